"""The page of a run: curves as logged, scores with intervals, examples and faults."""

import json
import shutil

import html_checks
import numpy as np
import prediction_samples
import pytest
from prediction_samples import CAPTIONS, QUESTIONS

from vit22b_transfer import UserError, cli
from vit22b_transfer.evaluation import scored_files
from vit22b_transfer.reports import report_page
from vit22b_transfer.training import curves


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a log, two evaluations, a recipe, and one that is gone."""
    folder = tmp_path_factory.mktemp("run")
    prediction_samples.register(folder)
    lines = prediction_samples.captions()
    prediction_samples.draw(folder, lines)
    (folder / "507.png").write_bytes(b"no image")
    lines[2] = {"image_id": "502", "error": "is <b>cut</b> off"}
    write = prediction_samples.write
    write(folder / "captions.jsonl", lines, CAPTIONS)
    write(folder / "vqa.jsonl", prediction_samples.answers(), QUESTIONS)
    entries = {
        f"{CAPTIONS}/test": {
            "predictions": "captions.jsonl",
            "metrics": {"token/l": 2},
        },
        f"{QUESTIONS}/test": {"predictions": "vqa.jsonl", "metrics": {}},
        "gone/test": {"predictions": "gone.jsonl", "metrics": {"anls": 0.25}},
    }
    (folder / "metrics.json").write_text(json.dumps(entries))
    log = [{"step": n, "train/loss": 5.0 / n, "lr": 0.1} for n in range(1, 1001)]
    log += [{"step": 1000, "eval/x/loss": 2.5, "instruments/a": 1.0}]
    text = "\n".join(map(json.dumps, log))
    (folder / "metrics.jsonl").write_text(f'{text}\n{{"step": 1}}x\n')
    (folder / "recipe.gin").write_text("# <script>\nSTEPS = 1000\n")
    (folder / "checkpoint_1000").mkdir()
    return folder


def no_register(task):
    assert task in (CAPTIONS, QUESTIONS)


@pytest.fixture(scope="module")
def shown(run):
    page = report_page.html(str(run), no_register)
    return page, *html_checks.checked(page)


def test_the_page_says_what_the_evaluation_says_with_intervals(run, shown):
    _, text, _ = shown
    for name, task in (("captions", CAPTIONS), ("vqa", QUESTIONS)):
        made = scored_files.report(scored_files.judge(str(run / f"{name}.jsonl"), task))
        for metric, found in made.intervals.items():
            value = f"{metric} {made.judged.metrics[metric]:.4f}"
            assert f"{value} {scored_files.told(found)}" in text
    assert "token/l 2.0000" in text
    assert "vqa_accuracy by answer_type" in text


def test_what_is_missing_is_said(shown):
    _, text, _ = shown
    assert "1 images could not be read" in text
    assert "image 502: is <b>cut</b> off" in text
    assert "not an image in a known format" in text  # in place of image 507
    assert "No pictures:" in text and "questions.json" in text
    assert "its file of predictions is not in the folder" in text
    assert "anls 0.2500" in text
    assert "1 lines of the log could not be read" in text


def test_best_and_worst_are_those_by_score_and_none_is_twice(run, shown, monkeypatch):
    _, text, tags = shown
    judged = scored_files.judge(str(run / "captions.jsonl"), CAPTIONS, "test")
    cards = []
    monkeypatch.setattr(
        report_page, "card", lambda p, line, *rest: cards.append(line["index"])
    )
    report_page._examples(judged)
    scores = judged.numbers["cider_d"].rows[:, 0]
    of = {
        line["index"]: score for line, score in zip(judged.lines, scores, strict=True)
    }
    ranked = sorted(scores)
    assert [of[n] for n in cards[:8]] == ranked[::-1][:8]
    assert [of[n] for n in cards[8:16]] == ranked[:8]
    assert len(set(cards)) == len(cards) == len(judged.lines)
    # All have their pictures, but for the one that is none.
    assert tags.count("img") == len(judged.lines) - 1
    assert "Best, by cider_d" in text and "Worst, by vqa_accuracy" in text


def test_curves_are_as_logged_and_thinned(run, shown):
    found = curves.read(str(run))
    assert found.damaged == 1 and found.points["eval/x/loss"] == [(1000, 2.5)]
    points = found.points["train/loss"]
    assert 200 < len(points) <= curves.MOST_POINTS and points[-1] == (1000, 0.005)
    assert all(value == 5.0 / step for step, value in points)
    page, text, _ = shown
    assert "1,000 steps are logged; 1 of instruments" in text
    assert page.count("<polyline") == 2  # of an evaluation there is one point
    assert "STEPS = 1000" in text and "Checkpoints of the steps 1,000" in text


def test_lines_that_no_run_writes_are_left_out(tmp_path):
    lines = ['{"step": 1, "a": NaN, "b": 1e99, "c": true, "d": [1], "e": 2}']
    lines += ["[1]", '{"step": "1", "e": 3}', '{"step": 1, "e": 4}', '{"step": 2']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert curves.read(str(tmp_path)) == ({"e": [(1, 4.0)]}, 3)
    lines = [json.dumps({"step": n, "e": n}) for n in range(1, 403)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    points = curves.read(str(tmp_path)).points["e"]  # every second, and the last
    assert len(points) == 201 and points[-1] == (402, 402.0)
    many = {f"n{i}": i for i in range(9999)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1} | many))
    assert len(curves.read(str(tmp_path)).points) == 500


def test_the_command_takes_a_run(run, tmp_path, capsys):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "x.html")]) == 0
    html_checks.checked((tmp_path / "x.html").read_text())
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(run / "metrics.jsonl", only)
    assert cli.main(["report", str(only)]) == 0
    text, _ = html_checks.checked((only / "report.html").read_text())
    assert "No evaluation yet" in text
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "name the MODEL_DIR of a run" in capsys.readouterr().err


def test_a_task_that_nobody_knows_leaves_the_numbers_it_said(run):
    def unknown(task):
        raise UserError(f"there is no task {task}")

    text, _ = html_checks.checked(report_page.html(str(run), unknown))
    assert f"No intervals, slices or examples: there is no task {CAPTIONS}" in text
    assert "token/l 2.0000" in text and not np.char.count(text, "Best, by")
