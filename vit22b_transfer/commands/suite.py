"""`suite` of the command: the paper's table on a tower, and on several."""

import argparse
import functools
import os
import re
import shlex
import sys

from vit22b_transfer import UserError
from vit22b_transfer.commands.arguments import (
    GIN_EPILOG,
    Add,
    add_gin_file,
    without_startup_notes,
)

# Nothing heavy is imported here: `vit22b --help` must answer at once.

RANDOM = "random"
# The recipe that is read to find the tower.
_PLAIN = "gin_configs/probes/knn.gin"
_PROBES = "gin_configs/probes/"
# Said of a name that a row's recipe does not have.
_OF_OTHER_ROWS = re.compile(r"the recipe names no|is set but nothing uses it")


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
        f"'{RANDOM}': fresh weights of the size that VIT or a gin file names",
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
    from vit22b_transfer.experiments import layouts, suite, suite_rows
    from vit22b_transfer.host import progress, whole_files
    from vit22b_transfer.recipes import shipped
    from vit22b_transfer.reports import suite_page, suite_table

    rows = suite_rows.numbered(args.rows)
    console = progress.console()
    with without_startup_notes():
        survey = layouts.survey(args.data)
    console.print(f"{survey.folder}:", markup=False)
    for line in layouts.told(survey):
        console.print(f"  {line}", markup=False)
    out = whole_files.writable_directory(args.out, "output directory")
    os.environ[layouts.VARIABLE] = survey.folder
    recipes = _Recipes(args, out, shipped.search_paths())
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
    )
    console.print("", markup=False)
    suite_table.show([lines])
    path = suite_page.write(out, [suite_page.Results.read(out, tower.fingerprint)])
    console.print(f"written to {path}", markup=False)
    failed = [line.row for line in lines if line.status == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(lines)} rows failed: "
            f"{', '.join(map(str, failed))}. Their errors stand below the table; "
            "started again, the suite runs them anew."
        )


def _compare(args: argparse.Namespace) -> None:
    from vit22b_transfer.host import progress, whole_files
    from vit22b_transfer.reports import suite_page, suite_table

    results = [suite_page.Results.read(folder) for folder in args.compare]
    suite_table.show([list(one.lines.values()) for one in results])
    out = whole_files.writable_directory(args.out or ".", "output directory")
    path = suite_page.write(out, results)
    progress.console().print(f"written to {path}", markup=False)


