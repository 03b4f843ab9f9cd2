"""Tables of Gemma and PaliGemma: published sizes map whole, configs are read."""

import json
import math

import pytest
from published_layouts import check_layout
from torch_peers import import_peer, torch

from vit22b_transfer.models import gemma as models
from vit22b_transfer.weights import sources, transforms
from vit22b_transfer.weights.families import gemma
from vit22b_transfer.weights.families.table import FAMILIES

transformers = import_peer("transformers")
core_model_loading = import_peer("transformers.core_model_loading")

# What the published config.json files say of the sizes.
GEMMA_1_2B = dict(
    model_type="gemma",
    hidden_size=2048,
    intermediate_size=16384,
    num_attention_heads=8,
    num_hidden_layers=18,
    num_key_value_heads=1,
)
GEMMA_2_9B = dict(
    model_type="gemma2",
    hidden_size=3584,
    intermediate_size=14336,
    num_attention_heads=16,
    num_hidden_layers=42,
    num_key_value_heads=8,
)
GEMMA_2_27B = dict(
    model_type="gemma2",
    head_dim=128,
    hidden_size=4608,
    intermediate_size=36864,
    num_attention_heads=32,
    num_hidden_layers=46,
    num_key_value_heads=16,
    query_pre_attn_scalar=144,
)
GEMMA_3_27B = dict(
    model_type="gemma3_text",
    head_dim=128,
    hidden_size=5376,
    intermediate_size=21504,
    num_attention_heads=32,
    num_hidden_layers=62,
    num_key_value_heads=16,
    query_pre_attn_scalar=168,
    rope_scaling={"factor": 8.0, "rope_type": "linear"},
    sliding_window=1024,
)
SO400M = dict(
    model_type="siglip_vision_model",
    hidden_size=1152,
    image_size=224,
    intermediate_size=4304,
    num_attention_heads=16,
    num_hidden_layers=27,
    patch_size=14,
    vision_use_head=False,
)


def paligemma(text, **sizes):
    return dict(
        model_type="paligemma",
        text_config=text | dict(vocab_size=257216),
        vision_config=SO400M | sizes,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
        image_token_index=257152,
    )


# name -> (class, config, our variant, parameters in millions)
PUBLISHED = {
    "Gemma 2 27B": ("Gemma2ForCausalLM", GEMMA_2_27B, "gemma2-27b", 27227),
    "Gemma 3 27B": (
        "Gemma3ForConditionalGeneration",
        dict(
            model_type="gemma3",
            text_config=GEMMA_3_27B,
            vision_config=SO400M | dict(image_size=896),
            mm_tokens_per_image=256,
        ),
        "gemma3-27b",
        27009,
    ),
    "PaliGemma 3B": (
        "PaliGemmaForConditionalGeneration",
        paligemma(GEMMA_1_2B),
        "gemma-2b",
        2923,
    ),
    "PaliGemma 2 10B 448": (
        "PaliGemmaForConditionalGeneration",
        paligemma(GEMMA_2_9B, image_size=448),
        "gemma2-9b",
        9664,
    ),
    "PaliGemma 2 28B 896": (
        "PaliGemmaForConditionalGeneration",
        paligemma(GEMMA_2_27B, image_size=896),
        "gemma2-27b",
        27655,
    ),
}


def published_shapes(kind, said):
    """Names and shapes of the tensors of Hugging Face's files; nothing is allocated."""
    model_class = getattr(transformers, kind)
    # The class writes into a config's own dictionaries.
    config = model_class.config_class(**json.loads(json.dumps(said)))
    with torch.device("meta"):
        model = model_class(config)
    names = core_model_loading.revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in names.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_size_maps_and_none_is_left(name):
    kind, said, variant, millions = PUBLISHED[name]
    shapes = published_shapes(kind, said)
    family = sources.choose(FAMILIES, said, shapes, None, name)
    model = check_layout(family, said, shapes)
    expected = models.gemma_config(variant, vocab_size=model.text.vocab_size)
    assert model.text == expected
    ours = sum(map(math.prod, family.shapes(model.tower, model.text).values()))
    others = [
        shape for n, shape in shapes.items() if model.drops(n) or n in model.copies
    ]
    total = sum(map(math.prod, shapes.values())) - sum(map(math.prod, others))
    assert ours == total and round(ours / 1e6) == millions
    assert (model.tower is None) == (name.startswith("Gemma"))
    wrong = {n: shape for n, shape in shapes.items() if ".17.mlp.up_proj" not in n}
    with pytest.raises(ValueError, match=r"17.mlp.up_proj.weight: missing"):
        check_layout(family, said, wrong)
    with pytest.raises(ValueError, match=r"more.weight: not expected"):
        check_layout(family, said, shapes | {"more.weight": (3,)})


