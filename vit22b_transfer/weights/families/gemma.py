"""Gemma 1, 2 and 3 of Hugging Face: the text models, which Gemma 3's larger files wrap.

Logits are taken from the token table, norms hold what their scale exceeds one by: as in
`models.gemma`. What a config.json leaves unsaid is the default of its class.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import brief
from vit22b_transfer.models import gemma, prefix_lm, vit
from vit22b_transfer.weights.families import config_fields
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.mapping import (
    Family,
    Model,
    Row,
    Shape,
    per_layer,
    unrolled_shapes,
)

Config = Mapping[str, Any]

TABLE = "token_embedder/embedding"
LAYER = "decoder/layers_{i}"
TEXT_BINDING = "prefix_lm.PrefixLMModule.text"
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
EOS_ID = prefix_lm.EOS_ID

_SAME = dict(
    rms_norm_eps=1e-6,
    attention_bias=False,
    tie_word_embeddings=True,
    head_dim=256,
    use_bidirectional_attention=None,
)
_WINDOWED = _SAME | dict(
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    sliding_window=4096,
)
GEMMA_1_DEFAULTS = _SAME | dict(
    vocab_size=256_000,
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    hidden_act="gelu_pytorch_tanh",
)
GEMMA_2_DEFAULTS = _WINDOWED | dict(
    vocab_size=256_000, final_logit_softcapping=30.0, attn_logit_softcapping=50.0
)
GEMMA_3_DEFAULTS = _WINDOWED | dict(
    vocab_size=262_208,
    final_logit_softcapping=None,
    attn_logit_softcapping=None,
    use_bidirectional_attention=False,
)
_DEFAULTS = {
    "gemma": GEMMA_1_DEFAULTS,
    "gemma2": GEMMA_2_DEFAULTS,
    "gemma3_text": GEMMA_3_DEFAULTS,
}
# Base of the rotary positions where a config says none.
_ROPE_BASE = {"full_attention": 10_000.0, "sliding_attention": 10_000.0}
_ROPE_BASES = {
    "gemma": _ROPE_BASE,
    "gemma2": _ROPE_BASE,
    "gemma3_text": _ROPE_BASE | {"full_attention": 1e6},
}
# Every n-th layer is global.
_PERIODS = {"gemma2": 2, "gemma3_text": 6}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu"}
# Gemma 1's first files say "gelu" and mean the approximation, as their class knows.
_ACTIVATIONS_OF_1 = _ACTIVATIONS | {"gelu": "gelu"}


# --- Configurations ---


def text_config(config: Config) -> gemma.GemmaConfig:
    """The text model that a Gemma's config.json, or a `text_config`, describes.

    Raises:
      UserError: for what models/gemma.py cannot compute.
    """
    kind = config_values.text(config, "model_type", "gemma")
    if kind not in _DEFAULTS:
        raise UserError(
            f"config.json says model_type {kind!r} of the text; known are "
            f"{', '.join(_DEFAULTS)}."
        )
    config_fields.check_text(config, kind)
    said = _completed(config, kind)
    tr.refuse(said, rms_norm_eps=1e-6, attention_bias=False, tie_word_embeddings=True)
    if kind == "gemma":
        tr.choose(said, "hidden_act", _ACTIVATIONS_OF_1)
    if "hidden_activation" in said:
        tr.choose(said, "hidden_activation", _ACTIVATIONS)
    if kind == "gemma3_text" and said["attn_logit_softcapping"] is not None:
        raise UserError(
            "config.json says attn_logit_softcapping = "
            f"{said['attn_logit_softcapping']}, which Gemma 3's own class does not "
            "apply. Set it to null if the model was trained with that class."
        )
    fields: dict[str, Any] = dict(
        vocab_size=said["vocab_size"],
        width=said["hidden_size"],
        depth=said["num_hidden_layers"],
        mlp_dim=said["intermediate_size"],
        num_heads=said["num_attention_heads"],
        num_kv_heads=said["num_key_value_heads"],
        head_dim=said["head_dim"],
    )
    base, stretch = _rotary(said, kind, "full_attention")
    fields |= dict(rope_base=base, rope_stretch=stretch)
    if kind != "gemma":
        fields |= _later_fields(said, kind, base)
    return gemma.GemmaConfig(**fields)


_NULLABLE = ("final_logit_softcapping", "attn_logit_softcapping")
# Compared with the only value there is, or null in some classes.
_UNTYPED = (*_NULLABLE, "use_bidirectional_attention")


def _completed(config: Config, kind: str) -> dict[str, Any]:
    """The config with its class's defaults; null is a value where the class has it."""
    defaults = _DEFAULTS[kind]
    said = {k: v for k, v in config.items() if v is not None or k in _NULLABLE}
    said = dict(defaults) | said
    of_class = {k: v for k, v in defaults.items() if k not in _UNTYPED}
    for name in _NULLABLE:
        if said.get(name) is not None:
            said[name] = config_values.number(said, name, least=1e-6)
    return said | config_values.like(said, of_class)


