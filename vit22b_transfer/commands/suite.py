"""`suite` of the command: the paper's table on a tower, and on several."""

import argparse
import os

from vit22b_transfer import UserError
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
        if args.compare:
            given = [args.tower, args.data, args.rows, *args.gin_file, *args.overrides]
            if any(given):
                command.error("suite --compare takes folders of results, and --out")
            _compare(args)
        elif not (args.tower and args.data and args.out):
            command.error("suite: --tower, --data and --out are required")
        else:
            _run(args)

    command = add(
        "suite",
        run,
        "Run the paper's experiments that a folder of data sets allows, on one tower.",
        GIN_EPILOG,
    )
    command.add_argument(
        "--tower",
        help="what `vit22b import` wrote, a MODEL_DIR or a checkpoint, a gin file, or "
        "'random': fresh weights of the size that VIT or a gin file names",
    )
    command.add_argument("--data", help="folder of standard layouts: docs/suite.md")
    command.add_argument("--out", help="folder for results and features")
    command.add_argument("--rows", help="such as 1,8,11-14 (default: all)")
    command.add_argument(
        "--compare",
        nargs="+",
        metavar="OUT",
        help="put the results of several towers beside each other",
    )
    add_gin_file(command, required=False)


def _run(args: argparse.Namespace) -> None:
    from vit22b_transfer.commands import suite_recipes
    from vit22b_transfer.experiments import suite, suite_rows, surveys
    from vit22b_transfer.host import progress, whole_files
    from vit22b_transfer.recipes import shipped
    from vit22b_transfer.reports import suite_table

    rows = suite_rows.numbered(args.rows)
    console = progress.console()
    with without_startup_notes():
        survey = surveys.survey(args.data)
    console.print(f"{survey.folder}:", markup=False)
    for line in surveys.told(survey):
        console.print(f"  {line}", markup=False)
    out = whole_files.writable_directory(args.out, "output directory")
    os.environ[surveys.VARIABLE] = survey.folder
    recipes = suite_recipes.Recipes(args, survey, out, shipped.search_paths())
    with without_startup_notes():
        tower = recipes.found_tower(console)
    every = suite_rows.numbered(None)  # another start may choose other rows
    jobs = [job for row in every for job in suite.jobs(row, survey, tower)[0]]
    recipes.check_overrides(jobs)
    lines = suite.run(
        rows,
        survey,
        tower,
        recipes.prepared,
        out,
        console,
        show_faults=args.traceback,
        # Behind each row: what a killed suite has done can be looked at.
        written=lambda: _write_page(out, tower.fingerprint),
    )
    console.print("", markup=False)
    suite_table.show([lines])
    path = _write_page(out, tower.fingerprint)
    console.print(f"written to {path}", markup=False)
    failed = [line.row for line in lines if line.status == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(lines)} rows failed: "
            f"{', '.join(map(str, failed))}. Their errors stand below the table; "
            "started again, the suite runs them anew."
        )
    if not any(line.status == "done" for line in lines):
        raise UserError(
            f"none of the {len(lines)} rows can be run; why stands below the table."
        )


def _write_page(out: str, fingerprint: str) -> str:
    """Writes the page of all that is known of a tower; its path."""
    from vit22b_transfer.reports import suite_page

    return suite_page.write(out, [suite_page.Results.read(out, fingerprint)])


def _compare(args: argparse.Namespace) -> None:
    from vit22b_transfer.host import progress, whole_files
    from vit22b_transfer.reports import suite_page, suite_table

    results = [suite_page.Results.read(folder) for folder in args.compare]
    suite_table.show([list(one.lines.values()) for one in results])
    out = whole_files.writable_directory(args.out or ".", "output directory")
    path = suite_page.write(out, results)
    progress.console().print(f"written to {path}", markup=False)
