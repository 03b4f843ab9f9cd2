"""The compiled step: one update of the parameters.

Metrics are dicts of `clu.metrics` as the model returns them. They are merged on the
device over a window of steps, so that the loop need not wait for any single step.
"""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from jax.sharding import NamedSharding, PartitionSpec

from vit22b_transfer import UserError
from vit22b_transfer.models import freezing
from vit22b_transfer.models.instruments import recorded_loss
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import instruments as readings
from vit22b_transfer.training.spike_guard import SpikeGuard
from vit22b_transfer.training.state import TrainState, shardings_of

Metrics = Mapping[str, clu_metrics.Metric]
Batch = Mapping[str, Any]
Update = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_update(
    model: Any,
    optimizer: optax.GradientTransformation,
    partitioning: Partitioning,
    *,
    num_microbatches: int = 1,
    instrumented: bool = False,
) -> Update:
    """The function (state, batch, base rng) -> (state, metrics) of one optimizer step.

    Only the parameters that `model.frozen` leaves over are differentiated. The model's
    losses are sums: the gradients of all microbatches are added up in float32 and
    divided once, by the weight of the whole batch. Adds `grad_norm`, of the trained
    gradients before clipping, and the used `learning_rate` if the optimizer tells it;
    with `instrumented` also what `training.instruments` names.

    Raises:
      UserError: for microbatches of a model with `loss_spans_batch`: each example's
        loss depends on the others of its batch, so parts of a batch have another loss.
    """
    check_microbatches(model, num_microbatches)
    loss_fn = recorded_loss(model) if instrumented else model.loss_fn

    def update(state, batch, base_rng):
        trainable, frozen = freezing.split_frozen(state.params, model.frozen)

        def loss(trainable, batch, rng):
            params = freezing.merge_frozen(trainable, frozen)
            return loss_fn(params, batch, rng)

        def gradients(batch, rng):
            grads, metrics = jax.grad(loss, has_aux=True)(trainable, batch, rng)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics

        rng = jax.random.fold_in(base_rng, state.step)
        if num_microbatches == 1:
            grads, metrics = gradients(batch, rng)
        else:
            parts = _microbatches(batch, num_microbatches, partitioning)
            grads, metrics = _accumulate(gradients, parts, rng, num_microbatches)
        grads = mean_gradients(grads, metrics)
        params, opt_state = apply_gradients(
            optimizer, grads, state.opt_state, state.params, model.frozen
        )

        one = jnp.ones((), jnp.float32)
        norm = optax.tree.norm(grads)
        metrics = dict(metrics, grad_norm=clu_metrics.Average(total=norm, count=one))
        schedule = getattr(model.optimizer_def, "learning_rate", None)
        if schedule is not None:
            rate = schedule(state.step)
            metrics["learning_rate"] = clu_metrics.LastValue(total=rate, count=one)
        if instrumented:
            moved = jax.tree.map(_moved, *_trained(params, state.params, model.frozen))
            squares = readings.squares_of_groups
            metrics |= squares(grads, readings.GRADIENT_NORM)
            metrics |= squares(moved, readings.UPDATE_NORM)
        return TrainState(state.step + 1, params, opt_state), metrics

    return update


def check_microbatches(model: Any, num_microbatches: int) -> None:
    """Raises UserError if the model's loss is not a sum over parts of a batch."""
    if num_microbatches > 1 and getattr(model, "loss_spans_batch", False):
        raise UserError(
            f"num_microbatches={num_microbatches}, but the loss of "
            f"{type(model).__name__} compares all examples of a batch, so that it is "
            "another in parts of a batch. Set num_microbatches=1; a smaller batch, a "
            "larger mesh or remat='block' save memory."
        )


def mean_gradients(grads: Any, metrics: Metrics) -> Any:
    """Gradients of a sum of losses, in float32 divided by the weight of its tokens."""
    weight = metrics["loss"].count.astype(jnp.float32)
    # A batch of nothing but skipped examples has zero gradients, not 0 / 0.
    weight = jnp.where(weight > 0, weight, jnp.ones_like(weight))
    return jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    grads: Any,
    opt_state: Any,
    params: Any,
    frozen_patterns: Sequence[str],
) -> tuple[Any, Any]:
    """(new parameters, new optimizer state); frozen parameters are passed through.

    `grads` need hold nothing for the frozen ones; what it holds of them is not read.
    """
    trainable, frozen = freezing.split_frozen(params, frozen_patterns)
    placeholders = jax.tree.map(jnp.zeros_like, frozen)
    updates, opt_state = optimizer.update(
        freezing.merge_frozen(grads, placeholders), opt_state, params
    )
    if frozen:
        updates, _ = freezing.split_frozen(updates, frozen_patterns)
    updated = optax.apply_updates(trainable, updates)
    return freezing.merge_frozen(updated, frozen), opt_state


