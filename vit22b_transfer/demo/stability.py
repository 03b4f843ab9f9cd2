"""`vit22b demo --part recipe`: what QK-norm does for the stability of a training.

ViT-22B's authors saw attention logits grow until training broke, and none of it behind
QK-norm (Dehghani et al. 2023, section 2). High learning rates show the same of small
towers (Wortsman et al. 2023, section 3.1). So one recipe is trained over a sweep of
peak rates, with and without QK-norm, each run by `vit22b train` with its instruments.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import rich.console
from PIL import Image

from vit22b_transfer import NotFiniteError, UserError
from vit22b_transfer.demo import scene_layout, stability_results
from vit22b_transfer.demo.stability_results import (
    FORMS,
    SEQUENTIAL,
    WITH,
    WITHOUT,
    Cell,
    Outcome,
)
from vit22b_transfer.host import json_files, progress, whole_files
from vit22b_transfer.models import instruments
from vit22b_transfer.training.instruments import PREFIX
from vit22b_transfer.training.logs import METRICS_FILE

Cli = Callable[[Sequence[str]], int]

RECIPE = "gin_configs/recipes/scenes_stability.gin"
INSTRUMENTS = "gin_configs/runs/instruments.gin"
RESULTS_FILE, PICTURE_FILE = "stability.json", "stability.png"
_TASK, _EVERY = "my_image_folder", 20
_SIZES = {"train": 2400, "validation": 480}
_CELL_FILE = "cell.json"
# Of the demo; benchmarks/stability.py has more of each.
RATES, STEPS, SEQUENTIAL_RATES = (1e-2, 3e-2, 1e-1, 3e-1), 400, (1e-2,)


def demo(cli: Cli, *, out: str, steps: int | None = None, seed: int = 0) -> None:
    """The short form, of one seed: under ten minutes on two cores. As `run`.

    steps: of each training, in place of 400.
    """
    todo = cells(RATES, (seed,), STEPS if steps is None else steps, SEQUENTIAL_RATES)
    run(cli, todo, out=out)


def cells(
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    sequential: Sequence[float] = (),
) -> list[Cell]:
    """Both forms at every rate and seed, and sequential blocks at some rates.

    Raises:
      UserError: without rates or seeds, for rates that are not above 0, or fewer steps
        than one reading of the instruments takes.
    """
    if not rates or not seeds or min(*rates, *sequential, 1.0) <= 0.0:
        raise UserError(
            f"rates={list(rates)}, seeds={list(seeds)}: a sweep needs learning rates "
            "above 0 and a seed or more."
        )
    if steps < _EVERY:
        raise UserError(
            f"steps={steps}: instruments are read every {_EVERY} steps; train that "
            "many or more."
        )
    swept = [(form, rate) for rate in rates for form in (WITH, WITHOUT)]
    swept += [(SEQUENTIAL, rate) for rate in sequential]
    return [Cell(form, rate, seed, steps) for seed in seeds for form, rate in swept]


def run(cli: Cli, todo: Sequence[Cell], *, out: str) -> dict[Cell, Outcome]:
    """Trains all cells below the directory `out`, then the table and the picture.

    Started again, it trains those that have not come to their end. `cli` runs one
    command line and returns its exit code: `cli.main`.
    """
    root = pathlib.Path(out).absolute()
    _draw(root / "classes")
    # Not redirected with the output of the trainings.
    console = progress.console(stderr=True)
    outcomes = {}
    with progress.Progress(
        console, "learning rates", total=len(todo), unit="trainings"
    ) as bar:
        for number, cell in enumerate(todo):
            bar.show(number)
            outcomes[cell] = _trained(cli, cell, root)
        bar.show(len(todo))
    _write(root / RESULTS_FILE, outcomes)
    stability_results.draw(outcomes, str(root / PICTURE_FILE))
    stability_results.print_table(rich.console.Console(), outcomes)
    print(f"trainings, {RESULTS_FILE} and {PICTURE_FILE}: {root}")
    return outcomes


def _draw(folder: pathlib.Path) -> None:
    """Writes pictures of one drawn object, a folder for each color and shape."""
    for split, name in (("train", "TRAIN_FOLDER"), ("validation", "VALIDATION_FOLDER")):
        os.environ[f"MY_{name}"] = str(folder / split)
    os.environ["MY_CLASSES"] = str(folder / "classes.txt")
    if (folder / "classes.txt").is_file():
        return
    config = scene_layout.SceneConfig(
        max_objects=1,
        held_out_pairs=(),
        question_types=("color",),  # others need two objects; nothing is asked
        questions_per_image=1,
    )
    names = [" ".join(pair) for pair in config.ordinary_pairs]
    with whole_files.new_directory(str(folder)) as written:
        for number, (split, size) in enumerate(_SIZES.items()):
            for name in names:
                os.makedirs(os.path.join(written, split, name))
            for index in range(size):
                rng = np.random.default_rng([0, number, index])
                scene = scene_layout.sample_scene(rng, config, held_out=False)
                path = pathlib.Path(written, split, scene.objects[0].name)
                picture = Image.fromarray(scene_layout.draw(scene))
                picture.save(path / f"{index:05}.png")
        text = "".join(f"{name}\n" for name in names)
        pathlib.Path(written, "classes.txt").write_text(text, encoding="utf-8")


def _trained(cli: Cli, cell: Cell, root: pathlib.Path) -> Outcome:
    folder = root / "trainings" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / _CELL_FILE
    if finished.is_file():
        return _outcome(json_files.read_object(finished, advice="Remove it."))
    settings = {"MODEL_DIR": repr(str(folder)), "LEARNING_RATE": cell.rate}
    settings |= {"TRAIN_STEPS": cell.steps, "INSTRUMENTS_EVERY": _EVERY}
    settings |= {**FORMS[cell.form], "train.fine_tune.seed": cell.seed}
    arguments = ["train", f"--gin_file={RECIPE}", f"--gin_file={INSTRUMENTS}"]
    arguments += [f"--gin.{name}={value}" for name, value in settings.items()]
    with (
        open(folder / "output.txt", "a", encoding="utf-8") as output,
        contextlib.redirect_stdout(output),
    ):
        print("$ vit22b", *arguments)
        code = cli(arguments)
    if code not in (0, NotFiniteError.exit_code):
        raise SystemExit(code)
    said = _read(folder / METRICS_FILE, cell.steps, diverged=bool(code))
    if said is None:  # a signal: the training has saved, and goes on another time
        raise SystemExit(f"{cell.name} was stopped; the same command goes on with it")
    with whole_files.replacing(str(finished)) as file:
        json.dump(said, file)
    return _outcome(said)


def _read(path: pathlib.Path, steps: int, *, diverged: bool) -> dict | None:
    """What `metrics.jsonl` says of a run; None if it has not come to its end."""
    loss, logits, entropies, has_ended = None, [], [], diverged
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json_files.parse(line, path)
        for name, value in values.items():
            if name.endswith(f"/{instruments.LARGEST_LOGIT}"):
                logits.append(value)
            elif name.startswith(PREFIX) and name.endswith(f"/{instruments.ENTROPY}"):
                entropies.append(value)
        if values["step"] == steps and (name := f"eval/{_TASK}/loss") in values:
            loss, has_ended = values[name], True
    if not has_ended:
        return None
    # A run may diverge before the first reading.
    return {
        "loss": None if diverged else loss,
        "largest_logit": max(logits, default=None),
        "entropy": min(entropies, default=None),
    }


def _outcome(said: Mapping) -> Outcome:
    """JSON has no infinite numbers: null is one."""
    loss, logit, entropy = (said[field.name] for field in dataclasses.fields(Outcome))
    return Outcome(
        math.inf if loss is None else loss,
        math.inf if logit is None else logit,
        0.0 if entropy is None else entropy,
    )


def _write(path: pathlib.Path, outcomes: Mapping[Cell, Outcome]) -> None:
    lines = [
        dataclasses.asdict(cell)
        | {n: v if math.isfinite(v) else None for n, v in dataclasses.asdict(o).items()}
        for cell, o in outcomes.items()
    ]
    with whole_files.replacing(str(path)) as file:
        json.dump(lines, file, indent=1)
