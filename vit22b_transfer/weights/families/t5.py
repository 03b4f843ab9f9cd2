"""T5 v1.1, Flan-T5, mT5, UL2, Flan-UL2 and ByT5 (and the first T5) of Hugging Face.

Attention is not scaled, one relative bias in layer 0 serves a whole stack, and norms
have no bias: as in `models.t5`. Of T5X, the same models: names that are nearly ours.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import brief
from vit22b_transfer.models import encoder_decoder, t5
from vit22b_transfer.weights.families import config_fields
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.mapping import (
    Family,
    Model,
    Row,
    Shape,
    nearest,
    per_layer,
    unrolled_shapes,
)
from vit22b_transfer.weights.transforms import TRANSPOSE

# Hugging Face calls them layer.0, layer.1, ... of a block: our attention and norm.
_SUBLAYERS = {
    "encoder": [("SelfAttention", "attention", "pre_attention_layer_norm")],
    "decoder": [
        ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
        (
            "EncDecAttention",
            "encoder_decoder_attention",
            "pre_cross_attention_layer_norm",
        ),
    ],
}
_OURS = {"encoder": "encoder/text", "decoder": "decoder"}
_HEAD = "lm_head.weight"
_TABLE = "shared.weight"
# What our model computes, by the name it has in a config.
_FIXED = {
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
_ACTIVATIONS: dict[str, tuple[Any, bool]] = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu", True),
    "gated-gelu_new": ("gelu", True),
    "gated-silu": ("silu", True),
}
_MOST = {"num_layers": config_values.MOST_LAYERS}
_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


def _recognises(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> bool:
    return config.get("model_type") in ("t5", "mt5", "umt5")


def _config(config: Mapping[str, Any], tied: bool) -> t5.T5Config:
    if config["model_type"] == "umt5":
        raise UserError(
            "umT5 has a relative position bias in every layer, which models/t5.py has "
            "not; take mT5, which is the same otherwise."
        )
    config_fields.check_text(config, config["model_type"])
    if missing := [name for name in _SIZES if name not in config]:
        raise UserError(f"config.json lacks {', '.join(missing)}; fetch it again.")
    sizes = {
        name: config_values.size(config, name, most=_MOST.get(name, config_values.MOST))
        for name in _SIZES
    }
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            got = brief(config[name])
            raise UserError(f"{name} is {got}, but models/t5.py has {value}.")
    said = config_values.text(config, "feed_forward_proj", "relu")
    if said not in _ACTIVATIONS:
        raise UserError(
            f"feed_forward_proj is {said!r}, which models/t5.py has not; "
            f"{nearest(said, _ACTIVATIONS)}; it has {', '.join(_ACTIVATIONS)}."
        )
    activation, gated = _ACTIVATIONS[said]
    act = said.removeprefix("gated-").replace("gelu_new", "gelu")
    tr.refuse(
        {name: value for name, value in config.items() if value is not None},
        is_gated_act=gated,
        dense_act_fn="gelu_new" if act == "gelu" else act,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    depth, most = sizes["num_layers"], config_values.MOST_LAYERS
    return t5.T5Config(
        vocab_size=sizes["vocab_size"],
        width=sizes["d_model"],
        num_encoder_layers=depth,
        num_decoder_layers=config_values.size(
            config, "num_decoder_layers", depth, most=most
        ),
        num_heads=sizes["num_heads"],
        head_dim=sizes["d_kv"],
        mlp_dim=sizes["d_ff"],
        tied_logits=tied,
        activation=activation,
        gated_mlp=gated,
    )


def _logits(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether logits are taken from the token table, and whether they are scaled.

    In T5's older configs `tie_word_embeddings` means both; files written by
    transformers 5 always set it, have the scaling under a name of its own, and are tied
    if they hold one of the two tensors. mT5 never scales.
    """
    said = config_values.flag(config, "tie_word_embeddings", True)
    scaled = config_values.flag(config, "scale_decoder_outputs", said)
    scaled = scaled and config["model_type"] != "mt5"
    if scaled or not tensors:
        return said, scaled
    return _HEAD not in tensors and _TABLE in tensors, False


def _read(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Model:
    tied, scaled = _logits(config, tensors)
    text = _config(config, tied)
    if tied and not scaled:
        text = dataclasses.replace(text, scaled_logits=False)
    rows = [
        Row("token_embedder/embedding", _TABLE),
        *_stack("encoder", text.num_encoder_layers, text.gated_mlp),
        *_stack("decoder", text.num_decoder_layers, text.gated_mlp),
    ]
    copies = {f"{side}.embed_tokens.weight": _TABLE for side in _OURS}
    if tied:
        copies[_HEAD] = _TABLE
    else:
        rows.append(Row("decoder/logits_dense/kernel", _HEAD, TRANSPOSE))
    return Model(
        tuple(rows),
        text=text,
        copies=copies,
        dropped={
            # It lies in the files of the first T5, and nothing ever used it.
            r"decoder\..*\.EncDecAttention\.relative_attention_bias\.weight": (
                "a position bias of the cross-attention, which T5 does not use"
            )
        },
        vocabulary={"token_embedder/embedding": 0}
        | ({} if tied else {"decoder/logits_dense/kernel": 1}),
        facts=_facts(config),
    )


def _facts(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("tokenizer_class") == "ByT5Tokenizer":
        return ("tokenizer: bytes (VIT22B_VOCABULARY=bytes); 0 pads, 1 ends a text",)
    return ("tokenizer: SentencePiece, cased; 0 pads, 1 ends a text",)


def _stack(side: str, depth: int, gated: bool) -> list[Row]:
    ours, block = f"{_OURS[side]}/layers_{{i}}", f"{side}.block.{{i}}.layer"
    rows = []
    for k, (theirs, attention, norm) in enumerate(_SUBLAYERS[side]):
        rows.append(Row(f"{ours}/{norm}/scale", f"{block}.{k}.layer_norm.weight"))
        for letter, name in zip("qkvo", ("query", "key", "value", "out"), strict=True):
            kernel = f"{ours}/{attention}/{name}/kernel"
            rows.append(Row(kernel, f"{block}.{k}.{theirs}.{letter}.weight", TRANSPOSE))
    mlp = f"{block}.{len(_SUBLAYERS[side])}"
    rows.append(Row(f"{ours}/pre_mlp_layer_norm/scale", f"{mlp}.layer_norm.weight"))
    for name in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
        kernel = f"{mlp}.DenseReluDense.{name}.weight"
        rows.append(Row(f"{ours}/mlp/{name}/kernel", kernel, TRANSPOSE))
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        *per_layer(depth, rows),
        Row(f"{_OURS[side]}/relpos_bias/rel_embedding", bias, TRANSPOSE),
        Row(f"{_OURS[side]}/{side}_norm/scale", f"{side}.final_layer_norm.weight"),
    ]


def shapes(tower: None, text: t5.T5Config) -> dict[str, Shape]:
    """Names and shapes of our text model's parameters; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    scanned = dataclasses.replace(text, scan_layers=True)
    module = encoder_decoder.ImageTextModule(tower, scanned)
    init = functools.partial(module.init, jax.random.key(0), None)
    params = jax.eval_shape(init, tokens, tokens)["params"]
    return unrolled_shapes(params)


HUGGING_FACE = Family("hf-t5", _recognises, _read, shapes)
