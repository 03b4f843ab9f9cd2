"""The sweep of learning rates: which trainings run, what they say, one for real."""

import json
import math

import gin_files
import numpy as np
import pytest
from PIL import Image
from shell_commands import no_tasks, use_one_device

from vit22b_transfer import NotFiniteError, UserError, cli
from vit22b_transfer.demo import stability, stability_results
from vit22b_transfer.demo.stability import cells
from vit22b_transfer.demo.stability_results import (
    FORMS,
    SEQUENTIAL,
    WITH,
    WITHOUT,
    Cell,
    Outcome,
)
from vit22b_transfer.recipes import loading
from vit22b_transfer.training import train


@pytest.fixture(autouse=True)
def without_folders(monkeypatch, tmp_path):
    for name in ("TRAIN_FOLDER", "VALIDATION_FOLDER", "CLASSES", "NEW_IMAGES"):
        monkeypatch.setenv(f"MY_{name}", str(tmp_path / "nowhere"))
    monkeypatch.setattr(stability, "_SIZES", {"train": 30, "validation": 6})


class Trainings:
    """In place of `vit22b train`: it writes what the recipe's own log would say."""

    def __init__(self, diverging=(), stopped_once=()):
        self.calls, self.diverging = [], diverging
        self.stopped_once = list(stopped_once)

    def __call__(self, arguments):
        said = dict(a.removeprefix("--gin.").split("=", 1) for a in arguments[3:])
        self.calls.append(said)
        rate, steps = float(said["LEARNING_RATE"]), int(said["TRAIN_STEPS"])
        at = f"instruments/tower/layers_0/attention/{said['QK_NORM']}"
        lines = [{"step": 10, f"{at}/largest_logit": 900.0, f"{at}/entropy": 0.5}]
        if rate in self.stopped_once:
            self.stopped_once.remove(rate)
        elif rate not in self.diverging:
            lines.append({"step": steps, f"{at}/largest_logit": 7.0})
            lines.append({"step": steps, "eval/my_image_folder/loss": rate})
        with open(f"{said['MODEL_DIR'][1:-1]}/metrics.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return NotFiniteError.exit_code if rate in self.diverging else 0


def test_a_training_that_came_to_its_end_does_not_run_again(tmp_path, capsys):
    todo = cells([0.1, 0.2], [0, 1], 20, sequential=[0.1])
    first = Trainings(diverging=[0.2])
    found = stability.run(first, todo, out=str(tmp_path))
    assert len(first.calls) == len(found) == 10
    assert found[Cell(WITH, 0.1, 0, 20)] == Outcome(0.1, 900.0, 0.5)
    assert found[Cell(WITHOUT, 0.2, 1, 20)].loss == math.inf
    shown = capsys.readouterr().out
    assert "diverged (2 of 2)" in shown and "0.100 (0.100 to 0.100)" in shown
    again = Trainings()
    more = cells([0.1, 0.2, 0.3], [0, 1], 20, sequential=[0.1])
    assert found.items() <= stability.run(again, more, out=str(tmp_path)).items()
    assert {float(said["LEARNING_RATE"]) for said in again.calls} == {0.3}
    assert len(again.calls) == 4
    with Image.open(tmp_path / stability.PICTURE_FILE) as image:
        pixels = np.asarray(image).reshape(-1, 3)
    drawn = {tuple(color) for color in np.unique(pixels, axis=0).tolist()}
    assert set(stability_results._COLORS.values()) <= drawn


def test_a_training_that_a_signal_stopped_is_not_taken_for_one_that_ended(tmp_path):
    todo, stopping = cells([0.1], [0], 20), Trainings(stopped_once=[0.1])
    with pytest.raises(SystemExit, match="was stopped; the same command goes on"):
        stability.run(stopping, todo, out=str(tmp_path))
    found = stability.run(stopping, todo, out=str(tmp_path))
    assert len(stopping.calls) == 3 and len(found) == 2


def test_another_error_of_a_training_ends_the_sweep(tmp_path):
    with pytest.raises(SystemExit) as error:
        stability.run(lambda _: 2, cells([0.1], [0], 20), out=str(tmp_path))
    assert error.value.code == 2


@pytest.mark.parametrize(
    "rates, seeds, steps, message",
    [
        ([], [0], 20, "needs learning rates above 0 and a seed"),
        ([0.1], [], 20, "needs learning rates above 0 and a seed"),
        ([0.1, 0.0], [0], 20, "needs learning rates above 0"),
        ([0.1], [0], 5, "steps=5: instruments are read every 20 steps"),
    ],
)
def test_a_sweep_of_nothing_is_refused(rates, seeds, steps, message):
    with pytest.raises(UserError, match=message):
        cells(rates, seeds, steps)


def test_sensitivity_is_the_mean_distance_from_the_best_and_capped_at_the_start():
    start = math.log(24)
    assert stability_results.sensitivity({1.0: 0.5, 2.0: 0.5}) == 0.0
    found = stability_results.sensitivity({1.0: 0.5, 2.0: 1.0, 3.0: math.inf})
    assert found == pytest.approx((0.0 + 0.5 + start - 0.5) / 3)
    assert stability_results.sensitivity({1.0: 99.0, 2.0: math.inf}) == 0.0
    outcomes = {
        Cell(WITH, rate, seed, 20): Outcome(rate * (1 + seed), 1.0, 1.0)
        for seed in (0, 1)
        for rate in (0.1, 0.3)
    }
    found = stability_results.sensitivities(outcomes, WITH)
    np.testing.assert_allclose(found, [0.1, 0.2])
    assert stability_results.sensitivities(outcomes, WITHOUT) == []


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_recipe_with_another_tower(form):
    settings = [f"{name}={value}" for name, value in FORMS[form].items()]
    settings += ["MODEL_DIR='/nowhere'", "CLASSES='/nowhere'"]
    paths = [str(gin_files.ROOT)]
    recipe = loading.read([stability.RECIPE, stability.INSTRUMENTS], settings, paths)
    made = loading.arguments(recipe, train.fine_tune, paths)
    tower = made["model"].module.tower
    assert tower.qk_norm == (form != WITHOUT)
    assert tower.parallel == (form != SEQUENTIAL)
    assert made["model"].module.num_classes == stability_results.CLASSES
    assert stability._EVERY % made["periods"].log == 0
    assert made["data"].task == stability._TASK


@pytest.mark.slow
def test_without_qk_norm_logits_grow_and_entropy_falls(tmp_path, monkeypatch):
    """At a high rate, by the real recipe; benchmarks/stability.py has three seeds."""
    monkeypatch.setattr(stability, "_SIZES", {"train": 480, "validation": 48})
    use_one_device(tmp_path)
    monkeypatch.chdir(tmp_path)
    with no_tasks():
        found = stability.run(cli.main, cells([0.1], [0], 40), out=str(tmp_path))
    normed, plain = (found[Cell(form, 0.1, 0, 40)] for form in (WITH, WITHOUT))
    assert plain.largest_logit > 10 * normed.largest_logit
    assert plain.entropy < normed.entropy / 2
