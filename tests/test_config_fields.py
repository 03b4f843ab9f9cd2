"""Every field of every config: used, known to change nothing, or refused."""

import pytest
from torch_peers import import_peer

from vit22b_transfer import UserError
from vit22b_transfer.weights.families import config_fields, gemma, t5
from vit22b_transfer.weights.families import pairs_hugging_face as pairs
from vit22b_transfer.weights.families import towers_dino as dino
from vit22b_transfer.weights.families import towers_hugging_face as hf
from vit22b_transfer.weights.families import towers_internvit as internvit
from vit22b_transfer.weights.families.table import FAMILIES

transformers = import_peer("transformers")

# What older files say beside, of how texts are generated and of the library.
OLDER = dict(
    torch_dtype="float32",
    top_k=50,
    early_stopping=False,
    pruned_heads={},
    tf_legacy_loss=False,
    forced_bos_token_id=None,
    gradient_checkpointing=False,
)
# Class of Hugging Face -> what reads its config.
READERS = {
    "ViT": lambda c: hf.completed(c, "vit", hf.VIT_DEFAULTS),
    "SiglipVision": lambda c: hf.siglip_tower(c),
    "Siglip2Vision": lambda c: hf.completed(c, c["model_type"], hf.NAFLEX_DEFAULTS),
    "CLIPVision": lambda c: hf.completed(c, c["model_type"], hf.CLIP_DEFAULTS),
    "Dinov2": lambda c: hf.completed(c, c["model_type"], dino.DINOV2_DEFAULTS),
    "Dinov2WithRegisters": lambda c: hf.completed(
        c, c["model_type"], dino.REGISTERS_DEFAULTS
    ),
    "DINOv3ViT": lambda c: hf.completed(c, "dinov3_vit", dino.DINOV3_DEFAULTS),
    "InternVLVision": lambda c: hf.completed(c, c["model_type"], internvit.HF_DEFAULTS),
    "Siglip": lambda c: hf.siglip_tower(c),
    "CLIP": lambda c: hf.completed(c, "clip_vision_model", hf.CLIP_DEFAULTS),
    "InternVL": lambda c: hf.completed(c, "internvl_vision", internvit.HF_DEFAULTS),
    "PaliGemma": lambda c: (
        hf.siglip_tower(c),
        gemma.text_config(c["text_config"]),
    ),
    "Gemma": gemma.text_config,
    "Gemma2": gemma.text_config,
    "Gemma3Text": gemma.text_config,
    "Gemma3": lambda c: (
        config_fields.check_whole(c),
        gemma.text_config(c["text_config"]),
    ),
    "T5": lambda c: t5.HUGGING_FACE.read(c, {}),
    "MT5": lambda c: t5.HUGGING_FACE.read(c, {}),
}


@pytest.mark.parametrize("kind", READERS)
def test_every_field_of_a_class_is_known_and_a_new_one_is_refused(kind):
    config = getattr(transformers, f"{kind}Config")().to_dict() | OLDER
    READERS[kind](config)
    READERS[kind](config | {"a_new_field": None})
    for value in (0.5, False, "yes", {"a": 1}):
        with pytest.raises(UserError, match="says a_new_field = .*remove it from the"):
            READERS[kind](config | {"a_new_field": value})


@pytest.mark.parametrize("name", [family.name for family in pairs.FAMILIES])
def test_the_text_part_of_a_model_of_pairs_is_read_field_by_field(name):
    kind = {"hf-clip-pairs": "CLIP", "hf-siglip-pairs": "Siglip"}.get(name, "Siglip2")
    (family,) = (family for family in pairs.FAMILIES if family.name == name)
    config = getattr(transformers, f"{kind}Config")().to_dict() | OLDER
    family.read(config, {})
    config["text_config"] = config["text_config"] | {"a_new_field": 1}
    with pytest.raises(UserError, match="says a_new_field = 1"):
        family.read(config, {})


@pytest.mark.parametrize("kind", ["Siglip", "CLIP", "InternVL", "PaliGemma", "Gemma3"])
def test_a_new_field_of_a_part_is_refused(kind):
    config = getattr(transformers, f"{kind}Config")().to_dict()
    part = "text_config" if kind == "Gemma3" else "vision_config"
    with pytest.raises(UserError, match="says a_new_field = 1"):
        READERS[kind](config | {part: config[part] | {"a_new_field": 1}})


def test_every_family_with_a_config_is_in_the_tables():
    """A family that reads a config.json and knows no table would take any field."""
    reading = set(config_fields.TOWERS) | set(config_fields.WHOLES)
    reading |= set(config_fields.TEXTS)
    shown = {
        family.name
        for family in FAMILIES
        if any(family.recognises({"model_type": kind}, {}) for kind in reading)
    }
    # Whole models of pairs are taken by name alone; their configs are read below.
    named = {family.name for family in pairs.FAMILIES}
    assert {f.name for f in FAMILIES if f.name.startswith("hf-")} == shown | named


@pytest.mark.parametrize(
    "read, config, message",
    [
        (
            gemma.text_config,
            dict(model_type="gemma2", hidden_activation="gelu"),
            "hidden_activation = 'gelu'; known are 'gelu_pytorch_tanh'",
        ),
        (
            gemma.text_config,
            dict(model_type="gemma3_text", hidden_activation="gelu"),
            "hidden_activation = 'gelu'",
        ),
        (
            gemma.text_config,
            dict(model_type="gemma3_text", attn_logit_softcapping=50.0),
            "attn_logit_softcapping = 50.0, which Gemma 3's own class does not apply",
        ),
        (READERS["T5"], dict(dense_act_fn="relu"), "dense_act_fn = 'relu'"),
        (READERS["T5"], dict(is_gated_act=False), "is_gated_act = False"),
        (READERS["T5"], dict(decoder_start_token_id=2), "decoder_start_token_id = 2"),
        (
            config_fields.check_timm,
            dict(pretrained_cfg=dict(letterbox=True)),
            "pretrained_cfg of config.json says letterbox = True",
        ),
        (
            config_fields.check_timm,
            dict(model_args=dict(act=1)),
            "model_args .*act = 1",
        ),
        (
            config_fields.check_whole,
            dict(model_type="internvl_chat", pad2square=True),
            "pad2square = True",
        ),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(read, config, message):
    if read is READERS["T5"]:
        config = (
            transformers.T5Config(feed_forward_proj="gated-gelu").to_dict() | config
        )
    with pytest.raises(UserError, match=message):
        read(config)


def test_the_first_gemmas_gelu_is_the_approximation_as_its_class_takes_it():
    said = dict(model_type="gemma", hidden_act="gelu")
    assert gemma.text_config(said) == gemma.text_config({"model_type": "gemma"})
    assert transformers.GemmaConfig(hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"
    assert transformers.Gemma2Config(hidden_activation="gelu").hidden_activation == (
        "gelu"
    )
