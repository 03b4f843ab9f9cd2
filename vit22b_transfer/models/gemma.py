"""Gemma-family decoder: the text model of a prefix-LM.

Gemma 1, 2 and the text part of 3 (arXiv 2403.08295, 2408.00118, 2503.19786): RMS norms,
no biases, rotary positions, query heads that share keys, gated GELU, tied logits; from
Gemma 2 on norms after each branch and layers that see a window only.
"""

import dataclasses
import difflib
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.models import attention, instruments, layers, stacking
from vit22b_transfer.models.grouped_attention import (
    GroupedQueryAttention,
    KeyValues,
    LayerView,
    rotary_angles,
)
from vit22b_transfer.models.lora import LoraConfig

gelu = functools.partial(nn.gelu, approximate=True)


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """One text model; `vocab_size` is the table's, at least the vocabulary's.

    query_scalar: the query-key product is divided by its root; `head_dim` by default.
    attention_softcap, logit_softcap: bounds of the logits of attention and of tokens.
    post_norms: each branch is also normalised before it is added.
    sliding_window: a local layer sees that many positions, its own included.
    global_period: every n-th layer is global, the others are local; 1: all layers
      are global.
    rope_base, rope_stretch: of the global layers; `local_rope_base` of the local ones,
      the same as `rope_base` by default.
    attention_form: `form` of `attention.attend`; decoding step by step has its own.
    """

    vocab_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scalar: int | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    post_norms: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    global_period: int = 1
    rope_base: float = 10_000.0
    rope_stretch: float = 1.0
    local_rope_base: float | None = None
    dropout_rate: float = 0.0
    scan_layers: bool = False
    remat: Literal["none", "dots", "block"] = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    lora: LoraConfig | None = None
    attention_form: attention.Form = "auto"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads "
                f"{self.num_kv_heads}; every group of query heads shares one key head."
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim is {self.head_dim}; rotary positions need an even one."
            )
        if (self.sliding_window is None) != (self.global_period == 1):
            raise UserError(
                f"sliding_window is {self.sliding_window} and global_period "
                f"{self.global_period}; set a window and a period above 1, or neither."
            )
        if self.remat not in ("none", "dots", "block"):
            raise UserError(f"remat is {self.remat!r}; valid are none, dots, block.")

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Whether each layer sees its window only."""
        return tuple((i + 1) % self.global_period != 0 for i in range(self.depth))


_SIZES = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
_GEMMA_1 = dict(vocab_size=256_000)
_GEMMA_2 = dict(
    vocab_size=256_000,
    attention_softcap=50.0,
    logit_softcap=30.0,
    post_norms=True,
    sliding_window=4096,
    global_period=2,
)
_GEMMA_3 = dict(
    vocab_size=262_144,
    post_norms=True,
    qk_norm=True,
    global_period=6,
    rope_base=1e6,
    local_rope_base=10_000.0,
)
# With 64 rows for the tokens of the image input.
_GEMMA_3_LONG = _GEMMA_3 | dict(
    vocab_size=262_208, sliding_window=1024, rope_stretch=8.0
)


def _variant(family: dict, *sizes: int, **others: Any) -> dict[str, Any]:
    return family | dict(zip(_SIZES, sizes, strict=True)) | others


# Tables 1 of the three reports, and what the published configurations add to them.
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma-2b": _variant(_GEMMA_1, 2048, 18, 16384, 8, 1, 256),
    "gemma-7b": _variant(_GEMMA_1, 3072, 28, 24576, 16, 16, 256),
    "gemma2-2b": _variant(_GEMMA_2, 2304, 26, 9216, 8, 4, 256),
    "gemma2-9b": _variant(_GEMMA_2, 3584, 42, 14336, 16, 8, 256),
    "gemma2-27b": _variant(_GEMMA_2, 4608, 46, 36864, 32, 16, 128, query_scalar=144),
    "gemma3-270m": _variant(_GEMMA_3, 640, 18, 2048, 4, 1, 256, sliding_window=512),
    "gemma3-1b": _variant(_GEMMA_3, 1152, 26, 6912, 4, 1, 256, sliding_window=512),
    "gemma3-4b": _variant(_GEMMA_3_LONG, 2560, 34, 10240, 8, 4, 256),
    "gemma3-12b": _variant(_GEMMA_3_LONG, 3840, 48, 15360, 16, 8, 256),
    "gemma3-27b": _variant(
        _GEMMA_3_LONG, 5376, 62, 21504, 32, 16, 128, query_scalar=168
    ),
}


def gemma_config(variant: str, **overrides: Any) -> GemmaConfig:
    """The published model of that name; overrides are GemmaConfig fields."""
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=3, cutoff=0.0)
        raise UserError(
            f"unknown Gemma variant {variant!r}; nearest: {', '.join(near)}; "
            f"all: {', '.join(VARIANTS)}."
        )
    return GemmaConfig(**(VARIANTS[variant] | overrides))


def _views(cfg: GemmaConfig, positions, mask, near) -> tuple[LayerView, ...]:
    """(view of global layers, view of local layers if there are any)."""
    angles = rotary_angles(positions, cfg.head_dim, cfg.rope_base, cfg.rope_stretch)
    views = (LayerView(mask[:, None], angles),)
    if any(cfg.is_local):
        base = cfg.local_rope_base or cfg.rope_base
        angles = rotary_angles(positions, cfg.head_dim, base)
        views += (LayerView((mask & near)[:, None], angles),)
    return views


def prefix_lm_views(
    cfg: GemmaConfig, valid: Bool[Array, "batch length"], prefix_length: int
) -> tuple[LayerView, ...]:
    """What each kind of layer sees of a prefix that is followed by a suffix.

    Positions of the prefix see all of it, whatever the window (as in Hugging Face's
    PaliGemma 2); those of the suffix see what precedes them. What is not `valid` is
    seen by nobody and does not count in the positions.
    """
    positions = jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1
    place = jnp.arange(valid.shape[1])
    inside = (place < prefix_length)[:, None] & (place < prefix_length)[None]
    allowed = inside | (place[None] <= place[:, None])
    near = None
    if cfg.sliding_window is not None:
        distance = positions[:, :, None] - positions[:, None]
        near = (distance < cfg.sliding_window) | inside[None]
    return _views(cfg, positions, allowed[None] & valid[:, None], near)


def decode_views(
    cfg: GemmaConfig,
    prefix_valid: Bool[Array, "batch prefix"],
    index: Int[Array, ""],
    ancestry: Bool[Array, "batch beams beams time"],
) -> tuple[LayerView, ...]:
    """What each kind of layer sees of a cache, from suffix position `index` - 1.

    The cache holds the prefix, then at place t*K + k what beam k was fed at step t.
    Step 0 feeds nothing: the prefix predicts the first token.
    """
    batch, beams, _, time = ancestry.shape
    step = jnp.arange(time)
    fed = ancestry & ((step >= 1) & (step <= index))[None, None, None]
    fed = fed.swapaxes(2, 3).reshape(batch, beams, time * beams)
    seen = jnp.broadcast_to(
        prefix_valid[:, None], (batch, beams, prefix_valid.shape[1])
    )
    mask = jnp.concatenate([seen, fed], axis=2)
    positions = jnp.cumsum(prefix_valid.astype(jnp.int32), axis=1) - 1
    last = jnp.max(positions, axis=1, keepdims=True)
    own, near = last + index, None
    if cfg.sliding_window is not None:
        fed_at = jnp.repeat(last + step[None], beams, axis=1)
        distance = own - jnp.concatenate([positions, fed_at], axis=1)
        near = (distance < cfg.sliding_window)[:, None]
    return _views(cfg, own, mask, near)


def _select(views: tuple[LayerView, ...], is_local) -> LayerView:
    """The view of one layer; in a scan `is_local` is traced."""
    if len(views) == 1:
        return views[0]
    return jax.tree.map(lambda wide, near: jnp.where(is_local, near, wide), *views)


def _norm(cfg: GemmaConfig) -> layers.Norm:
    return layers.Norm(
        cfg.width, scale_from_one=True, dtype=cfg.dtype, param_dtype=cfg.param_dtype
    )


class _Block(nn.Module):
    """Self-attention and MLP, each between its norms."""

    config: GemmaConfig

    def setup(self):
        cfg = self.config
        types = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        self.pre_self_attention_layer_norm = _norm(cfg)
        self.self_attention = GroupedQueryAttention(
            cfg.width,
            cfg.num_heads,
            cfg.num_kv_heads,
            cfg.head_dim,
            (cfg.query_scalar or cfg.head_dim) ** -0.5,
            cfg.attention_softcap,
            cfg.qk_norm,
            lora=cfg.lora,
            form=cfg.attention_form,
            **types,
        )
        self.pre_mlp_layer_norm = _norm(cfg)
        self.mlp = layers.Mlp(
            cfg.width,
            cfg.mlp_dim,
            gelu,
            gated=True,
            use_bias=False,
            kernel_init=layers.fan_in_normal,
            lora=cfg.lora,
            **types,
        )
        if cfg.post_norms:
            self.post_self_attention_layer_norm = _norm(cfg)
            self.post_mlp_layer_norm = _norm(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(self, x, is_local, views: tuple[LayerView, ...], train: bool):
        return self.with_key_values(x, is_local, views, train)[0], None

    def with_key_values(self, x, is_local, views, train: bool = False):
        """The block's output and its keys and values for a cache."""
        y = self.pre_self_attention_layer_norm(x)
        y, kept = self.self_attention(y, _select(views, is_local))
        return self._finish(x, y, train), kept

    def decode_step(self, x, is_local, views, cache: KeyValues, place):
        """One position of K beams, x [B, K, E]; the beams stand where queries do."""
        y = self.pre_self_attention_layer_norm(x)
        view = _select(views, is_local)
        y, cache = self.self_attention.decode_step(y, view, cache, place)
        return self._finish(x, y, train=False), cache

    def _finish(self, x, y, train: bool):
        """Adds the attention's result y to x, then the MLP's."""
        post = self.config.post_norms
        y = self.post_self_attention_layer_norm(y) if post else y
        x = x + self.dropout(y, deterministic=not train)
        y = self.mlp(self.pre_mlp_layer_norm(x))
        y = self.post_mlp_layer_norm(y) if post else y
        x = x + self.dropout(y, deterministic=not train)
        x = layers.with_sharding_constraint(x, ("batch", "length", "embed"))
        instruments.record_rms(self, instruments.RESIDUAL, x)
        return x


