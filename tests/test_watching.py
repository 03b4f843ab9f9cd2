"""`vit22b watch`: each checkpoint of a run once, whatever is killed or removed."""

import json
import shutil

import pytest
import tiny_runs

from vit22b_transfer import UserError, cli
from vit22b_transfer.demo import scenes
from vit22b_transfer.evaluation import watching
from vit22b_transfer.evaluation.evaluate import Scores
from vit22b_transfer.host import locks
from vit22b_transfer.training import curves

TASK = "scenes_captioning"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps that kept its checkpoints 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny_runs.run(folder, keep=None)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def scored(*, checkpoint, output_dir):
    """In place of an evaluation: its score is the step, beside words."""
    step = int(checkpoint.rpartition("_")[2])
    assert output_dir.endswith("run/watch")
    return {"tiny": Scores({"CIDEr": step / 10, "best": "a"}, 4, 0, 0)}


def quiet(text):
    del text


def test_each_checkpoint_is_evaluated_once_and_stands_in_the_curves(run):
    assert watching.watch(str(run), scored, tell=quiet) == [5, 10, 12]
    points = curves.read(str(run)).points
    assert points["watch/tiny/CIDEr"] == [(5.0, 0.5), (10.0, 1.0), (12.0, 1.2)]
    assert "train/loss" in points and "watch/tiny/best" not in points
    assert watching.watch(str(run), scored, tell=quiet) == []
    # Killed while its last line was written.
    log = run / "watch.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    assert watching.watch(str(run), scored, tell=quiet) == [12]
    found = curves.read(str(run))
    assert found.points["watch/tiny/CIDEr"][-1] == (12.0, 1.2)
    assert found.damaged == 1


def test_a_checkpoint_that_goes_while_it_is_read_is_left_out(run):
    said = []

    def vanishing(*, checkpoint, output_dir):
        if checkpoint.endswith("_5"):
            shutil.rmtree(checkpoint)
            raise FileNotFoundError(checkpoint)
        return scored(checkpoint=checkpoint, output_dir=output_dir)

    assert watching.watch(str(run), vanishing, tell=said.append) == [10, 12]
    assert any("checkpoint_5 was removed" in line for line in said)

    def failing(*, checkpoint, output_dir):
        raise UserError(f"no metrics: {checkpoint}, {output_dir}")

    (run / "watch.jsonl").unlink()
    with pytest.raises(UserError, match="no metrics"):
        watching.watch(str(run), failing, tell=quiet)


def test_it_waits_for_the_next_checkpoint_until_the_last(run, tmp_path, monkeypatch):
    late = tmp_path / "late"
    for name in ("checkpoint_10", "checkpoint_12"):
        shutil.move(run / name, late / name)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        name = {2: "checkpoint_10", 4: "checkpoint_12"}.get(len(waits))
        if name:
            shutil.move(late / name, run / name)
        assert len(waits) < 9

    monkeypatch.setattr(watching.time, "sleep", sleep)
    assert watching.watch(str(run), scored, tell=quiet, wait=0.1) == [5, 10, 12]
    assert len(waits) == 4


def test_one_at_a_time_and_only_of_a_run(run, tmp_path):
    with pytest.raises(UserError, match="is no directory"):
        watching.watch(str(tmp_path / "nowhere"), scored)
    (run / "watch").mkdir()
    with (
        locks.held(str(run / "watch")),
        pytest.raises(UserError, match="watch is in use"),
    ):
        watching.watch(str(run), scored, tell=quiet)


@pytest.mark.slow
def test_the_command_evaluates_the_checkpoints_of_a_training(
    tmp_path, monkeypatch, capsys
):
    scenes.write_scenes(tmp_path / "data", sizes=dict.fromkeys(scenes.SPLITS, 8))
    monkeypatch.setenv("VIT22B_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("VIT22B_VOCABULARY", raising=False)
    run = tmp_path / "run"
    values = ["TRAIN_STEPS=2", "WARMUP_STEPS=1", "BATCH_SIZE=8", "IMAGE_SIZE=(32, 32)"]
    values += ["train.Periods.checkpoint=1", "train.fine_tune.keep=None"]
    values += ["ViTConfig.depth=1", f"MODEL_DIR='{run}'", "EVAL_SPLIT='test'"]
    recipe = "--gin_file=gin_configs/recipes/scenes_captioning.gin"
    training = ["train", recipe, *(f"--gin.{value}" for value in values)]
    assert cli.main(training) == 0, capsys.readouterr().err
    assert cli.main(["watch", str(run)]) == 0, capsys.readouterr().err
    assert f"{run} is finished; 2 checkpoints were evaluated" in capsys.readouterr().out
    points = curves.read(str(run)).points
    assert [step for step, _ in points[f"watch/{TASK}/cider"]] == [1.0, 2.0]
    known = json.loads((run / "watch" / "metrics.json").read_text())
    assert known[f"{TASK}/test"]["checkpoint"].endswith("checkpoint_2")
