"""Import: public weights to a checkpoint in our layout, tensor by tensor.

Everything that headers and configs can tell is checked before anything is written. The
checkpoint is written under another name and renamed when it is complete; an import that
was interrupted goes on where it was, and one that meets a damaged tensor leaves
nothing.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.host import disk_errors, locks, memory_limit, whole_files
from vit22b_transfer.host.file_errors import naming
from vit22b_transfer.host.progress import Progress, console
from vit22b_transfer.weights import sources
from vit22b_transfer.weights.adapters import peft_adapters
from vit22b_transfer.weights.companions import (
    fresh_parameters,
    model_gin,
    write_companions,
)
from vit22b_transfer.weights.files import tensor_files
from vit22b_transfer.weights.files.checkpoint_output import CheckpointOutput
from vit22b_transfer.weights.files.stored_tensors import StoredTensor
from vit22b_transfer.weights.import_plan import (
    ImportOptions,
    Part,
    check_options,
    origin,
    plan_part,
)
from vit22b_transfer.weights.mapping import Family, Slot, Step

# Bytes of tensors that are converted at a time; a larger tensor is alone.
_BYTES_AT_A_TIME = 256 * 2**20
_THREADS = 3


def import_weights(
    names: Sequence[str],
    out: str,
    families: Sequence[Family],
    *,
    family_names: Sequence[str] = (),
    options: ImportOptions | None = None,
    adapter: peft_adapters.Adapter | None = None,
    open_tensors: Callable[[str], dict[str, StoredTensor]] = tensor_files.open_tensors,
) -> list[str]:
    """Imports sources into `OUT/checkpoint_0`; the result are lines to show.

    names: files or directories; several make one checkpoint, such as a tower and a text
      model.
    family_names: of each source, in order; none if the sources say what they are.
    adapter: low-rank updates of the sources' kernels, which become parameters too.
    open_tensors: reads formats that `tensor_files` does not, too.
    Besides the checkpoint, OUT gets `model.gin`, which a recipe includes, and for each
    family a directory with the config, preprocessing and tokenizer files.

    Raises:
      UserError: if a source is damaged or does not fit; then OUT has no checkpoint. If
        another import writes into OUT.
    """
    out = os.path.abspath(os.path.expanduser(out))
    _check_is_free(out)
    options = options or ImportOptions()
    if family_names and len(family_names) != len(names):
        raise UserError(
            f"{len(names)} sources, but {len(family_names)} families "
            f"({', '.join(family_names)}); name none, or one for each."
        )
    opened = [
        sources.open_source(name, families, family, open_tensors)
        for name, family in zip(names, family_names or [None] * len(names), strict=True)
    ]
    parts = [plan_part(source, options) for source in opened]
    check_options(parts, options)
    arrays = {}
    for part in parts:
        if both := sorted(arrays.keys() & part.shapes.keys()):
            raise UserError(
                f"two sources have {both[0]} (and {len(both) - 1} more); import them "
                "into different directories."
            )
        arrays |= {name: (shape, part.dtype) for name, shape in part.shapes.items()}
    updates = None
    if adapter is not None:
        plans = [(p.source.family.name, p.plan, p.shapes) for p in parts]
        updates = peft_adapters.plan_updates(adapter, plans)
        arrays |= updates.arrays
    fields = updates.gin_fields(fresh_parameters(parts)) if updates else {}
    gin = model_gin(parts, out, fields)
    whole_files.writable_directory(out, "--out")
    with disk_errors.said(out, lambda: "what is written is kept"), locks.held(out):
        _check_is_free(out)  # another import may have ended meanwhile
        checkpoint = _write_all(
            parts,
            updates,
            CheckpointOutput(out, arrays, origin(parts, options, adapter)),
            out,
            gin,
        )
    lines = _report(parts, out, checkpoint)
    return lines if updates is None else [*lines, *updates.lines()]


def _check_is_free(out: str) -> None:
    if os.path.lexists(os.path.join(out, "checkpoint_0")):
        raise UserError(
            f"{out} has a checkpoint_0 already; give another --out, or remove it."
        )


def _write_all(
    parts: Sequence[Part],
    updates: peft_adapters.Updates | None,
    output: CheckpointOutput,
    out: str,
    gin: str,
) -> str:
    """Writes the arrays, then what stands beside them; the checkpoint's path."""
    try:
        with (
            disk_errors.said(out, output.kept),
            Progress(
                console(stderr=True),
                "importing",
                total=sum(part.nbytes for part in parts),
                unit="bytes",
            ) as progress,
        ):
            for part in parts:
                _write(part, output, progress)
            if updates is not None:
                updates.write(output)
            write_companions(parts, out, gin)
    except disk_errors.DiskError:
        raise
    except ValueError:
        output.discard()
        raise
    # The checkpoint gets its name last: where it is, all beside it is whole.
    return output.finish()


