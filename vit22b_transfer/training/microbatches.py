"""A batch in parts: gradients and metrics of each, added up."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from jax.sharding import NamedSharding, PartitionSpec

from vit22b_transfer import UserError
from vit22b_transfer.partitioning.rules import Partitioning

Metrics = Mapping[str, clu_metrics.Metric]


def check(model: Any, num_microbatches: int) -> None:
    """Raises UserError if the model's loss is not a sum over parts of a batch."""
    if num_microbatches > 1 and getattr(model, "loss_spans_batch", False):
        raise UserError(
            f"num_microbatches={num_microbatches}, but the loss of "
            f"{type(model).__name__} compares all examples of a batch, or is a mean "
            "over them, so that it is another in parts of a batch. Set "
            "num_microbatches=1; a smaller batch, a larger mesh or remat='block' save "
            "memory."
        )


def split(batch: Mapping[str, Any], count: int, partitioning: Partitioning) -> Any:
    """Batch with a leading microbatch axis; each takes every `count`-th example.

    Consecutive examples would sit on few devices and had to be moved to the others.
    """

    def parted(array):
        rows = array.shape[0]
        parts = array.reshape(rows // count, count, *array.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, *partitioning.batch_sharding(array.ndim).spec)
        sharding = NamedSharding(partitioning.mesh, spec)
        return jax.lax.with_sharding_constraint(parts, sharding)

    return jax.tree.map(parted, batch)


def accumulate(
    gradients: Callable[..., Any], parts: Any, rng: jax.Array, count: int
) -> tuple[Any, Any]:
    """(sum of the gradients, merged metrics) of `gradients` over all parts."""

    def body(carry, part):
        index, batch = part
        grads, metrics = gradients(batch, jax.random.fold_in(rng, index))
        total, merged = carry
        total = jax.tree.map(jnp.add, total, grads)
        return (total, merge(merged, metrics, index == 0)), None

    first = jax.tree.map(lambda array: array[0], parts)
    shapes = jax.eval_shape(gradients, first, rng)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(body, zeros, (jnp.arange(count), parts))
    return grads, metrics


def merge(merged: Metrics, new: Metrics, restart: Any) -> Metrics:
    """`new` if `restart`, else both merged; metrics of any kind need no empty value."""
    both = {name: merged[name].merge(new[name]) for name in new}
    return jax.tree.map(lambda b, n: jnp.where(restart, n, b), both, dict(new))