def _later_fields(said: Config, kind: str, base: float) -> dict[str, Any]:
    """What Gemma 2 and 3 have beyond Gemma 1."""
    scalar = said["query_pre_attn_scalar"]
    fields = dict(
        query_scalar=None if scalar == said["head_dim"] else scalar,
        attention_softcap=said["attn_logit_softcapping"],
        logit_softcap=said["final_logit_softcapping"],
        post_norms=True,
        qk_norm=kind == "gemma3_text",
    )
    period = _period(said, kind)
    if period == 1:
        return fields
    local_base, local_stretch = _rotary(said, kind, "sliding_attention")
    if local_stretch != 1.0:
        raise UserError(
            f"config.json stretches the positions of local layers by {local_stretch}; "
            "models/gemma.py does so in global layers only."
        )
    return fields | dict(
        sliding_window=said["sliding_window"],
        global_period=period,
        local_rope_base=None if local_base == base else local_base,
    )


def _period(said: Config, kind: str) -> int:
    """`GemmaConfig.global_period`."""
    usual = config_values.size(said, "_sliding_window_pattern", _PERIODS[kind])
    usual = config_values.size(said, "sliding_window_pattern", usual)
    depth = said["num_hidden_layers"]
    if said.get("layer_types") is None:
        return usual
    kinds = config_values.texts(said, "layer_types", depth)
    is_local = [one == "sliding_attention" for one in kinds]
    for period in (usual, *range(1, depth + 2)):
        if is_local == [(i + 1) % period != 0 for i in range(depth)]:
            return period
    raise UserError(
        f"config.json says layer_types {brief(', '.join(kinds))}; models/gemma.py has "
        f"{depth} layers of which every n-th is full_attention, the others "
        "sliding_attention."
    )


def _rotary(said: Config, kind: str, layers: str) -> tuple[float, float]:
    """(base, stretch) of the rotary positions of one kind of layers.

    transformers 5 writes `rope_parameters`, for each kind of layers where they differ.
    """
    old_base = "rope_theta"
    if kind == "gemma3_text" and layers == "sliding_attention":
        old_base = "rope_local_base_freq"
    scaling = config_values.part(said, "rope_scaling")
    if kind == "gemma3_text" and layers == "sliding_attention":
        scaling = {}
    given = config_values.part(said, "rope_parameters")
    if layers in given:
        given = config_values.part(given, layers)
    elif "full_attention" in given:
        given = {}
    given = dict(scaling) | dict(given)
    base = config_values.number(said, old_base, _ROPE_BASES[kind][layers], least=1e-6)
    base = config_values.number(given, "rope_theta", base, least=1e-6)
    method = config_values.text(given, "type", "default")
    method = config_values.text(given, "rope_type", method)
    if method not in ("default", "linear"):
        raise UserError(
            f"config.json says rope_type {method!r}; models/gemma.py has default and "
            "linear."
        )
    if method == "default":
        return base, 1.0
    return base, config_values.number(given, "factor", least=1e-6)


# --- Tables ---


