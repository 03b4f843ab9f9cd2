"""Work, traffic and time of a traced program on a mesh of devices."""

import collections
import dataclasses
from collections.abc import Iterator

from vit22b_transfer.planning.devices import Device
from vit22b_transfer.planning.memory import Layout, Lifetimes
from vit22b_transfer.planning.trace import VIEWS, Axes, Program, Step, Value

_LINEAR = VIEWS | {"add", "add_any", "convert_element_type", "neg"}


def flops_by_part(program: Program) -> dict[tuple[str, str], int]:
    """Operations of all matrix products, all devices together, by (part, phase)."""
    flops: dict[tuple[str, str], int] = collections.Counter()
    for step, times in program.all_steps():
        if step.dot is not None:
            flops[step.part, step.phase] += step.flops * times
    return dict(flops)


def device_flops(step: Step, layout: Layout) -> float:
    """A device's share of a matrix product; what is not split is done by all."""
    specs = [layout.spec(value.axes) for value in (*step.reads, *step.writes)]
    used = {axis for spec in specs for axis in spec if axis is not None}
    share = 1
    for axis in used:
        share *= layout.sizes[axis]
    return step.flops / share


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Bytes that each device sends over a mesh axis, `times` per program."""

    kind: str
    axis: str
    part: str
    phase: str
    bytes: int
    times: int

    @property
    def total(self) -> int:
        """Bytes of all `times`."""
        return self.bytes * self.times


@dataclasses.dataclass(eq=False)
class _Partial:
    """A sum over these mesh axes that is still to be taken: devices hold addends."""

    axes: set[str]
    settled: bool = False


class _Collectives:
    """The transfers of one program, found step by step."""

    def __init__(self, program: Program, layout: Layout, times: int):
        self._layout, self._times = layout, times
        self._partial: dict[Value, _Partial] = {}
        self._gathered: set[tuple[Value, str, str]] = set()
        self._base: dict[Value, Value] = {}
        self.found: list[Transfer] = []
        for step in program.steps:
            self._take(step)
        for value in program.outputs:
            if program.steps:
                self._settle(value, value, program.steps[-1])

    def _take(self, step: Step) -> None:
        out = step.writes[0]
        if step.name in VIEWS:
            self._base[out] = self._base.get(step.reads[0], step.reads[0])
        if step.body is not None:
            inner = _Collectives(step.body, self._layout, self._times * step.repeats)
            self.found += inner.found
        if step.dot is not None:
            for value in step.reads:
                self._settle(value, value, step)
            self._product(step)
            return
        arrays = [value for value in step.reads if value.shape]
        waiting = [self._partial[v] for v in arrays if v in self._partial]
        if step.name in _LINEAR and waiting and len(waiting) == len(arrays):
            axes = [sorted(w.axes) for w in waiting]
            if all(a == axes[0] for a in axes) and not any(w.settled for w in waiting):
                if step.name == "sharding_constraint":
                    self._settle(step.reads[0], out, step)
                elif len(waiting) == 1:
                    self._partial[out] = waiting[0]
                else:
                    self._partial[out] = _Partial(set(axes[0]))
                return
        for value in step.reads:
            self._settle(value, value, step)
        if step.name.startswith("reduce_") or step.name == "gather":
            self._reduction(step)

    def _product(self, step: Step) -> None:
        (contracted, batch) = step.dot
        left: Axes = self._layout.spec(step.reads[0].axes)
        right: Axes = self._layout.spec(step.reads[1].axes)
        out = self._layout.spec(step.writes[0].axes)
        partial: set[str] = set()
        for dl, dr in zip(*contracted, strict=True):
            alike = left[dl] == right[dr]
            for side, spec, other, d in ((0, left, right, dl), (1, right, left, dr)):
                mesh_axis = spec[d]
                if isinstance(mesh_axis, str) and mesh_axis in other and not alike:
                    self._gather(step.reads[side], mesh_axis, step)
                elif isinstance(mesh_axis, str):
                    partial.add(mesh_axis)
        free: list[set[str]] = [
            {a for d, a in enumerate(spec) if a and d not in {*used, *outer}}
            for spec, used, outer in zip((left, right), contracted, batch, strict=True)
        ]
        for axis in free[0] & free[1]:
            self._gather(min(step.reads, key=self._layout.bytes), axis, step)
        partial -= set(out) & (free[0] | free[1])
        if partial:
            self._partial[step.writes[0]] = _Partial(partial)

    def _reduction(self, step: Step) -> None:
        """Sums over a split dimension, and look-ups in a split table."""
        spec = self._layout.spec(step.reads[0].axes)
        kept = self._layout.spec(step.writes[0].axes)
        lost = {a for a in spec if a is not None and a not in kept}
        if lost:
            self._partial[step.writes[0]] = _Partial(lost)
        if step.name == "gather" and "data" in spec and "data" in kept:
            self._gather(step.reads[0], "data", step)

    def _gather(self, value: Value, axis: str, step: Step) -> None:
        value = self._base.get(value, value)
        key = (value, axis, step.phase)
        if self._layout.sizes[axis] > 1 and key not in self._gathered:
            self._gathered.add(key)
            size = (self._layout.sizes[axis] - 1) * self._layout.bytes(value)
            self._record("all-gather", axis, size, step)

    def _settle(self, value: Value, target: Value, step: Step) -> None:
        """Counts the sum over devices that `value` waits for, laid out as `target`."""
        waiting = self._partial.pop(value, None)
        if waiting is None or waiting.settled:
            return
        waiting.settled = True
        spec = self._layout.spec(target.axes)
        for axis in sorted(waiting.axes):
            devices = self._layout.sizes[axis]
            size = self._layout.bytes(target)
            if devices == 1:
                continue
            if axis in spec:
                self._record("reduce-scatter", axis, (devices - 1) * size, step)
            else:
                size = 2 * (devices - 1) * size // devices
                self._record("all-reduce", axis, size, step)

    def _record(self, kind, axis, size, step):
        self.found.append(
            Transfer(kind, axis, step.part, step.phase, size, self._times)
        )


def transfers(program: Program, layout: Layout) -> list[Transfer]:
    """What each device sends in one run of the program.

    Derived from the layout of operands and results: addends of a sum that several
    devices hold are added, operands that are split where the product needs them whole
    are gathered. Sums of sums are added before they are sent.
    """
    return _Collectives(program, layout, 1).found


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds: of products and memory traffic, of transfers, of the update."""

    compute: float
    transfers: float
    update: float

    @property
    def shortest(self) -> float:
        """With every transfer hidden behind computing."""
        return max(self.compute, self.transfers) + self.update

    @property
    def longest(self) -> float:
        """With none hidden."""
        return self.compute + self.transfers + self.update


def compute_seconds(lifetimes: Lifetimes, layout: Layout, device: Device) -> float:
    """Roofline: each step as long as its products or its memory traffic take."""
    return sum(
        max(flops / rate, moved / device.bandwidth) * times
        for flops, rate, moved, times in _loads(lifetimes, layout, device, 1)
    )


def _loads(
    lifetimes: Lifetimes, layout: Layout, device: Device, times: int
) -> Iterator[tuple[float, float, int, int]]:
    for event in lifetimes.events:
        step = event.step
        if step is not None and step.body is not None:
            body = lifetimes.bodies[id(step.body)]
            yield from _loads(body, layout, device, times * step.repeats)
            continue
        flops, rate = 0.0, device.flops
        if step is not None and step.dot is not None:
            flops = device_flops(step, layout)
            if step.reads[0].itemsize > 2:
                rate = device.float32_flops
        moved = sum(layout.bytes(value) for value in (*event.reads, *event.writes))
        yield flops, rate, moved, times
