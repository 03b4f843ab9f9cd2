"""What an import makes of a source, checked before anything is written."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import naming
from vit22b_transfer.models import towers
from vit22b_transfer.weights import mapping
from vit22b_transfer.weights.adapters import peft_adapters
from vit22b_transfer.weights.files import blocks
from vit22b_transfer.weights.files.stored_tensors import StoredTensor
from vit22b_transfer.weights.mapping import SHOWN, Model, Shape, Step
from vit22b_transfer.weights.sources import Source


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
class Part:
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


def plan_part(source: Source, options: ImportOptions) -> Part:
    """What becomes of a source.

    Raises:
      UserError: naming the tensors that are missing, left over or of another shape or
        dtype than its config says.
    """
    with naming(source.name):
        return _plan_part(source, options)


def _plan_part(source: Source, options: ImportOptions) -> Part:
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
    return Part(source, model, resized, tuple(plan), shapes, written, dtype)


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


def check_options(parts: Sequence[Part], options: ImportOptions) -> None:
    """Raises UserError for an option that nothing takes."""
    if options.image_size and not any(part.model.positions for part in parts):
        raise UserError("--image_size: no source has position tables to resample.")
    if options.vocab_size and not any(part.model.vocabulary for part in parts):
        raise UserError("--vocab_size: no source has a vocabulary.")


def _resized(model: Model, options: ImportOptions, dtype: np.dtype) -> Model:
    """The model whose configurations say what is written."""
    tower, text, images = model.tower, model.text, model.images
    fields: dict[str, Any] = {}
    if dtype != np.float32:
        fields["param_dtype"] = dtype.name
    if options.scan_layers:
        fields["scan_layers"] = True
    if tower is not None:
        size = {"image_size": options.image_size} if options.image_size else {}
        images = options.image_size or images
        tower = towers.changed(tower, "this import", **fields, **size)
    if text is not None:
        size = {"vocab_size": options.vocab_size} if options.vocab_size else {}
        text = dataclasses.replace(text, **fields, **size)
    return dataclasses.replace(model, tower=tower, text=text, images=images)


def origin(
    parts: Sequence[Part],
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
