"""T5-family encoder-decoder text model (Raffel et al. 2020; v1.1: Shazeer 2020).

RMS norms, no biases, one relative position bias for the layers of a stack, gated MLP.
Parameter names and shapes are those of T5X's minimal T5, so its checkpoints fit. The
encoder takes embeddings, so that image tokens can stand before the text.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.models import (
    attention,
    instruments,
    layers,
    multi_head_attention,
    products,
    stacking,
)
from vit22b_transfer.models.lora import LoraConfig
from vit22b_transfer.models.t5_caches import CrossKeyValues, SelfCache
from vit22b_transfer.models.t5_variants import sizes_of

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "silu": nn.silu,
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of one text model; `vocab_size` is the table's, at least the vocabulary's.

    `num_encoder_layers=0` leaves a pure cross-attending decoder: the encoder then only
    normalises what it is given. T5 v1.1, mT5 and ByT5 have a gated gelu, UL2 a gated
    silu; the first T5 has relu without a gate, and tied logits. Those are divided by
    the root of the width unless `scaled_logits` is False (transformers 5's new models).
    attention_form: `form` of `attention.attend`; decoding step by step has its own.
    """

    vocab_size: int
    width: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    tied_logits: bool = False
    scaled_logits: bool = True
    activation: Literal["gelu", "silu", "relu"] = "gelu"
    gated_mlp: bool = True
    dropout_rate: float = 0.0
    scan_layers: bool = False
    remat: Literal["none", "dots", "block"] = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    lora: LoraConfig | None = None
    attention_form: attention.Form = "auto"

    def __post_init__(self):
        if self.remat not in ("none", "dots", "block"):
            raise UserError(f"remat is {self.remat!r}; valid are none, dots, block.")
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"activation is {self.activation!r}; "
                f"valid are {', '.join(ACTIVATIONS)}."
            )


def t5_config(variant: str, **overrides: Any) -> T5Config:
    """A T5 v1.1, or PaLI-X's, of that size; overrides are T5Config fields."""
    return T5Config(**(sizes_of(variant) | overrides))


def _norm(cfg: T5Config) -> layers.Norm:
    return layers.Norm(cfg.width, dtype=cfg.dtype, param_dtype=cfg.param_dtype)


def _attention(cfg: T5Config) -> multi_head_attention.MultiHeadAttention:
    def query_init(key, shape, dtype):
        scale = jnp.asarray(cfg.head_dim**-0.5, dtype)
        return layers.fan_in_normal(key, shape, dtype) * scale

    return multi_head_attention.MultiHeadAttention(
        cfg.width,
        cfg.num_heads,
        cfg.head_dim,
        scale=1.0,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        kernel_init=layers.fan_in_normal,
        query_init=query_init,
        lora=cfg.lora,
        form=cfg.attention_form,
    )


def _mlp(cfg: T5Config) -> layers.Mlp:
    return layers.Mlp(
        cfg.width,
        cfg.mlp_dim,
        ACTIVATIONS[cfg.activation],
        gated=cfg.gated_mlp,
        use_bias=False,
        dropout_rate=cfg.dropout_rate,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        kernel_init=layers.fan_in_normal,
        lora=cfg.lora,
    )


def _relative_bias(cfg: T5Config, *, bidirectional: bool):
    return layers.RelativePositionBias(
        cfg.num_heads, bidirectional, dtype=cfg.dtype, param_dtype=cfg.param_dtype
    )


def _stack(cfg: T5Config, block: type[nn.Module], depth: int, num_broadcast: int):
    """`depth` blocks: one scanned module or a list of modules."""
    block = stacking.remat_block(
        block, cfg.remat, scanned=cfg.scan_layers, static=(num_broadcast + 1,)
    )
    if cfg.scan_layers:
        return stacking.scan_blocks(block, depth, num_broadcast)(cfg)
    return [block(cfg) for _ in range(depth)]


def _run(stack, x, *broadcast):
    """x through a stack built by `_stack`."""
    if isinstance(stack, (list, tuple)):
        for block in stack:
            x, _ = block(x, *broadcast)
        return x
    return stack(x, *broadcast)[0]


