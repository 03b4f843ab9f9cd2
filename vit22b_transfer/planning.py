"""`vit22b plan`: the run of a recipe, planned for devices that need not be there."""

import dataclasses
import math
import resource
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vit22b_transfer.models import multimodal, vit
from vit22b_transfer.partitioning import devices, planner
from vit22b_transfer.partitioning.plan_memory import total_bytes
from vit22b_transfer.partitioning.plan_trace import Value
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, state, steps

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Job:
    """The parts of a training run that a plan needs."""

    model: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]
    partitioning: Partitioning
    num_microbatches: int = 1

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any]) -> "Job":
        """The job of `train.fine_tune` called with these arguments; reads no data."""
        from vit22b_transfer.data import batches

        model, data = arguments["model"], arguments["data"]
        shapes, types = batches.batch_shapes(
            model.FEATURE_CONVERTER_CLS, data.feature_lengths, data.batch_size
        )
        batch = {n: jax.ShapeDtypeStruct(shapes[n], types[n]) for n in shapes}
        if getattr(data, "cache", None) is not None:
            batch = with_features(batch, model.module.tower)
        return cls(
            model,
            batch,
            arguments["partitioning"],
            arguments.get("num_microbatches", 1),
        )

    @property
    def batch_size(self) -> int:
        """Examples per step."""
        return next(iter(self.batch.values())).shape[0]

    def with_batch(self, size: int) -> "Job":
        """The same job with batches of another size."""
        batch = {
            name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
            for name, array in self.batch.items()
        }
        return dataclasses.replace(self, batch=batch)

    def variables(self) -> dict[str, Any]:
        """Abstract `params` and `params_axes`."""
        shapes = {name: array.shape for name, array in self.batch.items()}
        types = {name: array.dtype for name, array in self.batch.items()}
        return jax.eval_shape(
            lambda rng: self.model.get_initial_variables(rng, shapes, types),
            jax.random.key(0),
        )

    def run(self) -> planner.Run:
        """What the planner has to know of it: traced once, for any mesh."""
        variables = self.variables()
        return planner.trace_run(
            self.model,
            variables,
            self.batch,
            _optimizer_values(self.model, variables),
            num_microbatches=self.num_microbatches,
        )


def decoding(job: Job, plan: planner.Plan) -> Iterator[str]:
    """What decoding a batch keeps from token to token, in a line of text."""
    cache = planner.decode_cache(job.model, job.variables(), job.batch)
    size = total_bytes(cache, plan.layout)
    yield f"decoding a batch of {job.batch_size} keeps {size / GIB:.3f} GiB per device"


def with_features(
    batch: Mapping[str, jax.ShapeDtypeStruct], tower: vit.ViTConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch with the tower's tokens, from a cache, in place of images."""
    others = dict(batch)
    images = others.pop("encoder_input_images").shape
    shape = (images[0], math.prod(tower.grid_of(*images[1:3])), tower.width)
    return {multimodal.FEATURES: jax.ShapeDtypeStruct(shape, tower.dtype), **others}


def compare(job: Job, plan: planner.Plan) -> Iterator[str]:
    """The plan beside what the compiler makes of the true step, in lines of text.

    The compiler is that of CPUs: arguments are those of any device, what is held
    beside them depends on the device's compiler.
    """
    plan = dataclasses.replace(plan, device=devices.device("cpu"))
    began = time.perf_counter()
    memory = compile_step(job, job.partitioning).memory_analysis()
    seconds = time.perf_counter() - began
    if memory is None:
        raise ValueError("this device's compiler tells no memory.")
    arguments = memory.argument_size_in_bytes
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes
    beside -= memory.alias_size_in_bytes
    rows = (
        ("arguments", plan.arguments, arguments),
        ("beside them", plan.total - plan.arguments, beside),
        ("total", plan.total, arguments + beside),
    )
    lines = [
        (name, [f"{a / GIB:.4f}", f"{b / GIB:.4f}", f"{a / b:.3f}"])
        for name, a, b in rows
    ]
    yield ""
    yield from _table("GiB per device", ["planned", "compiled", "ratio"], lines)
    # Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield f"compiled in {seconds:.1f} s; this process held {peak:.2f} GiB at most"


def compile_step(job: Job, partitioning: Partitioning) -> jax.stages.Compiled:
    """The true train step, compiled for the devices of the mesh; no state is made.

    `partitioning` needs its devices: simulated ones will do.
    """
    update, arguments = _step(job, partitioning)
    step = steps.make_train_step(update, 1)
    return steps.compile_train_step(step, *arguments, partitioning)


def abstract_arguments(job: Job, partitioning: Partitioning) -> tuple[Any, ...]:
    """State, window, batch and key of the train step, abstract but for the key."""
    return _step(job, partitioning)[1]


def _step(job, partitioning):
    model, replicated = job.model, partitioning.replicated
    batch = {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=partitioning.batch_sharding(array.ndim)
        )
        for name, array in job.batch.items()
    }
    params = state.abstract_variables(model, partitioning, batch)
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    abstract = state.abstract_state(params, optimizer, partitioning)
    update = steps.make_update(
        model, optimizer, partitioning, num_microbatches=job.num_microbatches
    )
    rng = jax.device_put(jax.random.key(0), replicated)
    with partitioning.activate():
        _, window = jax.eval_shape(update, abstract, batch, rng)
    window = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), window
    )
    return update, (abstract, window, batch, rng)


