"""What came of runs: `eval --predictions`, `compare`, `report`; without a model."""

import argparse
import functools
import os
import sys

from vit22b_transfer import UserError
from vit22b_transfer.commands.arguments import Add, without_startup_notes
from vit22b_transfer.commands.data import import_tasks

# Nothing heavy is imported here: `vit22b --help` must answer at once.


# Of a run's recipe, in bytes.
_MAX_RECIPE = 1 << 20


def add_to(add: Add) -> None:
    """Adds the commands; `add(name, run, text, epilog)` makes one."""
    command = add(
        "compare",
        _compare,
        "Say which of two models is better on the same examples, and how sure that is.",
    )
    for name in ("first", "second"):
        command.add_argument(
            name,
            metavar=name[0].upper(),
            help="a file of predictions, or a run's folder",
        )
    command.add_argument(
        "--entry",
        metavar="TASK/SPLIT",
        help="which evaluation of runs (default: the only one that both have)",
    )
    add_task(command)
    command.add_argument(
        "--common",
        action="store_true",
        help="leave out and count examples that one of the two does not have",
    )
    command.add_argument(
        "--out", metavar="FILE.html", help="a page with the examples that flipped"
    )

    command = add(
        "report",
        _report,
        "Make one page of a run: curves, scores, slices, examples with their images.",
    )
    command.add_argument("folder", metavar="RUN", help="MODEL_DIR of a run")
    add_modules(command)
    command.add_argument(
        "--out", metavar="FILE.html", help="default: report.html in RUN"
    )


def add_predictions(command: argparse.ArgumentParser) -> None:
    """The arguments of `eval --predictions`."""
    command.add_argument(
        "--predictions",
        metavar="FILE.jsonl",
        help="score this file, without a model: intervals, slices, results for "
        "official servers; the arguments below are of it",
    )
    add_task(command)
    command.add_argument(
        "--by",
        action="append",
        metavar="FIELD",
        help="slices by this field of lines; may be repeated (default: VQAv2's types)",
    )
    command.add_argument("--out", metavar="FILE.json", help="all of it as JSON")
    command.add_argument(
        "--coco_results", metavar="FILE.json", help="captions for COCO's server"
    )
    command.add_argument(
        "--vqa_results", metavar="FILE.json", help="answers for VQAv2's server"
    )


def add_task(command: argparse.ArgumentParser) -> None:
    """The arguments that name a registered task."""
    command.add_argument(
        "--task", help="whose metrics (default: what the file's record names)"
    )
    add_modules(command)


def add_modules(command: argparse.ArgumentParser) -> None:
    """The argument that names modules of tasks."""
    command.add_argument(
        "--import",
        dest="modules",
        action="append",
        metavar="MODULE",
        help="module that registers tasks (default: as `vit22b tasks`)",
    )


def task_and_split(args: argparse.Namespace, path: str) -> tuple[str, str]:
    """The task and split of a predictions file; the task is registered then."""
    from vit22b_transfer.evaluation import scored_files

    task, split = scored_files.of_record(path)
    task = args.task or task
    if not task:
        raise UserError(
            f"no {path}.run.json says of which task it is: give --task NAME, such as "
            "coco_captions; `vit22b tasks` lists them."
        )
    register(args.modules, task)
    return task, split


def register(modules: list[str] | None, task: str) -> None:
    """Imports the modules of tasks, and looks the task up."""
    with without_startup_notes():
        from vit22b_transfer.data import tasks

        if task not in tasks.names():
            import_tasks(modules)
    tasks.check_name(task)


def asked(args: argparse.Namespace) -> bool:
    """Whether `eval` is of a predictions file.

    Raises:
      UserError: if it is not, but an argument of one is given.
    """
    ours = ("task", "modules", "by", "out", "coco_results", "vqa_results")
    given = [f"--{'import' if n == 'modules' else n}" for n in ours if getattr(args, n)]
    if given and not args.predictions:
        raise UserError(f"{', '.join(given)}: of --predictions FILE alone.")
    return bool(args.predictions)


def score(args: argparse.Namespace) -> None:
    """`eval --predictions`."""
    given = [args.folder, *args.gin_file, *args.overrides]
    given += ["--deterministic"] if args.deterministic else []
    if any(given):
        raise UserError(
            "--predictions FILE needs no recipe and no model; leave out "
            f"{', '.join(filter(None, given))}."
        )
    from vit22b_transfer.host import progress

    with without_startup_notes():
        from vit22b_transfer.evaluation import result_files, scored_files
        from vit22b_transfer.inference.prediction_files import read_lines

    path, console = args.predictions, progress.console()
    for kind, out in (("coco", args.coco_results), ("vqa", args.vqa_results)):
        if out:
            count, unread = result_files.write(read_lines(path), kind, path, out)
            console.print(
                f"{out}: {count} entries"
                + (f", {unread} of images not read are empty" if unread else ""),
                markup=False,
            )
    if (args.coco_results or args.vqa_results) and not has_targets(path):
        console.print("nothing to score: the lines have no targets", markup=False)
        return
    task, split = task_and_split(args, path)
    made = scored_files.report(scored_files.judge(path, task, split), args.by)
    console.print(f"{task} {split}: {path}", markup=False)
    import rich.console

    scored_files.show(made, rich.console.Console())
    if args.out:
        scored_files.write(made, args.out)
        console.print(f"written to {args.out}", markup=False)
    sys.stdout.flush()


def has_targets(path: str) -> bool:
    """Whether a line has something to score against."""
    from vit22b_transfer.inference.prediction_files import read_lines

    fields = ("target", "references", "metadata")
    return any(any(line.get(field) for field in fields) for line in read_lines(path))


def _compare(args: argparse.Namespace) -> None:
    import rich.console

    with without_startup_notes():
        from vit22b_transfer.evaluation import paired_files
        from vit22b_transfer.reports import compare_page

    first, second = _files(args)
    task, split = task_and_split(args, first)
    made = paired_files.pair(first, second, task, split=split, common=args.common)
    paired_files.show(made, rich.console.Console())
    changed = _changed(args)
    for line in changed or ():
        print(line)
    if args.out:
        compare_page.write(made, changed, args.out)
        print(f"written to {args.out}")


def _files(args: argparse.Namespace) -> list[str]:
    """The files of predictions that are compared."""
    from vit22b_transfer.evaluation import run_files

    given: list[str] = [args.first, args.second]
    folders = [path for path in given if os.path.isdir(path)]
    if not folders:
        if args.entry:
            raise UserError("--entry chooses an evaluation of a run; these are files.")
        return given
    entry, found = run_files.chosen(folders, args.entry)
    print(f"comparing {entry}")
    files = dict(zip(folders, found, strict=True))
    return [files[path] if path in files else path for path in given]


def _changed(args: argparse.Namespace) -> list[str] | None:
    """The lines by which two runs' recipes differ; None unless both have one."""
    from vit22b_transfer.commands import folders
    from vit22b_transfer.evaluation import paired_files

    texts = []
    for folder in (args.first, args.second):
        path = os.path.join(folder, folders.RECIPE)
        if not os.path.isfile(path):
            return None
        with open(path, encoding="utf-8", errors="replace") as file:
            texts.append(file.read(_MAX_RECIPE).splitlines())
    return paired_files.differing(*texts)


def _report(args: argparse.Namespace) -> None:
    with without_startup_notes():
        from vit22b_transfer.reports import report_page

    register_one = functools.partial(register, args.modules)
    print(f"written to {report_page.write(args.folder, register_one, args.out)}")
