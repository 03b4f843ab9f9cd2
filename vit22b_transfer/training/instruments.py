"""Instruments of a training: what network and gradients tell, every so many steps.

A run with instruments has a second compiled step, the same update with more results
(`models.instruments`), which is taken once in `every` steps; the others are those of a
run without. What is told is logged with the losses of that step:

  instruments/PATH/largest_logit   per attention, of its heads the largest
  instruments/PATH/entropy         in nats, mean of the heads; `entropy_of_heads` in
                                   metrics.jsonl has each one
  instruments/PATH/dead_heads      whose entropy is below 1 % of that of even weights:
                                   each query sees one key, and neither query nor key
                                   kernels learn from it any more
  instruments/PATH/query_rms, key_rms   before QK-norm, over all heads
  instruments/PATH/residual_rms    the residual stream after a block
  instruments/GROUP/gradient_norm, update_norm   of a block's parameters, or of those of
                                   a module outside of all blocks: the mean gradients
                                   before clipping, and what was added to the parameters
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import traverse_util

from vit22b_transfer import UserError
from vit22b_transfer.models import instruments as network

PREFIX = f"{network.COLLECTION}/"
GRADIENT_NORM, UPDATE_NORM = "gradient_norm", "update_norm"
DEAD_HEADS, ENTROPY_OF_HEADS = "dead_heads", "entropy_of_heads"
# Of the entropy of even weights: a head below it has one key per query.
_DEAD_BELOW = 0.01
_STACK = "layers"
_ROOTS = (network.QUERY, network.KEY, network.RESIDUAL, GRADIENT_NORM, UPDATE_NORM)

Metrics = Mapping[str, clu_metrics.Metric]


@dataclasses.dataclass(frozen=True)
class Instruments:
    """When they are read. every: steps, a multiple of those between logs.

    Raises:
      UserError: if it is below 1.
    """

    every: int = 100

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"every={self.every} must be at least 1 step.")

    def check(self, log_every: int) -> None:
        """Raises UserError if a step would be read that is not logged."""
        if self.every % log_every:
            fitting = -(-self.every // log_every) * log_every
            raise UserError(
                f"instruments are read every {self.every} steps, but the run logs "
                f"every {log_every}: what is read is logged with the losses. Set "
                f"instruments.Instruments.every to a multiple of {log_every}, such as "
                f"{fitting}."
            )


@flax.struct.dataclass
class SumOfSquares(clu_metrics.Metric):
    """Squares that belong to one step: the later value counts."""

    # Any: under jax.eval_shape and in tree operations the leaf is no array.
    total: Any

    def merge(self, other: "SumOfSquares") -> "SumOfSquares":
        """The later one."""
        return other

    def compute(self) -> Any:
        """The sum."""
        return self.total


def split(metrics: Metrics) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics of every step, those of the instruments)."""
    parts = {}, {}
    for name, metric in metrics.items():
        parts[name.startswith(PREFIX)][name] = metric
    return parts


def squares_of_groups(tree: Any, name: str) -> dict[str, SumOfSquares]:
    """The sum of the squares of each group of parameters, in float32.

    tree: nested dicts of arrays, gradients or updates. A group is a block, that is all
    below `layers_3`, or below `layers` with a sum for each layer of its arrays' first
    axis; or what else one module holds.
    """
    sums: dict[str, Any] = {}
    for path, array in traverse_util.flatten_dict(tree).items():
        squares = jnp.square(array.astype(jnp.float32))
        place = next((i for i, part in enumerate(path) if _is_stack(part)), None)
        if place is None:
            group, total = path[:-1], jnp.sum(squares)
        elif path[place] == _STACK:
            axes = tuple(range(1, squares.ndim))
            group, total = path[: place + 1], jnp.sum(squares, axis=axes)
        else:
            group, total = path[: place + 1], jnp.sum(squares)
        key = f"{PREFIX}{'/'.join(group)}/{name}"
        sums[key] = sums[key] + total if key in sums else total
    return {key: SumOfSquares(total) for key, total in sums.items()}


def _is_stack(part: str) -> bool:
    return part == _STACK or (
        part.startswith(f"{_STACK}_") and part[len(_STACK) + 1 :].isdecimal()
    )


def readings(told: Metrics) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(value by name, values of the heads by name) of one step, fetched from devices.

    Layers that are stacked become `layers_0`, `layers_1` ... as unrolled ones are
    called. Means of squares and sums of squares become their roots. Values that are not
    finite are left out.
    """
    by_layer: dict[str, Any] = {}
    for name, metric in told.items():
        parts = name.split("/")
        if _STACK in parts:
            place = parts.index(_STACK)
            for i in range(len(jax.tree.leaves(metric)[0])):
                parts[place] = f"{_STACK}_{i}"
                by_layer["/".join(parts)] = jax.tree.map(lambda x, i=i: x[i], metric)
        else:
            by_layer[name] = metric
    values, of_heads = {}, {}
    for name, metric in by_layer.items():
        path, _, kind = name.rpartition("/")
        value = np.asarray(metric.compute(), np.float64)
        if kind in _ROOTS:
            values[name] = np.sqrt(value)
        elif kind == network.LARGEST_LOGIT:
            values[name] = np.max(value)
        elif kind == network.ENTROPY:
            even = np.asarray(by_layer[f"{path}/{network.EVEN_ENTROPY}"].compute())
            values[name] = np.mean(value)
            values[f"{path}/{DEAD_HEADS}"] = np.sum(value < _DEAD_BELOW * even)
            of_heads[f"{path}/{ENTROPY_OF_HEADS}"] = [_short(v) for v in value.tolist()]
    finite = {n: _short(float(v)) for n, v in values.items() if np.isfinite(v)}
    return finite, {n: v for n, v in of_heads.items() if np.all(np.isfinite(v))}


def _short(value: float) -> float:
    """Six digits: a line of a large tower stays of some kilobytes."""
    return float(f"{value:.6g}")


class Steps:
    """The compiled step of a run, and the one with instruments in its turn.

    compiled: (state, window, batch, base rng) -> (state, window); with instruments
      another one after it, which has what is told as a third result.
    """

    def __init__(
        self, compiled: Sequence[Callable[..., Any]], instruments: Instruments | None
    ):
        self._compiled, self._instruments = compiled, instruments
        self._told: Metrics = {}

    def __call__(self, step: int, *arguments: Any) -> tuple[Any, Any]:
        """(state, window) after step number `step`, counted from 1."""
        self._told = {}
        if self._instruments is None or step % self._instruments.every:
            return self._compiled[0](*arguments)
        state, window, self._told = self._compiled[1](*arguments)
        return state, window

    def told(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """`readings` of the last step, empty if it was one without; waits for it."""
        return readings(jax.device_get(self._told)) if self._told else ({}, {})