def make_train_step(
    update: Update,
    window_steps: int,
    *,
    guard: SpikeGuard | None = None,
    schedule: Callable[..., Any] | None = None,
    instrumented: bool = False,
):
    """The function (state, window, batch, base rng) -> (state, window).

    `window` holds the merged metrics since the last multiple of `window_steps`, and
    what `guard` keeps there; it decides whether a step counts. schedule: of the
    learning rate, for the guard's account of it. With `instrumented`, as of `update`,
    there is a third result: what the instruments tell.
    """

    def train_step(state, window, batch, base_rng):
        new_state, metrics = update(state, batch, base_rng)
        metrics, told = readings.split(metrics)
        place = state.step % window_steps

        def merged(window, metrics):
            return _merge(window, metrics, place == 0)

        if guard is None:
            result = new_state, merged(window, metrics)
        else:
            result = guard.advance(
                state, new_state, window, metrics, merged, place, schedule
            )
        return (*result, told) if instrumented else result

    return train_step


def empty_window(
    update: Update,
    state: TrainState,
    batch: Batch,
    base_rng: jax.Array,
    partitioning: Partitioning,
) -> Metrics:
    """Zeros in the form of the metrics of `update`; `state` may be abstract."""
    with partitioning.activate():
        _, metrics = jax.eval_shape(update, state, batch, base_rng)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), metrics)
    return jax.device_put(zeros, partitioning.replicated)


def compile_train_step(
    train_step: Callable[..., Any],
    state: TrainState,
    window: Metrics,
    batch: Batch,
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
    instruments: readings.Instruments | None,
    guard: SpikeGuard | None,
) -> readings.Steps:
    """The compiled step of a run, and the one with instruments if there are any.

    arguments: of `compile_train_step` behind the step.
    """
    schedule = getattr(model.optimizer_def, "learning_rate", None)
    compiled = []
    for instrumented in (False,) if instruments is None else (False, True):
        update = make_update(
            model,
            optimizer,
            arguments[-1],
            num_microbatches=num_microbatches,
            instrumented=instrumented,
        )
        step = make_train_step(
            update,
            window_steps,
            guard=guard,
            schedule=schedule,
            instrumented=instrumented,
        )
        compiled.append(compile_train_step(step, *arguments, instrumented=instrumented))
    return readings.Steps(compiled, instruments)


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

    def add(self, window: Metrics) -> None:
        """Waits, once the step that gives `window` is handed over, for one before."""
        self._windows.append(window)
        # What the last step took; nothing if it was not waited for.
        now = time.monotonic()
        seconds, self._time = now - self._time, now
        ahead = 2 if seconds < 1.0 else 1 if seconds < 5.0 else 0
        while len(self._windows) > ahead:
            jax.block_until_ready(self._windows.popleft())


def _trained(new, old, frozen_patterns):
    return (freezing.split_frozen(tree, frozen_patterns)[0] for tree in (new, old))


def _moved(new, old):
    return new.astype(jnp.float32) - old.astype(jnp.float32)


def _microbatches(batch, count, partitioning):
    """Batch with a leading microbatch axis; each takes every `count`-th example.

    Consecutive examples would sit on few devices and had to be moved to the others.
    """

    def split(array):
        rows = array.shape[0]
        parts = array.reshape(rows // count, count, *array.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, *partitioning.batch_sharding(array.ndim).spec)
        sharding = NamedSharding(partitioning.mesh, spec)
        return jax.lax.with_sharding_constraint(parts, sharding)

    return jax.tree.map(split, batch)


def _accumulate(gradients, parts, rng, count):
    def body(carry, part):
        index, batch = part
        grads, metrics = gradients(batch, jax.random.fold_in(rng, index))
        total, merged = carry
        total = jax.tree.map(jnp.add, total, grads)
        return (total, _merge(merged, metrics, index == 0)), None

    first = jax.tree.map(lambda array: array[0], parts)
    shapes = jax.eval_shape(gradients, first, rng)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(body, zeros, (jnp.arange(count), parts))
    return grads, metrics


def _merge(merged, new, restart):
    """`new` if `restart`, else both merged; metrics of any kind need no empty value."""
    both = {name: merged[name].merge(new[name]) for name in new}
    return jax.tree.map(lambda b, n: jnp.where(restart, n, b), both, dict(new))
