"""Multi-head attention with parameters, as T5 and the towers have it."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vit22b_transfer.models import instruments, layers
from vit22b_transfer.models.attention import Form, attend, attend_cached, rotate
from vit22b_transfer.models.lora import LoraConfig
from vit22b_transfer.models.segments import Segments


class MultiHeadAttention(nn.Module):
    """Attention with separate 2-D kernels (T5X's joined layout), optional QK-norm.

    `scale=None` means 1/sqrt(head_dim); T5 folds it into its weights and passes 1.
    QK-norm (ViT-22B eq. 3) normalises each head over head_dim with one scale of shape
    [H] for all heads, before the scaling; without `qk_norm_per_head` all heads together
    with a scale of shape [N*H]. With `qkv_bias`, keys may still have none. `form` is
    that of `attention.attend`.
    """

    width: int
    num_heads: int
    head_dim: int
    qkv_bias: bool = False
    key_bias: bool = True
    out_bias: bool = False
    qk_norm: bool = False
    qk_norm_per_head: bool = True
    norm_centering: bool = False
    norm_epsilon: float = 1e-6
    scale: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: layers.Initializer = layers.xavier_uniform
    query_init: layers.Initializer | None = None
    lora: LoraConfig | None = None
    int8_kernels: bool = False
    form: Form = "auto"

    def setup(self):
        joined = self.num_heads * self.head_dim
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = functools.partial(
            layers.Dense, lora=self.lora, int8_kernel=self.int8_kernels, **types
        )
        into = functools.partial(dense, self.width, joined, ("embed", "joined_kv"))
        bias, key_bias = self.qkv_bias, self.qkv_bias and self.key_bias
        query_init = self.query_init or self.kernel_init
        self.query = into(kernel_init=query_init, use_bias=bias)
        self.key = into(kernel_init=self.kernel_init, use_bias=key_bias)
        self.value = into(kernel_init=self.kernel_init, use_bias=bias)
        self.out = dense(
            joined,
            self.width,
            ("joined_kv", "embed"),
            use_bias=self.out_bias,
            kernel_init=self.kernel_init,
        )
        if self.qk_norm:
            norm = functools.partial(
                layers.Norm,
                self.head_dim if self.qk_norm_per_head else joined,
                self.norm_centering,
                epsilon=self.norm_epsilon,
                axis="kv" if self.qk_norm_per_head else "joined_kv",
                **types,
            )
            self.query_norm, self.key_norm = norm(), norm()

    @property
    def attention_scale(self) -> float:
        """Factor on the query-key product."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def split_heads(self, x: Float[Array, "batch length joined"]):
        """[B, L, N*H] -> [B, L, N, H], constrained to be sharded by heads."""
        x = x.reshape(*x.shape[:2], self.num_heads, self.head_dim)
        return layers.with_sharding_constraint(x, ("batch", "length", "heads", "kv"))

    def _normalized(self, norm: layers.Norm, x):
        """[B, L, N, H] normalised, each head or all of them together."""
        if self.qk_norm_per_head:
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def normalize(self, query, key):
        """QK-norm where configured; the arguments unchanged otherwise."""
        return self._normalize_query(query), self._normalize_key(key)

    def _normalize_query(self, query):
        instruments.record_rms(self, instruments.QUERY, query)
        return self._normalized(self.query_norm, query) if self.qk_norm else query

    def _normalize_key(self, key):
        instruments.record_rms(self, instruments.KEY, key)
        return self._normalized(self.key_norm, key) if self.qk_norm else key

    def record(self, query, key, *, mask=None, bias=None):
        """Tells the instruments of the attention of these queries to these keys."""
        mask = mask.mask if isinstance(mask, Segments) else mask
        instruments.record_attention(
            self, query, key, mask=mask, bias=bias, scale=self.attention_scale
        )

    def attend(self, query, key, value, *, mask=None, bias=None):
        """The weighted values [B, Q, N, H], before the out-projection."""
        return attend(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            scale=self.attention_scale,
            form=self.form,
        )

    def project_query(self, x: Float[Array, "batch queries embed"], angles=None):
        """Queries [B, Q, N, H], normalised, then rotated."""
        query = self._normalize_query(self.split_heads(self.query(x)))
        return query if angles is None else rotate(query, angles)

    def project_key_value(self, x: Float[Array, "batch keys embed"], angles=None):
        """Keys (normalised, then rotated) and values, each [B, K, N, H]."""
        key = self._normalize_key(self.split_heads(self.key(x)))
        key = key if angles is None else rotate(key, angles)
        return key, self.split_heads(self.value(x))

    def attend_projected(self, x, key, value, *, mask=None, bias=None, angles=None):
        """Attention of x [B, Q, E] over keys and values projected earlier."""
        query = self.project_query(x, angles)
        self.record(query, key, mask=mask, bias=bias)
        y = self.attend(query, key, value, mask=mask, bias=bias)
        return self.out(y.reshape(*y.shape[:2], -1))

    def attend_cached(self, x, key, value, *, mask=None, bias=None):
        """`attend_projected` over keys [B, N, H, K] and values [B, N, K, H]."""
        query = self.project_query(x)
        y = attend_cached(
            query, key, value, mask=mask, bias=bias, scale=self.attention_scale
        )
        return self.out(y.reshape(*y.shape[:2], -1))

    def __call__(
        self,
        x: Float[Array, "batch queries embed"],
        kv: Float[Array, "batch keys embed"],
        *,
        mask: Bool[Array, "#batch 1 #queries keys"] | Segments | None = None,
        bias: Float[Array, "1 heads queries keys"] | None = None,
        angles: Float[Array, "*#batch queries half"] | None = None,
    ) -> Float[Array, "batch queries embed"]:
        key, value = self.project_key_value(kv, angles)
        return self.attend_projected(x, key, value, mask=mask, bias=bias, angles=angles)
