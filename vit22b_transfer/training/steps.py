"""The compiled step: one update of the parameters.

Metrics are dicts of `clu.metrics` as the model returns them. They are merged on the
device over a window of steps, so that the loop need not wait for any single step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from vit22b_transfer.models import freezing
from vit22b_transfer.models.instruments import recorded_loss
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import instruments as readings
from vit22b_transfer.training import microbatches
from vit22b_transfer.training.qk_clip import CLIPPED, QKClip
from vit22b_transfer.training.spike_guard import SpikeGuard
from vit22b_transfer.training.state import TrainState

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
    qk_clip: QKClip | None = None,
) -> Update:
    """The function (state, batch, base rng) -> (state, metrics) of one optimizer step.

    Only the parameters that `model.frozen` leaves over are differentiated. The model's
    losses are sums: the gradients of all microbatches are added up in float32 and
    divided once, by the weight of the whole batch. Adds `grad_norm`, of the trained
    gradients before clipping, and the used `learning_rate` if the optimizer tells it;
    with `instrumented` also what `training.instruments` names. `qk_clip` scales heads
    of the new parameters, and adds how many they were.

    Raises:
      UserError: for microbatches of a model with `loss_spans_batch`: each example's
        loss depends on the others of its batch, so parts of a batch have another loss.
    """
    microbatches.check(model, num_microbatches)
    recorded = instrumented or qk_clip is not None
    loss_fn = recorded_loss(model) if recorded else model.loss_fn

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
            count = num_microbatches
            parts = microbatches.split(batch, count, partitioning)
            grads, metrics = microbatches.accumulate(gradients, parts, rng, count)
        grads = mean_gradients(grads, metrics)
        params, opt_state = apply_gradients(
            optimizer, grads, state.opt_state, state.params, model.frozen
        )

        one = jnp.ones((), jnp.float32)
        if qk_clip is not None:
            params, clipped = qk_clip.clip(params, metrics, model.frozen)
            if not instrumented:
                metrics, _ = readings.split(metrics)
            count = clu_metrics.Average(total=clipped, count=one)
            metrics = dict(metrics, **{CLIPPED: count})
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
            return microbatches.merge(window, metrics, place == 0)

        if guard is None:
            result = new_state, merged(window, metrics)
        else:
            result = guard.advance(
                state, new_state, window, metrics, merged, place, schedule
            )
        return (*result, told) if instrumented else result

    return train_step


def _trained(new, old, frozen_patterns):
    return (freezing.split_frozen(tree, frozen_patterns)[0] for tree in (new, old))


def _moved(new, old):
    return new.astype(jnp.float32) - old.astype(jnp.float32)