DEFAULTS = {
    "GemmaConfig": gemma.GEMMA_1_DEFAULTS,
    "Gemma2Config": gemma.GEMMA_2_DEFAULTS,
    "Gemma3TextConfig": gemma.GEMMA_3_DEFAULTS,
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_config_leaves_unsaid_is_the_default_of_its_class(kind):
    config = getattr(transformers, kind)()
    for field, value in DEFAULTS[kind].items():
        assert getattr(config, field) == value, field
    said = {"model_type": config.model_type}
    assert gemma.text_config(said) == gemma.text_config(config.to_dict())


# --- Wordings of a config ---

SMALL = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=6,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


def read(kind, **fields):
    return gemma.text_config(SMALL | dict(model_type=kind) | fields)


def test_positions_are_read_from_old_and_new_words_alike():
    old = read(
        "gemma3_text",
        rope_theta=5e5,
        rope_local_base_freq=2e3,
        rope_scaling=dict(rope_type="linear", factor=4.0),
    )
    new = read(
        "gemma3_text",
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=5e5),
            sliding_attention=dict(rope_type="default", rope_theta=2e3),
        ),
    )
    assert old == new
    assert (old.rope_base, old.rope_stretch, old.local_rope_base) == (5e5, 4.0, 2e3)
    one = read("gemma2", rope_parameters=dict(rope_type="default", rope_theta=7.0))
    assert one == read("gemma2", rope_theta=7.0)
    assert (one.rope_base, one.local_rope_base) == (7.0, None)


def test_kinds_of_layers_are_read_from_a_list_or_a_pattern():
    local, wide = "sliding_attention", "full_attention"
    listed = read("gemma3_text", layer_types=[local, local, wide] * 2)
    assert listed == read("gemma3_text", sliding_window_pattern=3)
    assert listed == read("gemma3_text", _sliding_window_pattern=3)
    assert listed.is_local == (True, True, False) * 2
    assert read("gemma2", layer_types=[local] * 6).is_local == (True,) * 6
    whole = read("gemma2", layer_types=[wide] * 6)
    assert whole.sliding_window is None and not any(whole.is_local)


def test_null_is_no_bound_of_the_logits():
    assert read("gemma2").logit_softcap == 30.0
    none = read("gemma2", final_logit_softcapping=None, attn_logit_softcapping=None)
    assert none.logit_softcap is None and none.attention_softcap is None


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("gemma4", {}, "model_type 'gemma4' of the text; known are gemma, gemma2"),
        ("gemma", dict(hidden_act="relu"), "hidden_act = 'relu'; known are"),
        ("gemma2", dict(hidden_activation="silu"), "hidden_activation = 'silu'"),
        ("gemma", dict(attention_bias=True), "attention_bias = True"),
        ("gemma2", dict(rms_norm_eps=1e-5), "rms_norm_eps = 1e-05"),
        ("gemma", dict(tie_word_embeddings=False), "tie_word_embeddings = False"),
        ("gemma", dict(rope_scaling={"type": "yarn"}), "rope_type 'yarn'"),
        (
            "gemma2",
            dict(layer_types=["full_attention"] + ["sliding_attention"] * 5),
            "every n-th is full_attention",
        ),
        (
            "gemma2",
            dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
            "stretches the positions of local layers by 2.0",
        ),
        ("gemma", dict(num_attention_heads=3, num_key_value_heads=2), "not divisible"),
    ],
)
def test_a_text_that_our_model_cannot_compute_is_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        read(kind, **fields)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dict(model_type="gemma3_text", use_bidirectional_attention=True),
            "this is an encoder",
        ),
        (dict(model_type="paligemma", text_config={}), "lacks vision_config"),
        (dict(model_type="paligemma", vision_config={}), "lacks text_config"),
        (
            dict(model_type="paligemma", vision_config={}, text_config={}),
            "no tensor is called embed_tokens.weight",
        ),
    ],
)
def test_a_model_that_is_another_or_not_whole_is_refused(config, message):
    tensors = {"something.weight": transforms.abstract((1,))}
    family = sources.choose(FAMILIES, config, tensors, None, "the source")
    with pytest.raises(ValueError, match=message):
        family.read(config, tensors)


def test_an_npz_of_which_nothing_is_known_is_refused():
    family = sources.by_name(FAMILIES, "big_vision-paligemma")
    with pytest.raises(ValueError, match="read from its tensors; name with --config"):
        family.read({}, {})
