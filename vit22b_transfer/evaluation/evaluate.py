"""Evaluation of a checkpoint: predictions of a split, scored by the task's metrics."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.data.records import half_character
from vit22b_transfer.host import json_files, tables, whole_files
from vit22b_transfer.inference import infer, prediction_lines
from vit22b_transfer.inference.prediction_files import is_empty, read_lines
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training.eval_loss import evaluate_loss, make_eval_step
from vit22b_transfer.training.inputs import EvalData

METRICS_FILE = "metrics.json"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Metrics of one file of predictions, and what they are of.

    num_scored: examples in the metrics; all but those whose image could not be read.
    num_empty: blank predictions; they are scored as such.
    """

    metrics: dict[str, float | str]
    num_scored: int
    num_bad_images: int
    num_empty: int


def evaluate_checkpoint(
    model: Any,
    *,
    partitioning: Partitioning,
    checkpoint: str,
    tasks: str | Sequence[str],
    split: str,
    feature_lengths: Mapping[str, Any],
    batch_size: int,
    output_dir: str,
    seed: int = 0,
    max_examples: int | None = None,
    weights: infer.Weights = "trained",
    fixed_rows: int | None = None,
) -> dict[str, Scores]:
    """The scores of a checkpoint by task; a mixture stands for its tasks.

    Predicts as `infer.infer_split` does, into `output_dir`, or takes the predictions
    that are there. Beside the tasks' own metrics stand the loss and accuracies on the
    targets, as `token/...`, or what else the model's `loss_per` is. Prints a table and
    enters the scores as `TASK/SPLIT` in `output_dir/metrics.json`, or
    `TASK/SPLIT/average`.

    weights: the trained ones, or their average, which a training with `ema_decay` kept.

    fixed_rows: see `infer_split`; the loss and accuracies, which are sums over
      batches, still differ by rounding.
    max_examples: for a trial, score no more than the first examples of each task: the
      table says so, and the entry is `TASK/SPLIT/first_N`.

    Raises:
      UserError: if something does not fit together, or a task has no metrics or no
        targets in the split.
    """
    from vit22b_transfer.data import tasks as registered

    registered.check_max_examples(max_examples)
    tasks = [tasks] if isinstance(tasks, str) else tasks
    names = [name for given in tasks for name in registered.task_names(given, split)]
    restored = infer.restore(
        model,
        partitioning,
        checkpoint,
        feature_lengths,
        batch_size,
        weights=weights,
        fixed_rows=fixed_rows,
    )
    suffix = "" if weights == "trained" else f"/{weights}"
    results, entries, titles = {}, {}, []
    eval_step = functools.cache(lambda model: make_eval_step(model, partitioning))
    for name in dict.fromkeys(names):
        data = infer.SplitToRead(name, split, feature_lengths, batch_size, max_examples)
        part, data = restored.judging(data)
        cut = data.cut_to()
        predictions = infer.predict_split(part, data, output=output_dir, seed=seed)
        scores = score_file(predictions.path, name)
        eval_data = EvalData(
            [name], split, data.feature_lengths, batch_size, max_examples=cut
        )
        with partitioning.activate():
            losses = evaluate_loss(
                eval_data, part.model, eval_step(part.model), part.params, partitioning
            )
        per = getattr(part.model, "loss_per", "token")
        own = {
            f"{per}/{key.rpartition('/')[2]}": value for key, value in losses.items()
        }
        results[name] = dataclasses.replace(scores, metrics=scores.metrics | own)
        titles.append(f"{name} {split}" + (f", {data.part()}" if cut else ""))
        entry = f"{name}/{split}" + (f"/first_{cut}" if cut else "") + suffix
        entries[entry] = dataclasses.asdict(results[name]) | {
            "checkpoint": restored.checkpoint,
            "predictions": predictions.path,
        }
    if jax.process_index() == 0:
        path = record_scores(output_dir, entries)
        print_scores(dict(zip(titles, results.values(), strict=True)))
        rich.console.Console(soft_wrap=True).print(f"written to {path}", markup=False)
    return results


def score_file(path: str, task_name: str) -> Scores:
    """The task's metrics of a complete file of predictions.

    Raises:
      UserError: if the file is not one, has nothing to score, or the task no metrics.
    """
    return score_lines(read_lines(path), path, task_name)


def score_majority(
    path: str,
    task_name: str,
    feature_lengths: Mapping[str, Any],
    *,
    train_task: str | None = None,
    train_split: str = "train",
) -> tuple[str, Scores]:
    """The majority baseline and its scores on the examples of a predictions file.

    It predicts for every example the text that is the target most often in
    `train_split` of `train_task` (default: of the task itself).
    """
    from vit22b_transfer.data import task_metrics

    text = task_metrics.most_frequent_target(
        train_task or task_name, train_split, feature_lengths
    )
    return text, score_lines(read_lines(path), path, task_name, prediction=text)


