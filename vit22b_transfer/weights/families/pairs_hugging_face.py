"""Whole SigLIP, SigLIP 2 and CLIP in Hugging Face's safetensors: both towers.

Each is a family of its own beside that of its image tower alone, and is only taken
where it is asked for by name: a tower for captioning needs no text tower.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit22b_transfer import UserError
from vit22b_transfer.models import contrastive, text_towers
from vit22b_transfer.weights.families import config_fields
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.families import towers_hugging_face as hf
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.mapping import (
    Family,
    Model,
    Row,
    Shape,
    unrolled_shapes,
)
from vit22b_transfer.weights.transforms import TRANSPOSE, leading_ones

Config = Mapping[str, Any]

TEXT_BINDING = "contrastive.ContrastiveModule.text"
TOWER, BLOCK = "text/tower", "text/tower/layers_{i}"
TABLE = f"{TOWER}/token_embedding/embedding"
_SIGLIP_DEFAULTS = dict(
    vocab_size=32_000,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=64,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
_CLIP_DEFAULTS = _SIGLIP_DEFAULTS | dict(
    vocab_size=49_408,
    hidden_size=512,
    num_attention_heads=8,
    intermediate_size=2048,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
# Rows of Gemma's table, by whose tokens SigLIP 2 is trained: config.json does not say
# that it pads with 0, and not with SigLIP's 1.
GEMMA_TOKENS = 256_000
_CLIP_START = 49_406
_DROPPED = {r".*\bposition_ids": "a buffer: 0, 1, 2, ..."}


def shapes(
    tower: Any, text: Any, *, image_projection: bool, has_bias: bool
) -> dict[str, Shape]:
    """Names and shapes of our model's parameters, unrolled; nothing is allocated."""
    tower, text = (
        dataclasses.replace(config, scan_layers=True) for config in (tower, text)
    )
    if tower.pooling == "none":  # an export asks what pooling adds; a mean adds nothing
        tower = dataclasses.replace(tower, pooling="gap")
    module = contrastive.ContrastiveModule(
        tower,
        text,
        image_projection=image_projection,
        first_bias=-10.0 if has_bias else None,
    )
    images = jax.ShapeDtypeStruct((1, *tower.image_size, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), images, tokens)["params"]
    return unrolled_shapes(params)


def _text(config: Config, kind: str, defaults: Config, **fields: Any):
    """The text tower that the text part of a whole config describes."""
    part = config_values.part(config, "text_config")
    if not part:
        raise UserError("config.json lacks text_config; fetch it again.")
    config_fields.check_text(part, kind)
    said = dict(part) | config_values.like(part, defaults)
    usual: dict[str, Any] = tr.SEQUENTIAL | dict(
        vocab_size=said["vocab_size"],
        width=said["hidden_size"],
        depth=said["num_hidden_layers"],
        num_heads=said["num_attention_heads"],
        mlp_dim=said["intermediate_size"],
        max_length=said["max_position_embeddings"],
        activation=tr.choose(said, "hidden_act", hf.ACTIVATIONS),
        norm_epsilon=said["layer_norm_eps"],
    )
    return text_towers.TransformerConfig(**(usual | fields))


def _text_rows(text: text_towers.TransformerConfig) -> list[Row]:
    theirs = "text_model."
    table = f"{theirs}embeddings.token_embedding.weight"
    positions = f"{theirs}embeddings.position_embedding.weight"
    return [
        Row(TABLE, table),
        Row(f"{TOWER}/position_embedding/embedding", positions),
        *hf.encoder_rows(text, theirs, BLOCK),
        *tr.norm(f"{TOWER}/encoder_norm", f"{theirs}final_layer_norm"),
    ]


def _model(
    image: Model, text: Any, rows: list[Row], facts: list[str], **bindings: Any
) -> Model:
    return Model(
        (*image.rows, *_text_rows(text), *rows),
        image.tower,
        text,
        dropped=_DROPPED,
        vocabulary={TABLE: 0},
        positions=image.positions,
        resample=image.resample,
        images=image.images,
        bindings={
            f"contrastive.{name.replace('__', '.')}": value
            for name, value in bindings.items()
        },
        facts=(*image.facts, *facts),
    )


