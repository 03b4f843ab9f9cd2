"""What a run is told when it goes on: what changed, and what may not."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
from tiny_runs import LinearModel, run

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.models import lora
from vit22b_transfer.training import optimizers, run_settings
from vit22b_transfer.training.train import InitialCheckpoint, Periods


@dataclasses.dataclass(frozen=True)
class Data(tiny_runs.Data):
    """What has the attributes of `inputs.TrainData`; batches are what they are."""

    task: str = "captions"
    split: str = "train"
    feature_lengths: dict = dataclasses.field(
        default_factory=lambda: {"images": (8, 8), "targets": 6}
    )
    batch_size: int = 16


def adamw(peak=1e-2, total_steps=100, **settings):
    schedule = optimizers.rsqrt(peak, total_steps=total_steps, warmup_steps=3)
    return LinearModel(optimizers.adamw(schedule, **settings))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("settings")
    run(directory, data=Data(), total_steps=5)
    return directory


@pytest.fixture
def begun(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "begun"))


def go_on(directory, capsys, model=None, data=None, **arguments):
    """The lines on what changed."""
    arguments = {"total_steps": 5} | arguments
    capsys.readouterr()
    run(directory, model, data=data or Data(), **arguments)
    lines = capsys.readouterr().out.splitlines()
    told = ("changed since checkpoint_5", "what checkpoint_5 was")
    return [line for line in lines if line.startswith(told)]


# --- What is only said ---


def test_the_same_run_goes_on_without_a_word(begun, capsys):
    assert go_on(begun, capsys) == []


def test_what_changed_is_said_in_a_line_each(begun, capsys):
    lines = go_on(
        begun,
        capsys,
        adamw(peak=0.5),
        total_steps=6,
        periods=Periods(log=4, evaluate=3, checkpoint=7),
        keep=None,
        eval_data=tiny_runs.EvalData(batch_size=4),
    )
    assert [line.removeprefix("changed since checkpoint_5: ") for line in lines] == [
        "eval_data.batch_size was 8, is now 4",
        "total_steps was 5, is now 6",
        "keep was 1, is now not set",
        "learning_rate.peak was 0.01, is now 0.5",
        "periods.checkpoint was 5, is now 7",
    ]


def test_settings_of_the_model_are_told(begun, capsys):
    (line,) = go_on(begun, capsys, LinearModel(keep_rate=0.5))
    assert line == "changed since checkpoint_5: model.keep_rate was 0.9, is now 0.5"
    record = reading.read_record(str(begun / "checkpoint_5"))
    assert record["settings"]["model.keep_rate"] == 0.9


def test_what_a_run_was_told_last_counts(begun, capsys):
    assert len(go_on(begun, capsys, total_steps=7)) == 1
    run(begun, data=Data(), total_steps=7)
    assert "changed since" not in capsys.readouterr().out


def test_without_a_record_of_settings_a_line_says_it_is_unknown(begun, capsys):
    file = begun / "checkpoint_5" / "run" / "metadata"
    record = json.loads(file.read_text())
    del record["settings"]
    file.write_text(json.dumps(record))
    (line,) = go_on(begun, capsys, seed=3)
    assert "checkpoint_5 was trained with is not recorded" in line
    shutil.rmtree(file.parent)  # as T5X writes it
    (line,) = go_on(begun, capsys, seed=3)
    assert "unknown" in line


# --- What is an error ---


def changed(**values):
    return {"data": dataclasses.replace(Data(), **values)}


CHANGES = {
    "task": (changed(task="vqa"), "task was captions, is now vqa"),
    "split": (changed(split="test"), "split was train, is now test"),
    "batch_size": (changed(batch_size=8), "batch_size was 16, is now 8"),
    "feature_lengths": (
        changed(feature_lengths={"images": (8, 8), "targets": 9}),
        "was {'images': (8, 8), 'targets': 6}, is now {'images': (8, 8), 'targets': 9}",
    ),
    "seed": ({"seed": 4}, "seed was 0, is now 4"),
    "num_microbatches": ({"num_microbatches": 2}, "microbatches was 1, is now 2"),
    "optimizer": ({"model": adamw(b2=0.5)}, "optimizer.b2 was 0.999, is now 0.5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_go_on_as_one_run_is_refused_unless_allowed(name, begun, capsys):
    arguments, told = CHANGES[name]
    with pytest.raises(UserError) as error:
        go_on(begun, capsys, **arguments)
    message = str(error.value)
    assert told in message and str(begun / "checkpoint_5") in message
    assert f"--gin.train.fine_tune.allow_changes='(\"{name}\",)'" in message
    (line,) = go_on(begun, capsys, **arguments, allow_changes=(name,))
    assert told in line


def test_an_optimizer_of_another_kind_and_other_frozen_parameters_are_refused(
    begun, capsys
):
    sgd = LinearModel(optimizers.sgd(1e-2))
    with pytest.raises(UserError, match=r"optimizer was adamw, is now sgd; .*\.b1 was"):
        go_on(begun, capsys, sgd)
    with pytest.raises(UserError, match=r"frozen was \(\), is now \('encoder/.*',\)"):
        go_on(begun, capsys, LinearModel(frozen=("encoder/.*",)))
    # Allowed or not, its state does not fit.
    with pytest.raises(UserError, match="optimizer state is of another optimizer"):
        go_on(begun, capsys, sgd, allow_changes=("optimizer",))


def test_all_that_is_refused_is_named_at_once(begun, capsys):
    with pytest.raises(UserError) as error:
        go_on(begun, capsys, seed=4, **changed(task="vqa", batch_size=8))
    assert 'allow_changes=\'("task","batch_size","seed",)\'' in str(error.value)
    assert reading.complete_steps(str(begun)) == [5]


def test_an_initial_checkpoint_that_would_not_be_read_is_refused(
    begun, source, tmp_path, capsys
):
    initial = InitialCheckpoint(str(source))
    with pytest.raises(UserError, match="initial_checkpoint was not set, is now /"):
        go_on(begun, capsys, initial=initial)
    run(tmp_path / "from", data=Data(), total_steps=5, initial=initial)
    assert go_on(tmp_path / "from", capsys, initial=initial) == []
    # To go on it is not needed.
    assert len(go_on(tmp_path / "from", capsys)) == 3


@pytest.mark.parametrize(
    "allowed, message",
    [
        (("batchsize",), "'batchsize'. Did you mean batch_size"),
        (("learning_rate",), "It may name task, split, .* and needs no leave"),
        ("batch_size", r"must be a tuple of names: \('batch_size',\)"),
    ],
)
def test_an_unknown_name_to_allow_is_told(allowed, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, allow_changes=allowed)


# --- Records of strangers ---


def test_a_hostile_record_is_bounded_and_escaped(begun, capsys):
    file = begun / "checkpoint_5" / "run" / "metadata"
    record = json.loads(file.read_text())
    record["settings"] |= {f"x{n}\x1b[2J": "y\n" * 900 for n in range(3_000)}
    record["settings"]["task"] = "\x1b[31m[red]\n" * 5_000
    file.write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        go_on(begun, capsys)
    assert str(error.value).isprintable() and len(str(error.value)) < 1_000
    lines = go_on(begun, capsys, allow_changes=("task",))
    assert len(lines) == 21 and lines[-1].endswith("other settings")
    assert all(line.isprintable() and len(line) < 500 for line in lines)


# --- Settings of a model ---


def test_all_that_decides_the_training_of_a_model_is_a_setting():
    model = tiny_models.image_text_model(
        lora=lora.LoraConfig(rank=2, alpha=4.0, patterns=(lora.POSSIBLE,))
    )
    model.optimizer_def = optimizers.adamw(optimizers.cosine(0.5, total_steps=9))
    found = run_settings.of_model(model)
    assert found["model.module.text.dropout_rate"] == 0.0
    assert found["model.module.tower.width"] == model.module.tower.width
    assert found["model.lora.rank"] == 2 and found["model.z_loss"] == model.z_loss
    assert found["learning_rate"] == "cosine" and found["learning_rate.peak"] == 0.5
    assert found["optimizer.decay_patterns"] == str(optimizers.KERNELS)
    assert not [name for name in found if "vocabulary" in name or "parent" in name]
    assert json.loads(json.dumps(found)) == found
    assert " at 0x" not in json.dumps(found)


def test_a_schedule_of_ones_own_is_told_by_its_rates():
    def own(step):
        return 0.25 * step

    schedule = optimizers.ScheduledOptimizer(optimizers.sgd(1.0), own, {"name": "mine"})
    found = run_settings.of_model(LinearModel(schedule))
    assert found["optimizer"] == "mine"
    assert found["learning_rate.at_step_10"] == 2.5
