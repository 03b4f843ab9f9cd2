"""Token loss and accuracies on evaluation tasks, while training."""

import collections
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from clu import metrics as clu_metrics

from vit22b_transfer import UserError
from vit22b_transfer.partitioning.rules import Partitioning

Metrics = Mapping[str, clu_metrics.Metric]

# Batches handed to the device before the first one's result is awaited.
_BATCHES_AHEAD = 2


class EvaluationStopped(Exception):
    """An evaluation was asked to stop; it has no result."""


def make_eval_step(
    model: Any, partitioning: Partitioning
) -> Callable[[Any, Mapping[str, Any]], Metrics]:
    """The jitted function (params, batch) -> metrics, without dropout."""

    def eval_step(params, batch):
        _, metrics = model.eval_fn(params, batch)
        return dict(metrics)

    return jax.jit(eval_step, out_shardings=partitioning.replicated)


def evaluate_loss(
    eval_data: Any,
    model: Any,
    eval_step: Callable[[Any, Mapping[str, Any]], Metrics],
    params: Any,
    partitioning: Partitioning,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """`eval/<task>/<metric>` of each task of `eval_data` (see `inputs.EvalData`).

    Exact over the examples, whatever the batch size: rows that fill up a batch have no
    weight, and the batches' sums are added up in float64 on the host.

    stop: whether to stop; asked before each task and after each batch.

    Raises:
      EvaluationStopped: if `stop` said so.
      UserError: if no example has a target.
    """
    results = {}
    for task in eval_data.tasks:
        _check(stop)
        total, in_flight = None, collections.deque()
        with contextlib.closing(eval_data.batches(task, model, partitioning)) as rows:
            for batch in rows:
                in_flight.append(eval_step(params, batch.features))
                if len(in_flight) > _BATCHES_AHEAD:
                    total = _added(total, in_flight.popleft())
                _check(stop)
        for metrics in in_flight:
            total = _added(total, metrics)
        if total is None or not total["loss"].count:
            raise UserError(
                f"evaluation task {task!r}, split {eval_data.split!r}: no example has "
                "a target. Choose another split, or no eval_data."
            )
        for name, metric in counted(total).items():
            results[f"eval/{task}/{name}"] = float(metric.compute())
    return results


def counted(metrics: Metrics) -> dict[str, clu_metrics.Metric]:
    """Those of some fetched metrics that something was counted for.

    Of a mixture, an objective that no row had has no mean.
    """
    return {name: x for name, x in metrics.items() if getattr(x, "count", 1) != 0}


def _check(stop):
    if stop():
        raise EvaluationStopped


def _added(total, metrics):
    metrics = jax.tree.map(np.float64, jax.device_get(metrics))
    if total is None:
        return metrics
    return {name: total[name].merge(metrics[name]) for name in metrics}
