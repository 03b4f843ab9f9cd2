"""What is in a file of weights, as text: a tree, statistics, the difference of two."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vit22b_transfer.weights.files import blocks
from vit22b_transfer.weights.files.stored_tensors import StoredTensor


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of the finite elements; `bad` counts the others (NaN, infinite)."""

    mean: float
    std: float
    least: float
    most: float
    bad: int

    def __str__(self) -> str:
        text = (
            f"mean {self.mean:.3g}  std {self.std:.3g}  "
            f"min {self.least:.3g}  max {self.most:.3g}"
        )
        return text + (f"  NOT FINITE: {self.bad}" if self.bad else "")


# Of a line, as terminals have it.
_WIDTH = 80

Tensors = Mapping[str, StoredTensor]


def inspect(tensors: Tensors, *, stats: bool = False) -> Iterator[str]:
    """Lines: every tensor below its scopes, with shape, dtype and size, then totals."""
    names = sorted(tensors, key=_natural)
    width = max((len(_leaf_text(name)) for name in names), default=0)
    width = min(width, _WIDTH // 2)
    above: list[str] = []
    bad = 0
    for name in names:
        *scopes, leaf = _parts(name)
        shared = _common(scopes, above)
        for depth in range(shared, len(scopes)):
            yield "  " * depth + scopes[depth]
        above = scopes
        tensor = tensors[name]
        indent = "  " * len(scopes)
        told = [f"{_kind(tensor)}  {_size(tensor.nbytes)}"]
        if stats:
            found = statistics(tensor)
            bad += found.bad
            told.append(str(found))
        yield from _beside((indent + leaf).ljust(width), told, indent)
    count = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    total = sum(tensor.nbytes for tensor in tensors.values())
    yield f"{len(tensors)} tensors, {count:,} elements, {_size(total)}"
    if stats:
        yield f"{bad} elements are not finite"


def differences(source: str, one: Tensors, other: str, two: Tensors) -> Iterator[str]:
    """Lines: what only one has, other shapes and dtypes, largest differences."""
    for title, names, tensors in (
        (f"only in {source}", one.keys() - two.keys(), one),
        (f"only in {other}", two.keys() - one.keys(), two),
    ):
        if names:
            yield f"{title}: {len(names)}"
            for name in sorted(names, key=_natural):
                yield from _beside(f"  {name}", [_kind(tensors[name])], "  ")
    equal, differing = 0, []
    for name in sorted(one.keys() & two.keys(), key=_natural):
        a, b = one[name], two[name]
        if a.shape != b.shape:
            kinds = [f"{_kind(a)} and {_kind(b)}"]
            differing.append(_beside(f"  {name}", kinds, "  "))
            continue
        largest, different = _largest_difference(a, b)
        if a.dtype != b.dtype or different:
            told = [f"{a.dtype.name} and {b.dtype.name}"] if a.dtype != b.dtype else []
            told.append(
                f"max abs difference {largest:.3g}, "
                f"{different} of {int(np.prod(a.shape))} elements"
            )
            differing.append(_beside(f"  {name}", told, "  "))
        else:
            equal += 1
    if differing:
        yield f"different: {len(differing)}"
        for lines in differing:
            yield from lines
    yield f"equal: {equal}"


def statistics(tensor: StoredTensor) -> Statistics:
    """Mean, deviation and range of a tensor, block by block."""
    total = squares = 0.0
    count = bad = 0
    least, most = float("inf"), float("-inf")
    for block in _blocks(tensor.read()):
        values = block.astype(np.float64)
        finite = np.isfinite(values)
        bad += int(values.size - np.count_nonzero(finite))
        values = values[finite]
        if values.size:
            count += values.size
            total += float(values.sum())
            squares += float(np.square(values).sum())
            least, most = min(least, values.min()), max(most, values.max())
    if not count:
        nothing = float("nan")
        return Statistics(nothing, nothing, nothing, nothing, bad)
    mean = total / count
    std = max(0.0, squares / count - mean * mean) ** 0.5
    return Statistics(mean, std, float(least), float(most), bad)


def _largest_difference(a: StoredTensor, b: StoredTensor) -> tuple[float, int]:
    """The largest absolute difference, and how many elements differ (NaN is NaN)."""
    largest, different = 0.0, 0
    for x, y in zip(_blocks(a.read()), _blocks(b.read()), strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64)
        unequal = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        if unequal.any():
            different += int(unequal.sum())
            with np.errstate(invalid="ignore"):
                largest = max(largest, float(np.abs(x - y)[unequal].max()))
    return largest, different


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Flat pieces, equally long for equal shapes."""
    flat = blocks.contiguous(array).reshape(-1)
    step = 2**20
    for i in range(0, flat.size, step):
        yield flat[i : i + step]


def _beside(name: str, told: Sequence[str], indent: str) -> list[str]:
    """A name and what is told of it, in further lines what does not fit."""
    lines = [name]
    for text in told:
        if len(lines[-1]) + 2 + len(text) > _WIDTH:
            lines.append(f"{indent}  {text}")
        else:
            lines[-1] += f"  {text}"
    return [line.rstrip() for line in lines]


def _parts(name: str) -> list[str]:
    return re.split(r"[/.]", name)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A key by which layer 10 comes after layer 9."""
    pieces = re.split(r"(\d+)", name.replace(".", "/"))
    return [(0, int(p)) if p.isdecimal() else (1, p) for p in pieces]


def _leaf_text(name: str) -> str:
    *scopes, leaf = _parts(name)
    return "  " * len(scopes) + leaf


def _common(one: list[str], other: list[str]) -> int:
    """How many first elements are equal."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def _kind(tensor: StoredTensor) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _size(count: int | float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
