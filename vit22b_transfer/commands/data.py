"""What a run reads: `vocab` and `tasks`."""

import argparse
import os
import pkgutil
import sys
from collections.abc import Iterator

from vit22b_transfer import UserError
from vit22b_transfer.commands.arguments import Add, without_startup_notes

# Nothing heavy is imported here: `vit22b --help` must answer at once.


def add_to(add: Add) -> None:
    """Adds the commands; `add(name, run, text, epilog)` makes one."""
    command = add("vocab", _vocab, "Train a SentencePiece vocabulary on captions.")
    command.add_argument("--out", required=True, help="file to write")
    command.add_argument("--vocab_size", type=int, required=True)
    command.add_argument(
        "captions", nargs="+", help="COCO or VQAv2 .json, .jsonl, or .txt files"
    )
    command.add_argument(
        "--on_bad_record",
        choices=("error", "skip"),
        default="error",
        help="whether an entry without a text stops it, or is left out and counted",
    )
    command = add("tasks", _tasks, "List the registered tasks and mixtures.")
    command.add_argument(
        "--import",
        dest="modules",
        action="append",
        metavar="MODULE",
        help="module that registers tasks (default: every module in ./tasks, or if "
        "there is no such folder, of the package)",
    )


def _vocab(args: argparse.Namespace) -> None:
    with without_startup_notes():
        from vit22b_transfer.data import vocabularies

    made = vocabularies.train(
        args.captions,
        args.out,
        vocab_size=args.vocab_size,
        on_bad_record=args.on_bad_record,
    )
    print(f"{args.out}: {made.vocab_size} pieces")


def _tasks(args: argparse.Namespace) -> None:
    with without_startup_notes():
        from vit22b_transfer.data import tasks as registered

        import_tasks(args.modules)
    for line in registered.describe():
        print(line)


def import_tasks(given: list[str] | None) -> None:
    """Imports modules that register tasks; None: those of the user, or the shipped.

    Raises:
      UserError: if one cannot be imported, or registers nothing.
    """
    from vit22b_transfer.data import tasks as registered
    from vit22b_transfer.recipes import modules

    for module in given or _task_modules():
        known = module in sys.modules
        before = registered.names()
        modules.imported(module)
        if given and not known and registered.names() == before:
            raise UserError(
                f"module {module} registers no task or mixture; give one that does, "
                "such as by `seqio.TaskRegistry.add`."
            )


def _task_modules() -> Iterator[str]:
    """The modules of the user's own folder of tasks, or of the shipped one."""
    from vit22b_transfer.recipes import shipped

    folder = os.path.abspath(shipped.TASKS)
    if not os.path.isdir(folder):
        folder = os.path.join(shipped.folder(), shipped.TASKS)
    for module in pkgutil.iter_modules([folder]):
        yield f"{shipped.TASKS}.{module.name}"
