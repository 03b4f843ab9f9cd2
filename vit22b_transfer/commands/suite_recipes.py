"""The recipes of the suite's rows, with the tower and the user's values behind them."""

import argparse
import functools
import os
import re
import shlex
import sys
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.commands.arguments import without_startup_notes

# Nothing heavy is imported here: `vit22b --help` must answer at once.

RANDOM = "random"
# The recipe that is read to find the tower.
_PLAIN = "gin_configs/probes/knn.gin"
# Where all but the table and the page goes, below --out.
_WORK = "work"
# What means itself to a shell.
_SHELL = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
# Said of a name that a row's recipe does not have.
_OF_OTHER_ROWS = re.compile(r"the recipe names no|is set but nothing uses it")
# Parameters that say where something lies, which decides nothing.
_PLACES = (".output_dir", ".directory", ".checkpoint", ".head")
# Sides in pixels of what is cut out for segmentation, and for depth.
_CROP, _WIDE = (504, 504), (448, 560)


class Recipes:
    """Reads the recipe of a job: its file, the tower's, then what the user gave.

    survey: a `surveys.Survey`. out: an absolute path.
    """

    def __init__(
        self, args: argparse.Namespace, survey: Any, out: str, paths: tuple[str, str]
    ):
        self._survey, self._out, self._paths = survey, out, paths
        self._work = os.path.join(out, _WORK)
        self._files, self._overrides = [*args.gin_file], [*args.overrides]
        self._given, self._checkpoint, self._tower = args.tower, "", None
        self._results: dict[Any, Any] = {}
        self._heads: dict[Any, str] = {}

    def found_tower(self, console: Any) -> Any:
        """The `suite.Tower` that --tower names; one of fresh weights is made."""
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
        files, settings = [_PLAIN, *self._files], [*self._settings(), *fresh]
        settings += self._fitting(files, settings)
        recipe = self._read(files, settings)
        source = loading.arguments(recipe, probe.run_probe, self._paths)["source"]
        self._tower = source.tower
        if given == RANDOM:
            place = os.path.join(self._out, "random_tower")
            self._checkpoint = random_tower.checkpoint(source.tower, place)
        self._checkpoint = reading.resolve(self._checkpoint or source.checkpoint)
        arrays = reading.saved_arrays(self._checkpoint)
        texts = any(name.startswith("target/text/") for name in arrays)
        digest = reading.tower_digest(self._checkpoint)
        console.print(f"tower: {given}, {self._checkpoint} ({digest})", markup=False)
        return suite.Tower(given, digest, texts, min(source.image_size))

    def check_overrides(self, jobs: Any) -> None:
        """Raises UserError for a --gin.NAME=VALUE that fits none of the rows."""
        wanted = [self._files_and_settings(job) for job in jobs]
        wanted += [
            self._files_and_settings(self._head_job(job))
            for job in jobs
            if job.part.head
        ]
        taken = {text for one in wanted for text in self._fitting(*one)}
        for override in self._overrides:
            if wanted and override not in taken:
                problems = [self._problem_of(*one, override) for one in wanted]
                said = [problem for problem in problems if problem is not None]
                own = [p for p in said if not _OF_OTHER_ROWS.search(str(p))]
                raise (own or said)[0]

    def prepared(self, job: Any) -> Any:
        """The `suite.Prepared` of a job, its recipe read and checked."""
        from vit22b_transfer.experiments import suite, surveys
        from vit22b_transfer.recipes import loading

        files, settings = self._files_and_settings(job)
        fitting = self._fitting(files, settings)
        recipe, root = self._read(files, [*settings, *fitting]), job.part.root()
        loading.check_complete(recipe, root)
        protocol = self._protocol(recipe, root)
        if job.part.head:
            head = self._head_job(job)
            one = self.prepared(head)
            protocol |= {f"head: {name}": text for name, text in one.protocol.items()}
        folder, _, name = job.part.recipe.rpartition("/")
        kind = {"probes": "probe", "measures": "measure"}[os.path.basename(folder)]
        key = (*files, *settings, *fitting)

        def values():
            given = [*settings, *fitting]
            if job.part.head:
                given.append(f"HEAD={self._kept_head(self._head_job(job))!r}")
            # A name that is set twice has its last value.
            by_name = {text.partition("=")[0]: text for text in given}
            return list(by_name.values())

        def command():
            lines = [f"{surveys.VARIABLE}={_quoted(self._survey.folder)}"]
            lines[0] += f" vit22b {kind} {name.removesuffix('.gin')}"
            lines += [f"--gin_file={_quoted(file)}" for file in files[1:]]
            for text in values():
                macro, _, value = text.partition("=")
                lines.append(f"--gin.{macro.strip()}={_quoted(value.strip())}")
            return " \\\n  ".join(lines)

        def run():
            if key not in self._results:  # of rows that are told of one result
                whole = self._read(files, values())
                self._results[key] = loading.install(whole, root, self._paths)()
            return self._results[key], self._work

        return suite.Prepared(protocol, command, run)

    def _head_job(self, job: Any) -> Any:
        """What learns the head that a job asks."""
        from vit22b_transfer.experiments import suite, suite_parts

        (imagenet,) = (one for one in job.layouts if one.name == "imagenet")
        return suite.Job(suite_parts.HEADS[job.part.head], "head", (imagenet,))

    def _kept_head(self, job: Any) -> str:
        """The file of a head, learned now at the latest."""
        from vit22b_transfer.experiments import probe
        from vit22b_transfer.recipes import loading

        files, settings = self._files_and_settings(job)
        whole = [*settings, *self._fitting(files, settings)]
        key = (*files, *whole)
        if key not in self._heads:
            recipe = self._read(files, whole)
            given = loading.arguments(recipe, probe.run_probe, self._paths)
            self._heads[key] = probe.kept_head(
                given["probe"],
                source=given["source"],
                split=given["train"] or given["test"],
                directory=self._work,
            )
        return self._heads[key]

    def _protocol(self, recipe: Any, root: Any) -> dict[str, str]:
        """What is bound in a recipe, but for where data and results lie."""
        from vit22b_transfer.recipes import loading

        return {
            name: text
            for name, text in loading.bound(recipe, root).items()
            if not name.endswith(_PLACES)
            and self._survey.folder not in text
            and self._out not in text
        }

    def _files_and_settings(self, job: Any) -> tuple[list[str], list[str]]:
        """The gin files of a job, and what the suite sets."""
        from vit22b_transfer.experiments import layouts

        known: dict[str, str] = {}
        for layout in reversed(job.layouts):  # the first has the last word
            parts = layouts.LAYOUTS[layout.kind].parts
            known |= {part.name: repr(layout.paths.get(part.name)) for part in parts}
            known |= {"task": layout.task, "place": repr(layout.place)}
            if layout.name == "imagenet":
                known |= self._of_imagenet(layout)
        known |= self._of_tower()
        settings = self._settings()
        for name, text in job.part.settings.items():
            settings.append(f"{name}={text.format(**known)}")
        if job.part.head:
            settings.append("HEAD='-'")
        return [job.part.recipe, *self._files], settings

    def _of_imagenet(self, layout: Any) -> dict[str, str]:
        """Its task, and how the classes of variants stand to its own."""
        from vit22b_transfer.data import class_lists

        every = len(class_lists.names(layout.paths["classes"])) == 1000
        return {
            "imagenet_task": layout.task,
            "labels_r": "'imagenet_r'" if every else "'named'",
            "labels_a": "'imagenet_a'" if every else "'named'",
        }

    def _of_tower(self) -> dict[str, str]:
        """Sizes of crops in whole patches, and steps of two thirds and a half."""
        patch = getattr(self._tower, "patch_size", 1)
        crop, wide = (
            tuple(max(patch, side // patch * patch) for side in sides)
            for sides in (_CROP, _WIDE)
        )
        steps = tuple(max(patch, side * 2 // 3 // patch * patch) for side in crop)
        across = max(patch, wide[1] // 2 // patch * patch)
        return {
            "crop": str(crop),
            "crop_stride": str(steps),
            "wide_crop": str(wide),
            "wide_stride": str((wide[0], across)),
        }

    def _settings(self) -> list[str]:
        settings = [f"OUTPUT_DIR={self._work!r}"]
        if self._checkpoint:
            settings.append(f"INITIAL_CHECKPOINT={self._checkpoint!r}")
        return settings

    def _read(self, files: list[str], settings: list[str]) -> Any:
        from vit22b_transfer.recipes import loading

        with without_startup_notes():
            recipe = loading.read(files, settings, self._paths)
        if "tensorflow" in sys.modules:
            from vit22b_transfer.data import streams

            streams.keep_tensorflow_off_accelerators()
        return recipe

    def _fitting(self, files: list[str], settings: list[str]) -> list[str]:
        """Those of the user's --gin.NAME=VALUE that a recipe takes."""
        problem = functools.partial(self._problem_of, files, settings)
        return [text for text in self._overrides if problem(text) is None]

    def _problem_of(
        self, files: list[str], settings: list[str], override: str
    ) -> UserError | None:
        try:
            self._read(files, [*settings, override])
        except UserError as error:
            return error
        return None


def _quoted(value: str) -> str:
    """A value as a shell takes it, in double quotes as in the docs if need be."""
    if _SHELL.fullmatch(value) or set(value) & set('"$`!\\'):
        return shlex.quote(value)
    return f'"{value}"'
