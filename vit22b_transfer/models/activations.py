"""The activations of image towers' MLPs."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

Activation = Literal["gelu_tanh", "gelu_erf", "quick_gelu", "silu"]


def quick_gelu(x: jax.Array) -> jax.Array:
    """GELU as OpenAI's CLIP approximates it: x * sigmoid(1.702 x)."""
    return x * nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu_erf": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
    "silu": nn.silu,
}