class _EncoderBlock(nn.Module):
    """Self-attention and MLP, each behind its own norm."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.pre_attention_layer_norm = _norm(cfg)
        self.attention = _attention(cfg)
        self.pre_mlp_layer_norm = _norm(cfg)
        self.mlp = _mlp(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def __call__(self, x, mask, bias, train: bool):
        y = self.pre_attention_layer_norm(x)
        y = self.attention(y, y, mask=mask, bias=bias)
        x = x + self.dropout(y, deterministic=not train)
        y = self.mlp(self.pre_mlp_layer_norm(x), train=train)
        x = x + self.dropout(y, deterministic=not train)
        x = layers.with_sharding_constraint(x, ("batch", "length", "embed"))
        instruments.record_rms(self, instruments.RESIDUAL, x)
        return x, None


class TextEncoder(nn.Module):
    """Embeddings to encodings; every position sees every valid position."""

    config: T5Config

    def setup(self):
        cfg = self.config
        if cfg.num_encoder_layers:
            self.relpos_bias = _relative_bias(cfg, bidirectional=True)
            self.layers = _stack(
                cfg, _EncoderBlock, cfg.num_encoder_layers, num_broadcast=3
            )
        self.encoder_norm = _norm(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        mask: Bool[Array, "batch 1 1 length"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch length embed"]:
        length, deterministic = x.shape[1], not train
        x = self.dropout(x, deterministic=deterministic)
        if self.config.num_encoder_layers:
            x = _run(self.layers, x, mask, self.relpos_bias(length, length), train)
        return self.dropout(self.encoder_norm(x), deterministic=deterministic)


class _DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention and MLP, each behind its own norm."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.pre_self_attention_layer_norm = _norm(cfg)
        self.self_attention = _attention(cfg)
        self.pre_cross_attention_layer_norm = _norm(cfg)
        self.encoder_decoder_attention = _attention(cfg)
        self.pre_mlp_layer_norm = _norm(cfg)
        self.mlp = _mlp(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def __call__(self, x, encoded, encoded_mask, mask, bias, train: bool):
        y = self.pre_self_attention_layer_norm(x)
        y = self.self_attention(y, y, mask=mask, bias=bias)
        x = x + self.dropout(y, deterministic=not train)
        y = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(y, encoded, mask=encoded_mask)
        x = x + self.dropout(y, deterministic=not train)
        y = self.mlp(self.pre_mlp_layer_norm(x), train=train)
        x = x + self.dropout(y, deterministic=not train)
        x = layers.with_sharding_constraint(x, ("batch", "length", "embed"))
        instruments.record_rms(self, instruments.RESIDUAL, x)
        return x, None

    def cross_key_values(self, encoded) -> CrossKeyValues:
        """This layer's keys and values of the encoded input."""
        key, value = self.encoder_decoder_attention.project_key_value(encoded)
        key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
        dtype = products.kept_dtype(key.dtype)
        return CrossKeyValues(key.astype(dtype), value.astype(dtype))

    def decode_step(self, x, cache: SelfCache, cross, encoded_mask, index, mask, bias):
        """One position of K beams, x [B, K, E]; the beams stand where queries do.

        So the encoded keys and values are shared by the beams, and a beam reads the
        others' cached keys where the mask says that they are its own past.
        """
        attention = self.self_attention
        y = self.pre_self_attention_layer_norm(x)
        key, value = attention.project_key_value(y)
        key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
        place = index * x.shape[1]
        write = jax.lax.dynamic_update_slice_in_dim
        cache = SelfCache(
            write(cache.key, key.astype(cache.key.dtype), place, axis=3),
            write(cache.value, value.astype(cache.value.dtype), place, axis=2),
        )
        x = x + attention.attend_cached(y, cache.key, cache.value, mask=mask, bias=bias)
        y = self.pre_cross_attention_layer_norm(x)
        x = x + self.encoder_decoder_attention.attend_cached(
            y, cross.key, cross.value, mask=encoded_mask
        )
        return x + self.mlp(self.pre_mlp_layer_norm(x)), cache


class TextDecoder(nn.Module):
    """Embedded target tokens and encodings to hidden states, whole or step by step."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.relpos_bias = _relative_bias(cfg, bidirectional=False)
        self.layers = _stack(
            cfg, _DecoderBlock, cfg.num_decoder_layers, num_broadcast=5
        )
        self.decoder_norm = _norm(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        if not cfg.tied_logits:
            self.logits_dense = layers.Dense(
                cfg.width,
                cfg.vocab_size,
                ("embed", "vocab"),
                use_bias=False,
                dtype=cfg.dtype,
                # bfloat16 logits would round log-probabilities to three digits
                out_dtype=jnp.float32,
                param_dtype=cfg.param_dtype,
                kernel_init=layers.fan_in_normal,
            )

    def __call__(
        self,
        x: Float[Array, "batch targets embed"],
        encoded: Float[Array, "batch length embed"],
        encoded_mask: Bool[Array, "batch 1 1 length"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch targets embed"]:
        """Hidden states before the logits, every position seeing only its past."""
        length, deterministic = x.shape[1], not train
        x = self.dropout(x, deterministic=deterministic)
        causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
        bias = self.relpos_bias(length, length)
        x = _run(self.layers, x, encoded, encoded_mask, causal, bias, train)
        return self.dropout(self.decoder_norm(x), deterministic=deterministic)

    def logits(
        self, x: Float[Array, "batch targets embed"]
    ) -> Float[Array, "batch targets vocab"]:
        """Untied logits in float32."""
        return self.logits_dense(x)

    def cross_key_values(
        self, encoded: Float[Array, "batch length embed"]
    ) -> tuple[CrossKeyValues, ...]:
        """What every layer's cross-attention needs, computed once per input."""
        return tuple(block.cross_key_values(encoded) for block in self._unrolled())

    def decode_step(
        self,
        x: Float[Array, "batch beams embed"],
        cache: tuple[SelfCache, ...],
        cross: tuple[CrossKeyValues, ...],
        encoded_mask: Bool[Array, "batch 1 1 length"],
        index: Int[Array, ""],
        ancestry: Bool[Array, "batch beams beams time"],
    ) -> tuple[Float[Array, "batch beams embed"], tuple[SelfCache, ...]]:
        """Hidden states at position `index` and the cache with that position written.

        Beam k attends position t of beam k' iff ancestry[b, k, k', t] and t <= index.
        """
        batch, beams, _, time = ancestry.shape
        past = (jnp.arange(time) <= index)[None, None, None]
        mask = (ancestry & past).swapaxes(2, 3).reshape(batch, 1, beams, time * beams)
        bias = self.relpos_bias(time, time)
        bias = jax.lax.dynamic_slice_in_dim(bias, index, 1, axis=2)
        bias = jnp.repeat(bias, beams, axis=3)
        out = []
        for block, own, crossed in zip(self._unrolled(), cache, cross, strict=True):
            x, own = block.decode_step(x, own, crossed, encoded_mask, index, mask, bias)
            out.append(own)
        return self.decoder_norm(x), tuple(out)

    def _unrolled(self) -> list[_DecoderBlock]:
        if self.config.scan_layers:
            raise UserError(
                "decoding needs unrolled layers: unstack the parameters "
                "(stacking.unstack_layers) and set scan_layers=False."
            )
        return list(self.layers)
