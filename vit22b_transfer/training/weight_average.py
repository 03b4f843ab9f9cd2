"""An exponential moving average of the weights, kept in the optimizer's state.

There it is checkpointed, resumed to the bit and laid out like the parameters, in both
runtimes. `checkpoints.averages` reads it, for evaluation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vit22b_transfer import UserError


class AverageState(NamedTuple):
    """Updates so far, and the average in float32; its name is one of the checkpoints'.

    Frozen parameters have no average: they are what they were.
    """

    count: Int[Array, ""]
    weight_average: Any


def average_decay(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """The decay of update `count`, from 1: `min(decay, (1 + count) / (10 + count))`.

    So the average of a short training is not that of its first weights.
    """
    count = count.astype(jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1.0 + count) / (10.0 + count))


def average_weights(decay: float) -> optax.GradientTransformation:
    """The last part of an optax chain: passes updates on, and averages what they make.

    decay: between 0 and 1, such as 0.9999; see `average_decay`. The average starts at
      the initial weights.

    Raises:
      UserError: if the decay is out of its range.
    """
    if not 0.0 < decay < 1.0:
        raise UserError(
            f"ema_decay={decay} must lie between 0 and 1; for no average of the "
            "weights leave it out."
        )

    def init(params):
        # A copy: the step gives away the memory of both.
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return AverageState(jnp.zeros((), jnp.int32), average)

    def update(updates, state, params):
        count = optax.safe_increment(state.count)
        step = 1.0 - average_decay(decay, count)
        average = jax.tree.map(
            lambda old, new: old + step * (new.astype(jnp.float32) - old),
            state.weight_average,
            optax.apply_updates(params, updates),
        )
        return updates, AverageState(count, average)

    return optax.GradientTransformation(init, update)
