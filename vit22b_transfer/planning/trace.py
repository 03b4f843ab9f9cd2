"""What a function computes, value by value, with the logical axes of every array.

The function is traced, never run or compiled. Each value keeps the logical names of its
dimensions, taken from the parameters, the batch and the models' sharding constraints
and carried on through every operation. So one trace serves every mesh and every table
of axis rules. Loops are kept as such: a scanned block counts as often as it runs.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.extend import core
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh, AxisType

from vit22b_transfer import UserError
from vit22b_transfer.models import products
from vit22b_transfer.partitioning import rules

Axes = tuple[str | None, ...]

# Operations that give their operand back, perhaps in another shape.
VIEWS = {
    "copy",
    "expand_dims",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "stop_gradient",
    "transpose",
}
# Operations that are done anew at each use, unless a use needs the result in memory.
CHEAP = set(
    "abs add add_any and broadcast_in_dim ceil clamp concatenate convert_element_type "
    "eq floor ge gt integer_pow iota is_finite le lt max min mul ne neg not or pad rev "
    "select_n shift_left shift_right_logical sign slice square sub xor div "
    "one_minus_square random_wrap random_unwrap bitcast_convert_type".split()
)
# The same if the result is used once: these are not done twice.
COSTLY = set("cos erf exp exp2 log log1p logistic pow rsqrt sin sqrt tanh".split())


@dataclasses.dataclass(eq=False)
class Value:
    """One array; `is_input`: whether its program, or loop body, is given it."""

    shape: tuple[int, ...]
    itemsize: int
    axes: Axes
    is_input: bool = False

    def learn(self, axes: Axes) -> None:
        """Takes the names of `axes` where it has none."""
        self.axes = _merged(self.axes, axes)


@dataclasses.dataclass
class Step:
    """One operation, or a loop of `repeats` iterations of `body`.

    part, phase: of the model, and "forward", "recomputed" or "backward".
    """

    name: str
    part: str
    phase: str
    reads: list[Value]
    writes: list[Value]
    dot: Any = None
    body: "Program | None" = None
    repeats: int = 1

    @property
    def flops(self) -> int:
        """Operations of a matrix product done once; 0 of anything else."""
        if self.dot is None:
            return 0
        (contracted, _), _ = self.dot
        depth = int(np.prod([self.reads[0].shape[d] for d in contracted], dtype=object))
        return 2 * depth * int(np.prod(self.writes[0].shape, dtype=object))


@dataclasses.dataclass
class Program:
    """Steps in order. In a loop the first `num_constants` inputs stay, the next
    `num_carried` become the first outputs, and the others are rows of what is scanned.
    """

    inputs: list[Value]
    steps: list[Step]
    outputs: list[Value]
    num_constants: int = 0
    num_carried: int = 0

    def all_steps(self, times: int = 1) -> Iterator[tuple[Step, int]]:
        """Every step, those of loops included, and how often it runs."""
        for step in self.steps:
            yield step, times
            if step.body is not None:
                yield from step.body.all_steps(times * step.repeats)


@dataclasses.dataclass(frozen=True)
class Logical(rules.Partitioning):
    """A stand-in whose mesh axes are the logical axes, each of one device."""

    @functools.cached_property
    def mesh(self) -> Any:
        """An abstract mesh: it has no devices."""
        names = (*rules.LOGICAL_AXES, *rules.MESH_AXES)
        types = (AxisType.Auto,) * len(names)
        return AbstractMesh((1,) * len(names), names, axis_types=types)

    @functools.cached_property
    def rules(self) -> tuple[rules.Rule, ...]:
        """Every name stands for itself."""
        return tuple((name, name) for name in rules.LOGICAL_AXES)

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Context in which sharding constraints name logical axes."""
        with (
            jax.sharding.use_abstract_mesh(self.mesh),
            flax_partitioning.axis_rules(self.rules),
        ):
            yield


def trace(function: Callable[..., Any], arguments: Sequence[Any], axes: Any) -> Program:
    """The program of `function(*arguments)`, abstract arrays; nothing is allocated.

    `axes` has the logical axes of each array, in the structure of `arguments`; an
    empty tuple names none.
    """
    with Logical().activate(), products.as_on_accelerators():
        closed: Any = jax.make_jaxpr(function)(*arguments)
    # What the compiler drops: gradients of frozen kernels, of pixels.
    used = [True] * len(closed.jaxpr.outvars)
    jaxpr: Any = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)[0]
    names = jax.tree.leaves(axes, is_leaf=_is_axes)
    inputs = [
        Value(tuple(v.aval.shape), _itemsize(v.aval), _padded(a, v.aval), is_input=True)
        for v, a in zip(jaxpr.invars, names, strict=True)
    ]
    return _program(jaxpr, [_value(c) for c in closed.consts], inputs, "", "")


