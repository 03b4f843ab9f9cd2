"""`config` of the command: what a recipe resolves to, and where recipes are."""

import argparse

from vit22b_transfer.commands.arguments import (
    GIN_EPILOG,
    Add,
    add_gin_file,
    without_startup_notes,
)

# Nothing heavy is imported here: `vit22b --help` must answer at once.


def add_to(add: Add) -> None:
    """Adds the command; `add(name, run, text, epilog)` makes it."""

    def run(args):
        if args.action == "show" and not args.gin_file:
            command.error(
                "config show: the following arguments are required: --gin_file"
            )
        if args.action == "path" and (args.gin_file or args.overrides):
            command.error("config path takes no recipe")
        _show(args) if args.action == "show" else _path()

    command = add("config", run, "Show what a recipe resolves to.", GIN_EPILOG)
    command.add_argument(
        "action",
        choices=["show", "path"],
        help="path: the folder of the package's own gin_configs and tasks, as T5X's "
        "--gin_search_paths takes it",
    )
    add_gin_file(command, required=False)


def _path() -> None:
    from vit22b_transfer.recipes import shipped

    print(shipped.folder())


def _show(args: argparse.Namespace) -> None:
    from vit22b_transfer.recipes import loading, shipped

    with without_startup_notes():
        recipe = loading.read(args.gin_file, args.overrides, shipped.search_paths())
    for line in loading.show(recipe):
        print(line)
