"""What a run does so that no work is lost: what it saves, keeps, and goes on from."""

import ast
import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import stat
from pathlib import Path

import full_disks
import jax.numpy as jnp
import optax
import pytest
import tiny_runs
from tiny_runs import Data, EvalData, LinearModel, logged, run

from vit22b_transfer import NotFiniteError, UserError
from vit22b_transfer.checkpoints import damage, reading, writing
from vit22b_transfer.host import whole_files
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import compiling
from vit22b_transfer.training.state import (
    abstract_state,
    from_checkpoint_tree,
    to_checkpoint_tree,
)
from vit22b_transfer.training.train import InitialCheckpoint, Periods

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

# --- What is not finite ---


def turned(step, value):
    """An optimizer whose update of `step` (from 1) moves every parameter by `value`."""

    def scale(count):
        return jnp.where(count == step - 1, value, -1e-2)

    return optax.scale_by_schedule(scale)


@pytest.mark.parametrize(
    "partitioning", [tiny_runs.ONE_DEVICE, Partitioning(data=4, model=2)]
)
def test_parameters_that_an_update_made_nan_replace_no_checkpoint(
    partitioning, tmp_path
):
    # Saved at step 10, whose loss and gradients are of the parameters before it.
    model = LinearModel(turned(10, jnp.nan))
    with pytest.raises(NotFiniteError) as error:
        run(tmp_path, model, partitioning=partitioning)
    message = str(error.value)
    assert "after step 10" in message and "checkpoint_5 is untouched" in message
    assert "target/decoder/kernel" in message and "and 1 more (of 4 arrays)" in message
    assert reading.complete_steps(str(tmp_path)) == [5]
    assert not run(tmp_path, LinearModel(turned(99, 0.0))).interrupted


def test_an_optimizer_state_that_is_not_finite_is_not_saved(tmp_path):
    def init(params):
        return {"trace": jnp.zeros(3), "best": jnp.inf}

    def update(updates, state, params=None):
        spoiled = {**state, "trace": state["trace"] + jnp.inf}
        return optax.tree.scale(-1e-2, updates), spoiled

    model = LinearModel(optax.GradientTransformation(init, update))
    with pytest.raises(NotFiniteError, match=r"in state/param_states/trace \(of 5 ar"):
        run(tmp_path, model)
    assert reading.complete_steps(str(tmp_path)) == []


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(two):
    path = str(two / "checkpoint_10")
    state = to_checkpoint_tree(saved_state(path))
    spoiled = state["target"]["decoder"]["kernel"].at[0, 0].set(jnp.inf)
    state["target"]["decoder"]["kernel"] = spoiled
    record = reading.read_record(path)
    shutil.rmtree(path)
    writer = writing.CheckpointWriter(str(two), keep=None)
    writer.save(10, state, record)
    writer.close()
    with pytest.raises(UserError, match="NaN or infinite values in target/decoder/ker"):
        run(two)
    assert reading.complete_steps(str(two)) == [5, 10]