def _write(part: Part, output: CheckpointOutput, progress: Progress) -> None:
    """Reads, converts and writes all tensors, a few at a time."""
    limit = memory_limit.MemoryLimit(_BYTES_AT_A_TIME)

    def run(step: Step) -> None:
        size = _step_bytes(part, step)
        with limit.holding(size), naming(part.source.name):
            _convert(part, step, output)
        progress.add(size)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        running = [pool.submit(run, step) for step in part.plan]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _step_bytes(part: Part, step: Step) -> int:
    return sum(
        part.source.tensors[slot.name].nbytes
        // (1 if slot.layer is None else part.source.tensors[slot.name].shape[0])
        for slot in step.theirs
    )


def _convert(part: Part, step: Step, output: CheckpointOutput) -> None:
    if all(output.has(slot) for slot in step.ours):
        return
    found = tuple(
        part.source.tensors[slot.name].read(slot.layer) for slot in step.theirs
    )
    names = " and ".join(_shown(slot) for slot in step.theirs)
    ours = step.transform.to_ours(found)
    for slot, array in zip(step.ours, ours, strict=True):
        expected = part.read_shapes[slot.name]
        expected = expected if slot.layer is None else expected[1:]
        assert array.shape == expected, (slot, array.shape, expected)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        output.write(slot, _resize(part, slot.name, array), names)


def _shown(slot: Slot) -> str:
    return slot.name if slot.layer is None else f"{slot.name}[{slot.layer}]"


def _resize(part: Part, name: str, array: np.ndarray) -> np.ndarray:
    """The array for the image or vocabulary size that was asked for."""
    old, new = part.model, part.resized
    if name in old.positions and old.tower.image_size != new.tower.image_size:
        assert old.resample is not None, f"{name} has no way to be resampled"
        grids = (t.grid_of(*t.image_size) for t in (old.tower, new.tower))
        return np.asarray(old.resample(array, *grids)).astype(array.dtype)
    if name in old.vocabulary and old.text.vocab_size != new.text.vocab_size:
        axis, count = old.vocabulary[name], new.text.vocab_size
        rows = np.moveaxis(array, axis, 0)
        added = max(0, count - len(rows))
        mean = rows.mean(axis=0, dtype=np.float32, keepdims=True).astype(array.dtype)
        rows = np.concatenate([rows[:count], np.repeat(mean, added, axis=0)])
        return np.moveaxis(rows, 0, axis)
    return array


def _report(parts: Sequence[Part], out: str, checkpoint: str) -> list[str]:
    lines = []
    for part in parts:
        count = sum(int(np.prod(shape)) for shape in part.shapes.values())
        lines.append(
            f"{part.source.name}: {part.source.family.name}, {count:,} parameters in "
            f"{part.dtype}"
        )
        lines += [f"  {line}" for line in _facts(part)]
    lines.append(f"wrote {checkpoint}")
    lines.append(f"wrote {os.path.join(out, 'model.gin')}: name it behind a recipe")
    return lines


def _facts(part: Part) -> Iterator[str]:
    tower = part.resized.tower
    if tower is not None:
        height, width = part.resized.images or tower.image_size
        yield (
            f"images {height}x{width}, pixel mean {tower.pixel_mean}, "
            f"std {tower.pixel_std}, of pixels times {tower.pixel_scale:.6g}"
        )
        yield f"images are prepared: {tower.preparation}"
    yield from part.model.facts
    dropped: dict[str, int] = {}
    for name in part.source.tensors:
        if why := part.model.drops(name):
            dropped[why] = dropped.get(why, 0) + 1
    for why, count in dropped.items():
        yield f"not imported: {count} tensors, {why}"
    if tokenizer := part.source.tokenizer():
        yield f"tokenizer {tokenizer}"
