"""What cached decoding of the T5 family keeps."""

from typing import Any

import flax
import jax.numpy as jnp

from vit22b_transfer.models import products


@flax.struct.dataclass
class CrossKeyValues:
    """Keys [B, N, H, L] and values [B, N, L, H] of the encoded input for one layer.

    So that the matmuls of every decoding step read them as they lie.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    key: Any
    value: Any


@flax.struct.dataclass
class SelfCache:
    """Keys [B, N, H, T*K] and values [B, N, T*K, H] decoded so far for one layer.

    Place t*K + k is position t of beam k: a step writes one block, in place.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    key: Any
    value: Any


def empty_cache(cfg: Any, batch: Any, beams: int, time: int) -> tuple[SelfCache, ...]:
    """Zeroed self-attention caches for `time` positions of `beams` beams.

    cfg: a `t5.T5Config`.
    batch: a number; in a program that is exported for any size, a symbol.
    """
    heads, kv, dtype = cfg.num_heads, cfg.head_dim, products.kept_dtype(cfg.dtype)
    key = jnp.zeros((batch, heads, kv, time * beams), dtype)
    value = jnp.zeros((batch, heads, time * beams, kv), dtype)
    return tuple(SelfCache(key, value) for _ in range(cfg.num_decoder_layers))