def _optimizer_values(model, variables) -> tuple[Value, ...]:
    params = variables["params"]
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    opt_state = jax.eval_shape(optimizer.init, params)
    by_path = planner.parameter_values(variables)
    own = jax.tree_util.tree_map_with_path(
        lambda path, _: by_path["/".join(entry.key for entry in path)], params
    )
    owners = state.like_parameters(opt_state, params, own, Value((), 0, ()))
    return tuple(
        Value(
            tuple(leaf.shape),
            leaf.dtype.itemsize,
            owner.axes or (None,) * len(leaf.shape),
            is_input=True,
        )
        for leaf, owner in zip(
            jax.tree.leaves(opt_state), jax.tree.leaves(owners), strict=True
        )
    )


def report(plan: planner.Plan) -> Iterator[str]:
    """The plan in lines of text."""
    mesh = " x ".join(f"{n} {k}" for k, n in plan.partitioning.mesh.shape.items())
    yield (
        f"{plan.device.name}, {plan.partitioning.mesh.size} devices: mesh {mesh}; "
        f"batch {plan.run.batch_size} in {plan.run.num_microbatches} microbatches"
    )
    yield ""
    yield from _table("parameters", ["all", "trained"], _parameters(plan))
    yield ""
    memory = plan.memory | {"total": plan.total}
    rows = [(name, [f"{size / GIB:.3f}"]) for name, size in memory.items()]
    yield from _table("bytes per device", ["GiB"], rows)
    yield ""
    yield from _table("TFLOP per step", list(_PHASES), _flops(plan))
    yield ""
    rows = [
        (f"{part}: {kind} over {axis}", [f"{size / GIB:.4f}"])
        for (part, kind, axis), size in sorted(planner.sent_by_part(plan).items())
    ]
    yield from _table("sent per device and step", ["GiB"], rows or [("nothing", [""])])
    yield ""
    time = plan.time
    yield (
        f"step at best: {time.shortest * 1e3:.3g} ms with all transfers hidden, "
        f"{time.longest * 1e3:.3g} ms with none; utilisation "
        f"{100 * plan.utilisation(time.shortest):.1f} % to "
        f"{100 * plan.utilisation(time.longest):.1f} %"
    )
    yield (
        f"(compute {time.compute * 1e3:.3g} ms, transfers {time.transfers * 1e3:.3g} "
        f"ms, update {time.update * 1e3:.3g} ms)"
    )
    room = plan.device.memory / GIB
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"{verdict}: {plan.total / GIB:.2f} of {room:.1f} GiB per device"


_PHASES = ("forward", "recomputed", "backward")


def _parameters(plan):
    counts = plan.run.count()
    rows = [(part, [f"{n:,}" for n in count]) for part, count in counts.items()]
    totals = [sum(count[i] for count in counts.values()) for i in range(2)]
    return [*rows, ("total", [f"{n:,}" for n in totals])]


def _flops(plan):
    parts = dict.fromkeys(part for part, _ in plan.flops)
    rows = [
        (part, [f"{plan.flops.get((part, p), 0) / 1e12:.4g}" for p in _PHASES])
        for part in parts
    ]
    totals = [
        sum(n for (_, phase), n in plan.flops.items() if phase == p) for p in _PHASES
    ]
    return [*rows, ("total", [f"{n / 1e12:.4g}" for n in totals])]


def _table(title, columns, rows) -> Iterator[str]:
    width = max(len(title), *(len(name) for name, _ in rows)) + 2
    yield title.ljust(width) + "".join(name.rjust(18) for name in columns)
    for name, cells in rows:
        yield name.ljust(width) + "".join(cell.rjust(18) for cell in cells)