class _Recipes:
    """Reads the recipes of rows, with the tower and the user's values behind them."""

    def __init__(self, args: argparse.Namespace, out: str, paths: tuple[str, str]):
        self._out, self._paths = out, paths
        self._files, self._overrides = [*args.gin_file], [*args.overrides]
        self._given, self._checkpoint = args.tower, ""

    def found_tower(self, console):
        """The tower that --tower names."""
        from vit22b_transfer.checkpoints import reading
        from vit22b_transfer.experiments import probe, random_tower, suite
        from vit22b_transfer.recipes import loading

        given = self._given
        model = os.path.join(given, "model.gin")
        if given.endswith(".gin"):
            self._files.insert(0, given)
        elif os.path.isfile(model):
            self._files.insert(0, model)
        elif given != RANDOM:
            self._checkpoint = reading.resolve(given)
        fresh = ["INITIAL_CHECKPOINT='-'"] if given == RANDOM else []
        files = [_PLAIN, *self._files]
        settings = [*self._settings("-"), *fresh]
        settings += self._fitting(files, settings)
        recipe = self._read(files, settings)
        arguments = loading.arguments(recipe, probe.run_probe, self._paths)
        source = arguments["source"]
        if given == RANDOM:
            place = os.path.join(self._out, "random_tower")
            self._checkpoint = random_tower.checkpoint(source.tower, place)
            source.tower.build()  # says what does not fit before any row
        checkpoint = reading.resolve(self._checkpoint or source.checkpoint)
        self._checkpoint = checkpoint
        texts = any(
            name.startswith("target/text/") for name in reading.saved_arrays(checkpoint)
        )
        fingerprint = reading.tower_digest(checkpoint)
        console.print(f"tower: {given}, {checkpoint} ({fingerprint})", markup=False)
        return suite.Tower(given, fingerprint, texts)

    def check_overrides(self, jobs) -> None:
        """Raises UserError for a --gin.NAME=VALUE that fits none of the rows."""
        taken = {
            override
            for job in jobs
            for override in self._fitting(self._files_of(job), self._of(job, "-"))
        }
        for override in self._overrides:
            if jobs and override not in taken:
                raise self._problem(override, jobs)

    def prepared(self, job, place):
        """The recipe of a job, read."""
        from vit22b_transfer.experiments import suite
        from vit22b_transfer.recipes import loading

        files, settings = self._files_of(job), self._of(job, place)
        fitting = self._fitting(files, settings)
        recipe = self._read(files, [*settings, *fitting])
        root = job.part.root()
        loading.check_complete(recipe, root)
        ours = {os.path.join(self._out, "features"), self._checkpoint, place}
        protocol = {
            name: text
            for name, text in loading.bound(recipe, root).items()
            if text.strip("'\"") not in ours
        }
        kind = job.part.recipe.removeprefix(_PROBES).removesuffix(".gin")
        words = ["vit22b", "probe", kind]
        words += [f"--gin_file={file}" for file in files[1:]]
        words += [f"--gin.{text}" for text in [*settings, *fitting]]

        def run():
            return loading.install(recipe, root, self._paths)()

        return suite.Prepared(protocol, " ".join(map(_quoted, words)), run)

    def _files_of(self, job) -> list[str]:
        return [job.part.recipe, *self._files]

    def _of(self, job, place) -> list[str]:
        """What the suite sets of a job."""
        from vit22b_transfer.experiments import layouts

        first = job.layouts[0]
        parts = layouts.LAYOUTS[first.name.partition("/")[0]].parts
        known = {part.name: repr(first.paths.get(part.name)) for part in parts}
        known["task"] = first.task
        values = {
            name: text.format(**known) for name, text in job.part.settings.items()
        }
        return [
            *self._settings(place),
            *(f"{name}={value}" for name, value in values.items()),
        ]

    def _settings(self, place) -> list[str]:
        features = os.path.join(self._out, "features")
        settings = [f"OUTPUT_DIR={place!r}", f"FEATURES_DIR={features!r}"]
        if self._checkpoint:
            settings.append(f"INITIAL_CHECKPOINT={self._checkpoint!r}")
        return settings

    def _read(self, files, settings):
        from vit22b_transfer.recipes import loading

        with without_startup_notes():
            recipe = loading.read(files, settings, self._paths)
        if "tensorflow" in sys.modules:
            from vit22b_transfer.data import streams

            streams.keep_tensorflow_off_accelerators()
        return recipe

    def _fitting(self, files, settings) -> list[str]:
        """Those of the user's --gin.NAME=VALUE that a recipe takes."""
        fits = functools.partial(self._problem_of, files, settings)
        return [override for override in self._overrides if fits(override) is None]

    def _problem_of(self, files, settings, override):
        try:
            self._read(files, [*settings, override])
        except UserError as error:
            return error
        return None

    def _problem(self, override, jobs) -> UserError:
        """Why an override fits none of the rows: of the one that comes nearest."""
        problems = [
            self._problem_of(self._files_of(job), self._of(job, "-"), override)
            for job in jobs
        ]
        known = [p for p in problems if p and not _OF_OTHER_ROWS.search(str(p))]
        return (known or [p for p in problems if p])[0]


def _quoted(word: str) -> str:
    """A word as a shell takes it, in double quotes if it holds single ones."""
    if "'" in word and not set(word) & set('"$`!\\'):
        return f'"{word}"'
    return shlex.quote(word)
