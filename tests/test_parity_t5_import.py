"""Hugging Face's T5 through `vit22b import` and `export`: logits, bytes, text."""

import ast
import dataclasses
import json
import re

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import round_trips
from published_layouts import check_layout
from tiny_models import (
    Vocabulary,
    assert_within,
    batch,
    jit,
    model_params,
    tower_config,
)
from torch_peers import import_peer, torch

from vit22b_transfer import cli
from vit22b_transfer.checkpoints import restoring
from vit22b_transfer.inference import decoding, word_attention
from vit22b_transfer.models import encoder_decoder, multimodal
from vit22b_transfer.recipes import loading
from vit22b_transfer.weights.families import t5
from vit22b_transfer.weights.files import tensor_files

transformers = import_peer("transformers")

TOLERANCE = 1e-4
VOCAB = 64
PROMPTS, INPUTS, TARGETS = 20, 24, 10


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of T5: the class, its config, whether its logits have their own kernel.

    `published` is what config.json says besides, as the published files do.
    """

    model: str
    config: dict
    untied: bool
    published: dict


V1_1 = dict(feed_forward_proj="gated-gelu")
VARIANTS = {
    "T5 v1.1, Flan-T5": Variant("T5", V1_1, True, {"tie_word_embeddings": False}),
    "T5 1.0": Variant("T5", dict(feed_forward_proj="relu"), False, {}),
    "UL2, Flan-UL2": Variant(
        "T5",
        dict(feed_forward_proj="gated-silu", d_kv=16, num_heads=2),
        True,
        {"tie_word_embeddings": False},
    ),
    "ByT5": Variant(
        "T5",
        V1_1 | dict(num_layers=3, num_decoder_layers=1),
        True,
        {"tie_word_embeddings": False, "tokenizer_class": "ByT5Tokenizer"},
    ),
    "mT5": Variant("MT5", V1_1, True, {"tie_word_embeddings": False}),
    "mT5, tied by transformers 5": Variant("MT5", V1_1, False, {}),
    "T5 v1.1, tied by transformers 5": Variant(
        "T5", V1_1 | {"tie_word_embeddings": False}, False, {}
    ),
}


@pytest.fixture(scope="module")
def tokens():
    """Prompts of all lengths, one of them of a single token, and decoder inputs."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(1, INPUTS, PROMPTS).astype(int)
    prompts = rng.integers(2, VOCAB, (PROMPTS, INPUTS), "int32")
    prompts = np.where(np.arange(INPUTS) < lengths[:, None], prompts, 0)
    shifted = rng.integers(2, VOCAB, (PROMPTS, TARGETS), "int32")
    shifted[:, 0] = 0
    return prompts.astype(np.int32), shifted


@dataclasses.dataclass(frozen=True)
class Imported:
    """Their model, the files it was saved to, and the directory of the import."""

    theirs: "torch.nn.Module"
    source: str
    out: str
    exported: str


