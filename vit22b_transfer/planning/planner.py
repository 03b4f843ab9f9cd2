"""Whether a run fits a mesh of devices, and how long a step takes, before it starts.

Nothing is allocated and nothing compiled: the gradients are traced once, and their
memory, work and traffic follow for any mesh. What cannot be known this way is the
compiler's schedule; `vit22b plan --compile` asks it.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType

from vit22b_transfer import UserError
from vit22b_transfer.models import freezing
from vit22b_transfer.partitioning import rules
from vit22b_transfer.planning import costs, trace
from vit22b_transfer.planning.devices import Device
from vit22b_transfer.planning.memory import Layout, Lifetimes, total_bytes
from vit22b_transfer.planning.trace import Value


@dataclasses.dataclass(frozen=True)
class Planned(rules.Partitioning):
    """A partitioning on `devices` devices, which need not be there."""

    devices: int = 1

    @functools.cached_property
    def mesh(self) -> Any:
        """An abstract mesh: it has shapes and shardings, but no devices."""
        sizes = rules.mesh_sizes(self.data, self.model, self.devices)
        return AbstractMesh(sizes, rules.MESH_AXES, axis_types=(AxisType.Auto,) * 2)


def planned(partitioning: rules.Partitioning, devices: int, **changes) -> Planned:
    """`partitioning` on `devices` devices, with some fields replaced."""
    fields = dataclasses.fields(rules.Partitioning)
    values = {field.name: getattr(partitioning, field.name) for field in fields}
    return Planned(**(values | changes), devices=devices)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run consists of, on whatever mesh.

    optimizer: its arrays, laid out like the parameters they belong to.
    """

    params: Mapping[str, Value]
    trained: frozenset[str]
    optimizer: tuple[Value, ...]
    batch: Mapping[str, Value]
    gradients: Lifetimes
    num_microbatches: int = 1

    @property
    def batch_size(self) -> int:
        """Examples per step."""
        return next(iter(self.batch.values())).shape[0]

    def count(self) -> dict[str, tuple[int, int]]:
        """(parameters, trained ones) of each part of the model."""
        counts: dict[str, tuple[int, int]] = {}
        for name, value in self.params.items():
            all_, trained = counts.get(trace.part_of(name), (0, 0))
            size = math.prod(value.shape)
            now = (all_ + size, trained + size * (name in self.trained))
            counts[trace.part_of(name)] = now
        return counts


def trace_run(
    model: Any,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.ShapeDtypeStruct],
    optimizer: tuple[Value, ...],
    *,
    num_microbatches: int = 1,
) -> Run:
    """The run of a model whose abstract `params` and `params_axes` are `variables`."""
    params = parameter_values(variables)
    rows = next(iter(batch.values())).shape[0]
    if rows % num_microbatches:
        raise UserError(
            f"a batch of {rows} examples does not divide into num_microbatches="
            f"{num_microbatches}. Set train.fine_tune.num_microbatches to a divisor."
        )
    part = {
        name: jax.ShapeDtypeStruct(
            (rows // num_microbatches, *array.shape[1:]), array.dtype
        )
        for name, array in batch.items()
    }
    trainable, frozen = freezing.split_frozen(variables["params"], model.frozen)
    trained = traverse_util.flatten_dict(trainable, sep="/")
    names = {path: value.axes for path, value in params.items()}
    axes = [_axes_of(tree, names) for tree in (trainable, frozen)]

    def gradients(trainable, frozen, batch, rng):
        def loss(trainable):
            merged = freezing.merge_frozen(trainable, frozen)
            return model.loss_fn(merged, batch, rng)

        grads, metrics = jax.grad(loss, has_aux=True)(trainable)
        weight = metrics["loss"].count.astype(jnp.float32)
        return jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)

    program = trace.trace(
        gradients,
        (trainable, frozen, part, jax.random.key(0)),
        (*axes, {name: ("batch",) for name in part}, ()),
    )
    whole = {
        name: Value(
            array.shape,
            array.dtype.itemsize,
            ("batch", *[None] * (len(array.shape) - 1)),
            is_input=True,
        )
        for name, array in batch.items()
    }
    return Run(
        params,
        frozenset(trained),
        optimizer,
        whole,
        Lifetimes(program),
        num_microbatches,
    )


def parameter_values(variables: Mapping[str, Any]) -> dict[str, Value]:
    """Every parameter by its path, with its logical axes."""
    params: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    axes: dict[str, Any] = traverse_util.flatten_dict(variables["params_axes"], sep="/")
    return {
        name: Value(
            tuple(array.shape),
            array.dtype.itemsize,
            tuple(axes[f"{name}_axes"].names),
            is_input=True,
        )
        for name, array in params.items()
    }


