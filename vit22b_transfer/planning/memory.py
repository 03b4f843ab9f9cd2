"""Bytes that a traced program holds on each device at its worst moment.

The compiler is imitated in outline: what is cheap is computed where it is used, matrix
products and loops need their operands in memory, a buffer lives from its first to its
last use, and what is computed element by element takes the place of what it used up.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

from vit22b_transfer.partitioning import rules
from vit22b_transfer.planning.trace import (
    CHEAP,
    COSTLY,
    VIEWS,
    Axes,
    Program,
    Step,
    Value,
)

# These read their operands from memory.
_READ_MEMORY = ("dot_general", "scan", "while", "gather", "scatter-add", "sort")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which part of an array each device has: sizes of the mesh axes, and the rules.

    cpu: the compiler of CPUs keeps what it computes in bfloat16 in float32, and copies
      operands of products that it needs transposed.
    """

    sizes: Mapping[str, int]
    rules: tuple[rules.Rule, ...]
    cpu: bool = False

    @functools.cached_property
    def _known(self) -> dict[Axes, Axes]:
        return {}

    def spec(self, axes: Axes) -> Axes:
        """The mesh axis of each dimension, as `flax` resolves rules."""
        if axes not in self._known:
            spec: list[str | None] = [None] * len(axes)
            settled = [False] * len(axes)
            for name, mesh_axis in self.rules:
                if name in axes and (mesh_axis is None or mesh_axis not in spec):
                    place = axes.index(name)
                    if not settled[place]:
                        spec[place], settled[place] = mesh_axis, True
            self._known[axes] = tuple(spec)
        return self._known[axes]

    def parts(self, axes: Axes) -> int:
        """Into how many pieces an array of these axes is split."""
        return math.prod(self.sizes[a] for a in self.spec(axes) if a is not None)

    def bytes(self, value: Value) -> int:
        """Size of a device's part; dimensions that do not divide are padded."""
        sizes = [1 if a is None else self.sizes[a] for a in self.spec(value.axes)]
        split = zip(value.shape, sizes, strict=True)
        itemsize = value.itemsize
        if self.cpu and itemsize > 1 and not value.is_input:
            itemsize = max(itemsize, 4)
        return itemsize * math.prod(-(-n // k) for n, k in split)


@dataclasses.dataclass
class _Event:
    """A moment at which buffers are written, and maybe the last use of others."""

    reads: set[Value]
    writes: list[Value]
    in_place: bool
    phase: str
    step: Step | None = None

    @property
    def body(self) -> Program | None:
        """The program of a loop."""
        return None if self.step is None else self.step.body


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes at the worst moment: gradients, what the forward pass keeps, the rest."""

    gradients: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.gradients + self.activations + self.temporaries


class Lifetimes:
    """When each buffer of a program is written and last read, whatever the mesh."""

    def __init__(self, program: Program):
        self.program = program
        self._uses = collections.Counter(
            value for step in program.steps for value in step.reads
        )
        self._uses.update(program.outputs)
        self._sources: dict[Value, tuple[Value, ...]] = {}
        self._views: dict[Value, Value] = {}
        self._stored: set[Value] = set()
        self._transposed: dict[Value, Value] = {}
        self._copied: dict[Value, Value] = {}
        self._broadcast: dict[Value, Value] = {}
        self.events: list[_Event] = []
        self._scanned: set[Value] = set()
        if program.num_constants or program.num_carried:
            first = program.num_constants + program.num_carried
            self._scanned.update(program.inputs[first:])
        self._returned = set(program.outputs)
        for step in program.steps:
            for value in step.reads:
                if value in self._scanned and step.name != "scan":
                    self._store(value, step.phase)
            self._take(step)
        self.gradients: set[Value] = set()
        for value in program.outputs:
            self.gradients |= self._roots(value)
            # Where the update uses the mean it may also compute it anew from the sum.
            for source in self._sources.get(self._base(value), ()):
                self.gradients |= self._roots(source)
        self.gradients -= set(program.inputs)
        # Loops add gradients to zeros, which the compiler has ready from the start.
        self._early = {
            value
            for event in self.events
            for value in event.writes
            if event.step is not None
            and event.step.name in ("scan", "scatter-add")
            and value in self.gradients
            and not program.num_carried
        }
        self.bodies = {
            id(event.body): Lifetimes(event.body)
            for event in self.events
            if event.body is not None
        }

    def _take(self, step):
        virtual = step.name in CHEAP or (
            step.name in COSTLY and self._uses[step.writes[0]] <= 1
        )
        if step.name in VIEWS:
            self._views[step.writes[0]] = step.reads[0]
            return
        if virtual:
            self._sources[step.writes[0]] = tuple(step.reads)
            if step.name == "broadcast_in_dim":
                self._broadcast[step.writes[0]] = step.reads[0]
            if step.writes[0] in self._returned:
                self._store(step.writes[0], step.phase)
            return
        if step.name in _READ_MEMORY:
            for value in step.reads:
                base = self._base(value)
                if step.body is not None and base in self._broadcast:
                    # Loops spread what they are given themselves.
                    base = self._broadcast[base]
                self._store(base, step.phase)
        reads = set().union(*(self._roots(value) for value in step.reads), set())
        if step.dot is not None and step.dot[0][0][:1] == (0,):
            reads = self._with_transposed(step.reads[0], reads)
        in_place = step.body is not None
        self.events.append(_Event(reads, step.writes, in_place, step.phase, step))
        self._stored.update(step.writes)

    def _store(self, value, phase):
        """Allocates a value that was taken to be fused into its use."""
        value = self._base(value)
        if value in self._stored or not value.shape:
            return
        if value in self._sources or value in self._scanned:
            event = _Event(self._roots(value), [value], False, phase)
            self.events.append(event)
            self._stored.add(value)

    def _with_transposed(self, value, reads):
        """`reads` with a transposed copy of `value`, made where it is made."""
        value = self._base(value)
        for event in self.events:
            if value in event.writes:
                if value not in self._transposed:
                    copy = dataclasses.replace(value)
                    self._transposed[value], self._copied[copy] = copy, value
                    event.writes = [*event.writes, copy]
                return (reads - {value}) | {self._transposed[value]}
        return reads

    def _base(self, value):
        while value in self._views:
            value = self._views[value]
        return value

    def _roots(self, value) -> set[Value]:
        """The buffers that the value can be computed from."""
        value = self._base(value)
        if value in self._stored or value not in self._sources:
            return {value}
        found = [self._roots(source) for source in self._sources[value]]
        return set().union(*found)

    def peak(self, layout: Layout) -> Peak:
        """The worst moment on a mesh; the program's inputs are not counted."""
        same = {} if layout.cpu else self._copied
        last: dict[Value, int] = {}
        for moment, event in enumerate(self.events):
            for value in event.reads:
                last[same.get(value, value)] = moment
        end = len(self.events)
        last.update((value, end) for value in self.gradients)
        made = {v: event for event in self.events for v in event.writes}
        live: dict[Value, int] = {v: layout.bytes(v) for v in self._early}
        size = worst_size = sum(live.values())
        worst: tuple[dict[Value, int], int] = ({}, 0)
        first = self.program.num_constants
        carried = self.program.inputs[first : first + self.program.num_carried]
        # What one iteration of a loop hands to the next is copied.
        copied = sum(
            layout.bytes(dataclasses.replace(v, is_input=False)) for v in carried
        )
        size += copied
        for moment, event in enumerate(self.events):
            reads = {same.get(v, v) for v in event.reads}
            dead = [v for v in reads if last[v] == moment and v in live]
            if event.in_place:
                size -= sum(live.pop(v) for v in dead)
            for value in event.writes:
                if value not in self._early and value not in same:
                    live[value] = layout.bytes(value)
                    size += live[value]
            inner = 0
            if event.body is not None:
                inner = self.bodies[id(event.body)].peak(layout).total
            if size + inner > worst_size:
                worst_size, worst = size + inner, (dict(live), inner)
            unused = [v for v in event.writes if last.get(v, -1) < moment]
            for value in (*dead, *unused):
                size -= live.pop(value, 0)
        held, inner = worst
        gradients = sum(held[v] for v in held if v in self.gradients)
        kept = sum(
            bytes_
            for v, bytes_ in held.items()
            if v not in self.gradients
            and made[v].phase == "forward"
            and last.get(v, -1) >= 0
            and self.events[min(last[v], end - 1)].phase != "forward"
        )
        return Peak(gradients, kept, worst_size - gradients - kept)


def total_bytes(values: Iterable[Value], layout: Layout) -> int:
    """Bytes per device of all the values."""
    return sum(layout.bytes(value) for value in values)