def score_lines(
    lines: Iterable[dict[str, Any]],
    where: str,
    task_name: str,
    *,
    prediction: str | None = None,
) -> Scores:
    """The task's metrics of lines of predictions, or of `prediction` in their place.

    where: what messages call the lines, such as their file.

    Raises:
      UserError: if there is nothing to score, or the task has no metrics.
    """
    from vit22b_transfer.data import task_metrics

    read = collected(lines, where, task_name, prediction=prediction)
    try:
        metrics = task_metrics.metrics(
            task_name, read.examples, read.predictions, read.aux
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Scores(metrics, len(read.examples), read.num_bad_images, read.num_empty)


class Collected(NamedTuple):
    """Lines of predictions in columns, without those whose image could not be read.

    examples: the task's features; aux: what the model says of each prediction.
    """

    lines: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    predictions: list[Any]
    aux: dict[str, list[Any]]
    num_bad_images: int
    num_empty: int


def collected(
    lines: Iterable[dict[str, Any]],
    where: str,
    task_name: str,
    *,
    prediction: str | None = None,
) -> Collected:
    """The columns of lines, which are checked to have something to score.

    Raises:
      UserError: if there is nothing to score, or a prediction tells other things than
        the first.
    """
    kept, examples, predictions, aux = [], [], [], []
    num_bad_images = num_empty = 0
    for line in lines:
        if "error" in line:
            num_bad_images += 1
            continue
        if prediction is not None:
            line |= {"prediction": prediction, "score": 0.0}
        kept.append(line)
        examples.append(prediction_lines.example_features(line))
        predictions.append(line["prediction"])
        aux.append(prediction_lines.example_aux(line))
        num_empty += is_empty(line)
        if aux[-1].keys() != aux[0].keys():
            raise UserError(
                f"{where}: the prediction with index {line['index']} has the fields "
                f"{', '.join(aux[-1])}, the first one {', '.join(aux[0])}."
            )
    if not examples:
        raise UserError(
            f"{where} has nothing to score: {num_bad_images} images could not be read."
        )
    if isinstance(predictions[0], str) and not any(map(_has_target, examples)):
        raise UserError(
            f"the examples in {where} have neither targets nor references, so nothing "
            f"to score against. Choose a split of {task_name!r} that has."
        )
    columns = {name: [values[name] for values in aux] for name in aux[0]}
    return Collected(kept, examples, predictions, columns, num_bad_images, num_empty)


def record_scores(output_dir: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Enters results in `metrics.json`, beside those that are there; returns its path.

    Raises:
      UserError: if the file that is there is no such file.
    """
    path = os.path.join(os.path.abspath(os.path.expanduser(output_dir)), METRICS_FILE)
    known = {}
    if os.path.exists(path):
        known = json_files.read_object(path, advice="Move it away.")
    scores = known | dict(entries)
    text = json.dumps(scores, indent=2, ensure_ascii=False)
    if half_character(text):
        text = json.dumps(scores, indent=2)
    with whole_files.replacing(path) as file:
        file.write(f"{text}\n")
    return path


def print_scores(
    scores: Mapping[str, Scores], *, console: rich.console.Console | None = None
) -> None:
    """Prints a table with a column for each of `scores`, or several if too wide.

    The count of a slice (`x_count/SLICE`) stands behind its metric (`x/SLICE`).
    """
    rows: dict[str, None] = {}
    for column in scores.values():
        rows |= dict.fromkeys(column.metrics)
    counts = {count for name in rows if (count := _count_name(name)) in rows}
    names = [name for name in rows if name not in counts]
    last = {
        "examples scored": "num_scored",
        "images not read": "num_bad_images",
        "empty predictions": "num_empty",
    }
    columns = {}
    for title, column in scores.items():
        cells = [_cell(column.metrics, name) for name in names]
        cells += [str(getattr(column, attribute)) for attribute in last.values()]
        columns[title] = cells
    tables.print_table(
        console or rich.console.Console(),
        [*names, *last],
        columns,
        heading="metric",
        section=len(names),
    )


def _has_target(example):
    texts = [example.get("targets_pretokenized"), *example.get("references", [])]
    return any(texts)


def _cell(metrics, name):
    value, count = metrics.get(name), metrics.get(_count_name(name))
    if value is None:
        return ""
    text = value if isinstance(value, str) else f"{value:.4f}"
    return text if count is None else f"{text} of {count:.0f}"


def _count_name(name):
    metric, _, part = name.partition("/")
    return f"{metric}_count/{part}"
