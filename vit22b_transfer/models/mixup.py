"""Mixup: training images blended in pairs, and their labels with them.

Zhang et al. 2018, in the form of the ViT-22B and distillation recipes: one weight for a
batch, at least a half, and the partner of an image is the one before it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from vit22b_transfer import UserError


def mixup(
    key: jax.Array,
    images: UInt8[Array, "batch *pixels"],
    labels: Float[Array, "batch classes"],
    *,
    alpha: float = 1.0,
) -> tuple[UInt8[Array, "batch *pixels"], Float[Array, "batch classes"]]:
    """Images and labels, each a times its own plus (1 - a) times those of its partner.

    key: of seed and step, as `loss_fn` is given one: then the same batch is mixed alike
      after a kill, and on any number of devices. Microbatches are mixed each in itself.
    labels: how much of each class an image is, in [0, 1]. An image of no class is no
      example: neither it nor the one that it is the partner of is mixed.
    alpha: a ~ Beta(alpha, alpha), the larger of a and 1 - a being taken; 1 makes it
      uniform from 1/2 to 1, small values change little.

    Mixed pixels are rounded to whole grey levels, half to even: towers take uint8.

    Raises:
      UserError: unless alpha is positive.
    """
    check_alpha(alpha)
    drawn = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    share = jnp.maximum(drawn, 1.0 - drawn)
    real = jnp.max(labels, axis=-1) > 0
    both = real & jnp.roll(real, 1)
    own = jnp.where(both, share, jnp.ones_like(share))
    pixels = jnp.round(_blended(images.astype(jnp.float32), own))
    return pixels.astype(jnp.uint8), _blended(labels, own)


def check_alpha(alpha: float) -> None:
    """Raises UserError unless Beta(alpha, alpha) is a distribution."""
    if not alpha > 0:
        raise UserError(
            f"mixup has alpha {alpha}; it must be above 0, such as 1.0. None, the "
            "default, mixes nothing."
        )


def _blended(values: Float[Array, "batch *rest"], own: Float[Array, " batch"]):
    weight = own.astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    return weight * values + (1.0 - weight) * jnp.roll(values, 1, axis=0)