def part_of(path: str) -> str:
    """The part of the model that a parameter or an operation belongs to."""
    if "token_embedder.attend" in path:
        return "logits"
    # flax names the methods on the way, such as `encoder.with_image`.
    scopes = "/".join(name for name in path.split("/") if "." not in name)
    for part, scope in (
        ("tower", "encoder/tower"),
        ("projection", "encoder/projection"),
        ("text encoder", "encoder/text"),
        ("logits", "logits_dense"),
        ("decoder", "decoder"),
    ):
        if scope in scopes:
            return part
    # Of a classifier; text towers have heads of their own.
    names = scopes.split("/")
    return "head" if "head" in names and "text" not in names else "tokens"


def _is_axes(x):
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def _padded(axes, aval):
    return (*axes, *[None] * len(aval.shape))[: len(aval.shape)]


def _itemsize(aval: Any) -> int:
    return 8 if jnp.issubdtype(aval.dtype, jax.dtypes.extended) else aval.dtype.itemsize


def _value(constant):
    shape = tuple(np.shape(constant))
    return Value(shape, constant.dtype.itemsize, (None,) * len(shape), is_input=True)


def _program(jaxpr, constants, inputs, scope, phase, **loop):
    program = Program(inputs, [], [], **loop)
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))
    program.outputs = _run(program, jaxpr, values, scope, phase)
    return program


def _run(program, jaxpr, values, scope, phase):
    """Appends the steps of `jaxpr` to the program; returns its outputs."""

    def read(variable: Any) -> Value:
        if isinstance(variable, core.Literal):
            return Value((), _itemsize(variable.aval), ())
        return values[variable]

    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        path = f"{scope}/{stack}" if stack else scope
        now = "backward" if "transpose(" in stack else phase or "forward"
        now = "recomputed" if "rematted_computation" in stack else now
        reads = [read(v) for v in eqn.invars]
        inner = _called(eqn)
        if inner is not None:
            jaxpr_, constants = inner
            known = dict(zip(jaxpr_.constvars, constants, strict=True))
            known |= dict(zip(jaxpr_.invars, reads, strict=True))
            outputs = _run(program, jaxpr_, known, path, now)
        else:
            outputs = [
                Value(tuple(v.aval.shape), _itemsize(v.aval), _padded((), v.aval))
                for v in eqn.outvars
            ]
            part = part_of(path)
            name = eqn.primitive.name
            step = Step(name, part, now, reads, outputs)
            if name in ("scan", "while"):
                _loop(step, eqn, path, now)
            else:
                if name == "dot_general":
                    step.dot = eqn.params["dimension_numbers"]
                _name_axes(step, eqn)
            program.steps.append(step)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _called(eqn):
    """(jaxpr, constants) of a call that is no loop, else None."""
    if eqn.primitive.name in ("scan", "while"):
        return None
    if eqn.primitive.name == "cond":
        raise UserError("the planner knows no conditionals; the models have none.")
    for name in ("jaxpr", "call_jaxpr"):
        inner = eqn.params.get(name)
        if inner is not None:
            closed = isinstance(inner, core.ClosedJaxpr)
            return (inner.jaxpr, inner.consts) if closed else (inner, ())
    return None


def _loop(step, eqn, path, phase):
    """Gives the step its body, and its outputs their axes."""
    parameters = eqn.params
    if step.name == "scan":
        body, step.repeats = parameters["jaxpr"], parameters["length"]
        reads = step.reads
        # Counted by shape, as JAX's versions name the counts differently: what is
        # scanned or stacked has one dimension more outside.
        carried = sum(
            len(outer.shape) == len(inner.aval.shape)
            for outer, inner in zip(step.writes, body.jaxpr.outvars, strict=True)
        )
        scanned = sum(
            len(outer.shape) > len(inner.aval.shape)
            for outer, inner in zip(reads, body.jaxpr.invars, strict=True)
        )
        constants = len(reads) - carried - scanned
    else:
        body, constants = parameters["body_jaxpr"], parameters["body_nconsts"]
        reads = step.reads[parameters["cond_nconsts"] :]
        carried = len(reads) - constants
    scanned = len(reads) - constants - carried
    inputs = [
        Value(r.shape, r.itemsize, r.axes, is_input=True)
        for r in reads[: constants + carried]
    ]
    inputs += [
        Value(r.shape[1:], r.itemsize, r.axes[1:], is_input=True)
        for r in reads[len(reads) - scanned :]
    ]
    loop = dict(num_constants=constants, num_carried=carried)
    trace_body = functools.partial(
        _program, body.jaxpr, [_value(c) for c in body.consts], inputs, path, phase
    )
    step.body = trace_body(**loop)
    # What one iteration hands to the next has the axes that it was given with.
    for before, after in zip(inputs[constants:], step.body.outputs, strict=False):
        if before.shape == after.shape:
            before.learn(after.axes)
    step.body = trace_body(**loop)
    for i, (outer, inner) in enumerate(
        zip(step.writes, step.body.outputs, strict=True)
    ):
        outer.axes = inner.axes if i < carried else ("layers", *inner.axes)


