"""What to change when a run does not fit, and the best mesh for a number of devices."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.models import freezing, gemma, t5_variants, vit_variants
from vit22b_transfer.models import lora as low_rank
from vit22b_transfer.planning import jobs, planner, report
from vit22b_transfer.training import optimizers

LORA = low_rank.LoraConfig(16, 32.0, (".*attention/(query|value)/kernel",))


@dataclasses.dataclass(frozen=True)
class Knob:
    """One change to a run: the gin lines that make it, and the plan with it."""

    lines: tuple[str, ...]
    plan: planner.Plan


def knobs(job: jobs.Job, plan: planner.Plan) -> list[Knob]:
    """All changes that lower memory, the largest effect first."""
    found = [*_mesh_knobs(plan)]
    for lines, changed in _job_knobs(job):
        found += _knob(lines, lambda c=changed: _planned(c, plan))
    helpful = [knob for knob in found if knob.plan.total < 0.99 * plan.total]
    return sorted(helpful, key=lambda knob: knob.plan.total)


def _planned(job, plan):
    return planner.Plan(job.run(), plan.partitioning, plan.device)


def _knob(lines, make) -> list[Knob]:
    """The change alone, or nothing if the mesh does not divide it."""
    try:
        return [Knob(lines, make())]
    except ValueError:
        return []


def _mesh_knobs(plan) -> Iterator[Knob]:
    mesh = plan.partitioning
    sizes = mesh.mesh.shape
    changes: list[dict[str, int]] = [
        {"parameter_partitioning_dims": 2},
        {"activation_partitioning_dims": 2},
        {"parameter_partitioning_dims": 2, "activation_partitioning_dims": 2},
    ]
    if sizes["data"] % 2 == 0:
        changes.append({"data": sizes["data"] // 2, "model": sizes["model"] * 2})
    for change in changes:
        lines = tuple(f"rules.Partitioning.{k} = {v}" for k, v in change.items())
        changed = dataclasses.replace(mesh, **change)
        yield from _knob(
            lines, lambda c=changed: dataclasses.replace(plan, partitioning=c)
        )


def _job_knobs(job) -> Iterator[tuple[tuple[str, ...], jobs.Job]]:
    """(gin lines, the job with them): each needs a trace of its own."""
    model, module = job.model, job.model.module
    microbatches = 2 * job.num_microbatches
    # Not every loss is a sum over parts of a batch, nor takes every model updates.
    in_parts = not getattr(model, "loss_spans_batch", False)
    without_lora = getattr(model, "lora", None) is None
    if in_parts and job.batch_size % microbatches == 0:
        lines = (f"train.fine_tune.num_microbatches = {microbatches}",)
        yield lines, dataclasses.replace(job, num_microbatches=microbatches)
    if job.batch_size % 2 == 0:
        yield (
            (f"BATCH_SIZE = {job.batch_size // 2}",),
            job.with_batch(job.batch_size // 2),
        )
    for name in ("tower", "text"):
        part: Any = getattr(module, name, None)
        if getattr(part, "remat", "block") != "block":
            remat = dataclasses.replace(part, remat="block")
            changed = _changed(model, module=module.clone(**{name: remat}))
            lines = (f"{_configurable(part)}.remat = 'block'",)
            yield lines, dataclasses.replace(job, model=changed)
    trains_tower = module.tower is not None and freezing.TOWER not in model.frozen
    if without_lora and trains_tower:
        changed = _changed(model, frozen=(*model.frozen, freezing.TOWER))
        lines = ("include 'gin_configs/models/frozen_tower.gin'",)
        yield lines, dataclasses.replace(job, model=changed)
    if without_lora and hasattr(model, "lora"):
        changed = _changed(
            model,
            module=low_rank.with_lora(module, LORA, in_tower=not model.frozen_tower),
            lora=LORA,
            frozen=(LORA.frozen, *model.frozen),
        )
        lines = ("include 'gin_configs/models/lora.gin'",)
        yield lines, dataclasses.replace(job, model=changed)
    rate = getattr(model.optimizer_def, "learning_rate", None)
    if rate is not None:
        ema_decay = getattr(model.optimizer_def, "ema_decay", None)
        optimizer = optimizers.adafactor(rate, ema_decay=ema_decay)
        changed = _changed(model, optimizer_def=optimizer)
        lines = ("include 'gin_configs/runs/optimizer_adafactor.gin'",)
        yield lines, dataclasses.replace(job, model=changed)


def _changed(model: Any, **values: Any) -> Any:
    """The same model with other attributes."""
    changed = copy.copy(model)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def _configurable(part) -> str:
    """What the shipped gin files call what makes such a config: by its name, or not."""
    kind = type(part)
    own = kind.__module__.rpartition(".")[2], kind.__name__, {}
    module, by_name, table = {
        "ViTConfig": ("vit", "vit22b_config", vit_variants.VARIANTS),
        "T5Config": ("t5", "t5_config", t5_variants.VARIANTS),
        "GemmaConfig": ("gemma", "gemma_config", gemma.VARIANTS),
    }.get(kind.__name__, own)
    if module == "vit" and not part.parallel:
        by_name = "classic_config"
    published = any(
        all(getattr(part, name) == size for name, size in _sizes(row).items())
        for row in table.values()
    )
    return f"{module}.{by_name if published else type(part).__name__}"


def _sizes(row: Any) -> dict[str, Any]:
    sizes = dict(row) if isinstance(row, Mapping) else dataclasses.asdict(row)
    sizes.pop("vocab_size", None)  # a recipe sets its own
    return sizes


def advice(job: jobs.Job, plan: planner.Plan) -> Iterator[str]:
    """The knobs in lines of text."""
    yield ""
    yield "what would help, each alone (GiB per device; time of a step at best):"
    for knob in knobs(job, plan):
        seconds = knob.plan.time.longest / plan.time.longest
        fits = "fits" if knob.plan.fits else ""
        yield (
            f"{knob.plan.total / jobs.GIB:9.2f}  {seconds:5.2f}x  {fits:5}"
            + "; ".join(knob.lines)
        )


def meshes(plan: planner.Plan) -> list[planner.Plan]:
    """The run on every mesh and table of rules of as many devices, best first.

    Those that fit come first, by time with no transfer hidden; then the smallest.
    """
    devices = plan.partitioning.devices
    found = []
    for model in (n for n in range(1, devices + 1) if devices % n == 0):
        for activations in (1, 2):
            for parameters in (1, 2):
                mesh = dataclasses.replace(
                    plan.partitioning,
                    data=devices // model,
                    model=model,
                    activation_partitioning_dims=activations,
                    parameter_partitioning_dims=parameters,
                    ring_projections=False,
                )
                try:
                    found.append(dataclasses.replace(plan, partitioning=mesh))
                except ValueError:
                    continue
    if not found:
        raise UserError(
            f"no mesh of {devices} devices divides this model and a batch of "
            f"{plan.run.batch_size}. Choose another number of devices, or BATCH_SIZE = "
            f"{-(-plan.run.batch_size // devices) * devices}."
        )
    return sorted(
        found, key=lambda p: (not p.fits, p.time.longest if p.fits else p.total)
    )


def search(job: jobs.Job, plan: planner.Plan) -> planner.Plan:
    """The mesh and batch with the most examples per second, of those that fit.

    The batch is doubled while that helps, the mesh chosen anew each time.
    """
    best = meshes(plan)[0]
    while best.fits:
        job = job.with_batch(2 * job.batch_size)
        larger = meshes(dataclasses.replace(plan, run=job.run()))[0]
        gained = _rate(larger) / _rate(best)
        if not larger.fits or gained < 1.05:
            break
        best = larger
    return best


def _rate(plan):
    return plan.run.batch_size / plan.time.longest


def proposal(best: planner.Plan) -> Iterator[str]:
    """The gin lines of the best mesh and batch."""
    mesh = best.partitioning
    yield ""
    yield "best mesh and batch found:" if best.fits else "nothing fits; nearest:"
    for name in (
        "data",
        "model",
        "activation_partitioning_dims",
        "parameter_partitioning_dims",
    ):
        yield f"rules.Partitioning.{name} = {getattr(mesh, name)}"
    yield f"BATCH_SIZE = {best.run.batch_size}"
    yield f"# {_rate(best):.4g} examples per second at best"
    yield ""
    yield from report.report(best)