def _read_siglip(config: Config, tensors: Config, *, naflex: bool = False) -> Model:
    image = (hf.read_naflex if naflex else hf.read_siglip)(config, tensors)
    if image.tower.pooling != "map":
        raise UserError(
            "config.json says vision_use_head = false: without its head the image "
            "tower has no embedding. Import the tower alone."
        )
    part = config_values.part(config, "text_config")
    kind = "siglip2_text_model" if naflex else "siglip_text_model"
    width = config_values.size(part, "hidden_size", _SIGLIP_DEFAULTS["hidden_size"])
    rows = config_values.size(part, "vocab_size", _SIGLIP_DEFAULTS["vocab_size"])
    pad_id = config_values.size(part, "pad_token_id", 1, least=0)
    gemma = rows >= GEMMA_TOKENS
    text = _text(
        config,
        kind,
        _SIGLIP_DEFAULTS,
        embed_dim=config_values.size(part, "projection_size", width),
        pad_id=0 if gemma else pad_id,
    )
    file = "Gemma's tokenizer.model" if gemma else "the model's spiece.model"
    return _model(
        image,
        text,
        [
            *tr.linear("text/projection", "text_model.head"),
            Row("logit_scale/value", "logit_scale", leading_ones(0, 1)),
            Row("logit_bias/value", "logit_bias", leading_ones(0, 1)),
        ],
        [
            f"texts: lower case, tokens of {file}, an end (1), padded with "
            f"{text.pad_id} to {text.max_length} tokens"
        ],
    )


def _read_clip(config: Config, tensors: Config) -> Model:
    image = hf.read_clip(config, tensors)
    part = config_values.part(config, "text_config")
    vocab_size = config_values.size(part, "vocab_size", _CLIP_DEFAULTS["vocab_size"])
    end_id = config_values.size(part, "eos_token_id", vocab_size - 1, least=0)
    if end_id == 2:  # what the published files say; the class then takes the last token
        end_id = vocab_size - 1
    start_id = config_values.size(part, "bos_token_id", _CLIP_START, least=0)
    if start_id == 0:  # likewise: the one before the last
        start_id = vocab_size - 2
    text = _text(
        config,
        "clip_text_model",
        _CLIP_DEFAULTS,
        embed_dim=config_values.size(config, "projection_dim", 512),
        projection_bias=False,
        causal=True,
        pooling="end",
        start_id=start_id,
        end_id=end_id,
        pad_id=end_id,
    )
    return _model(
        image,
        text,
        [
            Row("text/projection/kernel", "text_projection.weight", TRANSPOSE),
            Row("encoder/projection/kernel", "visual_projection.weight", TRANSPOSE),
            Row("logit_scale/value", "logit_scale"),
        ],
        [
            "texts are tokens of CLIP's own (vocab.json, merges.txt), which no task "
            "here can make: models on texts refuse this text tower, embeddings of "
            "tokens that you bring are CLIP's"
        ],
        ContrastiveModule__image_projection=True,
        ContrastiveModule__first_bias=None,
        ContrastiveModel__loss="softmax",
    )


_OF_SIGLIP = functools.partial(shapes, image_projection=False, has_bias=True)
_OF_CLIP = functools.partial(shapes, image_projection=True, has_bias=False)


def by_name_alone(config: Config, tensors: Config) -> bool:
    """`Family.recognises` of a family that is only taken where it is asked for."""
    del config, tensors
    return False


FAMILIES = (
    Family("hf-siglip-pairs", by_name_alone, _read_siglip, _OF_SIGLIP, TEXT_BINDING),
    Family(
        "hf-siglip2-naflex-pairs",
        by_name_alone,
        functools.partial(_read_siglip, naflex=True),
        _OF_SIGLIP,
        TEXT_BINDING,
    ),
    Family("hf-clip-pairs", by_name_alone, _read_clip, _OF_CLIP, TEXT_BINDING),
)
