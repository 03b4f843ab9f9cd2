"""`vit22b plan` of the command."""

import argparse

from vit22b_transfer.commands.arguments import (
    Add,
    add_gin_file,
    without_startup_notes,
)

# Nothing heavy is imported here: `vit22b --help` must answer at once.

# What a run needs but a plan does not.
_UNREAD = ("MODEL_DIR", "INITIAL_CHECKPOINT")


def add_to(add: Add) -> None:
    """Adds the command; `add(name, run, text, epilog)` makes it."""

    def run(args):
        with without_startup_notes():
            job, plan = _planned(args)
        from vit22b_transfer.planning import advice, report

        for line in report.report(plan):
            print(line)
        if getattr(job.model, "decode_fn", None) is not None:
            for line in report.decoding(job, plan):
                print(line)
        if not plan.fits:
            for line in advice.advice(job, plan):
                print(line)
        if args.search:
            for line in advice.proposal(advice.search(job, plan)):
                print(line)
        if args.compile:
            for line in report.compare(job, plan):
                print(line)

    command = add(
        "plan",
        run,
        "Say whether a recipe's training fits, and how fast a step can be.",
        "Nothing is allocated, no data is read. The mesh is the recipe's: "
        "--gin_file=gin_configs/meshes/NAME.gin, --gin.Partitioning.model=8.",
    )
    add_gin_file(command)
    command.add_argument(
        "--device", default="h100", help="h100, h200, a100, tpu-v4 ... or cpu"
    )
    command.add_argument("--devices", type=int, default=1, help="how many")
    command.add_argument(
        "--compile",
        action="store_true",
        help="also compile the step for as many simulated devices, and compare",
    )
    command.add_argument(
        "--search",
        action="store_true",
        help="also look for the best mesh and batch of as many devices",
    )


def _planned(args: argparse.Namespace):
    """The job of the recipe, and its plan."""
    import jax

    # A plan for other devices must not take memory of those that are here.
    jax.config.update("jax_platforms", "cpu")
    if args.compile:
        jax.config.update("jax_num_cpu_devices", args.devices)
    from vit22b_transfer.planning import devices, jobs, planner
    from vit22b_transfer.recipes import loading, shipped
    from vit22b_transfer.training import train

    paths = shipped.search_paths()
    device = devices.device(args.device)
    recipe = loading.read(args.gin_file, args.overrides, paths)
    unset = " ".join(recipe.required())
    unread = [f"{name}='(not read)'" for name in _UNREAD if name in unset.split()]
    recipe = loading.read(args.gin_file, [*args.overrides, *unread], paths)
    arguments = loading.arguments(recipe, train.fine_tune, paths)
    job = jobs.Job.from_arguments(arguments)
    partitioning = planner.planned(job.partitioning, args.devices)
    return job, planner.Plan(job.run(), partitioning, device)
