"""`data-check` and `data-bench` of the command: data before a training."""

import argparse
import json
import os

from vit22b_transfer import UserError
from vit22b_transfer.commands import folders
from vit22b_transfer.commands.arguments import Add, without_startup_notes
from vit22b_transfer.commands.results import add_modules, register

# Nothing heavy is imported here: `vit22b --help` must answer at once.


def add_to(add: Add) -> None:
    """Adds the command; `add(name, run, text, epilog)` makes it."""
    command = add(
        "data-check",
        _run,
        "Look at data before a training: images, texts, duplicates, leaks, speed.",
    )
    command.add_argument(
        "what",
        nargs="+",
        metavar="TASK|FILES",
        help="a registered task; or images, folders, lists or archives, as `vit22b "
        "caption` takes them",
    )
    add_modules(command)
    command.add_argument(
        "--images_root",
        metavar="FOLDER",
        help="that names in lists are relative to (default: the folder of each list)",
    )
    command.add_argument(
        "--split", action="append", help="may be repeated (default: all splits)"
    )
    command.add_argument(
        "--size", type=int, default=224, help="side of the prepared images, in pixels"
    )
    for name in ("inputs", "targets"):
        command.add_argument(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"tokens of {name} that the model takes; longer ones are counted",
        )
    command.add_argument(
        "--most_images",
        type=int,
        metavar="N",
        help="look at N images of each split, drawn at random",
    )
    command.add_argument("--out", metavar="FILE.html", help="a page of all of it")
    command.add_argument("--json", metavar="FILE.json", help="the same as JSON")
    command = add(
        "data-bench",
        _bench,
        "Time the reading of a task: examples a second, and where the time goes.",
    )
    command.add_argument("task", metavar="TASK", help="a registered task")
    add_modules(command)
    command.add_argument("--split", default="train", help="(default: train)")
    command.add_argument(
        "--size", type=int, default=224, help="side of the images, in pixels"
    )
    command.add_argument("--batch_size", type=int, default=64)
    command.add_argument(
        "--seconds", type=float, default=20.0, help="how long to read (default: 20)"
    )


def _bench(args: argparse.Namespace) -> None:
    folders.use_vocabulary("")
    for name in ("size", "batch_size", "seconds"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name)}: it is to be above 0.")
    import rich.console

    from vit22b_transfer.host.tables import print_table

    with without_startup_notes():
        from vit22b_transfer.data import data_bench

    register(args.modules, args.task)
    found = data_bench.measure(
        args.task,
        args.split,
        size=args.size,
        batch_size=args.batch_size,
        seconds=args.seconds,
    )
    each, speed = found.per_example, found.examples_per_second
    rows = {**found.parts, "together": each}
    columns = {
        "ms of a processor for each example": [f"{1e3 * x:.2f}" for x in rows.values()],
        "share": [f"{x / each:.0%}" for x in rows.values()],
    }
    console = rich.console.Console()
    print_table(console, list(rows), columns, section=len(rows) - 1)
    print(
        f"{found.examples} examples read: {speed:,.0f} a second with "
        f"{found.processors} processors, {1 / each:,.0f} a second of one. A step of "
        f"{args.batch_size} examples that takes less than "
        f"{1e3 * args.batch_size / speed:,.0f} ms waits for its data.\n"
        "Of JPEGs at a scale (runs/scaled_jpegs.gin) images would take "
        f"{1e3 * found.scaled:.2f} ms."
    )


def _run(args: argparse.Namespace) -> None:
    folders.use_vocabulary("")  # of a project, in its folder
    for name in ("size", "inputs", "targets", "most_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it is to be 1 or more.")
    import rich.console

    from vit22b_transfer.host import whole_files

    with without_startup_notes():
        from vit22b_transfer.data import data_check, given_images, streams
        from vit22b_transfer.reports import check_page

        streams.keep_tensorflow_off_accelerators()

    what = args.what
    is_task = len(what) == 1 and what[0].isidentifier() and not os.path.exists(what[0])
    if is_task:
        if args.images_root:
            raise UserError(f"--images_root is of files; {what[0]} is a task.")
        task = what[0]
        register(args.modules, task)
    else:
        task = given_images.task(what, ["caption en"], folder=args.images_root)
    checked = data_check.check(
        task,
        args.split,
        size=args.size,
        limits={"inputs": args.inputs, "targets": args.targets},
        most_images=args.most_images,
    )
    check_page.show(checked, rich.console.Console())
    if args.json:
        with whole_files.replacing(args.json) as file:
            json.dump(data_check.as_json(checked), file, indent=2)
            file.write("\n")
        print(f"written to {args.json}")
    if args.out:
        check_page.write(checked, args.out)
        print(f"written to {args.out}")
