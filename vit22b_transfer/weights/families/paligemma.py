"""PaliGemma and PaliGemma 2: of Hugging Face, and big_vision's npz.

A SigLIP tower without its head, a linear projection, and Gemma 1 or 2. The table of
tokens is Gemma's 256000, 1024 places <locDDDD>, 128 masks <segDDD>, and in Hugging
Face's files some rows of padding. Prompts stand between BOS and a line break.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.models import gemma as models
from vit22b_transfer.weights.families import gemma, towers_big_vision
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.families import towers_hugging_face as hf
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.mapping import Family, Model, Row, per_layer
from vit22b_transfer.weights.transforms import (
    Transform,
    each,
    join_heads,
    then,
    unstack,
)

Config = Mapping[str, Any]

PROJECTION = "encoder/projection"
# Gemma's id of a line break, which ends PaliGemma's prompts.
SEPARATOR_ID = 108
_FACTS = (
    "prompts: BOS (2), the prompt, a line break (108); the answer ends with 1",
    "token 256000 is <loc0000>, 257024 is <seg000>: the 1152 last of the vocabulary, "
    "which tokenizer.model lacks",
)

_NO_BOUND = (
    "logits of tokens have no bound, as where big_vision trains; in Hugging Face's "
    "PaliGemma 2 GemmaConfig.logit_softcap is 30"
)


# --- Hugging Face ---


def _read(config: Config, tensors: Config) -> Model:
    for part in ("text_config", "vision_config"):
        if part not in config:
            raise UserError(f"config.json lacks {part}; fetch it again.")
    text = gemma.text_config(config_values.part(config, "text_config"))
    tower, images = hf.siglip_tower(config)
    tower = dataclasses.replace(tower, pooling="none")
    prefix = tr.find_prefix(
        tensors,
        "embed_tokens.weight",
        ("language_model.model.", "model.language_model."),
    )
    tower_prefix = tr.find_prefix(
        tensors,
        "embeddings.patch_embedding.weight",
        (
            "vision_tower.vision_model.",
            "vision_tower.",
            "model.vision_tower.",
            "model.vision_tower.vision_model.",
        ),
    )
    projector = "multi_modal_projector.linear"
    projection = tr.find_prefix(tensors, f"{projector}.weight", ("", "model."))
    head = r"(model\.)?vision_tower\.(vision_model\.)?head\..*"
    return Model(
        (
            *hf.siglip_rows(tower, tower_prefix),
            *tr.linear(PROJECTION, projection + projector),
            *gemma.text_rows(text, prefix),
        ),
        tower,
        text,
        copies=dict.fromkeys(gemma.HEADS, f"{prefix}embed_tokens.weight"),
        dropped={head: "SigLIP's pooling, which PaliGemma does not use"},
        carried=(head,),
        vocabulary={gemma.TABLE: 0},
        positions=(tr.POSITIONS,),
        resample=tr.resample("bicubic"),
        bindings=gemma.framing(config, SEPARATOR_ID),
        images=images.size,
        facts=(
            *images.facts,
            *_FACTS,
            f"token {_image_token(config)} stands for the image in Hugging Face's "
            "prompts; here the image needs no tokens",
        ),
    )


def _image_token(config: Config) -> int:
    old = config_values.size(config, "image_token_index", 256_000, least=0)
    return config_values.size(config, "image_token_id", old, least=0)


# --- big_vision ---


# Where the names of a whole model, and of its `params` alone, begin.
_ROOTS = ("params/", "")
_ANCHOR = "llm/embedder/input_embedding"


def _heads_first(num_heads: int) -> Transform:
    """Theirs [N, E, H], one matrix for each head, and ours [E, N*H]."""

    def part(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], num_heads, -1).transpose(1, 0, 2)

    return each(lambda x: x.transpose(1, 0, 2).reshape(x.shape[1], -1), part)


def _read_npz(config: Config, tensors: Config) -> Model:
    del config
    tr.need_tensors(tensors, "big_vision's PaliGemma")
    root = tr.find_prefix(tensors, _ANCHOR, _ROOTS)
    image = towers_big_vision.FAMILIES[0].read({}, tensors)
    tower = dataclasses.replace(image.tower, pooling="none")
    text = _npz_text(tensors, f"{root}llm")
    return Model(
        (
            *image.rows,
            Row(f"{PROJECTION}/kernel", f"{root}img/head/kernel"),
            Row(f"{PROJECTION}/bias", f"{root}img/head/bias"),
            *_npz_rows(text, f"{root}llm"),
        ),
        tower,
        text,
        dropped={r"opt/.*": "the optimizer's state"},
        vocabulary={gemma.TABLE: 0},
        positions=(tr.POSITIONS,),
        resample=image.resample,
        bindings=gemma.framing({}, SEPARATOR_ID),
        facts=(
            *_FACTS,
            *([_NO_BOUND] if text.post_norms else []),
        ),
    )


def _npz_text(tensors: Config, llm: str) -> models.GemmaConfig:
    """The text model, its sizes from the shapes of tensors.

    big_vision has neither local layers nor, where it trains, a bound of the logits.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(
                f"{name} is missing: only files with stacked layers and fewer keys "
                "than queries are read, as they are published."
            )
        return tr.shape(tensors, name, axes)

    layers = f"{llm}/layers"
    vocab_size, width = shape(f"{llm}/embedder/input_embedding", 2)
    depth, num_heads, head_dim, _ = shape(f"{layers}/attn/attn_vec_einsum/w", 4)
    fields: dict[str, Any] = dict(
        width=width,
        depth=depth,
        mlp_dim=shape(f"{layers}/mlp/linear", 3)[1],
        num_heads=num_heads,
        num_kv_heads=shape(f"{layers}/attn/kv_einsum/w", 5)[2],
        head_dim=head_dim,
    )
    if f"{layers}/post_ffw_norm/scale" in tensors:
        fields |= dict(post_norms=True, attention_softcap=50.0)
        fields |= dict(query_scalar=_query_scalar(fields))
    return models.GemmaConfig(vocab_size=vocab_size, **fields)