def _axes_of(tree, names):
    flat = traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict({n: names[n] for n in flat}, sep="/")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes on each device: bytes, operations, seconds."""

    run: Run
    partitioning: Planned
    device: Device

    def __post_init__(self):
        """Raises UserError for sizes that the mesh does not divide."""
        for name, value in self.run.params.items():
            self.partitioning.spec(name, value.shape, value.axes)
        parts = self.partitioning.mesh.shape["data"] * self.run.num_microbatches
        if self.run.batch_size % parts:
            raise UserError(
                f"a batch of {self.run.batch_size} examples does not divide by the "
                f"mesh's data axis of {self.partitioning.mesh.shape['data']} x "
                f"num_microbatches={self.run.num_microbatches}. Set BATCH_SIZE = "
                f"{-(-self.run.batch_size // parts) * parts}, or choose another mesh."
            )

    @functools.cached_property
    def layout(self) -> Layout:
        """How arrays are laid out on the mesh."""
        cpu = self.device.name == "cpu"
        return Layout(dict(self.partitioning.mesh.shape), self.partitioning.rules, cpu)

    @functools.cached_property
    def memory(self) -> dict[str, int]:
        """Bytes by category; they are needed at the same, worst moment."""
        layout, run = self.layout, self.run
        trained = [value for name, value in run.params.items() if name in run.trained]
        accumulated = sum(
            layout.bytes(dataclasses.replace(value, itemsize=4)) for value in trained
        )
        peak = run.gradients.peak(layout)
        memory = {
            "weights": total_bytes(run.params.values(), layout),
            "optimizer": total_bytes(run.optimizer, layout),
            "batch": total_bytes(run.batch.values(), layout),
        }
        # With microbatches the sum of the gradients is there beside those of each part.
        extra = accumulated if run.num_microbatches > 1 else 0
        return memory | {
            "gradients": peak.gradients + extra,
            "activations": peak.activations,
            "temporaries": peak.temporaries,
        }

    @property
    def arguments(self) -> int:
        """Bytes of what the step is given: state and batch."""
        return sum(self.memory[name] for name in ("weights", "optimizer", "batch"))

    @property
    def total(self) -> int:
        """Bytes at the worst moment of a step."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device has as much memory, 5 % of it left to the runtime."""
        return self.total <= 0.95 * self.device.memory

    @functools.cached_property
    def transfers(self) -> list[costs.Transfer]:
        """What each device sends in a step."""
        program = self.run.gradients.program
        found = costs.transfers(program, self.layout)
        times = self.run.num_microbatches
        return [dataclasses.replace(t, times=t.times * times) for t in found]

    @functools.cached_property
    def flops(self) -> dict[tuple[str, str], int]:
        """Operations of a step on all devices, by (part of the model, phase)."""
        program, times = self.run.gradients.program, self.run.num_microbatches
        found = costs.flops_by_part(program)
        return {key: count * times for key, count in found.items()}

    @functools.cached_property
    def time(self) -> costs.Time:
        """Seconds of a step, by roofline."""
        layout, device, run = self.layout, self.device, self.run
        compute = costs.compute_seconds(run.gradients, layout, device)
        sent = sum(transfer.total for transfer in self.transfers)
        trained = [value for name, value in run.params.items() if name in run.trained]
        # Gradients are read; parameters and optimizer state are read and written.
        moved = 3 * total_bytes(trained, layout)
        moved += 2 * total_bytes(run.optimizer, layout)
        return costs.Time(
            compute * run.num_microbatches, sent / device.link, moved / device.bandwidth
        )

    def utilisation(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step of so long: recomputing does not count."""
        useful = sum(n for (_, phase), n in self.flops.items() if phase != "recomputed")
        mesh = self.partitioning.mesh
        return useful / (seconds * self.device.flops * mesh.size)


def sent_by_part(plan: Plan) -> dict[tuple[str, str, str], int]:
    """Bytes per device and step by (part, kind, mesh axis)."""
    sent: dict[tuple[str, str, str], int] = collections.Counter()
    for transfer in plan.transfers:
        sent[transfer.part, transfer.kind, transfer.axis] += transfer.total
    return dict(sent)


def decode_cache(
    model: Any,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[Value, ...]:
    """What decoding a batch keeps from token to token: keys, values, tokens so far."""
    names = {path: value.axes for path, value in parameter_values(variables).items()}
    program = trace.trace(
        lambda params, batch, rng: model.predict_batch(params, batch, rng),
        (variables["params"], dict(batch), jax.random.key(0)),
        (
            _axes_of(variables["params"], names),
            {name: ("batch",) for name in batch},
            (),
        ),
    )
    loops = [step for step, _ in program.all_steps() if step.name == "while"]
    kept: list[Value] = []
    for loop in loops:
        assert loop.body is not None
        held = [v for v in loop.body.inputs if "batch" in v.axes and len(v.shape) > 1]
        kept = max(kept, held, key=lambda vs: sum(math.prod(v.shape) for v in vs))
    return tuple(kept)
