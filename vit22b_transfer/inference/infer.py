"""Partitioned inference over a whole split, into an ordered file of JSON lines."""

import contextlib
import dataclasses
import functools
import os
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import (
    averages,
    fingerprints,
    identity,
    reading,
    restoring,
)
from vit22b_transfer.host import disk_errors, progress, whole_files
from vit22b_transfer.inference import predicting
from vit22b_transfer.inference.prediction_files import LineWriter, PredictionFiles
from vit22b_transfer.partitioning import processes
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training.state import abstract_variables, shardings_of

Weights = Literal["trained", "average"]


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


@dataclasses.dataclass(frozen=True)
class RestoredModel:
    """A model with the parameters of a checkpoint on the devices of a mesh.

    weights: which of the checkpoint's: see `infer_split`.
    """

    model: Any
    partitioning: Partitioning
    checkpoint: str
    params: Any
    weights: str = "trained"

    @functools.cached_property
    def predict(self) -> predicting.Predict:
        """The jitted function of `predicting.make_predict`."""
        return predicting.make_predict(self.model, self.partitioning)

    def judging(self, data: "SplitToRead") -> tuple["RestoredModel", "SplitToRead"]:
        """What predicts a task, and the split with the feature lengths that it takes.

        Of a mixed model that is its part for the task's objective.
        """
        from vit22b_transfer.data import objectives

        model, lengths = objectives.judge(self.model, data.task, data.feature_lengths)
        if model is self.model:
            return self, data
        part = self._parts.setdefault(id(model), dataclasses.replace(self, model=model))
        return part, dataclasses.replace(data, feature_lengths=lengths)

    @functools.cached_property
    def _parts(self) -> dict[int, "RestoredModel"]:
        """Those asked for before, so that each is compiled once."""
        return {}

    @functools.cached_property
    def params_digest(self) -> str:
        """A hash of the parameters."""
        return fingerprints.parameters_digest(self.params)


