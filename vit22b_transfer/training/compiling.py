"""Steps compiled for the shapes and shardings of a run, and how far they run ahead."""

import collections
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import steps
from vit22b_transfer.training.instruments import Instruments, Steps
from vit22b_transfer.training.qk_clip import QKClip
from vit22b_transfer.training.spike_guard import SpikeGuard
from vit22b_transfer.training.state import TrainState, shardings_of


def empty_window(
    update: steps.Update,
    state: TrainState,
    batch: steps.Batch,
    base_rng: jax.Array,
    partitioning: Partitioning,
) -> steps.Metrics:
    """Zeros in the form of the metrics of `update`; `state` may be abstract."""
    with partitioning.activate():
        _, metrics = jax.eval_shape(update, state, batch, base_rng)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), metrics)
    return jax.device_put(zeros, partitioning.replicated)


def compile_train_step(
    train_step: Callable[..., Any],
    state: TrainState,
    window: steps.Metrics,
    batch: steps.Batch,
    base_rng: jax.Array,
    partitioning: Partitioning,
    *,
    instrumented: bool = False,
) -> jax.stages.Compiled:
    """`train_step` compiled for these shapes and shardings; `state` may be abstract.

    It gives the state's memory to the new state. instrumented: as it was made.
    """
    replicated = partitioning.replicated
    told = (replicated,) if instrumented else ()
    out_shardings = (shardings_of(state), replicated, *told)
    with partitioning.activate():
        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
        return jitted.lower(state, window, batch, base_rng).compile()


def compile_steps(
    model: Any,
    optimizer: optax.GradientTransformation,
    arguments: tuple[Any, ...],
    *,
    num_microbatches: int,
    window_steps: int,
    instruments: Instruments | None,
    guard: SpikeGuard | None,
    qk_clip: QKClip | None,
) -> Steps:
    """The compiled step of a run, and the one with instruments if there are any.

    arguments: of `compile_train_step` behind the step.
    """
    schedule = getattr(model.optimizer_def, "learning_rate", None)
    compiled = []
    for instrumented in (False,) if instruments is None else (False, True):
        update = steps.make_update(
            model,
            optimizer,
            arguments[-1],
            num_microbatches=num_microbatches,
            instrumented=instrumented,
            qk_clip=qk_clip,
        )
        step = steps.make_train_step(
            update,
            window_steps,
            guard=guard,
            schedule=schedule,
            instrumented=instrumented,
        )
        compiled.append(compile_train_step(step, *arguments, instrumented=instrumented))
    return Steps(compiled, instruments)


class StepsInFlight:
    """Steps handed to the device beyond the one that is known to be finished.

    Two keep it busy, and batches and memory do not pile up. Of slow steps there are
    fewer: a run that is asked to stop has to wait for all of them, which takes no
    longer than ten seconds as long as a step does not; and what the device is idle in
    between, some milliseconds, is little beside them.
    """

    def __init__(self):
        self._windows = collections.deque()
        self._time = time.monotonic()

    def add(self, window: steps.Metrics) -> None:
        """Waits, once the step that gives `window` is handed over, for one before."""
        self._windows.append(window)
        # What the last step took; nothing if it was not waited for.
        now = time.monotonic()
        seconds, self._time = now - self._time, now
        ahead = 2 if seconds < 1.0 else 1 if seconds < 5.0 else 0
        while len(self._windows) > ahead:
            jax.block_until_ready(self._windows.popleft())
