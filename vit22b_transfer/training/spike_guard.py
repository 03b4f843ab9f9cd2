"""A guard against spikes: steps whose loss or gradients leave a running band.

Whether a step counts is decided inside the compiled step, from its own loss and
gradient norm: of one that does not, parameters and optimizer state stay what they were,
to the bit. The host looks at what was decided where the loop waits for the device
anyway, when it logs (`spike_watch`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training.state import TrainState

# The guard's place among the metrics of a window.
KEY = "spike_guard"
# Why a step was skipped, by the number that the step gives.
REASONS = (
    "",
    "loss is not finite",
    "gradient norm is not finite",
    "loss left its band",
    "gradient norm left its band",
)
# Of the running mean and variance, per step that counts.
_DECAY = 0.98
# The least deviation of a logarithm: about 5 %.
_LEAST_DEVIATION = 0.05
_SMALLEST = 1e-30


class Band(NamedTuple):
    """What goes on from step to step, and from session to session.

    mean, variance: of the logarithms of loss and gradient norm, float32 [2].
    count: steps that made them. streak: steps skipped in a row, up to now.
    skipped: in all. lag: steps that the optimizer's schedule is behind.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    mean: Any
    variance: Any
    count: Any
    streak: Any
    skipped: Any
    lag: Any


class Ring(NamedTuple):
    """The steps of a window: number of the reason [W], loss and gradient norm [2, W].

    A session does not keep it for the next: what it holds is written before a
    checkpoint is.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    reason: Any
    values: Any


class Guard(NamedTuple):
    """What the window of a guarded run holds beside its metrics."""

    band: Band
    ring: Ring


@dataclasses.dataclass(frozen=True)
class SpikeGuard:
    """When a step is a spike, and when a run goes back.

    deviations: above the running mean, of the running deviation, both of the logarithm;
      more than 0. What is not finite is always a spike.
    settle_steps: steps that count before the band does; at least 1.
    max_skips: after so many steps skipped in a row the run goes back to its last good
      checkpoint, when it logs; at least 1. After twice as many the next time, if that
      is to the same checkpoint.

    Raises:
      UserError: for a value out of its range.
    """

    deviations: float = 6.0
    settle_steps: int = 50
    max_skips: int = 10

    def __post_init__(self):
        if not 0.0 < self.deviations < float("inf"):
            raise UserError(
                f"deviations={self.deviations} must be greater than 0; to let every "
                "step count set train.fine_tune.guard=None."
            )
        for name in ("settle_steps", "max_skips"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")

    def advance(
        self,
        old: TrainState,
        new: TrainState,
        window: Mapping[str, Any],
        metrics: Mapping[str, Any],
        merged: Callable[[Any, Any], Any],
        place: Int[Array, ""],
        schedule: Callable[[Int[Array, ""]], Float[Array, ""]] | None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """(state, window) after a step, which counts or not.

        merged: (window's metrics, this step's) -> both. place: of the step in its
        window; at 0 the window begins anew. schedule: that of the optimizer, which
        counts the steps that count.
        """
        guard: Guard = window[KEY]
        loss = metrics["loss"]
        weight = loss.count.astype(jnp.float32)
        value = loss.total / jnp.where(weight > 0, weight, 1.0)
        values = jnp.stack([value, metrics["grad_norm"].total]).astype(jnp.float32)
        reason = self._reason(values, guard.band)
        counts = reason == 0
        # A batch of nothing but skipped examples has no loss to learn a band from.
        band = _advanced(guard.band, values, counts, counts & (weight > 0))
        if schedule is not None:
            rate = metrics["learning_rate"]
            rate = rate.replace(total=schedule(old.step - guard.band.lag))
            metrics = dict(metrics, learning_rate=rate)

        def chosen(new, old):
            return jax.tree.map(lambda n, o: jnp.where(counts, n, o), new, old)

        before = {name: metric for name, metric in window.items() if name != KEY}
        fresh = jax.tree.map(lambda x: jnp.where(place == 0, 0, x), before)
        after = chosen(merged(before, metrics), fresh)
        ring = jax.tree.map(lambda x: jnp.where(place == 0, 0, x), guard.ring)
        ring = Ring(
            ring.reason.at[place].set(reason), ring.values.at[:, place].set(values)
        )
        state = TrainState(
            new.step,
            chosen(new.params, old.params),
            chosen(new.opt_state, old.opt_state),
        )
        return state, after | {KEY: Guard(band, ring)}

    def _reason(self, values: Float[Array, "2"], band: Band) -> Int[Array, ""]:
        deviation = jnp.sqrt(band.variance + _LEAST_DEVIATION**2)
        beyond = _logarithms(values) > band.mean + self.deviations * deviation
        beyond = beyond & (band.count >= self.settle_steps)
        finite = jnp.isfinite(values)
        conditions = jnp.stack([~finite[0], ~finite[1], beyond[0], beyond[1]])
        first = jnp.argmax(conditions).astype(jnp.int32) + 1
        return jnp.where(jnp.any(conditions), first, 0)


def empty_guard(window_steps: int, partitioning: Partitioning) -> Guard:
    """The guard before the first step."""
    number, pair = np.zeros((), np.int32), np.zeros(2, np.float32)
    band = Band(pair, pair, number, number, number, number)
    ring = Ring(
        np.zeros(window_steps, np.int32), np.zeros((2, window_steps), np.float32)
    )
    return jax.device_put(Guard(band, ring), partitioning.replicated)


def _advanced(band, values, counts, learns):
    steps = band.count.astype(jnp.float32) + 1.0
    rate = jnp.maximum(1.0 / steps, 1.0 - _DECAY)
    difference = _logarithms(values) - band.mean
    mean = band.mean + rate * difference
    variance = (1.0 - rate) * (band.variance + rate * jnp.square(difference))
    skipped = 1 - counts.astype(jnp.int32)
    return Band(
        jnp.where(learns, mean, band.mean),
        jnp.where(learns, variance, band.variance),
        band.count + learns.astype(jnp.int32),
        jnp.where(counts, 0, band.streak + 1),
        band.skipped + skipped,
        band.lag + skipped,
    )


def _logarithms(values):
    return jnp.log(jnp.maximum(values, _SMALLEST))