@dataclasses.dataclass(frozen=True)
class SplitToRead:
    """A split of a task and the shapes of its batches.

    feature_lengths: of what the model's converter reads. Decoded texts are no longer
      than `targets`, unless the model has its own `max_decode_length`.
    max_examples: how many of the first examples; None: all.
    """

    task: str
    split: str
    feature_lengths: Mapping[str, Any]
    batch_size: int
    max_examples: int | None = None

    def cut_to(self) -> int | None:
        """The number of first examples that are read, None if it is all of them."""
        from vit22b_transfer.data import tasks as registered

        return registered.cut_to(self.task, self.split, self.max_examples)

    def part(self) -> str:
        """`the first 16 of 500 examples alone`; "" of a whole split."""
        from vit22b_transfer.data import tasks as registered

        cut = self.cut_to()
        if cut is None:
            return ""
        size = registered.num_examples(self.task, self.split)
        return f"the first {cut} of {size or 'its'} examples alone"


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
) -> Predictions:
    """Predictions of `model` for every example of a split, as JSON lines in order.

    checkpoint: one, or a directory of them, of which the latest is taken.
    output: a path ending in .jsonl, or a directory, in which the file is then called
      TASK-SPLIT-CHECKPOINT.jsonl, or TASK-SPLIT-CHECKPOINT-average.jsonl.
    weights: the trained ones, or their average, which a training with `ema_decay` kept.
    seed: of `decoding.sample`; results depend on it and on `batch_size` alone, but for
      rounding: a mesh decides in which order sums are taken.
    max_examples: for a trial, predict no more than the first ones. The file is then
      called TASK-SPLIT-CHECKPOINT-first_N.jsonl, its record holds `max_examples`, and
      it is never taken for one of the whole split, nor gone on from.

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
    restored = restore(
        model, partitioning, checkpoint, feature_lengths, batch_size, weights=weights
    )
    data = SplitToRead(task, split, feature_lengths, batch_size, max_examples)
    restored, data = restored.judging(data)
    return predict_split(restored, data, output=output, seed=seed)


def restore(
    model: Any,
    partitioning: Partitioning,
    checkpoint: str,
    feature_lengths: Mapping[str, Any],
    batch_size: int,
    *,
    weights: Weights = "trained",
) -> RestoredModel:
    """The model with a checkpoint's parameters, laid out on the mesh.

    weights: see `infer_split`.
    """
    from vit22b_transfer.data import batches, image_lengths, placement

    if weights not in (known := typing.get_args(Weights)):
        raise UserError(f"weights={weights!r} must be one of {', '.join(known)}.")
    identity.show_vocabulary(model)
    path = reading.resolve(checkpoint)
    # A batch that the mesh cannot hold is an error before gigabytes are read.
    placement.Placement.on(partitioning, batch_size)
    shapes, types = batches.batch_shapes(
        image_lengths.converter_of(model), feature_lengths, batch_size
    )
    batch = {
        name: jax.ShapeDtypeStruct(shape, types[name]) for name, shape in shapes.items()
    }
    abstract = abstract_variables(model, partitioning, batch)
    if weights == "average":
        params, count = averages.restore(path, abstract, model=model)
        rest = len(jax.tree.leaves(abstract)) - count
        progress.console(quiet=jax.process_index() > 0).print(
            f"{path}: the average of {count} parameters; {rest} frozen in its training "
            "are as they were",
            markup=False,
        )
    elif any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(abstract)):
        params = restoring.restore_whole(path, abstract, model=model)
    else:
        params = restoring.restore_params(
            path, abstract, shardings_of(abstract), model=model
        )
    if left_out := restoring.teacher_left_out(path, abstract):
        progress.console(quiet=jax.process_index() > 0).print(
            f"{path}: the teacher of its distillation ({left_out} arrays) is left out",
            markup=False,
        )
    return RestoredModel(model, partitioning, path, params, weights)


def predict_split(
    restored: RestoredModel, data: SplitToRead, *, output: str, seed: int = 0
) -> Predictions:
    """As `infer_split`, for a model that is restored already."""
    from vit22b_transfer.data import tasks as registered

    # An unknown name or a wrong vocabulary is an error before anything is written.
    registered.task_names(data.task, data.split)
    registered.check_vocabularies(data.task, restored.model)
    registered.check_classes(data.task, restored.model)
    console = progress.console(quiet=jax.process_index() > 0)
    files = PredictionFiles(
        _output_path(output, data, restored),
        _fingerprint(restored, data, seed),
        host=jax.process_index(),
        num_hosts=jax.process_count(),
    )
    left_out = registered.skipped_text(data.task, data.split)
    left_out = f"; left out of the split: {left_out}" if left_out else ""
    part = f", of {data.part()} (max_examples)" if data.part() else ""
    with contextlib.ExitStack() as stack:
        folder = os.path.dirname(files.path)
        stack.enter_context(disk_errors.said(folder, files.kept))
        if jax.process_index() == 0:
            stack.enter_context(files.lock())
        processes.wait_for_all("predictions locked")
        if files.is_complete():
            console.print(
                f"reusing the predictions in {files.path}{part}{left_out}", markup=False
            )
            return Predictions(files.path, **files.summary(), reused=True)
        start = _recovered(files, data, console)
        with files.writer() as writer:
            _predict(restored, data, start, writer, console, seed)
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
) -> int:
    """The number of lines that stopped runs had left: where every host goes on."""
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
    return files.num_begun()


def _predict(
    restored: RestoredModel,
    data: SplitToRead,
    start: int,
    writer: LineWriter,
    console: rich.console.Console,
    seed: int,
) -> None:
    """Writes this host's lines from example `start` on."""
    from vit22b_transfer.data import batches, image_lengths
    from vit22b_transfer.data import tasks as registered

    model = restored.model
    cut = data.cut_to()
    total = cut or registered.num_examples(data.task, data.split)
    if start == total:
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
        ) as rows,
        restored.partitioning.activate(),
        progress.Progress(
            console, f"{data.task} {data.split}", total=total, done=start
        ) as bar,
    ):
        for done, lines in predicting.predicted_lines(
            rows,
            model,
            restored.predict,
            restored.params,
            batch_size=data.batch_size,
            first_batch=start // data.batch_size,
            seed=seed,
        ):
            writer.write(lines)
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
        "batch_size": data.batch_size,
        "seed": seed,
    }
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


def decode_settings(decode_fn: Any) -> dict[str, Any]:
    """The method and parameters of a decode function, however they were bound.

    Asked of its own result, so that bindings by gin or functools.partial are seen.
    """
    # Larger than any top_k or number of beams; nothing is computed.
    vocab_size = 1 << 24

    def step_fn(tokens, cache, index, ancestry):
        del index, ancestry
        return jnp.zeros((*tokens.shape, vocab_size), jnp.float32), cache

    def decode(rng):
        return decode_fn(
            lambda num_beams: (),
            step_fn,
            batch_size=1,
            max_decode_length=2,
            eos_id=1,
            rng=rng,
        )

    decoded = jax.eval_shape(decode, jax.random.key(0))
    return dict(decoded.settings) or {"method": _name(decode_fn)}


def _name(function):
    function = getattr(function, "func", function)
    return getattr(function, "__qualname__", type(function).__qualname__)
