"""Evaluation: the task's metrics on the predictions that are there, and baselines."""

import functools
import io
import json

import jax
import numpy as np
import pytest
import rich.console
import seqio
import tiny_captions
from tiny_captions import BAD_IMAGE, BATCH_SIZE, LENGTHS, NUM_IMAGES, ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.data import batches, task_metrics
from vit22b_transfer.data.converters import ImageTextFeatureConverter
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.inference import prediction_lines
from vit22b_transfer.inference.prediction_files import read_lines

TASK, GOOD_TASK, OTHER_TASK = "tiny_evaluate", "tiny_evaluate_good", "tiny_evaluate_2"


def overlap(targets, predictions):
    """Metrics of which random predictions get numbers of their own."""
    shared = [
        max(len(set(text) & set(prediction)) for text in texts)
        for texts, prediction in zip(targets, predictions, strict=True)
    ]
    exact = [p in texts for texts, p in zip(targets, predictions, strict=True)]
    return {
        "shared_letters": float(np.mean(shared)),
        "exact": 100 * float(np.mean(exact)),
        "references": float(sum(map(len, targets))),
        "letters": sum(map(len, predictions)),
    }


def mean_score(targets, predictions, aux_values):
    assert len(targets) == len(predictions)
    return {"mean_score": seqio.metrics.Scalar(aux_values["scores"].mean())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    tiny_captions.write_folder(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def tasks(folder, tmp_path_factory):
    tiny_captions.register(TASK, folder, metric_fns=[overlap, mean_score])
    tiny_captions.register(OTHER_TASK, folder, metric_fns=[overlap])
    good = tmp_path_factory.mktemp("good")
    tiny_captions.write_folder(good)
    (good / f"{BAD_IMAGE}.png").write_bytes((good / "0.png").read_bytes())
    tiny_captions.register(GOOD_TASK, good, metric_fns=[overlap])
    seqio.MixtureRegistry.remove("tiny_evaluate_mixture")
    seqio.MixtureRegistry.add("tiny_evaluate_mixture", [TASK, OTHER_TASK], 1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_captions.write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(checkpoint):
    """`evaluate` of the tiny model in a directory."""
    return functools.partial(
        evaluate.evaluate_checkpoint,
        tiny_captions.model(),
        partitioning=ONE_DEVICE,
        checkpoint=checkpoint,
        split="test",
        feature_lengths=LENGTHS,
        batch_size=BATCH_SIZE,
    )


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """A directory in which a mixture was evaluated, and the result."""
    output = tmp_path_factory.mktemp("evaluated")
    return output, run(tasks=["tiny_evaluate_mixture"], output_dir=str(output))


def predictions_of(output, task):
    return str(output / f"{task}-test-checkpoint_7.jsonl")


def write_lines(path, *lines):
    with open(path, "w", encoding="utf-8") as file:
        for index, line in enumerate(lines):
            line = {"index": index, "score": -1.0, "image_id": str(index)} | line
            file.write(json.dumps(line) + "\n")
    return str(path)


# ----- Whole evaluations ----------------------------------------------------------


@pytest.mark.slow
def test_a_mixture_is_evaluated_task_by_task(evaluated):
    output, results = evaluated
    assert list(results) == [TASK, OTHER_TASK]
    for task in results:
        lines = list(read_lines(predictions_of(output, task)))
        assert len(lines) == NUM_IMAGES
        good = [line for line in lines if "error" not in line]
        assert results[task].num_scored == len(good) == NUM_IMAGES - 1
        assert results[task].num_bad_images == 1
        expected = overlap(
            [line["references"] for line in good],
            [line["prediction"].strip() for line in good],
        )
        metrics = results[task].metrics
        assert {name: metrics[name] for name in expected} == expected
    scores = [line["score"] for line in good]
    assert results[TASK].metrics["mean_score"] == pytest.approx(np.mean(scores))


def test_metrics_are_written_beside_what_is_there(evaluated, run):
    output, results = evaluated
    path = output / evaluate.METRICS_FILE
    written = json.loads(path.read_text())
    assert set(written) == {f"{TASK}/test", f"{OTHER_TASK}/test"}
    entry = written[f"{TASK}/test"]
    assert entry["metrics"] == results[TASK].metrics
    assert entry["num_bad_images"] == 1 and entry["checkpoint"].endswith("checkpoint_7")
    evaluate.record_scores(str(output), {"other/test": {"metrics": {}}})
    assert json.loads(path.read_text()) == written | {"other/test": {"metrics": {}}}


@pytest.mark.slow
def test_a_trial_stands_beside_the_whole_and_says_what_it_is(run, tmp_path, capsys):
    output = str(tmp_path)
    trial = run(tasks=OTHER_TASK, output_dir=output, max_examples=3)[OTHER_TASK]
    shown = " ".join(capsys.readouterr().out.split())
    assert "first 3" in shown and "examples alone" in shown
    run(tasks=OTHER_TASK, output_dir=output)
    written = json.loads((tmp_path / evaluate.METRICS_FILE).read_text())
    assert set(written) == {f"{OTHER_TASK}/test", f"{OTHER_TASK}/test/first_3"}
    entry = written[f"{OTHER_TASK}/test/first_3"]
    assert entry["num_scored"] == trial.num_scored == 3
    assert entry["predictions"].endswith("-first_3.jsonl")
    whole = written[f"{OTHER_TASK}/test"]["metrics"]
    assert entry["metrics"]["token/loss"] != whole["token/loss"]
    with pytest.raises(UserError, match="max_examples is 0"):
        run(tasks=OTHER_TASK, output_dir=output, max_examples=0)


def test_evaluating_again_reuses_the_predictions(evaluated, run, capsys):
    output, results = evaluated
    again = run(tasks=TASK, output_dir=str(output))
    assert again[TASK] == results[TASK]
    printed = capsys.readouterr().out
    assert "reusing" in printed
    assert "shared_letters" in printed and "images not read" in printed


def test_token_metrics_are_those_of_eval_fn_on_the_whole_split(evaluated, checkpoint):
    _, results = evaluated
    restored = evaluate.infer.restore(
        tiny_captions.model(), ONE_DEVICE, checkpoint, LENGTHS, NUM_IMAGES
    )
    (batch,) = batches.eval_batches(
        TASK,
        "test",
        feature_lengths=LENGTHS,
        converter_cls=ImageTextFeatureConverter,
        batch_size=NUM_IMAGES,
        partitioning=ONE_DEVICE,
    )
    _, metrics = jax.jit(restored.model.eval_fn)(restored.params, batch.features)
    for name, metric in metrics.items():
        found = results[TASK].metrics[f"token/{name}"]
        assert found == pytest.approx(float(metric.compute()), rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_metrics_equal_those_of_seqios_evaluator(run, checkpoint, tmp_path):
    """SeqIO's evaluator is what T5X evaluates with; no image is bad here."""
    ours = run(tasks=[GOOD_TASK], output_dir=str(tmp_path))[GOOD_TASK].metrics
    restored = evaluate.infer.restore(
        tiny_captions.model(), ONE_DEVICE, checkpoint, LENGTHS, 1
    )
    predict = jax.jit(restored.model.predict_batch)

    def predict_fn(dataset):
        results = []
        for index, features in dataset.as_numpy_iterator():
            batch = {name: value[None] for name, value in features.items()}
            tokens = predict(restored.params, batch)
            results.append((index, np.asarray(tokens[0]).tolist()))
        return results

    evaluator = seqio.Evaluator(
        GOOD_TASK,
        ImageTextFeatureConverter(pack=False),
        eval_split="test",
        sequence_length=LENGTHS,
    )
    theirs, _ = evaluator.evaluate(
        compute_metrics=True, step=None, predict_fn=predict_fn, score_fn=None
    )
    theirs = theirs.result()[GOOD_TASK]
    assert theirs == {name: ours[name] for name in theirs}


# ----- Scoring files --------------------------------------------------------------


def test_any_file_of_predictions_can_be_scored(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prediction": " a dog ", "target": "x", "references": ["a cat", "a dog"]},
        {"prediction": "", "target": "y", "references": ["a bird"]},
        {"prediction": None, "references": ["z"], "error": "truncated"},
    )
    scores = evaluate.score_file(path, OTHER_TASK)
    assert scores.metrics["exact"] == 50.0
    assert scores.metrics["references"] == 3.0
    assert (scores.num_scored, scores.num_empty, scores.num_bad_images) == (2, 1, 1)


def test_postprocessors_get_examples_as_seqio_hands_them_out(folder, tmp_path):
    seen = []

    def postprocess(text, example, is_target):
        seen.append(example)
        return text

    task = tiny_captions.register("tiny_postprocess", folder, metric_fns=[overlap])
    seqio.TaskRegistry.remove("tiny_postprocess")
    seqio.TaskRegistry.add_provider(
        "tiny_postprocess", task.replace(postprocess_fn=postprocess)
    )
    path = write_lines(
        tmp_path / "p.jsonl",
        {
            "prediction": "a",
            "prompt": "say",
            "target": "b",
            "references": ["b", "ç"],
            "metadata": {"difficulty": 3, "weights": [0.5, 1.0]},
        },
    )
    evaluate.score_file(path, "tiny_postprocess")
    example = seen[0]
    assert example["image_id"] == b"0" and example["inputs_pretokenized"] == b"say"
    assert example["references"].tolist() == [b"b", "ç".encode()]
    assert example["difficulty"] == 3
    np.testing.assert_array_equal(example["weights"], [0.5, 1.0])


DAMAGED = [
    b"\0" * 40,
    b"[" * 100_000,
    b'{"index": 1, "prediction": "a", "score": 1' + b"0" * 5000 + b"}",
    b'{"index": true, "prediction": "a", "score": 0}',
    b'{"index": 1, "score": 0}',
    b'{"index": 1, "prediction": "a", "score": null}',
    b'{"index": 1, "prediction": "a", "score": 0, "metadata": [1]}',
    b'{"index": 1, "prediction": "a", "score": 0, "references": "x"}',
    b'{"index": 1, "prediction": "a", "score": 0, "references": ["x", 1]}',
    b'{"index": 1, "prediction": "a", "score": 0, "target": {}}',
    b'{"index": 1, "prediction": "caf\xe9", "score": 0}',
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_of_predictions_is_named(tmp_path, line):
    good = {"prediction": "a", "target": "b", "references": ["c"]}
    path = write_lines(tmp_path / "p.jsonl", good)
    with open(path, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(
        UserError, match=r"p\.jsonl, line 2: a prediction with"
    ) as error:
        evaluate.score_file(path, OTHER_TASK)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "line, message",
    [
        (
            {"metadata": {"x": [1, [2]]}},
            r"p\.jsonl: feature 'x' of an example is no arr",
        ),
        ({"all_scores": [1.0]}, "index 1 has the fields scores, all_scores, the first"),
    ],
)
def test_lines_that_do_not_fit_each_other_name_their_file(tmp_path, line, message):
    good = {"prediction": "a", "target": "b", "references": ["c"]}
    path = write_lines(tmp_path / "p.jsonl", good, good | line)
    with pytest.raises(UserError, match=message):
        evaluate.score_file(path, OTHER_TASK)


def test_lines_without_anything_to_score_keep_their_place(tmp_path):
    """What a line leaves out because it is empty is there again for a postprocessor."""
    line = {"index": 0, "image_id": "0", "prediction": "a", "score": 0.5}
    example = prediction_lines.example_features(line)
    nothing = {"question_id": "", "targets_pretokenized": "", "references": []}
    assert example == {"image_id": "0"} | nothing
    labels = {"label_ids": [], "label_names": []}
    example = prediction_lines.example_features(line | {"prediction": 3})
    assert example == {"image_id": "0"} | nothing | labels
    example = prediction_lines.example_features(line | {"references": ["b"]})
    assert "targets_pretokenized" not in example


@pytest.mark.parametrize("content", [b"[1]", b"\0" * 9, b"[" * 100_000, b'"\xff"', b""])
def test_damaged_metrics_are_named_and_kept(tmp_path, content):
    (tmp_path / evaluate.METRICS_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.json.*Move it away\."):
        evaluate.record_scores(str(tmp_path), {})
    assert (tmp_path / evaluate.METRICS_FILE).read_bytes() == content


def test_metrics_with_half_a_character_are_kept_as_they_are(tmp_path):
    (tmp_path / evaluate.METRICS_FILE).write_text('{"\\ud83d": 1}')
    path = evaluate.record_scores(str(tmp_path), {"é": {}})
    with open(path, encoding="utf-8") as file:
        assert json.load(file) == {"\ud83d": 1, "é": {}}


@pytest.mark.parametrize(
    "lines,message",
    [
        ([{"prediction": None, "error": "no"}], "nothing to score: 1 images"),
        ([{"prediction": "a", "target": ""}], "neither targets nor references"),
        ([{"prediction": "a", "references": ["b"]}], "no targets_pretokenized"),
    ],
)
def test_files_without_anything_to_score_are_refused(tmp_path, lines, message):
    path = write_lines(tmp_path / "p.jsonl", *lines)
    with pytest.raises(ValueError, match=message):
        evaluate.score_file(path, OTHER_TASK)


def test_tasks_whose_metrics_cannot_be_computed_are_refused(folder, tmp_path):
    def of_scores(targets, scores):
        return {"x": 0.0}

    def again(targets, predictions):
        return {"exact": 0.0}

    path = write_lines(tmp_path / "p.jsonl", {"prediction": "a", "target": "a"})
    for metric_fns, message in (
        ([], "has no metrics"),
        ([of_scores], "has 1 metrics of another kind"),
        ([overlap, again], "two metrics of task 'tiny_refused' are called 'exact'"),
    ):
        tiny_captions.register("tiny_refused", folder, metric_fns=metric_fns)
        line = {"prediction": "a", "target": "a", "references": ["a"]}
        path = write_lines(tmp_path / "p.jsonl", line)
        with pytest.raises(ValueError, match=message):
            evaluate.score_file(path, "tiny_refused")


def test_an_unreadable_metrics_file_is_not_overwritten(tmp_path):
    (tmp_path / evaluate.METRICS_FILE).write_text("{half")
    with pytest.raises(
        ValueError, match="metrics.json, line 1.*malformed.*Move it away"
    ):
        evaluate.record_scores(str(tmp_path), {})
    assert (tmp_path / evaluate.METRICS_FILE).read_text() == "{half"


def test_the_table_has_a_column_for_each_of_several_scores():
    screen = io.StringIO()
    console = rich.console.Console(file=screen, width=100)
    columns = {
        "model": evaluate.Scores({"bleu": 0.5, "note": "x"}, 9, 1, 0),
        "majority": evaluate.Scores({"bleu": 0.25}, 9, 1, 0),
    }
    evaluate.print_scores(columns, console=console)
    rows = screen.getvalue().splitlines()
    assert any("model" in row and "majority" in row for row in rows)
    assert any("bleu" in row and "0.5000" in row and "0.2500" in row for row in rows)


# ----- Majority -------------------------------------------------------------------


def test_the_majority_baseline_always_says_the_commonest_training_target(evaluated):
    output, _ = evaluated
    path = predictions_of(output, TASK)
    text, scores = evaluate.score_majority(path, TASK, LENGTHS)
    assert text == "a dog"  # five of the fifteen captions
    good = [line for line in read_lines(path) if "error" not in line]
    references = [line["references"] for line in good]
    expected = overlap(references, ["a dog"] * len(good))
    assert {name: scores.metrics[name] for name in expected} == expected
    assert scores.metrics["exact"] == pytest.approx(100 * 4 / 9)
    assert scores.num_bad_images == 1


def test_the_majority_of_a_source_without_records_is_read_from_its_examples(folder):
    def unordered(split, shuffle_files, seed=None):
        del shuffle_files, seed
        files = seqio.TaskRegistry.get(OTHER_TASK).source
        return files.get_dataset(split, shuffle=False)

    source = seqio.FunctionDataSource(unordered, ["train"])
    tiny_captions.register("tiny_function", folder, source=source)
    found = task_metrics.most_frequent_target("tiny_function", "train", LENGTHS)
    assert found == "a dog"


def test_the_majority_of_equally_common_targets_is_the_first(tmp_path):
    tiny_captions.write_folder(tmp_path)
    lines = [{"file_name": f"{i}.png", "caption": text} for i, text in enumerate("bab")]
    text = "\n".join(map(json.dumps, [*lines, {"file_name": "3.png", "caption": "a"}]))
    (tmp_path / "captions.jsonl").write_text(text + "\n")
    tiny_captions.register("tiny_tie", tmp_path)
    assert task_metrics.most_frequent_target("tiny_tie", "train", LENGTHS) == "b"
