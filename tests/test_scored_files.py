"""A file of predictions scored without a model: intervals, slices, servers' formats."""

import contextlib
import io
import json
from typing import Any

import numpy as np
import prediction_samples
import pytest
import scipy.stats
from prediction_samples import CAPTIONS, QUESTIONS
from pycocotools import coco

from vit22b_transfer import UserError, cli
from vit22b_transfer.evaluation import (
    evaluate,
    example_numbers,
    intervals,
    label_metrics,
    result_files,
    scored_files,
    text_metrics,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    prediction_samples.register(folder)
    write = prediction_samples.write
    write(folder / "vqa.jsonl", prediction_samples.answers(unread=2), QUESTIONS)
    write(folder / "captions.jsonl", prediction_samples.captions(), CAPTIONS)
    return folder


@pytest.fixture(scope="module")
def answered(folder):
    judged = scored_files.judge(str(folder / "vqa.jsonl"), QUESTIONS)
    return scored_files.report(judged)


@pytest.fixture(scope="module")
def captioned(folder):
    return scored_files.judge(str(folder / "captions.jsonl"), CAPTIONS)


def test_metrics_are_those_of_an_evaluation_and_of_their_examples(answered, captioned):
    for judged in (answered.judged, captioned):
        scores = evaluate.score_file(judged.path, judged.task)
        assert judged.metrics == scores.metrics
        assert judged.num_bad_images == scores.num_bad_images
        for name, numbers in judged.numbers.items():
            assert numbers.value() == judged.metrics[name], name
    assert set(captioned.numbers) == set(captioned.metrics)
    assert answered.judged.num_bad_images == 2


def test_an_interval_resamples_images_with_all_their_questions(answered):
    judged = answered.judged
    scores = judged.numbers["vqa_accuracy"].rows[:, 0]
    sums = np.array([scores[judged.images == i].sum() for i in range(30)])
    counts = np.array([np.sum(judged.images == i) for i in range(30)])
    kept = counts > 0  # an image may have lost its only question
    expected = scipy.stats.bootstrap(
        (sums[kept], counts[kept]),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=intervals.RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    found = answered.intervals["vqa_accuracy"]
    assert (found.low, found.high) == pytest.approx(expected.confidence_interval)
    clustered = intervals.clustered_standard_error(scores, judged.images)
    assert answered.clustered["vqa_accuracy"] == clustered
    assert "bleu4" not in answered.intervals


def test_slices_add_up_and_have_intervals_of_their_own(answered):
    assert {part.field for part in answered.slices} == {"answer_type"}
    assert sum(part.count for part in answered.slices) == len(answered.judged.lines)
    for name in ("vqa_accuracy", "exact_match"):
        total = sum(part.count * part.metrics[name][0] for part in answered.slices)
        mean = total / len(answered.judged.lines)
        assert mean == pytest.approx(answered.judged.metrics[name])
    for part in answered.slices:
        whole = answered.judged.metrics[f"vqa_accuracy/answer_type={part.value}"]
        value, found = part.metrics["vqa_accuracy"]
        assert value == pytest.approx(whole) and found.low <= value <= found.high


def test_a_part_of_captions_has_the_bleu_of_that_part_and_the_whole_cider(captioned):
    places = [1, 5, 6, 20]
    lines = [captioned.lines[place] for place in places]
    alone = text_metrics.captioning(
        [line["references"] for line in lines], [line["prediction"] for line in lines]
    )
    for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"):
        part = captioned.numbers[name].of(places).value()
        assert part == pytest.approx(alone[name]), name
    every = text_metrics.cider_d_scores(
        [line["references"] for line in captioned.lines],
        [line["prediction"] for line in captioned.lines],
    ).scores
    part = captioned.numbers["cider_d"].of(places).value()
    assert part == pytest.approx(np.mean([every[place] for place in places]))
    assert part != pytest.approx(alone["cider_d"])


def test_the_interval_of_bleu_is_that_of_resampled_corpora(captioned):
    """Images of two captions each: both are drawn together."""
    images = captioned.images // 2
    numbers = captioned.numbers["bleu2"]
    found = example_numbers.interval(numbers, images, resamples=60)
    assert found is not None and found.value == pytest.approx(numbers.value())
    rng = np.random.default_rng(0)
    drawn = []
    for chosen in rng.integers(0, 12, (60, 12)):
        places = np.ravel([[2 * image, 2 * image + 1] for image in chosen])
        lines = [captioned.lines[place] for place in places]
        drawn.append(
            text_metrics.captioning(
                [line["references"] for line in lines],
                [line["prediction"] for line in lines],
            )["bleu2"]
        )
    assert found.standard_error == pytest.approx(np.std(drawn, ddof=1))


def test_images_without_labels_are_in_no_part():
    targets, predictions = [[3], [], [2, 5], [1]], [3, 3, 5, 0]
    aux = {"top_classes": np.array([[3, 1], [3, 1], [5, 0], [0, 4]])}
    numbers = label_metrics.hit_numbers(targets, predictions, aux)["accuracy"]
    assert numbers.value() == pytest.approx(2 / 3)
    assert numbers.of([0, 1]).value() == 1 and np.isnan(numbers.of([1]).value())
    found = example_numbers.interval(numbers, np.arange(4))
    assert found == intervals.bootstrap(np.array([1.0, 1.0, 0.0]), np.ones(3, int))
    assert example_numbers.interval(numbers.of([0, 1]), np.arange(2)) is None
    # Two are compared where both score.
    other = example_numbers.mean_of([0.0, 1.0, 0.0, np.nan])
    gap = example_numbers.difference(numbers, other, np.arange(4))
    assert gap is not None and gap.interval.value == 1.0  # of the images 0 and 2


# ----- Official servers -----------------------------------------------------------


def test_captions_for_coco_are_read_by_its_own_tools(folder):
    lines = prediction_samples.captions()
    lines[3] = {"image_id": "503", "error": "is cut off"}
    path = prediction_samples.write(folder / "some.jsonl", lines)
    out = str(folder / "captions_test2014_ours_results.json")
    read = [json.loads(line) for line in open(path)]
    assert result_files.write(read, "coco", path, out) == (24, 1)
    with open(out, encoding="utf-8") as file:
        entries = json.load(file)
    assert all(set(entry) == {"image_id", "caption"} for entry in entries)
    assert all(type(entry["image_id"]) is int for entry in entries)
    assert entries[3] == {"image_id": 503, "caption": ""}
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = coco.COCO()
        truth.dataset = {"images": [{"id": 500 + n} for n in range(24)]}
        truth.createIndex()
        loaded = truth.loadRes(out)  # asserts that the ids are those of its images
    assert [a["caption"] for a in loaded.dataset["annotations"]] == [
        entry["caption"] for entry in entries
    ]


def test_answers_for_vqa_are_one_for_each_question():
    lines = prediction_samples.answers(unread=1)
    lines = [{"index": n} | line for n, line in enumerate(lines)]
    entries, unread = result_files.entries(lines, "vqa", "x")
    # What the official evaluation asserts: a list, and the ids of all questions.
    assert {entry["question_id"] for entry in entries} == {
        1000 + number for number in range(len(lines))
    }
    assert unread == 1 and entries[0] == {"question_id": 1000, "answer": ""}
    assert all(
        type(v) in (int, str) and len(e) == 2 for e in entries for v in e.values()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": "a.png"}, "the image_id of example 1 is 'a.png'"),
        ({"image_id": "500"}, "image_id 500 is there twice"),
        ({"image_id": "9" * 30}, "whole number"),
        ({"image_id": "²"}, "whole number"),
        ({"prediction": 3}, "no text"),
    ],
)
def test_what_a_server_would_refuse_is_said(change, message):
    lines = [{"index": n} | x for n, x in enumerate(prediction_samples.captions())]
    lines[1] |= change
    with pytest.raises(UserError, match=message):
        result_files.entries(lines, "coco", "x.jsonl")


# ----- The command ----------------------------------------------------------------


def test_the_command_needs_no_model(folder, capsys, monkeypatch):
    from vit22b_transfer.inference import infer

    monkeypatch.setattr(infer, "restore", None)
    out, results = folder / "scores.json", folder / "vqa_results.json"
    code = cli.main(
        ["eval", "--predictions", str(folder / "vqa.jsonl"), "--out", str(out)]
        + ["--by", "answer_type", "--vqa_results", str(results)]
    )
    shown = capsys.readouterr().out
    assert code == 0 and "2 of images not read are empty" in shown
    assert "answer_type=yes/no" in shown and "95 % interval" in shown
    said = json.loads(out.read_text())
    low, high = (said["metrics"]["vqa_accuracy"][end] for end in ("low", "high"))
    assert low < said["metrics"]["vqa_accuracy"]["value"] < high
    assert said["num_bad_images"] == 2 and len(said["slices"]) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--predictions", "no.jsonl", "--task", CAPTIONS], "no.jsonl cannot be read"),
        (["--predictions", "bare.jsonl"], "give --task NAME"),
        (["--predictions", "bare.jsonl", "--task", "sample_vqaa"], "sample_vqa"),
        (["--predictions", "vqa.jsonl", "--by", "colour"], "has a field 'colour'"),
        (["--predictions", "vqa.jsonl", "--by", "references"], "is a list"),
        (["--predictions", "vqa.jsonl", "run"], "leave out run"),
        (["--predictions", "captions.jsonl", "--coco_results", "x.txt"], ".json"),
        (
            ["--predictions", "captions.jsonl", "--vqa_results", "x.json"],
            "whole number",
        ),
        (["--task", "x"], "--predictions"),
    ],
)
def test_what_is_wrong_is_said(folder, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    prediction_samples.write(folder / "bare.jsonl", prediction_samples.captions())
    assert cli.main(["eval", *arguments]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
