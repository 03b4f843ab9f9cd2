"""What a run reads: `vocab` and `tasks`."""

import argparse
import importlib
import os
import pkgutil
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

    made = vocabularies.train(args.captions, args.out, vocab_size=args.vocab_size)
    print(f"{args.out}: {made.vocab_size} pieces")


def _tasks(args: argparse.Namespace) -> None:
    with without_startup_notes():
        from vit22b_transfer.data import tasks as registered

        for module in args.modules or _task_modules():
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name not in (module, module.partition(".")[0]):
                    raise
                raise UserError(
                    f"there is no module {module} in {os.getcwd()} or on Python's path."
                ) from error
    for line in registered.describe():
        print(line)


def _task_modules() -> Iterator[str]:
    """The modules of the user's own folder of tasks, or of the shipped one."""
    from vit22b_transfer.recipes import shipped

    folder = os.path.abspath(shipped.TASKS)
    if not os.path.isdir(folder):
        folder = os.path.join(shipped.folder(), shipped.TASKS)
    for module in pkgutil.iter_modules([folder]):
        yield f"{shipped.TASKS}.{module.name}"
