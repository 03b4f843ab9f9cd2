"""Layers: every parameter of the library is created in this file.

Shape legend: B batch, L length, E embed (width), M mlp, N heads, H head dimension,
V vocabulary, K beams, T decode length. Logical axis names are T5X's; `patch`,
`lora_rank` and `classes` are ours.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning as flax_partitioning
from flax.linen.partitioning import param_with_axes
from jaxtyping import Array, Float, Int

from vit22b_transfer.models import int8, products, relative_buckets
from vit22b_transfer.models.lora import LoraConfig

Initializer = Callable[..., jax.Array]

xavier_uniform = nn.initializers.xavier_uniform()
fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
# Uniform within 1 / sqrt(inputs), as in PEFT.
lora_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def with_sharding_constraint(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x`, laid out by the logical names of its axes; as it is where no rules are set.

    flax's function of this name silently does nothing under `with mesh:`, which is how
    T5X sets its mesh.
    """
    rules = flax_partitioning.get_axis_rules()
    if not rules:
        return x
    spec = flax_partitioning.logical_to_mesh_axes(axes, rules)
    return jax.lax.with_sharding_constraint(x, spec)


class Dense(nn.Module):
    """`x @ kernel (+ bias)` over the last axis; parameters readable by the parent.

    `kernel_axes` are the logical axes of the kernel; the bias takes the second one.
    Operands are cast to `dtype`; the result has `out_dtype` (`dtype` by default);
    parameters are stored in `param_dtype`, the kernel with `int8_kernel` as in
    `models.int8`. The bias starts at `bias_value`.
    Where `lora` chooses the kernel, a low-rank update is added, in float32 and zero at
    first.
    """

    inputs: int
    outputs: int
    kernel_axes: tuple[str, str]
    use_bias: bool = True
    dtype: Any = jnp.float32
    out_dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = xavier_uniform
    bias_value: float = 0.0
    lora: LoraConfig | None = None
    int8_kernel: bool = False

    def setup(self):
        create = functools.partial(param_with_axes, module=self)
        shape, axes = (self.inputs, self.outputs), self.kernel_axes
        init, dtype = self.kernel_init, jnp.dtype(self.param_dtype)
        self.kernel_scale = self.bias = None
        if self.int8_kernel:
            first = int8.fresh_scales(self.inputs)
            scales = (first, shape[1:], jnp.float32)
            self.kernel_scale = create(int8.SCALES, *scales, axes=axes[1:])
            init, dtype = int8.fresh_values(init), jnp.int8
        self.kernel = create("kernel", init, shape, dtype, axes=axes)
        if self.use_bias:
            first = nn.initializers.constant(self.bias_value)
            dtype = jnp.dtype(self.param_dtype)
            self.bias = create("bias", first, shape[1:], dtype, axes=axes[1:])
        self.lora_a = self.lora_b = None
        if self.lora is not None and self._is_updated(self.lora):
            (into, out), rank, name = self.kernel_axes, self.lora.rank, "lora_rank"
            shape, zeros = (self.inputs, rank), nn.initializers.zeros_init()
            self.lora_a = create("lora_a", lora_init, shape, axes=(into, name))
            self.lora_b = create(
                "lora_b", zeros, (rank, self.outputs), axes=(name, out)
            )

    def _is_updated(self, lora: LoraConfig) -> bool:
        # Later the parameters tell: decoding unrolls layers and so changes their paths.
        if self.is_initializing():
            return lora.chooses("/".join((*self.path, "kernel")))
        return self.has_variable("params", "lora_a")

    def __call__(
        self, x: Float[Array, "*batch inputs"]
    ) -> Float[Array, "*batch outputs"]:
        y = products.linear(x.astype(self.dtype), self.weights, self.out_dtype)
        return self.complete(y, x)

    @property
    def weights(self) -> Float[Array, "inputs outputs"]:
        """The kernel in `dtype`."""
        if self.kernel_scale is None:
            return self.kernel.astype(self.dtype)
        return int8.dequantized(self.kernel, self.kernel_scale, self.dtype)

    def complete(
        self, y: Float[Array, "*batch outputs"], x: Float[Array, "*batch inputs"]
    ) -> Float[Array, "*batch outputs"]:
        """`y` = x @ kernel with all that is added to it: bias and low-rank update."""
        y = y if self.bias is None else products.add_bias(y, self.bias)
        if self.lora is None or self.lora_a is None or self.lora_b is None:
            return y
        a, b = self.lora_a.astype(self.dtype), self.lora_b.astype(self.dtype)
        scale = jnp.asarray(self.lora.scale, a.dtype)
        return y + products.linear(
            products.linear(x.astype(self.dtype), a) * scale, b, y.dtype
        )