# --- Damage ---


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run that was killed after step 10, with two checkpoints."""
    directory = tmp_path_factory.mktemp("two")
    with pytest.raises(tiny_runs.Killed):
        run(directory, keep=None, data=Data(dies_at=10))
    return directory


@pytest.fixture
def two(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "two"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    run(directory)
    return directory


def saved_state(path):
    model = LinearModel()
    params = tiny_runs.abstract_params(model)
    abstract = abstract_state(params, model.optimizer_def, tiny_runs.ONE_DEVICE)
    tree = reading.restore_tree(path, to_checkpoint_tree(abstract))
    return from_checkpoint_tree(tree, abstract)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=os.path.getsize)


def write(content, *name):
    return lambda folder: folder.joinpath(*name).write_bytes(content)


DAMAGES = {
    "a cut data file": lambda f: os.truncate(
        largest(f), largest(f).stat().st_size // 2
    ),
    "NULs for data": lambda f: largest(f).write_bytes(b"\0" * 60_000),
    "no data file": lambda f: largest(f).unlink(),
    "an empty manifest": write(b"", "state", "manifest.ocdbt"),
    "an empty _METADATA": write(b"", "state", "_METADATA"),
    "a list for _METADATA": write(b"[1]", "state", "_METADATA"),
    "a deep _METADATA": write(b"[" * 100_000, "state", "_METADATA"),
    "an empty record": write(b"", "run", "metadata"),
    "NULs for a record": write(b"\0" * 99, "run", "metadata"),
    "a list for a window": write(b'{"window": [1]}', "run", "metadata"),
    "a deep record": write(b"[" * 100_000, "run", "metadata"),
    "no vocabulary": write(b'{"vocabularies": {"a": 1}}', "run", "metadata"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_one_to_go_on_from(name, two, capfd):
    damaged = two / "checkpoint_10"
    DAMAGES[name](damaged)
    before = sorted(two.rglob("*"))
    with pytest.raises(damage.UnreadableCheckpointError) as error:
        run(two, keep=1)
    assert sorted(two.rglob("*")) == before
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"checkpoint {damaged}")
    assert "older checkpoint_5 is there" in message
    assert "Traceback" not in capfd.readouterr().err


def test_the_ways_on_that_are_told_of_a_damaged_checkpoint_work(
    two, uninterrupted, tmp_path
):
    DAMAGES["a cut data file"](two / "checkpoint_10")
    with pytest.raises(UserError) as error:
        run(two)
    move, add = re.findall("`(.*?)`", str(error.value))
    gin_file, *bindings = shlex.split(add)
    assert gin_file == "--gin_file=gin_configs/runs/from_checkpoint.gin"
    values = dict(b.removeprefix("--gin.").split("=", 1) for b in bindings)
    initial = InitialCheckpoint(ast.literal_eval(values["INITIAL_CHECKPOINT"]))
    run(ast.literal_eval(values["MODEL_DIR"]), initial=initial, total_steps=2)
    program, old, new = shlex.split(move)
    assert program == "mv"
    os.rename(old, new)
    run(two)
    tiny_runs.assert_same_bits(
        tiny_runs.saved_params(two), tiny_runs.saved_params(uninterrupted)
    )
    assert logged(two) == logged(uninterrupted)


def test_the_only_checkpoint_is_damaged_and_that_is_said(two):
    shutil.rmtree(two / "checkpoint_5")
    DAMAGES["an empty _METADATA"](two / "checkpoint_10")
    with pytest.raises(UserError, match="There is no older checkpoint in .* the beg"):
        run(two)


def test_a_start_that_fails_removes_no_checkpoint(two):
    """Though the next save would: they were kept by a run that keeps all."""
    with pytest.raises(UserError, match="not the one .* was trained with"):
        run(two, LinearModel(vocab_size=60), keep=1)
    with pytest.raises(NotFiniteError):
        run(two, keep=1, data=Data(broken=(10,)))
    assert reading.complete_steps(str(two)) == [5, 10]
    run(two, keep=1)
    assert reading.complete_steps(str(two)) == [12]


def test_a_checkpoint_with_a_damaged_record_is_not_removed(two):
    DAMAGES["an empty record"](two / "checkpoint_5")
    run(two, keep=1)
    assert reading.complete_steps(str(two)) == [5, 12]


DAMAGED_LINES = [
    b"\0" * 300,
    b'{"step": 4, "train/lo',
    b"[1]",
    b"null",
    b'{"step": true}',
    b'{"step": "4"}',
    b'{"train/loss": 1.0}',
    b'{"step": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"step": 4, "train/loss": 1.0}',  # without its end
]


def test_damaged_lines_of_a_log_are_left_out_and_counted(two, uninterrupted, capsys):
    with open(two / "metrics.jsonl", "ab") as log:
        log.write(b"\n".join(DAMAGED_LINES))
    run(two)
    count = len(DAMAGED_LINES)
    assert f"metrics.jsonl: {count} lines were cut off" in capsys.readouterr().out
    assert logged(two) == logged(uninterrupted)
    run(two)
    assert "lines were cut off" not in capsys.readouterr().out


# --- What the last line says ---


def test_the_last_line_says_the_best_and_the_last_loss_over_restarts(tmp_path, capsys):
    model = LinearModel(turned(11, -1e4))  # a spike in the last steps
    periods = Periods(log=1, evaluate=99, checkpoint=5)
    with pytest.raises(tiny_runs.Killed):
        run(tmp_path, model, periods=periods, data=Data(dies_at=10))
    run(tmp_path, model, periods=periods, total_steps=13, eval_data=None)
    last = capsys.readouterr().out.splitlines()[-1]
    losses = {line["step"]: line["train/loss"] for line in logged(tmp_path)}
    best = min(losses, key=losses.__getitem__)
    assert best <= 10 and losses[13] > 2 * losses[best]
    assert last == (
        f"done: {tmp_path}/checkpoint_13, best loss {losses[best]:.4f} at step {best}, "
        f"last loss {losses[13]:.4f} at step 13"
    )


# --- Signals ---


@pytest.fixture
def ordinary_signals():
    """SIGHUP as it is on a terminal, also under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@dataclasses.dataclass(frozen=True)
class SignalledEvalData(EvalData):
    """Sends a signal when a batch of the evaluation of a step is asked for.

    given: the numbers of the batches that were asked for.
    """

    number: int = signal.SIGTERM
    at: tuple[int, int] = (0, 0)
    given: list = dataclasses.field(default_factory=list)

    def batches(self, task, model, partitioning):
        evaluation = self.given.count(0)
        for number, batch in enumerate(super().batches(task, model, partitioning)):
            self.given.append(number)
            if (evaluation, number) == self.at:
                os.kill(os.getpid(), self.number)
            yield batch


