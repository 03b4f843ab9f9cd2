"""Tables of weights: which of their tensors is which of our parameters, and how.

A family's file holds a list of `Row(ours, theirs, transform)`. Names are '/'-joined
paths on our side (`encoder/tower/layers_{i}/attention/query/kernel`) and whatever the
files say on theirs; `{i}` is the number of a layer, and `per_layer(depth, rows)` says
how many there are. A tuple of names on one side is a tensor that is fused on the other.

    rows = [
        Row("encoder/tower/encoder_norm/scale", "vision_model.post_layernorm.weight"),
        *per_layer(depth, [
            Row(f"{block}/norm/scale", f"{layer}.layer_norm1.weight"),
            Row(f"{block}/mlp/wi/kernel", f"{layer}.mlp.fc1.weight", TRANSPOSE),
            Row([f"{block}/attention/{x}/kernel" for x in ("query", "key", "value")],
                f"{layer}.attn.qkv.weight", then(split(3, axis=0), TRANSPOSE)),
        ]),
    ]

Layers that are stacked on a leading axis are no concern of a table: where a name
without its `_{i}` exists in a file (big_vision's `encoderblock`), or scanned layers are
wanted on our side (`layers`), the engine takes slices.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from vit22b_transfer import UserError
from vit22b_transfer.weights.transforms import SAME, Transform, abstract

Shape = tuple[int, ...]
# Lines of an error that lists names.
SHOWN = 20
# Names that another is compared with, and how long they may be.
_COMPARED, _COMPARED_LENGTH = 500, 200


# --- Tables ---


@dataclasses.dataclass(frozen=True, init=False)
class Row:
    """One line of a table; `depth` is set by `per_layer`."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform
    depth: int | None

    def __init__(
        self,
        ours: str | Sequence[str],
        theirs: str | Sequence[str],
        transform: Transform = SAME,
        depth: int | None = None,
    ):
        def names(given):
            return (given,) if isinstance(given, str) else tuple(given)

        object.__setattr__(self, "ours", names(ours))
        object.__setattr__(self, "theirs", names(theirs))
        object.__setattr__(self, "transform", transform)
        object.__setattr__(self, "depth", depth)


def per_layer(depth: int, rows: Iterable[Row]) -> list[Row]:
    """The same rows for each of `depth` layers."""
    return [dataclasses.replace(row, depth=depth) for row in rows]


@dataclasses.dataclass(frozen=True)
class Model:
    """All that a family reads from a source's config and tensor names.

    tower, text: our configurations; None if the source has no such part.
    rows: the table.
    copies: their name -> their name that it repeats; such a tensor may be there or not,
      and must be equal if it is.
    dropped: pattern over whole names of theirs -> why we have no use for them.
    carried: patterns of dropped ones that their class has all the same (DINO's mask
      token): the import keeps them beside the checkpoint, the export adds them again.
    vocabulary: our name -> the axis that `vocab_size` counts.
    positions: our tables [rows * columns, E] over the patch grid.
    resample: (table [rows * columns, E], old grid, new grid) -> table, as the source's
      own code changes the resolution.
    images: (height, width) that the source's image processor makes, which a run takes
      at first; None for the tower's `image_size`.
    bindings: further names of the gin file, on modules of `models`, and their values.
    facts: lines on what our configurations have no field for (tokenizer, prompts);
      printed, and comments of the gin file.
    """

    rows: tuple[Row, ...]
    tower: Any = None
    text: Any = None
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    carried: tuple[str, ...] = ()
    vocabulary: Mapping[str, int] = dataclasses.field(default_factory=dict)
    positions: tuple[str, ...] = ()
    resample: Callable[..., np.ndarray] | None = None
    images: tuple[int, int] | None = None
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    facts: tuple[str, ...] = ()

    def drops(self, name: str) -> str | None:
        """Why their tensor is not used; None if it is, or is not known."""
        matching = (why for p, why in self.dropped.items() if re.fullmatch(p, name))
        return next(matching, None)

    def carries(self, name: str) -> bool:
        """Whether their tensor is kept for the export."""
        return any(re.fullmatch(pattern, name) for pattern in self.carried)


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of public weights; `families.table.FAMILIES` lists them all.

    name: of `--family`, and of `--format` at export: `hf-...`, `big_vision-...`, `t5x`.
    recognises: (config.json as a dict, empty if there is none; their name -> tensor
      with `.shape` and `.dtype`) -> whether a source is of this family.
    read: the same two -> `Model`. Raises UserError for what our models cannot compute.
    shapes: (tower, text) -> our parameters' unrolled names and shapes.
    text_binding: MODULE.CLASS.PARAMETER below `models` that the gin file binds to the
      text configuration. (Towers are bound by the macro TOWER.)
    file_format: `safetensors` or `npz`; or `orbax`, which export does not write.
    """

    name: str
    recognises: Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Model]
    shapes: Callable[[Any, Any], dict[str, Shape]]
    text_binding: str = "encoder_decoder.ImageTextModule.text"
    file_format: str = "safetensors"


# --- The engine ---


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor, or one layer of a tensor in which layers are stacked on axis 0."""

    name: str
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One application of a row."""

    ours: tuple[Slot, ...]
    theirs: tuple[Slot, ...]
    transform: Transform


def stacked_name(name: str) -> str:
    """`layers/norm` for `layers_{i}/norm`."""
    return name.replace("_{i}", "")


def steps(
    rows: Iterable[Row], their_names: Iterable[str], our_names: Iterable[str]
) -> list[Step]:
    """What to do, layer by layer, for names that are unrolled or stacked."""
    known = frozenset(their_names), frozenset(our_names)

    def slot(name: str, i: int | None, names: frozenset[str]) -> Slot:
        if i is None:
            return Slot(name)
        if (stacked := stacked_name(name)) != name and stacked in names:
            return Slot(stacked, i)
        return Slot(name.format(i=i))

    return [
        Step(
            tuple(slot(name, i, known[1]) for name in row.ours),
            tuple(slot(name, i, known[0]) for name in row.theirs),
            row.transform,
        )
        for row in rows
        for i in ([None] if row.depth is None else range(row.depth))
    ]


def stack_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of scanned parameters for those of unrolled ones."""
    depths: dict[str, int] = {}
    for name in shapes:
        stacked = re.sub(r"\blayers_\d+\b", "layers", name)
        depths[stacked] = depths.get(stacked, 0) + 1
    return {
        stacked: shapes[stacked]
        if stacked in shapes
        else (depth, *shapes[re.sub(r"\blayers\b", "layers_0", stacked)])
        for stacked, depth in depths.items()
    }