class Norm(nn.Module):
    """Normalisation over the last axis, computed in float32.

    `centering=False` is RMS normalisation (no mean subtracted; ViT-22B section 2, T5);
    `centering=True` is LayerNorm. The scale is learned; the bias only if `use_bias`.
    With `scale_from_one` the parameter is what the scale exceeds one by (Gemma).
    """

    features: int
    centering: bool = False
    use_bias: bool = False
    epsilon: float = 1e-6
    axis: str = "embed"
    scale_from_one: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch features"]
    ) -> Float[Array, "*batch features"]:
        y = x.astype(jnp.float32)
        if self.centering:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(
            jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon
        )
        create = functools.partial(
            param_with_axes,
            axes=(self.axis,),
        )
        shape, dtype = (self.features,), jnp.dtype(self.param_dtype)
        first = nn.initializers.zeros if self.scale_from_one else nn.initializers.ones
        scale = create("scale", first, shape, dtype).astype(jnp.float32)
        y = y * products.promoted(scale + 1.0 if self.scale_from_one else scale, y.ndim)
        if self.use_bias:
            bias = create("bias", nn.initializers.zeros_init(), shape, dtype)
            y = products.add_bias(y, bias)
        return y.astype(self.dtype)


class LayerScale(nn.Module):
    """A learned factor per feature of what a block adds (Touvron et al. 2021)."""

    features: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch features"]
    ) -> Float[Array, "*batch features"]:
        scale = param_with_axes(
            "scale",
            nn.initializers.constant(1e-5),
            (self.features,),
            jnp.dtype(self.param_dtype),
            axes=("embed",),
        )
        return x * products.promoted(scale.astype(x.dtype), x.ndim)


class Embedding(nn.Module):
    """Token table [V, E]; `__call__` looks ids up, `attend` gives tied logits.

    T5 divides the tied logits by sqrt(width), unless `scaled_logits` is False (mT5);
    with `scaled_inputs` the embeddings are multiplied by it instead, and the table
    starts that much smaller (Gemma).
    """

    vocab_size: int
    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scaled_inputs: bool = False
    scaled_logits: bool = True

    def setup(self):
        self.embedding = param_with_axes(
            "embedding",
            nn.initializers.normal(self.width**-0.5 if self.scaled_inputs else 1.0),
            (self.vocab_size, self.width),
            jnp.dtype(self.param_dtype),
            axes=("vocab", "embed"),
            module=self,
        )

    def __call__(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return x * self._scale(0.5) if self.scaled_inputs else x

    def attend(
        self, x: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length vocab"]:
        """Logits in float32."""
        return products.linear(
            self.before_logits(x), self.embedding.astype(self.dtype).T, jnp.float32
        )

    def before_logits(
        self, x: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        """What is multiplied with the table to give logits."""
        x = x.astype(self.dtype)
        if self.scaled_logits and not self.scaled_inputs:
            x = x * self._scale(-0.5)
        return x

    def _scale(self, power):
        return jnp.asarray(self.width**power, self.dtype)


class LearnedTable(nn.Module):
    """One learned array: position embeddings, class token, MAP probe."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        return param_with_axes(
            "embedding",
            self.init,
            self.shape,
            jnp.dtype(self.param_dtype),
            axes=self.axes,
        )


class LearnedNumber(nn.Module):
    """One learned number, in float32: a temperature, or the bias of a loss."""

    first: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, ""]:
        first, dtype = nn.initializers.constant(self.first), self.param_dtype
        number = param_with_axes("value", first, (), jnp.dtype(dtype), axes=())
        return number.astype(jnp.float32)


class RelativePositionBias(nn.Module):
    """T5's learned attention bias by bucketed distance (Raffel et al. 2020, 2.1)."""

    num_heads: int
    bidirectional: bool
    num_buckets: int = 32
    max_distance: int = 128
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, query_length: int, key_length: int
    ) -> Float[Array, "1 heads queries keys"]:
        table = param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (self.num_heads, self.num_buckets),
            jnp.dtype(self.param_dtype),
            axes=("heads", "relpos_buckets"),
        )
        buckets = relative_buckets.buckets(
            query_length,
            key_length,
            count=self.num_buckets,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return jnp.take(table.astype(self.dtype), buckets, axis=1)[None]


class Mlp(nn.Module):
    """act(x W_i) W_o, or the gated form act(x W_i0) * (x W_i1) W_o (Shazeer 2020)."""

    width: int
    mlp_dim: int
    activation: Callable[[jax.Array], jax.Array]
    gated: bool = False
    use_bias: bool = True
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = xavier_uniform
    lora: LoraConfig | None = None
    int8_kernels: bool = False

    def setup(self):
        types = dict(
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            lora=self.lora,
            int8_kernel=self.int8_kernels,
        )
        into = functools.partial(
            Dense, self.width, self.mlp_dim, ("embed", "mlp"), **types
        )
        if self.gated:
            self.wi_0, self.wi_1 = into(), into()
        else:
            self.wi = into()
        self.wo = Dense(self.mlp_dim, self.width, ("mlp", "embed"), **types)
        self.dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self, x: Float[Array, "batch length embed"], *, train: bool = False
    ) -> Float[Array, "batch length embed"]:
        if self.gated:
            y = self.activation(self.wi_0(x)) * self.wi_1(x)
        else:
            y = self.activation(self.wi(x))
        y = with_sharding_constraint(y, ("batch", "length", "mlp"))
        return self.wo(self.dropout(y, deterministic=not train))