@pytest.mark.parametrize(
    ("number", "evaluation", "step"),
    [
        (signal.SIGTERM, 0, 3),
        (signal.SIGHUP, 3, 12),
        pytest.param(signal.SIGINT, 1, 6, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_an_evaluation_which_is_done_again(
    number, evaluation, step, tmp_path, uninterrupted, ordinary_signals
):
    handler = signal.getsignal(number)
    data = SignalledEvalData(number=number, at=(evaluation, 1))
    result = run(tmp_path, eval_data=data)
    assert result.interrupted and result.step == step
    assert data.given[-2:] == [0, 1], "it has three batches"
    assert reading.latest_step(str(tmp_path)) == step
    assert signal.getsignal(number) is handler
    # Stopped before the first batch, then killed before that was recorded.
    again = SignalledEvalData(number=number, at=(0, 0))
    assert run(tmp_path, eval_data=again).interrupted
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": step, "eval/tiny/loss": 1.0}) + "\n")
    assert not run(tmp_path).interrupted
    assert logged(tmp_path) == logged(uninterrupted)
    tiny_runs.assert_same_bits(
        tiny_runs.saved_params(tmp_path), tiny_runs.saved_params(uninterrupted)
    )
    assert not run(tmp_path).interrupted
    assert logged(tmp_path) == logged(uninterrupted)


def test_a_signal_before_an_evaluation_starts_none(tmp_path, ordinary_signals):
    data = SignalledEvalData()
    stop = Data(events={2: lambda: os.kill(os.getpid(), signal.SIGHUP)})
    assert run(tmp_path, data=stop, eval_data=data).step == 3
    assert data.given == []


def test_under_nohup_the_end_of_the_terminal_stops_nothing(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up = Data(events={2: lambda: os.kill(os.getpid(), signal.SIGHUP)})
        assert not run(tmp_path, data=hang_up, eval_data=None).interrupted
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("seconds", "ahead"), [(0.1, 2), (2.0, 1), (9.0, 0)], ids=["fast", "slow", "slower"]
)
def test_few_slow_steps_are_to_be_waited_for_when_a_run_is_stopped(
    seconds, ahead, monkeypatch
):
    """No longer than ten seconds, if a step takes less."""
    clock, waited = iter(range(1000)), []
    monkeypatch.setattr(compiling.time, "monotonic", lambda: seconds * next(clock))
    monkeypatch.setattr(compiling.jax, "block_until_ready", waited.append)
    in_flight = compiling.StepsInFlight()
    windows = [{} for _ in range(6)]
    for window in windows:
        in_flight.add(window)
    assert list(map(id, waited)) == list(map(id, windows[: 6 - ahead]))
    assert ahead * seconds + seconds < 10


# --- Full disks ---


@pytest.mark.parametrize("num_bytes", [300, 20_000], ids=["the log", "a checkpoint"])
def test_training_on_a_full_disk_ends_in_a_line_and_goes_on(
    num_bytes, tmp_path, uninterrupted, capfd
):
    with pytest.raises(tiny_runs.Killed):
        run(tmp_path, data=Data(dies_at=6))
    with full_disks.full_disk() as fill:
        events = {6: lambda: fill(num_bytes)}
        with full_disks.refused(
            capfd, str(tmp_path), full_disks.FULL, "Checkpoint_5 is untouched"
        ):
            run(tmp_path, data=Data(events=events))
    run(tmp_path)
    assert logged(tmp_path) == logged(uninterrupted)
    tiny_runs.assert_same_bits(
        tiny_runs.saved_params(tmp_path), tiny_runs.saved_params(uninterrupted)
    )
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_training_in_a_directory_that_is_removed_ends_in_a_line(tmp_path, capfd):
    # At once: the checkpoint of step 5 may be being written in there.
    gone = {8: lambda: os.rename(tmp_path / "run", tmp_path / "elsewhere")}
    with full_disks.refused(
        capfd, str(tmp_path / "run"), "No such file", "no checkpoint yet"
    ):
        run(tmp_path / "run", data=Data(events=gone))


def test_what_is_written_has_the_usual_permissions_or_keeps_its_own(tmp_path):
    paths = [tmp_path / name for name in ("new", "old", "folder")]
    paths[1].write_text("")
    paths[1].chmod(0o604)
    mask = os.umask(0o027)
    try:
        for path in paths[:2]:
            with whole_files.replacing(str(path)) as file:
                file.write("x")
        with whole_files.new_directory(str(paths[2])):
            pass
    finally:
        os.umask(mask)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in paths]
    assert modes == [0o640, 0o604, 0o750]


def test_training_on_a_disk_that_became_read_only_ends_in_a_line(
    tmp_path, capfd, monkeypatch
):
    run(tmp_path, total_steps=5)

    def mkstemp(**arguments):
        name = os.path.join(arguments["dir"], arguments["prefix"])
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)

    monkeypatch.setattr(whole_files.tempfile, "mkstemp", mkstemp)
    with full_disks.refused(
        capfd, "metrics.jsonl", "Read-only file", "Checkpoint_5 is untouched"
    ):
        run(tmp_path)
    assert reading.complete_steps(str(tmp_path)) == [5]
