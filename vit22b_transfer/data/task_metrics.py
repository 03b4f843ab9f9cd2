"""The metrics of a registered task, and its majority baseline."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.data import streams
from vit22b_transfer.data import tasks as registered


@runtime_checkable
class _Records(Protocol):
    """A source that gives its texts without reading images."""

    def num_records(self, split: str) -> int: ...

    def record(self, split: str, index: int) -> Any: ...


def metrics(
    task_name: str,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[Any],
    aux_values: Mapping[str, Sequence[Any]],
) -> dict[str, float | str]:
    """The task's own metrics of predictions, as SeqIO's evaluator computes them.

    examples: the task's features beside those of the model, as str, number or list. The
      postprocessor gets them as SeqIO hands them out: bytes and numpy.
    predictions: decoded texts, or what else the model predicts: class ids, vectors.
    aux_values: what the model says of each prediction, such as `scores`; for metric
      functions that ask for it.

    The postprocessor is called with `targets_pretokenized` as the target, and with None
    for tasks without a feature `targets`: it finds what to score against in `example`.

    Raises:
      UserError: if the task has no metrics, or some that need more than this.
    """
    plain, with_aux = functions(task_name)
    targets, outputs = postprocessed(task_name, examples, predictions)
    aux = as_arrays(aux_values)
    results = [function(targets, outputs) for function in plain]
    results += [function(targets, outputs, aux) for function in with_aux]
    return _joined(task_name, results)


def functions(task_name: str) -> tuple[list[Callable], list[Callable]]:
    """The metric functions of a task: of targets and predictions, and with aux values.

    Raises:
      UserError: as `check`.
    """
    check(task_name)
    task = registered.task_named(task_name)
    return [*task.predict_metric_fns], [*task.predict_with_aux_metric_fns]


def postprocessed(
    task_name: str, examples: Sequence[Mapping[str, Any]], predictions: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """What the task's metric functions get: targets and predictions, postprocessed.

    Raises:
      UserError: if an example lacks what the task scores against.
    """
    task = registered.task_named(task_name)
    targets, outputs = [], []
    for example, prediction in zip(examples, predictions, strict=True):
        target = example.get("targets_pretokenized")
        if target is None and "targets" in task.output_features:
            raise UserError(
                f"an example of task {task_name!r} has no targets_pretokenized, the "
                "text to score against; add it in the task's preprocessors."
            )
        example = {name: _as_numpy(name, value) for name, value in example.items()}
        targets.append(task.postprocess_fn(target, example=example, is_target=True))
        outputs.append(
            task.postprocess_fn(prediction, example=example, is_target=False)
        )
    return targets, outputs


def as_arrays(aux_values: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """What the model says of each prediction, as metric functions get it."""
    return {name: _as_array(values) for name, values in aux_values.items()}


def check(task_name: str) -> None:
    """Raises UserError if the task has no metrics, or some that need more than this."""
    task = registered.task_named(task_name)
    known = len(task.predict_metric_fns) + len(task.predict_with_aux_metric_fns)
    others = len(task.metric_objs) - known
    if others or not task.metric_fns:
        raise UserError(
            f"task {task_name!r} has "
            + (f"{others} metrics of another kind" if others else "no metrics")
            + "; its metric_fns must name functions of (targets, predictions) or "
            "(targets, predictions, aux_values), and only those can be computed here."
        )


def most_frequent_target(
    task_name: str, split: str, feature_lengths: Mapping[str, Any]
) -> str:
    """The text that is the target most often; of equals the first in the split.

    Reads no images where the source is one of `data.sources`; else the whole split.
    """
    streams.keep_tensorflow_off_accelerators()
    task = registered.task_named(task_name)
    registered.find_provider(task_name, split)
    if isinstance(task.source, _Records):
        size = task.source.num_records(split)
        targets = (task.source.record(split, i).target for i in range(size))
    else:
        dataset = task.get_dataset(
            feature_lengths, split=split, shuffle=False, trim_output_features=False
        )
        texts = dataset.map(lambda example: {"text": example["targets_pretokenized"]})
        targets = (_text(row["text"]) for row in streams.as_numpy(texts))
    counts = collections.Counter(target for target in targets if target)
    if not counts:
        raise UserError(f"split {split!r} of task {task_name!r} has no targets.")
    return counts.most_common(1)[0][0]


def _as_array(values: Sequence[Any]) -> np.ndarray:
    """Numbers of predictions in the precision in which they were computed."""
    array = np.asarray(values)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _as_numpy(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return np.array([item.encode() for item in value], dtype=object)
    if isinstance(value, np.ndarray):  # texts of a task are arrays of objects
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UserError(
            f"feature {name!r} of an example is no array: {error}"
        ) from error
    if array.dtype == object:
        raise UserError(f"feature {name!r} of an example is no array of one type.")
    return array


def _text(value: Any) -> str:
    return value.decode()


def _joined(
    task_name: str, results: Sequence[Mapping[str, Any]]
) -> dict[str, float | str]:
    joined: dict[str, float | str] = {}
    for result in results:
        for name, value in result.items():
            if name in joined:
                raise UserError(
                    f"two metrics of task {task_name!r} are called {name!r}."
                )
            value = getattr(value, "value", value)  # SeqIO's Scalar and the like
            is_text = isinstance(value, str) or np.ndim(value) > 0
            joined[name] = str(value) if is_text else float(value)
    return joined
