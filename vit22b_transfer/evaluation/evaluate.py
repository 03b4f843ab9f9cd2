"""Evaluation of a checkpoint: predictions of a split, scored by the task's metrics."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.table

from vit22b_transfer import UserError
from vit22b_transfer.data.records import half_character
from vit22b_transfer.host import json_files, whole_files
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
) -> dict[str, Scores]:
    """The scores of a checkpoint by task; a mixture stands for its tasks.

    Predicts as `infer.infer_split` does, into `output_dir`, or takes the predictions
    that are there. Beside the tasks' own metrics stand the loss and accuracies on the
    targets, as `token/...`, or what else the model's `loss_per` is. Prints a table and
    enters the scores as `TASK/SPLIT` in `output_dir/metrics.json`.

    Raises:
      UserError: if something does not fit together, or a task has no metrics or no
        targets in the split.
    """
    from vit22b_transfer.data import tasks as registered

    tasks = [tasks] if isinstance(tasks, str) else tasks
    names = [name for given in tasks for name in registered.task_names(given, split)]
    restored = infer.restore(
        model, partitioning, checkpoint, feature_lengths, batch_size
    )
    eval_step = make_eval_step(model, partitioning)
    results, entries = {}, {}
    for name in dict.fromkeys(names):
        data = infer.SplitToRead(name, split, feature_lengths, batch_size)
        predictions = infer.predict_split(restored, data, output=output_dir, seed=seed)
        scores = score_file(predictions.path, name)
        eval_data = EvalData([name], split, feature_lengths, batch_size)
        with partitioning.activate():
            losses = evaluate_loss(
                eval_data, model, eval_step, restored.params, partitioning
            )
        per = getattr(model, "loss_per", "token")
        own = {
            f"{per}/{key.rpartition('/')[2]}": value for key, value in losses.items()
        }
        results[name] = dataclasses.replace(scores, metrics=scores.metrics | own)
        entries[f"{name}/{split}"] = dataclasses.asdict(results[name]) | {
            "checkpoint": restored.checkpoint,
            "predictions": predictions.path,
        }
    if jax.process_index() == 0:
        path = record_scores(output_dir, entries)
        print_scores({f"{name} {split}": scores for name, scores in results.items()})
        rich.console.Console(soft_wrap=True).print(f"written to {path}", markup=False)
    return results


def score_file(path: str, task_name: str) -> Scores:
    """The task's metrics of a complete file of predictions.

    Raises:
      UserError: if the file is not one, has nothing to score, or the task no metrics.
    """
    return _scores(path, task_name, None)


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
    return text, _scores(path, task_name, text)


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
    """Prints a table with a column for each of `scores`."""
    table = rich.table.Table("metric", *scores)
    rows: dict[str, None] = {}
    for column in scores.values():
        rows |= dict.fromkeys(column.metrics)
    for name in rows:
        table.add_row(
            name, *(_cell(column.metrics.get(name)) for column in scores.values())
        )
    table.add_section()
    for name, attribute in (
        ("examples scored", "num_scored"),
        ("images not read", "num_bad_images"),
        ("empty predictions", "num_empty"),
    ):
        table.add_row(name, *(str(getattr(c, attribute)) for c in scores.values()))
    (console or rich.console.Console()).print(table)


def _scores(path, task_name, prediction):
    """Scores of a file's predictions, or of `prediction` in their place."""
    from vit22b_transfer.data import task_metrics

    examples, predictions, aux = [], [], []
    num_bad_images = num_empty = 0
    for line in read_lines(path):
        if "error" in line:
            num_bad_images += 1
            continue
        if prediction is not None:
            line |= {"prediction": prediction, "score": 0.0}
        examples.append(prediction_lines.example_features(line))
        predictions.append(line["prediction"])
        aux.append(prediction_lines.example_aux(line))
        num_empty += is_empty(line)
        if aux[-1].keys() != aux[0].keys():
            raise UserError(
                f"{path}: the prediction with index {line['index']} has the fields "
                f"{', '.join(aux[-1])}, the first one {', '.join(aux[0])}."
            )
    if not examples:
        raise UserError(
            f"{path} has nothing to score: {num_bad_images} images could not be read."
        )
    if isinstance(predictions[0], str) and not any(map(_has_target, examples)):
        raise UserError(
            f"the examples in {path} have neither targets nor references, so nothing "
            f"to score against. Choose a split of {task_name!r} that has."
        )
    columns = {name: [values[name] for values in aux] for name in aux[0]}
    try:
        metrics = task_metrics.metrics(task_name, examples, predictions, columns)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Scores(metrics, len(examples), num_bad_images, num_empty)


def _has_target(example):
    texts = [example.get("targets_pretokenized"), *example.get("references", [])]
    return any(texts)


def _cell(value):
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4f}"