def _query_scalar(sizes: Mapping[str, Any]) -> int | None:
    """That of the published Gemma with these sizes; no tensor says it."""
    for variant in models.VARIANTS.values():
        if sizes.items() <= variant.items():
            return variant.get("query_scalar")
    return None


def _npz_rows(text: models.GemmaConfig, llm: str) -> list[Row]:
    ours, layer = gemma.LAYER, f"{llm}/layers_{{i}}"
    attention = f"{ours}/self_attention"
    query, key, value = (f"{attention}/{x}/kernel" for x in ("query", "key", "value"))
    heads, kv_heads = _heads_first(text.num_heads), _heads_first(text.num_kv_heads)
    fused = f"{layer}/attn/kv_einsum/w"
    projections = [
        Row(query, f"{layer}/attn/q_einsum/w", heads),
        Row((key, value), fused, then(unstack(), kv_heads)),
    ]
    norms = {
        "pre_self_attention_layer_norm": "pre_attention_norm",
        "pre_mlp_layer_norm": "pre_ffw_norm",
    }
    if text.post_norms:
        norms |= {
            "post_self_attention_layer_norm": "post_attention_norm",
            "post_mlp_layer_norm": "post_ffw_norm",
        }
    out = join_heads(text.num_heads, axis=0)
    gates = [f"{ours}/mlp/{x}/kernel" for x in ("wi_0", "wi_1")]
    blocks = [
        *projections,
        Row(f"{attention}/out/kernel", f"{layer}/attn/attn_vec_einsum/w", out),
        Row(gates, f"{layer}/mlp/gating_einsum", unstack()),
        Row(f"{ours}/mlp/wo/kernel", f"{layer}/mlp/linear"),
    ]
    for name, theirs in norms.items():
        blocks.append(Row(f"{ours}/{name}/scale", f"{layer}/{theirs}/scale"))
    return [
        Row(gemma.TABLE, f"{llm}/embedder/input_embedding"),
        *per_layer(text.depth, blocks),
        Row("decoder/decoder_norm/scale", f"{llm}/final_norm/scale"),
    ]


FAMILIES = (
    Family(
        "hf-paligemma",
        hf.has_model_type("paligemma"),
        _read,
        gemma.shapes,
        gemma.TEXT_BINDING,
    ),
    Family(
        "big_vision-paligemma",
        lambda config, tensors: any(root + _ANCHOR in tensors for root in _ROOTS),
        _read_npz,
        gemma.shapes,
        gemma.TEXT_BINDING,
        file_format="npz",
    ),
)