def text_rows(text: gemma.GemmaConfig, prefix: str) -> list[Row]:
    """Rows of the decoder and its table; `prefix` is before `embed_tokens` there."""
    layer = f"{prefix}layers.{{i}}"
    norms = {
        "pre_self_attention_layer_norm": "input_layernorm",
        "pre_mlp_layer_norm": "post_attention_layernorm",
    }
    if text.post_norms:
        norms = {
            "pre_self_attention_layer_norm": "input_layernorm",
            "post_self_attention_layer_norm": "post_attention_layernorm",
            "pre_mlp_layer_norm": "pre_feedforward_layernorm",
            "post_mlp_layer_norm": "post_feedforward_layernorm",
        }
    dense = {
        "self_attention/query": "self_attn.q_proj",
        "self_attention/key": "self_attn.k_proj",
        "self_attention/value": "self_attn.v_proj",
        "self_attention/out": "self_attn.o_proj",
        "mlp/wi_0": "mlp.gate_proj",
        "mlp/wi_1": "mlp.up_proj",
        "mlp/wo": "mlp.down_proj",
    }
    if text.qk_norm:
        norms |= {
            "self_attention/query_norm": "self_attn.q_norm",
            "self_attention/key_norm": "self_attn.k_norm",
        }
    rows = [
        tr.norm(f"{LAYER}/{ours}", f"{layer}.{theirs}", bias=False)
        for ours, theirs in norms.items()
    ] + [
        tr.linear(f"{LAYER}/{ours}", f"{layer}.{theirs}", bias=False)
        for ours, theirs in dense.items()
    ]
    return [
        Row(TABLE, f"{prefix}embed_tokens.weight"),
        *per_layer(text.depth, [row for group in rows for row in group]),
        *tr.norm("decoder/decoder_norm", f"{prefix}norm", bias=False),
    ]


def shapes(tower: vit.ViTConfig | None, text: gemma.GemmaConfig) -> dict[str, Shape]:
    """Names and shapes of a prefix-LM's parameters; nothing is allocated."""
    images = None
    if tower is not None:
        tower = dataclasses.replace(tower, scan_layers=True)
        images = jax.ShapeDtypeStruct((1, *tower.image_size, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    text = dataclasses.replace(text, scan_layers=True)
    init = functools.partial(prefix_lm.PrefixLMModule(tower, text).init)
    params = jax.eval_shape(init, jax.random.key(0), images, tokens, tokens)["params"]
    return unrolled_shapes(params)


def framing(config: Config, separator_id: int | None) -> dict[str, int]:
    """What gin binds to frame prompts as the source's own model has them."""
    bos_id = config_values.size(config, "bos_token_id", 2, least=0)
    bindings = {"prefix_lm.PrefixLMModule.bos_id": bos_id}
    if separator_id is not None:
        bindings["prefix_lm.PrefixLMModule.separator_id"] = separator_id
    return bindings


def _read(config: Config, tensors: Config) -> Model:
    whole = config["model_type"] == "gemma3"
    said = config
    if whole:
        config_fields.check_whole(config)
        said = dict(config_values.part(config, "text_config"))
        said = {"model_type": "gemma3_text"} | said
    if said.get("use_bidirectional_attention"):
        raise UserError(
            "config.json says use_bidirectional_attention = True: this is an encoder, "
            "and models/gemma.py computes text from left to right."
        )
    text = text_config(said)
    prefixes = ("language_model.model.", "model.language_model.")
    prefix = tr.find_prefix(
        tensors, "embed_tokens.weight", prefixes if whole else ("model.", "")
    )
    others = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
    return Model(
        tuple(text_rows(text, prefix)),
        text=text,
        copies=dict.fromkeys(HEADS, f"{prefix}embed_tokens.weight"),
        dropped={others: "the image tower and its projection"} if whole else {},
        carried=(others,) if whole else (),
        vocabulary={TABLE: 0},
        bindings=framing(said, None),
        facts=(
            "tokenizer: SentencePiece, cased; 0 pads, 1 ends a text, 2 begins it",
            "what stands between prompt and answer is set by "
            "PrefixLMModule.separator_id: 108 is a line break",
        ),
    )


def _recognises(config: Config, tensors: Config) -> bool:
    return config.get("model_type") in (*_DEFAULTS, "gemma3")


HUGGING_FACE = Family("hf-gemma", _recognises, _read, shapes, TEXT_BINDING)
