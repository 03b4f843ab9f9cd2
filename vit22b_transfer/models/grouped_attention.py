"""Self-attention with rotary positions whose query heads share keys in groups.

As in Gemma (arXiv 2403.08295, 2408.00118, 2503.19786). Shape legend: B batch, Q
queries, S keys, N query heads, K key heads, G = N / K query heads per key head, H head
dimension.
"""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vit22b_transfer.models import attention, instruments, layers, products
from vit22b_transfer.models.lora import LoraConfig


@flax.struct.dataclass
class LayerView:
    """What a layer's queries may attend, and the angles of their positions.

    mask: bool [B, 1, Q, S], True = may attend.
    angles: float32 [B, Q, H/2], or [B, 1, H/2] for queries at the same position.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    mask: Any
    angles: Any


@flax.struct.dataclass
class KeyValues:
    """Rotated keys [B, K, H, S] and values [B, K, S, H] of one layer.

    So that the matmuls of every decoding step read them as they lie.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    key: Any
    value: Any


def rotary_angles(
    positions: Int[Array, "batch length"],
    head_dim: int,
    base: float,
    stretch: float = 1.0,
) -> Float[Array, "batch length half"]:
    """Angles by which the pairs of a head turn (Su et al. 2021).

    Pair i of H/2 turns by base**(-2i/H) per position; `stretch` divides the positions
    (linear scaling to longer contexts).
    """
    frequency = base ** (-np.arange(0, head_dim, 2) / head_dim) / stretch
    frequency = frequency.astype(np.float32)[None, None]
    return positions.astype(jnp.float32)[..., None] * frequency


class GroupedQueryAttention(nn.Module):
    """Self-attention; `num_kv_heads` divides `num_heads`. No biases.

    `softcap` bounds the logits smoothly: softcap * tanh(logits / softcap). QK-norm
    normalises each head before the rotation. Key and value kernels with fewer heads
    than queries have T5X's axis `kv`, which no rule shards: a model axis may be larger
    than the number of heads and would cut them into pieces. They are small, and every
    device then has the keys that its query heads need.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    qk_norm: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    lora: LoraConfig | None = None
    form: attention.Form = "auto"

    def setup(self):
        shared = self.num_kv_heads < self.num_heads
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = functools.partial(
            layers.Dense,
            use_bias=False,
            kernel_init=layers.fan_in_normal,
            lora=self.lora,
            **types,
        )
        joined, joined_kv = (
            heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads)
        )
        axes = ("embed", "kv" if shared else "joined_kv")
        self.query = dense(self.width, joined, ("embed", "joined_kv"))
        self.key = dense(self.width, joined_kv, axes)
        self.value = dense(self.width, joined_kv, axes)
        self.out = dense(joined, self.width, ("joined_kv", "embed"))
        if self.qk_norm:
            norm = functools.partial(
                layers.Norm, self.head_dim, axis="kv", scale_from_one=True, **types
            )
            self.query_norm, self.key_norm = norm(), norm()

    def project(self, x: Float[Array, "batch length embed"], view: LayerView):
        """Rotated queries [B, Q, N, H] and keys, and values [B, Q, K, H]."""
        query, key, value = (
            part(x).reshape(*x.shape[:2], -1, self.head_dim)
            for part in (self.query, self.key, self.value)
        )
        axes = ("batch", "length", "heads", "kv")
        query = layers.with_sharding_constraint(query, axes)
        if self.num_kv_heads == self.num_heads:
            key = layers.with_sharding_constraint(key, axes)
            value = layers.with_sharding_constraint(value, axes)
        instruments.record_rms(self, instruments.QUERY, query)
        instruments.record_rms(self, instruments.KEY, key)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = (attention.rotate(part, view.angles) for part in (query, key))
        return query, key, value

    def __call__(
        self, x: Float[Array, "batch length embed"], view: LayerView
    ) -> tuple[Float[Array, "batch length embed"], KeyValues]:
        """Attention of x to itself, and its keys and values for a cache."""
        query, key, value = self.project(x, view)
        instruments.record_attention(
            self,
            query,
            key,
            mask=view.mask,
            scale=self.scale,
            softcap=self.softcap,
        )
        y = attention.attend(
            query,
            key,
            value,
            mask=view.mask,
            scale=self.scale,
            softcap=self.softcap,
            form=self.form,
        )
        dtype = products.kept_dtype(key.dtype)
        kept = KeyValues(
            key.transpose(0, 2, 3, 1).astype(dtype), value.swapaxes(1, 2).astype(dtype)
        )
        return self._joined(y), kept

    def decode_step(
        self,
        x: Float[Array, "batch beams embed"],
        view: LayerView,
        cache: KeyValues,
        place: Int[Array, ""],
    ) -> tuple[Float[Array, "batch beams embed"], KeyValues]:
        """Attention of one position of the beams to the cache, written at `place`."""
        query, key, value = self.project(x, view)
        write = jax.lax.dynamic_update_slice_in_dim
        kept = cache.key.dtype
        key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
        cache = KeyValues(
            write(cache.key, key.astype(kept), place, axis=3),
            write(cache.value, value.astype(kept), place, axis=2),
        )
        query = self._grouped(query).astype(kept)
        logits = products.einsum("BQKGH,BKHS->BKGQS", query, cache.key)
        weights = attention.attention_weights(logits, view.mask, softcap=self.softcap)
        weights = weights.astype(kept)
        y = products.einsum("BKGQS,BKSH->BQKGH", weights, cache.value)
        return self._joined(y.astype(self.dtype)), cache

    def _grouped(self, query):
        query = query * jnp.asarray(self.scale, query.dtype)
        return query.reshape(*query.shape[:2], self.num_kv_heads, -1, self.head_dim)

    def _joined(self, y):
        return self.out(y.reshape(*y.shape[:2], -1))