def draw(model):
    """Random values for everything, nothing left at one or zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("layer_norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name in ("shared.weight", "lm_head.weight"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(0.7 * noise / parameter.shape[-1] ** 0.5)


# In the suite each network once; the others differ in sizes and names alone.
IN_THE_SUITE = (
    "T5 v1.1, Flan-T5",
    "T5 1.0",
    "UL2, Flan-UL2",
    "mT5, tied by transformers 5",
)


def every_variant():
    for name in VARIANTS:
        marks = () if name in IN_THE_SUITE else (pytest.mark.slow,)
        yield pytest.param(name, marks=marks, id=name)


@pytest.fixture(scope="module", params=every_variant())
def imported(request, tmp_path_factory):
    variant = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("t5")
    sizes = dict(vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=48, num_layers=2)
    config = getattr(transformers, f"{variant.model}Config")(
        **(sizes | dict(num_heads=3) | variant.published | variant.config)
    )
    name = f"{variant.model}ForConditionalGeneration"
    model = getattr(transformers, name)(config).eval()
    if variant.untied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 24))
    draw(model)
    if variant.untied:
        with torch.no_grad():
            model.lm_head.weight[1] *= 3  # some texts shall end
    source, out, exported = (str(folder / n) for n in ("source", "out", "exported"))
    model.save_pretrained(source)
    path = folder / "source" / "config.json"
    said = json.loads(path.read_text())
    if variant.published:  # transformers 5 saves other names than the published files
        said.pop("scale_decoder_outputs", None)
    path.write_text(json.dumps(said | variant.published))
    assert cli.main(["import", source, "--out", out]) == 0
    assert cli.main(["export", out, "--format", "hf-t5", "--out", exported]) == 0
    return Imported(model, source, out, exported)


def our_model(out, **fields):
    """The model that `model.gin` describes, and the imported parameters."""
    blind = ["encoder_decoder.ImageTextModule.tower=None"]
    recipe = loading.read([f"{out}/model.gin"], blind, ("",))
    module = loading.install(recipe, encoder_decoder.ImageTextModule, ("",))()
    gin.clear_config()
    model = multimodal.ImageTextModel(
        module, Vocabulary(VOCAB), Vocabulary(VOCAB), **fields
    )
    abstract = abstract_params(model, (1, 0, 0, 3))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return model, restoring.restore_params(out, abstract, shardings)


def abstract_params(model, images):
    shapes = {
        "encoder_input_images": images,
        "encoder_input_tokens": (1, INPUTS),
        "decoder_input_tokens": (1, TARGETS),
    }
    abstract = jax.eval_shape(
        lambda: model.get_initial_variables(jax.random.key(0), shapes)
    )["params"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
    )


def their_logits(model, prompts, shifted):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(prompts).long(),
            attention_mask=torch.tensor(prompts > 0).long(),
            decoder_input_ids=torch.tensor(shifted).long(),
        ).logits


@pytest.mark.slow
def test_logits_of_an_imported_model_equal_hugging_faces(imported, tokens):
    model, params = our_model(imported.out)
    prompts, shifted = map(jnp.asarray, tokens)
    logits = jit(
        lambda params: model.module.apply({"params": params}, None, prompts, shifted)
    )(params)
    expected = their_logits(imported.theirs, *tokens)
    assert float(np.std(logits)) > 0.1
    assert_within(TOLERANCE, logits, expected, "logits of an imported T5 vs HF")


def test_import_and_then_export_gives_every_byte_back(imported):
    before = tensor_files.open_tensors(imported.source)
    after = tensor_files.open_tensors(imported.exported)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        assert tensor.read().tobytes() == after[name].read().tobytes(), name


def test_hugging_face_loads_the_export_and_gives_the_same_logits(imported, tokens):
    model, info = type(imported.theirs).from_pretrained(
        imported.exported, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    again = their_logits(model.eval(), *tokens)
    np.testing.assert_array_equal(again, their_logits(imported.theirs, *tokens))


@pytest.mark.parametrize("imported", ["T5 v1.1, Flan-T5"], indirect=True)
def test_greedy_text_equals_hugging_faces_token_for_token(imported, tokens):
    prompts, _ = tokens
    model, params = our_model(
        imported.out, decode_fn=decoding.greedy, max_decode_length=TARGETS
    )
    batch = {
        "encoder_input_images": np.zeros((PROMPTS, 0, 0, 3), np.uint8),
        "encoder_input_tokens": prompts,
    }
    ours = np.asarray(jit(model.predict_batch)(params, batch))
    theirs = imported.theirs.generate(
        input_ids=torch.tensor(prompts).long(),
        attention_mask=torch.tensor(prompts > 0).long(),
        max_new_tokens=TARGETS,
        do_sample=False,
        num_beams=1,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    ).numpy()[:, 1:]
    ended = (theirs == 1).any(axis=1)
    assert ended.any() and not ended.all() and len(np.unique(theirs)) > 10
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert not ours[:, theirs.shape[1] :].any()


@pytest.mark.parametrize("imported", ["T5 v1.1, Flan-T5"], indirect=True)
def test_attention_of_each_token_over_the_patches_equals_hugging_faces(imported):
    blind, params = our_model(imported.out)
    module = encoder_decoder.ImageTextModule(tower_config(), blind.module.text)
    model = multimodal.ImageTextModel(module, Vocabulary(VOCAB), Vocabulary(VOCAB))
    given = batch(inputs=INPUTS, targets=TARGETS)
    pixels, prompts = given["encoder_input_images"], given["encoder_input_tokens"]
    fresh = model_params(model)
    params = {**params, "encoder": fresh["encoder"]}
    targets = given["decoder_target_tokens"]
    ours = word_attention.WordAttention(model)(params, pixels, prompts, targets)
    encode = jit(lambda p, *x: module.apply({"params": p}, *x, method="encode"))
    encoded = encode(params, pixels, prompts)
    imported.theirs.set_attn_implementation("eager")
    with torch.no_grad():
        said = imported.theirs(
            encoder_outputs=(torch.tensor(np.asarray(encoded.encodings)),),
            attention_mask=torch.tensor(np.asarray(encoded.mask)[:, 0, 0]).long(),
            decoder_input_ids=torch.tensor(given["decoder_input_tokens"]).long(),
            output_attentions=True,
        )
    weights = torch.stack(said.cross_attentions).mean(dim=(0, 2)).numpy()
    assert weights.shape == (4, TARGETS, 4 + INPUTS) and np.std(weights) > 0.001
    assert_within(TOLERANCE, ours, weights[:, :, :4], "attention over patches vs HF")


@pytest.mark.parametrize("imported", ["T5 v1.1, Flan-T5"], indirect=True)
def test_an_image_text_model_starts_from_it_by_the_rules_of_the_gin_file(imported):
    said = open(f"{imported.out}/model.gin", encoding="utf-8").read()
    (rules,) = re.findall(r"train\.InitialCheckpoint\.rules = (.*)", said)
    blind, params = our_model(imported.out)
    model = multimodal.ImageTextModel(
        encoder_decoder.ImageTextModule(tower_config(), blind.module.text),
        Vocabulary(VOCAB),
        Vocabulary(VOCAB),
    )
    abstract = abstract_params(model, (1, *tower_config().image_size, 3))
    restored = restoring.restore_partial(
        imported.out, abstract, ast.literal_eval(rules)
    )
    assert jax.tree.structure(restored.params) == jax.tree.structure(params)
    assert {name.split("/")[1] for name in restored.kept} == {"tower", "projection"}
    assert not restored.unused


@pytest.mark.parametrize("imported", ["T5 v1.1, Flan-T5"], indirect=True)
def test_scanned_layers_and_another_dtype_and_vocabulary_on_request(
    imported, tokens, tmp_path
):
    out = str(tmp_path / "scanned")
    options = ["--scan_layers", "--dtype", "bfloat16", "--vocab_size", "80"]
    assert cli.main(["import", imported.source, "--out", out, *options]) == 0
    found = tensor_files.open_tensors(out)
    assert {t.dtype.name for n, t in found.items() if n.startswith("target/")} == {
        "bfloat16"
    }
    ours = tensor_files.open_tensors(imported.out)
    name = "target/decoder/layers{}/mlp/wi_0/kernel"
    stacked = found[name.format("")].read()
    assert stacked.shape == (2, 24, 48)
    for i in range(2):
        one = ours[name.format(f"_{i}")].read().astype(stacked.dtype)
        assert stacked[i].tobytes() == one.tobytes()
        sliced = found[name.format("")].read(i)
        assert sliced.tobytes() == one.tobytes()
    table = found["target/token_embedder/embedding"].read().astype(np.float32)
    assert table.shape == (80, 24)
    mean = ours["target/token_embedder/embedding"].read().mean(axis=0)
    np.testing.assert_allclose(table[64:], np.tile(mean, (16, 1)), atol=2e-3)
    assert found["target/decoder/logits_dense/kernel"].shape == (24, 80)
    model, params = our_model(out)  # it restores into the model of its model.gin
    assert model.module.text.scan_layers and model.module.text.vocab_size == 80
    exported = str(tmp_path / "exported")
    assert cli.main(["export", out, "--format", "hf-t5", "--out", exported]) == 0
    _, info = transformers.T5ForConditionalGeneration.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(info.values())
    with open(f"{exported}/config.json") as file:
        config = json.load(file)
    assert config["vocab_size"] == 80 and config["dtype"] == "bfloat16"


PUBLISHED = {
    "T5-XXL v1.1": dict(d_model=4096, d_kv=64, d_ff=10240, num_heads=64),
    "UL2 20B": dict(d_model=4096, d_kv=256, d_ff=16384, num_heads=16, num_layers=32)
    | dict(feed_forward_proj="gated-silu"),
    "ByT5-XXL": dict(d_model=4672, d_kv=64, d_ff=12352, num_heads=64)
    | dict(num_layers=36, num_decoder_layers=12, vocab_size=384),
    "mT5-XXL": dict(d_model=4096, d_kv=64, d_ff=10240, num_heads=64)
    | dict(model_type="mt5", vocab_size=250112),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_name_and_shape_of_the_published_sizes_maps(name):
    sizes = dict(vocab_size=32128, num_layers=24, feed_forward_proj="gated-gelu")
    config = dict(model_type="t5", tie_word_embeddings=False) | sizes | PUBLISHED[name]
    with torch.device("meta"):
        theirs = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**(config | {"model_type": "t5"}))
        )
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    model = check_layout(t5.HUGGING_FACE, config, shapes)
    assert model.text.num_encoder_layers == config["num_layers"]
    assert model.text.activation == ("silu" if name.startswith("UL2") else "gelu")
    for wrong in (shapes | {"extra": (1,)}, {**shapes, "lm_head.weight": (1, 4096)}):
        with pytest.raises(ValueError, match="extra|lm_head"):
            check_layout(t5.HUGGING_FACE, config, wrong)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "umt5"}, "umT5 has a relative position bias in every layer"),
        ({"feed_forward_proj": "gated-relu"}, "'gated-relu', which models/t5.py has"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05, but"),
        ({"d_model": None}, "config.json lacks d_model"),
    ],
)
def test_a_t5_that_our_model_cannot_compute_is_refused(
    change, message, tmp_path, capsys
):
    config = dict(model_type="t5", d_model=8, d_kv=4, d_ff=16, num_layers=1)
    config |= dict(num_heads=2, vocab_size=9) | change
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    header = b'{"shared.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (tmp_path / "model.safetensors").write_bytes(data)
    out = tmp_path / "out"
    assert cli.main(["import", str(tmp_path), "--out", str(out)]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_what_was_trained_is_exported_by_the_sources_own_config(
    imported, tokens, tmp_path
):
    model, params = our_model(imported.out)
    params = round_trips.moved(params)
    out = round_trips.exported(params, tmp_path / "run", "hf-t5", imported.source)
    prompts, shifted = map(jnp.asarray, tokens)
    ours = jit(lambda p: model.module.apply({"params": p}, None, prompts, shifted))
    loaded, info = type(imported.theirs).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    theirs = their_logits(loaded.eval(), *tokens)
    assert_within(TOLERANCE, ours(params), theirs, "logits of a trained T5 vs HF")


@pytest.mark.parametrize("imported", ["T5 v1.1, tied by transformers 5"], indirect=True)
def test_logits_of_their_own_are_not_lost_in_a_tied_config(imported, tmp_path, capsys):
    _, params = our_model(imported.out)
    params["decoder"]["logits_dense"] = {"kernel": jnp.ones((24, VOCAB))}
    with pytest.raises(AssertionError):
        round_trips.exported(params, tmp_path / "run", "hf-t5", imported.source)
    assert "logits are taken from the token table" in capsys.readouterr().err
