"""`vit22b bench --compare-settings`: which settings are fastest on these devices.

Flags of XLA count only before a process has begun to compute, so each combination is a
`vit22b bench` of its own. The fastest step is that of the fewest seconds; the table has
beside it what fraction of the rate of its own run's matrix product it reaches.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.host import progress, tables

TRAIN_STEP = "train step"
# How a tower's blocks are compiled, and what is kept for the backward pass.
FORMS = {
    "unrolled": dict(scan_layers=False, remat="none"),
    "unrolled, products kept": dict(scan_layers=False, remat="dots"),
    "scanned": dict(scan_layers=True, remat="none"),
    "scanned, products kept": dict(scan_layers=True, remat="dots"),
    "scanned, inputs kept": dict(scan_layers=True, remat="block"),
}
_LAUNCH = "gin_configs/launch"
_SHOWN_ERROR = 300


class Run(NamedTuple):
    """A combination, what `bench.measure` wrote of it, or why there is nothing."""

    form: str
    launch: str
    results: dict[str, dict[str, float]]
    platform: str = ""
    problem: str = ""

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{self.form}; {self.launch}" if self.launch else self.form

    @property
    def step_seconds(self) -> float:
        """Of a training step; infinite where there is none."""
        return self.results.get(TRAIN_STEP, {}).get("seconds", float("inf"))


def overrides(form: str, tower: str) -> list[str]:
    """The arguments that give a tower one of `FORMS`."""
    return [f"--gin.{tower}.{name}={value!r}" for name, value in FORMS[form].items()]


def compare(arguments: Sequence[str], tower: str, folder: str) -> list[Run]:
    """Runs `vit22b bench` with the arguments in every form, and the best under flags.

    tower: what configures it in a recipe, such as `vit.vit22b_config`.
    folder: that of the shipped recipes, whose `gin_configs/launch/gpu_*.sh` are tried
      on GPUs; on other devices their flags do nothing.

    A form that fails, for want of memory mostly, is told and the others go on. This
    process leaves the devices to those that it starts.

    Raises:
      UserError: if every form fails.
    """
    console = rich.console.Console()
    scripts = sorted(pathlib.Path(folder, _LAUNCH).glob("gpu_*.sh"))
    runs = []
    with progress.Progress(
        progress.console(stderr=True), "settings", total=None, unit="runs"
    ) as shown:
        for form in FORMS:
            runs.append(_run(arguments, tower, form, None))
            shown.add(1)
        best = min(runs, key=lambda run: run.step_seconds)
        if not best.results:
            raise UserError(f"no setting can be measured: {best.problem}")
        on_gpu = best.platform == "gpu"
        for script in scripts if on_gpu else []:
            runs.append(_run(arguments, tower, best.form, script))
            shown.add(1)
    _show(runs, tower, console)
    if not on_gpu:
        console.print(
            f"The flags of {_LAUNCH}/gpu_*.sh are for NVIDIA GPUs and were not tried.",
            markup=False,
        )
    return runs


def _run(
    arguments: Sequence[str], tower: str, form: str, script: pathlib.Path | None
) -> Run:
    launch = script.name if script else ""
    command = [sys.executable, "-m", "vit22b_transfer.cli", "bench"]
    with tempfile.TemporaryDirectory() as work:
        path = os.path.join(work, "results.json")
        command += [
            *arguments,
            *overrides(form, tower),
            f"--gin.measure.json_file={path!r}",
        ]
        if script:
            # Variables of the file, which composes with what the user has set.
            command = ["sh", "-c", '. "$0" && exec "$@"', str(script), *command]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            ours = [line for line in lines if line.startswith("vit22b: error: ")]
            problem = [*ours, lines[-1]][0].removeprefix("vit22b: error: ")
            return Run(form, launch, {}, problem=problem[:_SHOWN_ERROR])
        with open(path, encoding="utf-8") as file:
            return Run(form, launch, **json.load(file))


def _show(runs: list[Run], tower: str, console: rich.console.Console) -> None:
    measured = [run for run in runs if run.results]
    columns: dict[str, list[str]] = {}
    for heading, part in (
        ("tower forward", "tower forward"),
        ("training step", TRAIN_STEP),
    ):
        found = [run.results[part] for run in measured]
        columns[f"{heading}, ms"] = [f"{1e3 * one['seconds']:,.1f}" for one in found]
        columns[f"{heading}, of the product's rate"] = [
            f"{one['of_product']:.1%}" for one in found
        ]
    tables.print_table(console, [run.name for run in measured], columns)
    for run in runs:
        if run.problem:
            console.print(f"{run.name}: failed: {run.problem}", markup=False)
    best = min(measured, key=lambda run: run.step_seconds)
    first = measured[0]
    said = f"Fastest training step: {best.name}"
    if best is not first:
        said += f", {first.step_seconds / best.step_seconds:.2f} times {first.name}"
    console.print(f"{said}. Add to your command:", markup=False)
    prefix = f". {_LAUNCH}/{best.launch} && " if best.launch else ""
    console.print(
        # Texts in them are in single quotes.
        f"  {prefix}vit22b ... "
        + " ".join(f'"{argument}"' for argument in overrides(best.form, tower)),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
