"""Kernels stored as int8 with a float32 scale per output channel, for frozen towers.

A weight is value * scale; the scale is the largest weight of its channel by 127. Only
the storage is int8: layers compute in their own dtype. Both arrays are parameters, so
that shardings, checkpoints and scans treat them as all others.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

# Name of the scales, beside a `kernel`.
SCALES = "kernel_scale"
# A fresh kernel reaches about this far from zero, by the root of its inputs.
_FRESH_RANGE = 3.0


def quantized(
    kernel: Float[Array, "*stacked inputs outputs"], axis: int = -2
) -> tuple[Int8[Array, "*stacked inputs outputs"], Float[Array, "..."]]:
    """(values, scales) nearest to a kernel, of one layer or of stacked ones.

    What lies along `axis` shares a scale: inputs here, -1 for vectors such as tokens.
    """
    x = kernel.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=axis) / 127.0
    divisors = jnp.where(scales > 0, scales, jnp.ones_like(scales))
    values = jnp.round(x / jnp.expand_dims(divisors, axis)).astype(jnp.int8)
    return values, scales


def dequantized(values: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """The kernel in `dtype`."""
    return (values.astype(jnp.float32) * scales[..., None, :]).astype(dtype)


def fresh_values(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An initializer of values, for scales of `fresh_scales`."""

    def values(rng, shape, dtype):
        del dtype
        kernel = init(rng, shape, jnp.float32)
        steps = kernel / jnp.float32(_fresh_scale(shape))
        return jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8)

    return values


def fresh_scales(inputs: int) -> Callable[..., jax.Array]:
    """An initializer of scales."""
    return jax.nn.initializers.constant(_fresh_scale((inputs, 1)))


def _fresh_scale(shape):
    return _FRESH_RANGE / (127.0 * shape[-2] ** 0.5)