def unrolled_shapes(params: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes, layer by layer, of a scanned model's abstract parameters."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return unstack_shapes({name: tuple(leaf.shape) for name, leaf in flat.items()})


def unstack_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The inverse of `stack_shapes`: a scanned model is traced much faster."""
    unrolled = {}
    for name, shape in shapes.items():
        before, stacked, after = name.partition("layers/")
        if not stacked:
            unrolled[name] = shape
            continue
        for i in range(shape[0]):
            unrolled[f"{before}layers_{i}/{after}"] = shape[1:]
    return unrolled


def expected_shapes(
    plan: Iterable[Step], our_shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
    """The shapes that their tensors have, from ours by the inverse transforms.

    Raises:
      UserError: if the table and our model do not cover each other.
    """
    expected: dict[str, Shape] = {}
    seen: dict[Slot, Step] = {}
    for step in plan:
        inputs = []
        for slot in step.ours:
            if slot.name not in our_shapes:
                raise UserError(
                    f"the table has a row for {slot.name}, which the model has not; "
                    + nearest(slot.name, our_shapes)
                )
            if slot in seen:
                raise UserError(f"the table has two rows for {slot.name}.")
            seen[slot] = step
            shape = our_shapes[slot.name]
            inputs.append(abstract(shape if slot.layer is None else shape[1:]))
        outputs = step.transform.to_theirs(tuple(inputs))
        for slot, output in zip(step.theirs, outputs, strict=True):
            shape = output.shape
            if slot.layer is not None:
                shape = (
                    max(slot.layer + 1, *expected.get(slot.name, (0,))[:1]),
                    *shape,
                )
            expected[slot.name] = shape
    done = {slot.name for slot in seen}
    if left := [name for name in our_shapes if name not in done]:
        raise UserError(
            f"the table has no row for {len(left)} parameters of the model: "
            f"{', '.join(left[:8])}."
        )
    return expected


def misfits(
    expected: Mapping[str, Shape], found: Mapping[str, Any], model: Model
) -> list[str]:
    """What is missing, left over or of a wrong shape in a source, one line each.

    found: their name -> anything with a `.shape`.
    """
    lines: list[str] = []

    def hint(name: str, names: Iterable[str]) -> str:
        # Comparing every name with every other takes minutes in a large model.
        return f"; {nearest(name, names)}" if len(lines) < SHOWN else ""

    for name, shape in expected.items():
        if name not in found:
            left = [n for n in found if n not in expected]
            lines.append(f"{name}: missing, expected shape {shape}{hint(name, left)}")
        elif tuple(found[name].shape) != tuple(shape):
            got = tuple(found[name].shape)
            turned = " (it is transposed)" if got == tuple(shape)[::-1] else ""
            lines.append(f"{name}: shape {got}, expected {shape}{turned}")
    for name, tensor in found.items():
        if name in expected or model.drops(name):
            continue
        if name not in model.copies:
            missing = [n for n in expected if n not in found]
            lines.append(
                f"{name}: not expected, shape {tuple(tensor.shape)}"
                + hint(name, missing)
            )
        elif tuple(tensor.shape) != tuple(expected[model.copies[name]]):
            lines.append(
                f"{name}: shape {tuple(tensor.shape)}, but it repeats "
                f"{model.copies[name]} of shape {expected[model.copies[name]]}"
            )
    return lines


def nearest(name: str, names: Iterable[str]) -> str:
    """`nearest: a, b`, or that there is nothing like it."""
    names = [other for other in names if len(other) <= _COMPARED_LENGTH]
    if len(names) > _COMPARED:  # it would take minutes
        last = re.split(r"[/.]", name)[-1]
        names = [other for other in names if other.endswith(last)][:_COMPARED]
    near = difflib.get_close_matches(name[:_COMPARED_LENGTH], names, n=3, cutoff=0.6)
    return f"nearest: {', '.join(near)}" if near else "nothing is called similarly"


def num_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Size of a dense tensor."""
    return math.prod(shape) * np.dtype(dtype).itemsize
