"""Import: public weights to a checkpoint in our layout, tensor by tensor.

Everything that headers and configs can tell is checked before anything is written. The
checkpoint is written under another name and renamed when it is complete; an import that
was interrupted goes on where it was, and one that meets a damaged tensor leaves
nothing.
"""

import concurrent.futures
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.host import memory_limit
from vit22b_transfer.host.progress import Progress, console
from vit22b_transfer.weights import gin_files, mapping, sources
from vit22b_transfer.weights.adapters import peft_adapters
from vit22b_transfer.weights.files import blocks, tensor_files, tensor_writing
from vit22b_transfer.weights.files.checkpoint_output import CheckpointOutput
from vit22b_transfer.weights.files.stored_tensors import StoredTensor
from vit22b_transfer.weights.files.tensor_writing import LazyTensor
from vit22b_transfer.weights.mapping import SHOWN, Family, Model, Shape, Slot, Step
from vit22b_transfer.weights.sources import Source

# What an import writes beside a source's own files, for the export.
RECORD = "import.json"
# Tensors of so many bytes in all are converted beside each other; a larger one alone.
_BYTES_AT_A_TIME = 256 * 2**20
_THREADS = 3
CARRIED = "carried"


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What an import changes, each thing only if it is asked for.

    dtype: of all parameters; None keeps the source's.
    image_size: (height, width) whose grid the position tables are resampled to.
    vocab_size: rows of the token table; new ones are the mean of the old.
    scan_layers: whether layers are stacked on a leading axis.
    """

    dtype: str | None = None
    image_size: tuple[int, int] | None = None
    vocab_size: int | None = None
    scan_layers: bool = False


@dataclasses.dataclass(frozen=True)
class _Part:
    """One source and what becomes of it.

    model: as the source has it; `resized` as it is written.
    shapes: of our parameters as they are written; `read_shapes` before resizing.
    """

    source: Source
    model: Model
    resized: Model
    plan: tuple[Step, ...]
    read_shapes: Mapping[str, Shape]
    shapes: Mapping[str, Shape]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Of the tensors that are read."""
        names = {slot.name for step in self.plan for slot in step.theirs}
        return sum(self.source.tensors[name].nbytes for name in names)


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
      UserError: if a source is damaged or does not fit; then OUT has no checkpoint.
    """
    out = os.path.abspath(os.path.expanduser(out))
    if os.path.exists(os.path.join(out, "checkpoint_0")):
        raise UserError(
            f"{out} has a checkpoint_0 already; give another --out, or remove it."
        )
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
    parts = [_part(source, options) for source in opened]
    _check_options(parts, options)
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
    output = CheckpointOutput(out, arrays, _origin(parts, options, adapter))
    try:
        with Progress(
            console(stderr=True),
            "importing",
            total=sum(part.nbytes for part in parts),
            unit="bytes",
        ) as progress:
            for part in parts:
                _write(part, output, progress)
            if updates is not None:
                updates.write(output)
    except ValueError:
        output.discard()
        raise
    _write_companions(parts, out)
    lines = _report(parts, out, output.finish())
    if updates is not None:
        with open(os.path.join(out, "model.gin"), "a", encoding="utf-8") as file:
            file.write("\n".join(updates.gin_lines(_fresh(parts))) + "\n")
        lines += updates.lines()
    return lines


# --- Checks before anything is written ---


def _part(source: Source, options: ImportOptions) -> _Part:
    family, model = source.family, source.model
    source.check_companions()
    shapes = family.shapes(model.tower, model.text)
    if options.scan_layers:
        shapes = mapping.stack_shapes(shapes)
    plan = mapping.steps(model.rows, source.tensors, shapes)
    expected = mapping.expected_shapes(plan, shapes)
    problems = mapping.misfits(expected, source.tensors, model)
    used = {name: source.tensors[name] for name in expected if name in source.tensors}
    dtype, wrong = _dtype(used, options)
    if problems := problems + wrong:
        more = len(problems) - SHOWN
        lines = problems[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise UserError(
            f"{source.name} does not fit {family.name} with the sizes that its config "
            "and headers say:\n  "
            + "\n  ".join(lines)
            + "\nFetch the files again, all "
            "of one model, or name another --family."
        )
    for copy, of in model.copies.items():
        _check_copy(source, copy, of)
    resized, written = _resized(model, options, dtype), shapes
    if options.image_size or options.vocab_size:
        written = family.shapes(resized.tower, resized.text)
        if options.scan_layers:
            written = mapping.stack_shapes(written)
    return _Part(source, model, resized, tuple(plan), shapes, written, dtype)


def _dtype(
    tensors: Mapping[str, StoredTensor], options: ImportOptions
) -> tuple[np.dtype, list[str]]:
    """The dtype to write, and a line for each tensor whose dtype is wrong."""
    wanted = options.dtype and np.dtype(options.dtype)
    counts: dict[np.dtype, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    usual = max(counts, key=lambda dtype: counts[dtype], default=np.dtype(np.float32))
    convertible = (*blocks.FLOATS, np.dtype(np.float64))
    names = ", ".join(dtype.name for dtype in blocks.FLOATS)
    lines = []
    for name, tensor in tensors.items():
        if tensor.dtype not in convertible:
            lines.append(
                f"{name}: dtype {tensor.dtype}, expected one of {names}; quantised "
                "weights are not supported, take the original ones"
            )
        elif not wanted and tensor.dtype not in blocks.FLOATS:
            lines.append(
                f"{name}: dtype {tensor.dtype}, expected one of {names}; convert it "
                "with --dtype float32"
            )
        elif not wanted and tensor.dtype != usual:
            lines.append(
                f"{name}: dtype {tensor.dtype}, but most tensors are {usual}; convert "
                "all with --dtype"
            )
    return np.dtype(wanted or usual), lines


def _check_copy(source: Source, copy: str, of: str) -> None:
    if copy in source.tensors:
        one, other = source.tensors[copy].read(), source.tensors[of].read()
        if one.tobytes() != other.tobytes():
            raise UserError(
                f"{source.name}: {copy} differs from {of}, which it must repeat in a "
                f"{source.family.name} with this config. Fetch the files again, all of "
                "one model."
            )


def _check_options(parts: Sequence[_Part], options: ImportOptions) -> None:
    """Raises UserError for an option that nothing takes."""
    if options.image_size and not any(part.model.positions for part in parts):
        raise UserError("--image_size: no source has position tables to resample.")
    if options.vocab_size and not any(part.model.vocabulary for part in parts):
        raise UserError("--vocab_size: no source has a vocabulary.")


def _resized(model: Model, options: ImportOptions, dtype: np.dtype) -> Model:
    """The model whose configurations say what is written."""
    tower, text = model.tower, model.text
    fields: dict[str, Any] = {}
    if dtype != np.float32:
        fields["param_dtype"] = dtype.name
    if options.scan_layers:
        fields["scan_layers"] = True
    if tower is not None:
        size = {"image_size": options.image_size} if options.image_size else {}
        tower = dataclasses.replace(tower, **fields, **size)
    if text is not None:
        size = {"vocab_size": options.vocab_size} if options.vocab_size else {}
        text = dataclasses.replace(text, **fields, **size)
    return dataclasses.replace(model, tower=tower, text=text)


def _origin(
    parts: Sequence[_Part],
    options: ImportOptions,
    adapter: peft_adapters.Adapter | None,
) -> str:
    """A text that changes with the files and with what is made of them."""
    found = {t.file for part in parts for t in part.source.tensors.values()}
    if adapter is not None:
        found |= {t.file for pair in adapter.pairs.values() for t in pair.values()}
    files = sorted(found)
    stats = [(file, os.stat(file)) for file in files]
    return json.dumps(
        [
            [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats],
            [part.source.family.name for part in parts],
            dataclasses.asdict(options),
        ]
    )


# --- Writing ---


def _write(part: _Part, output: CheckpointOutput, progress: Progress) -> None:
    """Reads, converts and writes all tensors, a few at a time."""
    limit = memory_limit.MemoryLimit(_BYTES_AT_A_TIME)

    def run(step: Step) -> None:
        size = _step_bytes(part, step)
        with limit.holding(size):
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


def _step_bytes(part: _Part, step: Step) -> int:
    return sum(
        part.source.tensors[slot.name].nbytes
        // (1 if slot.layer is None else part.source.tensors[slot.name].shape[0])
        for slot in step.theirs
    )


def _convert(part: _Part, step: Step, output: CheckpointOutput) -> None:
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


def _resize(part: _Part, name: str, array: np.ndarray) -> np.ndarray:
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


def _write_companions(parts: Sequence[_Part], out: str) -> None:
    comments = []
    for part in parts:
        folder = os.path.join(out, part.source.family.name)
        shutil.rmtree(folder, ignore_errors=True)
        part.source.copy_companions(folder)
        _record_sizes(part, folder)
        _carry(part, os.path.join(folder, CARRIED))
        if tokenizer := part.source.tokenizer():
            path = os.path.join(folder, tokenizer)
            comments.append(f"Vocabulary: export VIT22B_VOCABULARY={path}")
    models = [(part.source.family, part.resized) for part in parts]
    origins = [os.path.basename(os.path.normpath(part.source.name)) for part in parts]
    text = gin_files.gin_text(
        models,
        origins,
        comments,
        os.path.join(out, "checkpoint_0"),
        f"(({fresh!r}, None),)" if (fresh := _fresh(parts)) else "()",
    )
    with open(os.path.join(out, "model.gin"), "w", encoding="utf-8") as file:
        file.write(text)


def _fresh(parts: Sequence[_Part]) -> str | None:
    """A pattern of what a training run that starts from the import has of its own."""
    names = [name for part in parts for name in part.shapes]
    if all(part.model.text is None for part in parts):
        return r"(?!encoder/tower/).*"
    if all(part.model.tower is None for part in parts):
        return r"encoder/(tower|projection)/.*"
    if not any("projection/" in name for name in names):
        return r"encoder/projection/.*"
    return None


def _record_sizes(part: _Part, folder: str) -> None:
    """Writes what the export needs: configs and the tensors' shapes, as resized."""
    sources.write_sizes(folder, part.model, part.resized)
    shapes = {name: tensor.shape for name, tensor in part.source.tensors.items()}
    shapes |= mapping.expected_shapes(part.plan, part.shapes)
    shapes |= {n: shapes[of] for n, of in part.model.copies.items() if n in shapes}
    kept = {name: shape for name, shape in shapes.items() if not part.model.drops(name)}
    with open(os.path.join(folder, RECORD), "w", encoding="utf-8") as file:
        json.dump({"family": part.source.family.name, "tensors": kept}, file)


def _carry(part: _Part, folder: str) -> None:
    """Keeps the tensors that only their class has."""
    tensors = [
        LazyTensor(name, tensor.shape, tensor.dtype, tensor.read)
        for name, tensor in part.source.tensors.items()
        if part.model.carries(name)
    ]
    if tensors:
        os.makedirs(folder)
        tensor_writing.write_safetensors(
            folder, tensors, max_shard_bytes=2**40, done=lambda count: None
        )


def _report(parts: Sequence[_Part], out: str, checkpoint: str) -> list[str]:
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


def _facts(part: _Part) -> Iterator[str]:
    tower = part.resized.tower
    if tower is not None:
        height, width = tower.image_size
        yield (
            f"images {height}x{width}, pixel mean {tower.pixel_mean}, "
            f"std {tower.pixel_std}"
        )
    yield from part.model.facts
    dropped: dict[str, int] = {}
    for name in part.source.tensors:
        if why := part.model.drops(name):
            dropped[why] = dropped.get(why, 0) + 1
    for why, count in dropped.items():
        yield f"not imported: {count} tensors, {why}"
    if tokenizer := part.source.tokenizer():
        yield f"tokenizer {tokenizer}"