def _merged(first: Axes, second: Axes) -> Axes:
    """Names of both, those of `first` where both have one; no name twice but length."""
    merged = list(first)
    for i, name in enumerate(second):
        if merged[i] is None and (name == "length" or name not in merged):
            merged[i] = name
    return tuple(merged)


def _name_axes(step, eqn):
    """Gives the step's outputs the axes that follow from those of its inputs."""
    name, parameters, reads = step.name, eqn.params, step.reads
    out = step.writes[0]
    if name == "dot_general":
        out.axes = _dot_axes(step)
    elif name == "transpose":
        out.axes = tuple(reads[0].axes[i] for i in parameters["permutation"])
    elif name == "broadcast_in_dim":
        dimensions = parameters["broadcast_dimensions"]
        axes = list(out.axes)
        for i, d in enumerate(dimensions):
            if reads[0].shape[i] == out.shape[d]:
                axes[d] = reads[0].axes[i]
        out.axes = tuple(axes)
    elif name in ("reshape", "squeeze", "expand_dims"):
        out.axes = _reshaped(reads[0], out.shape)
    elif name == "sharding_constraint":
        spec: list[str | None] = [
            _logical_name(entry) for entry in parameters["sharding"].spec
        ]
        out.axes = _merged((*spec, *[None] * len(out.axes))[: len(out.axes)], ())
        for read in reads:
            read.learn(out.axes)
    elif name == "gather":
        numbers = parameters["dimension_numbers"]
        dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        window = [a for d, a in enumerate(reads[0].axes) if d not in dropped]
        batch = iter(reads[1].axes[:-1])
        out.axes = tuple(
            window[numbers.offset_dims.index(d)]
            if d in numbers.offset_dims
            else next(batch)
            for d in range(len(out.shape))
        )
        out.axes = _merged(out.axes, ())
    elif name.startswith(("reduce_", "arg")):
        for value in step.writes:
            value.axes = tuple(
                a
                for d, a in enumerate(reads[0].axes)
                if d not in parameters.get("axes", ())
            )
    elif name == "split":
        for value in step.writes:
            value.axes = reads[0].axes
    else:
        for read in reads:
            if len(read.shape) == len(out.shape):
                for d, (a, b) in enumerate(zip(read.shape, out.shape, strict=True)):
                    one = tuple(
                        read.axes[d] if i == d else None for i in range(len(out.shape))
                    )
                    if a == b or name in ("concatenate", "pad", "slice"):
                        out.learn(one)


def _logical_name(entry: Any) -> str | None:
    """The logical axis that a constraint names; the mesh axis `data` is the batch."""
    entry = entry[0] if isinstance(entry, tuple) and entry else entry
    return "batch" if entry == "data" else entry or None


def _dot_axes(step) -> Axes:
    (contracted, batch) = step.dot
    axes = [step.reads[0].axes[d] for d in batch[0]]
    for read, used, outer in zip(step.reads, contracted, batch, strict=True):
        axes += [a for d, a in enumerate(read.axes) if d not in {*used, *outer}]
    return _merged((None,) * len(axes), tuple(axes))


def _reshaped(value: Value, shape: tuple[int, ...]) -> Axes:
    """Axes after a reshape: a name goes to the outermost dimension it becomes."""
    axes: list[str | None] = [None] * len(shape)
    i = j = 0
    while i < len(value.shape) and j < len(shape):
        first, start, old, new = i, j, value.shape[i], shape[j]
        i, j = i + 1, j + 1
        while old != new:
            if old < new:
                old, i = old * value.shape[i], i + 1
            else:
                new, j = new * shape[j], j + 1
        names = [a for a in value.axes[first:i] if a is not None]
        wide = [d for d in range(start, j) if shape[d] > 1] or [start]
        if i - first == j - start:
            axes[start:j] = value.axes[first:i]
        elif names:
            axes[wide[0]] = names[0]
    return tuple(axes)