class TextDecoder(nn.Module):
    """Embeddings to hidden states before the logits, whole or step by step."""

    config: GemmaConfig

    def setup(self):
        cfg = self.config
        block = stacking.remat_block(
            _Block, cfg.remat, scanned=cfg.scan_layers, static=(4,)
        )
        if cfg.scan_layers:
            scan = stacking.scan_blocks(
                block, cfg.depth, num_broadcast=2, num_scanned=1
            )
            self.layers = scan(cfg)
        else:
            self.layers = [block(cfg) for _ in range(cfg.depth)]
        self.decoder_norm = _norm(cfg)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        views: tuple[LayerView, ...],
        *,
        train: bool = False,
    ) -> Float[Array, "batch length embed"]:
        """Hidden states of a whole sequence, seen as `prefix_lm_views` says."""
        if self.config.scan_layers:
            x, _ = self.layers(x, jnp.asarray(self.config.is_local), views, train)
        else:
            for block, is_local in zip(self.layers, self.config.is_local, strict=True):
                x, _ = block(x, is_local, views, train)
        return self.decoder_norm(x)

    def prefill(
        self, x: Float[Array, "batch length embed"], views: tuple[LayerView, ...]
    ) -> tuple[Float[Array, "batch length embed"], tuple[KeyValues, ...]]:
        """Hidden states of a prefix, and every layer's keys and values of it."""
        kept = []
        for block, is_local in self._unrolled():
            x, key_values = block.with_key_values(x, is_local, views)
            kept.append(key_values)
        return self.decoder_norm(x), tuple(kept)

    def decode_step(
        self,
        x: Float[Array, "batch beams embed"],
        cache: tuple[KeyValues, ...],
        views: tuple[LayerView, ...],
        place: Int[Array, ""],
    ) -> tuple[Float[Array, "batch beams embed"], tuple[KeyValues, ...]]:
        """Hidden states of one position, and the cache with it written at `place`."""
        out = []
        for (block, is_local), own in zip(self._unrolled(), cache, strict=True):
            x, own = block.decode_step(x, is_local, views, own, place)
            out.append(own)
        return self.decoder_norm(x), tuple(out)

    def _unrolled(self) -> list[tuple[_Block, bool]]:
        if self.config.scan_layers:
            raise UserError(
                "decoding needs unrolled layers: unstack the parameters "
                "(stacking.unstack_layers) and set scan_layers=False."
            )
        return list(zip(self.layers, self.config.is_local, strict=True))


def extend_cache(prefix: tuple[KeyValues, ...], places: int) -> tuple[KeyValues, ...]:
    """The keys and values of a prefix with empty places behind them."""
    return tuple(
        KeyValues(
            jnp.pad(layer.key, ((0, 0), (0, 0), (0, 0), (0, places))),
            jnp.pad(layer.value, ((0, 0), (0, 0), (0, places), (0, 0))),
        )
        for layer in prefix
    )
