"""Scores of answers that are generated while a model is trained."""

import dataclasses
import json

import jax
import pytest
import tiny_captions
import tiny_processes
import tiny_runs
from tiny_captions import BATCH_SIZE, LENGTHS, NUM_IMAGES, ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.demo import scenes
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.evaluation.training_scores import TrainingScores
from vit22b_transfer.inference import infer, predicting
from vit22b_transfer.models import lora
from vit22b_transfer.partitioning import processes
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import logs, optimizers
from vit22b_transfer.training.eval_loss import EvaluationStopped
from vit22b_transfer.training.inputs import EvalData, TrainData
from vit22b_transfer.training.train import Periods, fine_tune

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

TASK, PLAIN_TASK = "tiny_training_scores", "tiny_training_scores_plain"
FOUR_DEVICES = Partitioning(data=2, model=2)


def letters(targets, predictions):
    """Numbers that tell which examples were scored, and of which predictions."""
    assert len(targets) == len(predictions)
    texts = "".join(sorted(map(str, targets)))
    return {
        "targets": float(sum(map(ord, texts))),
        "letters": float(sum(map(ord, "".join(predictions)))),
        "count": float(len(predictions)),
    }


@pytest.fixture(scope="module", autouse=True)
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    tiny_captions.write_folder(folder)
    tiny_captions.register(TASK, folder, metric_fns=[letters])
    tiny_captions.register(PLAIN_TASK, folder)


def scores_of(count, task=TASK, split="test"):
    data = EvalData([task], split, LENGTHS, BATCH_SIZE)
    return TrainingScores(data, generate_every=2, generate_examples=count)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_captions.write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return logs.RunLog(str(tmp_path_factory.mktemp("log")), total_steps=1)


def never():
    return False


@pytest.mark.parametrize("partitioning", [ONE_DEVICE, FOUR_DEVICES], ids=["1", "4"])
def test_scores_are_those_of_an_evaluation(
    partitioning, checkpoint, log, tmp_path, capsys, monkeypatch
):
    made = []
    make = predicting.make_predict
    monkeypatch.setattr(
        predicting, "make_predict", lambda *x: made.append(make(*x)) or made[-1]
    )
    restored = infer.restore(
        tiny_captions.model(), partitioning, checkpoint, LENGTHS, BATCH_SIZE
    )
    scorer = scores_of(1000).start(restored.model, partitioning)
    with partitioning.activate():
        found = scorer(restored.params, never, log)
        assert scorer(restored.params, never, log) == found
        few = scores_of(5).start(restored.model, partitioning)
        (first,) = few(restored.params, never, log).values()
    assert made[0]._cache_size() == 1  # compiled once for both calls
    shown = " ".join(capsys.readouterr().out.split())
    told = f"generated {NUM_IMAGES - 1} answers of {TASK} test: 1 images could not be"
    assert shown.count(told) == 2
    data = infer.SplitToRead(TASK, "test", LENGTHS, BATCH_SIZE)
    whole = infer.predict_split(restored, data, output=str(tmp_path)).path
    assert found == {TASK: evaluate.score_file(whole, TASK).metrics}
    with open(whole, encoding="utf-8") as file:
        lines = list(map(json.loads, file))[:5]
    assert first == evaluate.score_lines(lines, "five", TASK).metrics
    assert first["count"] == 5


def test_a_signal_ends_it_between_its_batches(checkpoint, log):
    restored = infer.restore(
        tiny_captions.model(), ONE_DEVICE, checkpoint, LENGTHS, BATCH_SIZE
    )
    asked = []
    scorer = scores_of(1000).start(restored.model, ONE_DEVICE)
    with ONE_DEVICE.activate(), pytest.raises(EvaluationStopped):
        scorer(restored.params, lambda: asked.append(None) or len(asked) == 3, log)
    assert len(asked) == 3  # before the task, after the first batch and the second


