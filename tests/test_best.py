"""Which checkpoints a run keeps by a metric, and what it is measured by meanwhile."""

import dataclasses
import json
import os
import signal

import jax
import pytest
import tiny_models
import tiny_runs
from tiny_runs import Data, logged, run, saved_params

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.checkpoints.best import KeepBest
from vit22b_transfer.training.eval_loss import EvaluationStopped
from vit22b_transfer.training.train import Periods

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

NOISE = "generated/tiny/noise"
BEST = KeepBest(NOISE, "max", keep=2)
# Of 12 steps: measured at 3, 6, 9, 12, the loss at 4, 8, 12 and saved at each step.
PERIODS = Periods(log=4, evaluate=4, checkpoint=1)


@dataclasses.dataclass(frozen=True)
class Scores:
    """In place of `TrainingScores`: a number that the parameters decide, as hashes do.

    same: this one instead. stops_at: the call that a signal comes in.
    """

    same: float | None = None
    stops_at: int | None = None
    generate_every: int = 3
    tasks: tuple[str, ...] = ("tiny",)

    def start(self, model, partitioning):
        calls = []

        def scorer(params, stop, log):
            calls.append(None)
            if len(calls) == self.stops_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop():
                raise EvaluationStopped
            with log.part("generating", total=1) as bar:
                bar.show(1)
            kernel = jax.device_get(params["decoder"]["kernel"])
            value = self.same or float(abs(kernel).sum() * 1e4 % 1.0)
            return {"tiny": {"noise": value, "nothing": float("nan"), "text": "a\nb"}}

        return scorer


def scored_run(model_dir, **arguments):
    defaults = {"periods": PERIODS, "scores": Scores(), "best": BEST, "keep": 1}
    return run(model_dir, **(defaults | arguments))


def measured(model_dir, name=NOISE):
    return {line["step"]: line[name] for line in logged(model_dir) if name in line}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The directory of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("straight")
    scored_run(directory)
    return directory


def test_the_best_are_kept_besides_the_newest(straight):
    values = measured(straight)
    assert sorted(values) == [3, 6, 9, 12] and len(set(values.values())) == 4
    best = sorted(values, key=values.get, reverse=True)[:2]
    assert reading.complete_steps(str(straight)) == sorted({*best, 12})
    assert 12 != best[0]  # or the newest alone would pass
    ranked = BEST.ranked(str(straight))
    assert [(step, values[step]) for step in best] == ranked[:2]


def test_scores_and_the_best_change_nothing_that_is_learned(tmp_path, straight):
    run(tmp_path, periods=PERIODS)
    tiny_runs.assert_same_bits(saved_params(tmp_path), saved_params(straight))
    without = [
        {name: x for name, x in line.items() if not name.startswith("generated/")}
        for line in logged(straight)
    ]
    assert [line for line in without if len(line) > 1] == logged(tmp_path)


def assert_same_end(directory, straight):
    ours, theirs = str(directory), str(straight)
    assert reading.complete_steps(ours) == reading.complete_steps(theirs)
    assert BEST.ranked(ours) == BEST.ranked(theirs)
    tiny_runs.assert_same_bits(saved_params(directory), saved_params(straight))
    assert logged(directory) == logged(straight)


def test_a_killed_run_keeps_the_same_checkpoints(tmp_path, straight):
    for step in (4, 7, 10):
        with pytest.raises(tiny_runs.Killed):
            scored_run(tmp_path, data=Data(dies_at=step))
        (tmp_path / "checkpoint_1.being-deleted").mkdir()  # as a kill may leave
    scored_run(tmp_path)
    assert not list(tmp_path.glob("*deleted"))
    assert_same_end(tmp_path, straight)


# The second call is that of step 6, the fourth that of the last, with the loss.
@pytest.mark.parametrize("call, step", [(2, 6), (4, 12)])
def test_scores_that_a_signal_stopped_are_done_again(tmp_path, straight, call, step):
    result = scored_run(tmp_path, scores=Scores(stops_at=call))
    assert result.interrupted and result.step == step
    assert step not in measured(tmp_path)
    assert "measured" not in reading.read_record(result.checkpoint)
    assert not scored_run(tmp_path).interrupted
    assert_same_end(tmp_path, straight)


def test_of_equal_values_the_earlier_is_the_best(tmp_path, capsys):
    best = dataclasses.replace(BEST, keep=1)
    scored_run(tmp_path, scores=Scores(same=0.5), best=best)
    assert reading.complete_steps(str(tmp_path)) == [3, 12]
    shown = capsys.readouterr().out
    path = tmp_path / "checkpoint_3"
    assert f"best {NOISE} 0.5000 at step 3: {path}" in shown
    assert f"--gin.CHECKPOINT=\"'{path}'\"" in shown
    assert f"{NOISE.replace('noise', 'text')}: a\\nb (not logged)" in shown
    assert "generated/tiny/nothing: nan (not logged)" in shown


def test_the_least_loss_is_the_best_by_min(tmp_path):
    name = "eval/tiny/loss"
    best = KeepBest(name, "min")
    scored_run(tmp_path, scores=None, best=best, keep=None)
    values = measured(tmp_path, name)
    (step, value), *_ = best.ranked(str(tmp_path))
    assert value == min(values.values()) == values[step]


def test_what_a_record_says_was_measured_are_numbers(tmp_path, straight):
    path = reading.checkpoint_path(str(straight), 12)
    record = json.loads(open(reading.record_file(path)).read())
    for wrong in ({NOISE: "0.5"}, {NOISE: True}, [1.0]):
        file = tmp_path / "record"
        file.write_text(json.dumps(record | {"measured": wrong}))
        with pytest.raises(UserError, match="says measured = "):
            reading.run_records.read(str(file), "Restore it.")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"best": KeepBest("eval/tiny/los", "min")}, "Nearest: eval/tiny/loss"),
        ({"best": KeepBest("train/loss", "min")}, "is not measured"),
        ({"best": KeepBest("generated/other/noise", "max")}, "generated/tiny/METRIC"),
        ({"scores": None}, "'generated/tiny/noise' is not measured"),
        (
            {"best": KeepBest("eval/tiny/loss", "min"), "eval_data": None},
            "is not measured",
        ),
        (
            {"periods": Periods(evaluate=4, checkpoint=2)},
            "measured every 3 steps, but checkpoints are saved every 2: .* such as 1",
        ),
    ],
)
def test_what_cannot_be_kept_by_is_told_before_the_first_step(
    arguments, message, tmp_path
):
    with pytest.raises(UserError, match=message):
        scored_run(tmp_path, **arguments)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_score_that_the_task_lacks_is_told_when_its_step_is_saved(tmp_path):
    best = KeepBest("generated/tiny/nois", "max")
    with pytest.raises(UserError, match="Nearest: generated/tiny/noise"):
        scored_run(tmp_path, best=best)
    assert reading.complete_steps(str(tmp_path)) == [3]
    scored_run(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [(("x", "most"), "mode='most'"), (("x", "max", 0), "keep=0 of KeepBest")],
)
def test_wrong_settings_of_the_best_are_refused(arguments, message):
    with tiny_models.without_type_checks(), pytest.raises(UserError, match=message):
        KeepBest(*arguments)
