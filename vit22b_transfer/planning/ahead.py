"""What a training will take on the devices that are here, told before it starts.

The plan of a run whose layers are scanned is traced in a second or two, however many
layers there are, and needs more memory than that of the run itself: by 1.3 to 1.9 in
the package's recipes. Where even that fits, it is told. Only where it does not is the
run itself traced.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vit22b_transfer import UserError
from vit22b_transfer.planning import advice, devices, jobs, planner

# Of a refusal.
_KNOBS = 5


def check(arguments: Mapping[str, Any], *, force: bool = False) -> Iterator[str]:
    """One or two lines on what `train.fine_tune` with these arguments will take.

    force: a run that does not fit is told, and no error.

    Raises:
      UserError: if it does not fit, with what would help.
    """
    device = devices.here()
    if device is None:
        yield f"no plan: nothing is known of a {jax.devices()[0].device_kind}"
        return
    try:
        job = jobs.Job.from_arguments(arguments)
        quick = _scanned(job)
        plan = _plan(quick, device)
        # Scanned layers are another program; what fits as one, fits as the other.
        is_bound = quick is not job and plan.fits
        if not plan.fits and quick is not job:
            plan = _plan(job, device)
    except UserError as error:
        yield f"no plan: {error}"  # the training says itself what is wrong
        return
    yield _told(plan, arguments.get("total_steps"), is_bound)
    if plan.fits:
        return
    if force:
        yield "it does not fit, but is forced to start"
        return
    knobs = advice.knobs(quick, _plan(quick, device))[:_KNOBS]
    lines = [f"  {'; '.join(knob.lines)}" for knob in knobs]
    raise UserError(
        f"this training does not fit: it takes {plan.total / jobs.GIB:.1f} GiB on "
        f"each device, which has {device.memory / jobs.GIB:.1f}. What lowers it, most "
        "first, as lines of a recipe:\n"
        + "\n".join(lines)
        + "\n`vit22b plan` says by how much; --force starts it all the same."
    )


def _plan(job: jobs.Job, device: devices.Device) -> planner.Plan:
    partitioning = planner.planned(job.partitioning, jax.device_count())
    return planner.Plan(job.run(), partitioning, device)


def _scanned(job: jobs.Job) -> jobs.Job:
    """The job with scanned layers, or itself if they are or cannot be."""
    model, changes = job.model, {}
    if getattr(model, "lora", None) is not None:
        return job  # which names kernels by their layers
    for name in ("tower", "text"):
        part: Any = getattr(model.module, name, None)
        if getattr(part, "scan_layers", None) is False:
            changes[name] = dataclasses.replace(part, scan_layers=True)
    if not changes:
        return job
    model = copy.copy(model)
    model.module = model.module.clone(**changes)
    return dataclasses.replace(job, model=model)


def _told(plan: planner.Plan, steps: Any, is_bound: bool) -> str:
    """`plan: at most 1.6 of 80.0 GiB on each of 8 h100; a step takes 0.2 s or more`."""
    device = plan.device
    size = f"{'at most ' if is_bound else ''}{plan.total / jobs.GIB:.2f}"
    text = (
        f"plan: {size} of {device.memory / jobs.GIB:.1f} GiB on "
        f"each of {plan.partitioning.mesh.size} {device.name}"
    )
    if device.flops:
        seconds = plan.time.shortest
        text += f"; a step takes {seconds:.2g} s or more"
        if isinstance(steps, int):
            text += f", all {steps} take {seconds * steps / 3600:.2g} hours or more"
    return text