@pytest.mark.parametrize(
    "task, split, message",
    [
        (PLAIN_TASK, "test", "has no metrics"),
        (TASK, "dev", "has no split 'dev'"),
        ("tiny_training_score", "test", f"Nearest: {TASK}"),
    ],
)
def test_what_cannot_be_scored_is_told_at_the_start(task, split, message):
    with pytest.raises(UserError, match=message):
        scores_of(5, task, split).start(tiny_captions.model(), ONE_DEVICE)


@pytest.mark.parametrize("name", ["generate_every", "generate_examples"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
        dataclasses.replace(scores_of(5), **{name: 0})


def test_one_process_gathers_what_it_gave():
    assert processes.gathered(b"[1]") == [b"[1]"]


# --- Whole trainings ---

KINDS = {
    "plain": {},
    "lora, int8": {
        "lora": lora.LoraConfig(2, 4.0, (".*attention/query/kernel",)),
        "int8_tower": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_the_same_with_and_without_scores(kind, tmp_path):
    partitioning = FOUR_DEVICES if kind == "plain" else ONE_DEVICE
    task = dict(feature_lengths=LENGTHS, batch_size=BATCH_SIZE)
    ends = []
    for scores in (scores_of(6), None):
        schedule = optimizers.cosine(1e-2, total_steps=4)
        model = tiny_captions.model(
            optimizer_def=optimizers.adafactor(schedule), **KINDS[kind]
        )
        directory = tmp_path / str(bool(scores))
        fine_tune(
            model,
            model_dir=str(directory),
            data=TrainData(TASK, "train", **task),
            eval_data=EvalData([TASK], "test", **task),
            total_steps=4,
            partitioning=partitioning,
            periods=Periods(log=2, evaluate=2, checkpoint=2),
            scores=scores,
        )
        restored = infer.restore(
            model, partitioning, str(directory), LENGTHS, BATCH_SIZE
        )
        ends.append(jax.device_get(restored.params))
    tiny_runs.assert_same_bits(*ends)
    lines = tiny_runs.logged(tmp_path / "True")
    name = f"generated/{TASK}/count"
    assert [line["step"] for line in lines if name in line] == [2, 4]
    # What is logged at the end are the scores of the checkpoint of the end.
    data = infer.SplitToRead(TASK, "test", LENGTHS, BATCH_SIZE)
    whole = infer.predict_split(restored, data, output=str(tmp_path)).path
    with open(whole, encoding="utf-8") as file:
        six = list(map(json.loads, file))[:6]
    expected = evaluate.score_lines(six, "six", TASK).metrics
    assert {n: lines[-1][f"generated/{TASK}/{n}"] for n in expected} == expected


def test_two_processes_score_and_keep_what_one_does(tmp_path):
    sizes = {"train": 12, "validation": 11, "test": 2}
    scenes.write_scenes(tmp_path / "data", seed=3, sizes=sizes)
    (tmp_path / "recipe.gin").write_text(tiny_processes.RECIPE)
    name = "generated/scenes_captioning/cider_d"
    logs_of = []
    for count in (1, 2):
        command = tiny_processes.command(
            "train",
            tmp_path,
            tmp_path / str(count),
            "gin_configs/runs/generate.gin",
            "gin_configs/runs/keep_best.gin",
            GENERATE_EVERY=1,
            GENERATE_EXAMPLES=10,  # two batches, the second in part
            BEST_METRIC=name,
            BEST_MODE="max",
            TRAIN_STEPS=2,
            train__Periods__checkpoint=1,
        )
        with tiny_processes.started(tmp_path, str(count), count, [command]) as children:
            tiny_processes.finish(tmp_path, str(count), children)
        logs_of.append(tiny_runs.logged(tmp_path / str(count)))
    one, _ = logs_of
    assert [line["step"] for line in one if name in line] == [1, 2]
    scores = [
        [{n: x for n, x in line.items() if n[0] == "g"} for line in lines]
        for lines in logs_of
    ]
    assert scores[0] == scores[1]
    told = tiny_processes.output(tmp_path, "2", 0)
    assert told.count("generated 10 answers of scenes_captioning validation") == 2
    assert f"best {name}" in told
    assert "generated 10" not in tiny_processes.output(tmp_path, "2", 1)
