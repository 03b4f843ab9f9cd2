"""Partitioned inference over a whole split, into an ordered file of JSON lines."""

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import fingerprints
from vit22b_transfer.host import disk_errors, progress, whole_files
from vit22b_transfer.inference import predicting
from vit22b_transfer.inference.decoding import decode_settings
from vit22b_transfer.inference.prediction_files import LineWriter, PredictionFiles
from vit22b_transfer.inference.prediction_shards import ShardFiles
from vit22b_transfer.inference.restored import (
    RestoredModel,
    SplitToRead,
    Weights,
    restore,
)
from vit22b_transfer.partitioning import processes
from vit22b_transfer.partitioning.rules import Partitioning

# Whose versions a manifest tells.
_PACKAGES = ("vit22b_transfer", "jax", "flax", "orbax-checkpoint", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A complete file of predictions, and what this call did for it.

    num_examples: lines, those of bad images among them.
    num_bad_images: examples without a prediction because of the policy 'skip'.
    num_empty: blank predictions.
    reused: the file was complete already; nothing was computed.
    num_resumed: lines that stopped runs had left.
    """

    path: str
    num_examples: int
    num_bad_images: int
    num_empty: int
    reused: bool
    num_resumed: int = 0


def infer_split(
    model: Any,
    *,
    partitioning: Partitioning,
    checkpoint: str,
    task: str,
    split: str,
    feature_lengths: Mapping[str, Any],
    batch_size: int,
    output: str,
    seed: int = 0,
    max_examples: int | None = None,
    weights: Weights = "trained",
    fixed_rows: int | None = None,
    shard: tuple[int, int] | None = None,
    recipe: str = "",
) -> Predictions | None:
    """Predictions of `model` for every example of a split, as JSON lines in order.

    checkpoint: one, or a directory of them, of which the latest is taken.
    output: a path ending in .jsonl, or a directory, in which the file is then called
      TASK-SPLIT-CHECKPOINT.jsonl, or TASK-SPLIT-CHECKPOINT-average.jsonl.
    weights: the trained ones, or their average, which a training with `ema_decay` kept.
    seed: of `decoding.sample`: what is drawn of an example depends on it and on the
      example's index alone, but for rounding: batch size and mesh decide in which order
      sums are taken, unless there are `fixed_rows`.
    max_examples: for a trial, predict no more than the first ones. The file is then
      called TASK-SPLIT-CHECKPOINT-first_N.jsonl, its record holds `max_examples`, and
      it is never taken for one of the whole split, nor gone on from.

    fixed_rows: examples that a device computes at a time; the bytes of a line then
      depend on neither batch size nor mesh, and a stopped run may go on with others.
      None: all that it has of a batch, which is quicker.
    shard: (i, n): be the i-th, from 0, of n jobs that fill one file, each alone with
      its devices; it makes every n-th batch of those that are not there. Whoever ends
      last merges; the others return None.
    recipe: what the manifest, `OUTPUT.run.json`, says of where the settings come from.

    A line holds index, image_id, question_id, prompt, prediction and score, what the
    task knows beside them (target, references, metadata), and of an image that could
    not be read its `error` in place of a prediction; never pixels. A run that was
    stopped goes on where it was and ends with the same bytes; one that was complete is
    reused.

    Raises:
      UserError: if something does not fit together, or if what the output holds was
        made by another model, task or setting: nothing is overwritten.
    """
    from vit22b_transfer.data import tasks as registered

    registered.task_names(task, split)  # an error now, not after the parameters' read
    registered.check_max_examples(max_examples)
    if shard is not None:
        _check_shard(shard)
    restored = restore(
        model,
        partitioning,
        checkpoint,
        feature_lengths,
        batch_size,
        weights=weights,
        fixed_rows=fixed_rows,
    )
    data = SplitToRead(task, split, feature_lengths, batch_size, max_examples)
    restored, data = restored.judging(data)
    run = {"output": output, "seed": seed, "recipe": recipe}
    if shard is None:
        return predict_split(restored, data, **run)
    return predict_shard(restored, data, shard, **run)


def _check_shard(shard: tuple[int, int]) -> None:
    index, count = shard
    if not 0 <= index < count <= 99_999:
        raise UserError(
            f"shard {index}/{count}: the first number is from 0 to the second minus 1."
        )
    if jax.process_count() > 1:
        raise UserError(
            "shards are jobs of one process each; several processes of one job divide "
            "the work by themselves. Leave --shard or --distributed out."
        )


def _prediction_files(
    restored: RestoredModel, data: SplitToRead, output: str, seed: int, recipe: str
) -> PredictionFiles:
    """The files of a run; UserError for what does not fit, before any is written."""
    from vit22b_transfer.data import tasks as registered

    registered.task_names(data.task, data.split)
    registered.check_vocabularies(data.task, restored.model)
    registered.check_classes(data.task, restored.model)
    about = {
        "versions": {
            n: metadata.version(n) for n in ("vit22b_transfer", "jax", "flax")
        },
        "devices": jax.devices()[0].device_kind,
        "left_out_of_the_split": registered.skipped_text(data.task, data.split),
    }
    return PredictionFiles(
        _output_path(output, data, restored),
        _fingerprint(restored, data, seed),
        host=jax.process_index(),
        num_hosts=jax.process_count(),
        about=about | ({"recipe": recipe} if recipe else {}),
    )


def predict_shard(
    restored: RestoredModel,
    data: SplitToRead,
    shard: tuple[int, int],
    *,
    output: str,
    seed: int = 0,
    recipe: str = "",
) -> Predictions | None:
    """As `infer_split` with a shard, for a model that is restored already."""
    from vit22b_transfer.data import tasks as registered

    console = progress.console()
    files = _prediction_files(restored, data, output, seed, recipe)
    total = data.cut_to() or registered.num_examples(data.task, data.split)
    if total is None:
        raise UserError(
            f"the source of task {data.task!r} does not tell how many examples "
            f"{data.split!r} has, so they cannot be dealt out; leave --shard out."
        )
    if files.is_complete():
        files.remove_left()
        console.print(f"reusing the predictions in {files.path}", markup=False)
        return Predictions(files.path, **files.summary(), reused=True)
    index, count = shard
    shards = ShardFiles(files)
    with (
        disk_errors.said(os.path.dirname(files.path), files.kept),
        shards.entered(index, count) as part,
    ):
        missing = shards.missing(data.batch_size, total)
        mine = [number for number in missing if number % count == index]
        if mine:
            with part() as writer:
                _predict(restored, data, mine, writer, console, seed)
    summary = shards.merge(total)
    if summary is None:
        console.print(
            f"shard {index} of {count} is done: {shards.num_written()} of {total} "
            f"examples of {files.path} are there",
            markup=False,
        )
        return None
    console.print(
        f"{summary['num_examples']} predictions in {files.path}", markup=False
    )
    return Predictions(files.path, **summary, reused=False)


def predict_split(
    restored: RestoredModel,
    data: SplitToRead,
    *,
    output: str,
    seed: int = 0,
    recipe: str = "",
) -> Predictions:
    """As `infer_split`, for a model that is restored already."""
    from vit22b_transfer.data import tasks as registered

    console = progress.console(quiet=jax.process_index() > 0)
    files = _prediction_files(restored, data, output, seed, recipe)
    left_out = registered.skipped_text(data.task, data.split)
    left_out = f"; left out of the split: {left_out}" if left_out else ""
    part = f", of {data.part()} (max_examples)" if data.part() else ""
    with contextlib.ExitStack() as stack:
        folder = os.path.dirname(files.path)
        stack.enter_context(disk_errors.said(folder, files.kept))
        if jax.process_index() == 0:
            stack.enter_context(files.lock())
            ShardFiles(files).check_none_writes()
        processes.wait_for_all("predictions locked")
        if files.is_complete():
            if jax.process_index() == 0:
                files.remove_left()
            console.print(
                f"reusing the predictions in {files.path}{part}{left_out}", markup=False
            )
            return Predictions(files.path, **files.summary(), reused=True)
        begun = _recovered(files, data, console)
        start = len(begun) * data.batch_size
        with files.writer() as writer:
            todo = _not_begun(data, begun)
            _predict(restored, data, todo, writer, console, seed)
        processes.wait_for_all("predictions written")
        if jax.process_index() == 0:
            files.merge()
        processes.wait_for_all("predictions merged")
        summary = files.summary()
    result = Predictions(files.path, **summary, reused=False, num_resumed=start)
    predicted = result.num_examples - result.num_bad_images
    console.print(
        f"{predicted} predictions in {files.path}{part} ({result.num_empty} of them "
        f"are empty); {result.num_bad_images} images could not be read{left_out}",
        markup=False,
    )
    return result


def _recovered(
    files: PredictionFiles, data: SplitToRead, console: rich.console.Console
) -> list[int]:
    """Numbers of the batches that stopped runs had left, on every host."""
    processes.wait_for_all("predictions looked")
    if jax.process_index() == 0:
        recovered = files.recover(data.batch_size)
        if recovered.num_lines or recovered.num_dropped:
            console.print(
                f"resuming {files.path}: {recovered.num_lines} lines are there, "
                f"{recovered.num_dropped} cut or beyond the last whole batch are made "
                "again",
                markup=False,
            )
    processes.wait_for_all("predictions recovered")
    return files.begun(data.batch_size)


def _not_begun(data: SplitToRead, begun: list[int]) -> list[int] | int:
    """The batches to make: their numbers, or the first of all that are left."""
    from vit22b_transfer.data import tasks as registered

    if begun == list(range(len(begun))):
        return len(begun)
    total = data.cut_to() or registered.num_examples(data.task, data.split)
    assert total is not None  # gaps are what shards leave, which know it
    return sorted(set(range(-(-total // data.batch_size))) - set(begun))


def _predict(
    restored: RestoredModel,
    data: SplitToRead,
    todo: list[int] | int,
    writer: LineWriter,
    console: rich.console.Console,
    seed: int,
) -> None:
    """Writes this host's lines of the batches `todo`, or of all from that one on."""
    from vit22b_transfer.data import batches, image_lengths
    from vit22b_transfer.data import tasks as registered

    model = restored.model
    cut, size = data.cut_to(), data.batch_size
    total = cut or registered.num_examples(data.task, data.split)
    if isinstance(todo, int):
        start, only, numbers = todo * size, None, itertools.count(todo)
        done = start
    else:
        start, only, numbers = 0, todo, todo
        done = max(0, (total or 0) - len(todo) * size)
    if start == total or only == []:
        return  # stopped between the last line and the merge
    with (
        batches.eval_batches(
            data.task,
            data.split,
            feature_lengths=data.feature_lengths,
            converter_cls=image_lengths.converter_of(model),
            batch_size=data.batch_size,
            partitioning=restored.partitioning,
            start_index=start,
            max_examples=cut,
            only=only,
        ) as rows,
        restored.partitioning.activate(),
        progress.Progress(
            console, f"{data.task} {data.split}", total=total, done=done
        ) as bar,
    ):
        for _, lines in predicting.predicted_lines(
            rows,
            model,
            restored.predict,
            restored.params,
            batch_size=size,
            numbers=numbers,
            seed=seed,
            shared=restored.shared,
        ):
            writer.write(lines)
            done += size
            bar.show(done)
        if shortened := rows.counters.lost.get("truncated_inputs"):
            console.print(
                f"{shortened} prompts were longer than "
                f"{data.feature_lengths['inputs']} tokens and were cut",
                markup=False,
            )


def _fingerprint(restored, data, seed):
    from vit22b_transfer.data import image_lengths, vocabularies
    from vit22b_transfer.data import tasks as registered

    model = restored.model
    facts = {
        "task": data.task,
        "split": data.split,
        "num_examples": registered.num_examples(data.task, data.split),
        "checkpoint": os.path.basename(restored.checkpoint),
        "parameters": restored.params_digest,
        "model": fingerprints.text_digest(repr(model.module)),
        "feature_lengths": image_lengths.described(data.feature_lengths, model),
        "seed": seed,
    }
    if restored.fixed_rows is None:
        facts["batch_size"] = data.batch_size
    else:
        facts["fixed_rows"] = restored.fixed_rows
    if said := registered.digest(data.task):
        facts["examples"] = said
    if (cut := data.cut_to()) is not None:
        facts["max_examples"] = cut
    if settings := getattr(model, "prediction_settings", None):
        facts["predictions"] = settings
    if getattr(model, "decode_fn", None) is not None:
        facts |= {
            "vocabulary": vocabularies.fingerprint(model.output_vocabulary),
            "decoding": decode_settings(model.decode_fn),
            "max_decode_length": model.max_decode_length,
        }
    return facts


def _output_path(output, data, restored):
    """The absolute path of the file; its directory is made and can be written."""
    path = os.path.abspath(os.path.expanduser(output))
    if not path.endswith(".jsonl"):
        parts = [data.task, data.split, os.path.basename(restored.checkpoint)]
        parts += [f"first_{cut}"] if (cut := data.cut_to()) else []
        if restored.weights != "trained":
            parts.append(restored.weights)
        name = "-".join(re.sub(r"[^\w.+-]+", "_", part) for part in parts)
        path = os.path.join(path, f"{name}.jsonl")
    whole_files.writable_directory(os.path.dirname(path), "output directory")
    return path
