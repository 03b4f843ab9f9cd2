"""A plan as lines of text."""

import dataclasses
import resource
import time
from collections.abc import Iterator

from vit22b_transfer import UserError
from vit22b_transfer.planning import devices, jobs, planner
from vit22b_transfer.planning.memory import total_bytes


def decoding(job: jobs.Job, plan: planner.Plan) -> Iterator[str]:
    """What decoding a batch keeps from token to token, in a line of text."""
    cache = planner.decode_cache(job.model, job.variables(), job.batch)
    size = total_bytes(cache, plan.layout)
    yield (
        f"decoding a batch of {job.batch_size} keeps {size / jobs.GIB:.3f} GiB per "
        "device"
    )


def compare(job: jobs.Job, plan: planner.Plan) -> Iterator[str]:
    """The plan beside what the compiler makes of the true step, in lines of text.

    The compiler is that of CPUs: arguments are those of any device, what is held
    beside them depends on the device's compiler.
    """
    plan = dataclasses.replace(plan, device=devices.device("cpu"))
    began = time.perf_counter()
    memory = jobs.compile_step(job, job.partitioning).memory_analysis()
    seconds = time.perf_counter() - began
    if memory is None:
        raise UserError("this device's compiler tells no memory.")
    arguments = memory.argument_size_in_bytes
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes
    beside -= memory.alias_size_in_bytes
    rows = (
        ("arguments", plan.arguments, arguments),
        ("beside them", plan.total - plan.arguments, beside),
        ("total", plan.total, arguments + beside),
    )
    lines = [
        (name, [f"{a / jobs.GIB:.4f}", f"{b / jobs.GIB:.4f}", f"{a / b:.3f}"])
        for name, a, b in rows
    ]
    yield ""
    yield from _table("GiB per device", ["planned", "compiled", "ratio"], lines)
    # Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield f"compiled in {seconds:.1f} s; this process held {peak:.2f} GiB at most"


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
    rows = [(name, [f"{size / jobs.GIB:.3f}"]) for name, size in memory.items()]
    yield from _table("bytes per device", ["GiB"], rows)
    yield ""
    yield from _table("TFLOP per step", list(_PHASES), _flops(plan))
    yield ""
    rows = [
        (f"{part}: {kind} over {axis}", [f"{size / jobs.GIB:.4f}"])
        for (part, kind, axis), size in sorted(planner.sent_by_part(plan).items())
    ]
    yield from _table("sent per device and step", ["GiB"], rows or [("nothing", [""])])
    yield ""
    time = plan.time
    yield (
        f"step at best: {time.shortest * 1e3:.3g} ms with all transfers hidden, "
        f"{time.longest * 1e3:.3g} ms with none"
    )
    yield (
        f"utilisation at best: {100 * plan.utilisation(time.shortest):.1f} % to "
        f"{100 * plan.utilisation(time.longest):.1f} %"
    )
    yield (
        f"(compute {time.compute * 1e3:.3g} ms, transfers {time.transfers * 1e3:.3g} "
        f"ms, update {time.update * 1e3:.3g} ms)"
    )
    available = plan.device.memory / jobs.GIB
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"{verdict}: {plan.total / jobs.GIB:.2f} of {available:.1f} GiB per device"


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
