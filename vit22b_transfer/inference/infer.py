"""Partitioned inference over a whole split, into an ordered file of JSON lines."""

import collections
import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from vit22b_transfer.checkpoints import fingerprints, identity, reading, restoring
from vit22b_transfer.host import disk_errors, progress, whole_files
from vit22b_transfer.inference import prediction_lines
from vit22b_transfer.inference.prediction_files import LineWriter, PredictionFiles
from vit22b_transfer.partitioning import processes
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training.state import abstract_variables, shardings_of

# Batches handed to the devices before the first one's predictions are fetched.
_BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A complete file of predictions, and what this call did for it.

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
    """A model with the parameters of a checkpoint on the devices of a mesh."""

    model: Any
    partitioning: Partitioning
    checkpoint: str
    params: Any

    @functools.cached_property
    def predict(self):
        """The jitted (params, batch, seed, number of the batch) -> (predictions, aux).

        Both are trees of arrays with a row for each example.
        """

        def predict(params, batch, seed, number):
            rng = jax.random.fold_in(jax.random.key(seed), number)
            return self.model.predict_batch_with_aux(params, batch, rng=rng)

        # Replicated: each host then finds its own rows without a mesh's geometry.
        return jax.jit(predict, out_shardings=self.partitioning.replicated)

    @functools.cached_property
    def params_digest(self) -> str:
        """A hash of the parameters."""
        return fingerprints.parameters_digest(self.params)


@dataclasses.dataclass(frozen=True)
class SplitToRead:
    """A split of a task and the shapes of its batches.

    feature_lengths: of what the model's converter reads. Decoded texts are no longer
      than `targets`, unless the model has its own `max_decode_length`.
    """

    task: str
    split: str
    feature_lengths: Mapping[str, Any]
    batch_size: int


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
) -> Predictions:
    """Predictions of `model` for every example of a split, as JSON lines in order.

    checkpoint: one, or a directory of them, of which the latest is taken.
    output: a path ending in .jsonl, or a directory, in which the file is then called
      TASK-SPLIT-CHECKPOINT.jsonl.
    seed: of `decoding.sample`; results depend on it and on `batch_size` alone, but for
      rounding: a mesh decides in which order sums are taken.

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
    restored = restore(model, partitioning, checkpoint, feature_lengths, batch_size)
    data = SplitToRead(task, split, feature_lengths, batch_size)
    return predict_split(restored, data, output=output, seed=seed)


def restore(
    model: Any,
    partitioning: Partitioning,
    checkpoint: str,
    feature_lengths: Mapping[str, Any],
    batch_size: int,
) -> RestoredModel:
    """The model with a checkpoint's parameters, laid out on the mesh."""
    from vit22b_transfer.data import batches, image_lengths, placement

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
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(abstract)):
        params = restoring.restore_whole(path, abstract, model=model)
    else:
        params = restoring.restore_params(
            path, abstract, shardings_of(abstract), model=model
        )
    return RestoredModel(model, partitioning, path, params)


def predict_split(
    restored: RestoredModel, data: SplitToRead, *, output: str, seed: int = 0
) -> Predictions:
    """As `infer_split`, for a model that is restored already."""
    from vit22b_transfer.data import tasks as registered

    # An unknown name or a wrong vocabulary is an error before anything is written.
    registered.task_names(data.task, data.split)
    registered.check_vocabularies(data.task, restored.model)
    console = progress.console(quiet=jax.process_index() > 0)
    files = PredictionFiles(
        _output_path(output, data, restored.checkpoint),
        _fingerprint(restored, data, seed),
        host=jax.process_index(),
        num_hosts=jax.process_count(),
    )
    left_out = registered.skipped_text(data.task, data.split)
    left_out = f"; left out of the split: {left_out}" if left_out else ""
    with contextlib.ExitStack() as stack:
        folder = os.path.dirname(files.path)
        stack.enter_context(disk_errors.said(folder, files.kept))
        if jax.process_index() == 0:
            stack.enter_context(files.lock())
        processes.wait_for_all("predictions locked")
        if files.is_complete():
            console.print(
                f"reusing the predictions in {files.path}{left_out}", markup=False
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
    console.print(
        f"{result.num_examples} predictions in {files.path} "
        f"({result.num_bad_images} images could not be read, {result.num_empty} "
        f"predictions are empty{left_out})",
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
    total = registered.num_examples(data.task, data.split)
    if start == total:
        return  # stopped between the last line and the merge
    in_flight = collections.deque()
    with (
        batches.eval_batches(
            data.task,
            data.split,
            feature_lengths=data.feature_lengths,
            converter_cls=image_lengths.converter_of(model),
            batch_size=data.batch_size,
            partitioning=restored.partitioning,
            start_index=start,
        ) as rows,
        restored.partitioning.activate(),
        progress.Progress(
            console, f"{data.task} {data.split}", total=total, done=start
        ) as bar,
    ):

        def write():
            batch_start, examples, first, outputs = in_flight.popleft()
            outputs = jax.device_get(outputs)
            lines = prediction_lines.of_batch(
                examples, first, first - batch_start, outputs, model
            )
            writer.write(list(lines))
            bar.show(batch_start + data.batch_size)

        for number, batch in enumerate(rows, start // data.batch_size):
            outputs = restored.predict(
                restored.params, batch.features, np.uint32(seed), np.uint32(number)
            )
            batch_start = number * data.batch_size
            in_flight.append((batch_start, batch.examples, batch.start_index, outputs))
            if len(in_flight) > _BATCHES_AHEAD:
                write()
        while in_flight:
            write()
        if cut := rows.counters.lost.get("truncated_inputs"):
            console.print(
                f"{cut} prompts were longer than {data.feature_lengths['inputs']} "
                "tokens and were cut",
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
    if settings := getattr(model, "prediction_settings", None):
        facts["predictions"] = settings
    if getattr(model, "decode_fn", None) is not None:
        facts |= {
            "vocabulary": vocabularies.fingerprint(model.output_vocabulary),
            "decoding": decode_settings(model.decode_fn),
            "max_decode_length": model.max_decode_length,
        }
    return facts


def _output_path(output, data, checkpoint):
    """The absolute path of the file; its directory is made and can be written."""
    path = os.path.abspath(os.path.expanduser(output))
    if not path.endswith(".jsonl"):
        parts = (data.task, data.split, os.path.basename(checkpoint))
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
