"""Steps that are spikes change nothing, are told, and a run goes back from many."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_processes
import tiny_runs
from tiny_runs import ONE_DEVICE, LinearModel, logged, run, saved_params

from vit22b_transfer import NotFiniteError, UserError
from vit22b_transfer.checkpoints import reading, writing
from vit22b_transfer.demo import scenes
from vit22b_transfer.models import freezing
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import compiling, optimizers, spike_guard, state, steps
from vit22b_transfer.training.spike_guard import KEY, SpikeGuard
from vit22b_transfer.training.train import Periods

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

GUARD = SpikeGuard(settle_steps=3, max_skips=3)
PERIODS = Periods(log=4, evaluate=100, checkpoint=4)


class ScaledModel(LinearModel):
    """A loss that a batch may scale: by the largest of its loss weights."""

    def __init__(self, optimizer_def=None, **arguments):
        schedule = optimizers.cosine(1e-2, total_steps=40, warmup_steps=3)
        super().__init__(optimizer_def or optimizers.adamw(schedule), **arguments)

    def loss_fn(self, params, batch, dropout_rng):
        weights = batch["decoder_loss_weights"]
        scale = jnp.max(weights)
        weights = (weights > 0).astype(jnp.float32)
        batch = dict(batch, decoder_loss_weights=weights)
        loss, metrics = super().loss_fn(params, batch, dropout_rng)
        total = scale * metrics["loss"].total
        metrics["loss"] = metrics["loss"].replace(total=total)
        return loss * scale, metrics


@dataclasses.dataclass(frozen=True)
class SpikyData(tiny_runs.Data):
    """The loss of the batches of some steps (from 0) is scaled, by NaN if need be."""

    spikes: dict = dataclasses.field(default_factory=dict)

    def batches(self, model, partitioning, *, seed, start_step):
        return SpikyStream(partitioning, seed, start_step, self)


class SpikyStream(tiny_runs.Stream):
    image_ids: list[str] = []

    def __next__(self):
        number = self._step
        batch = super().__next__()
        self.image_ids = [f"{number}/{i}\x1b<b>{'x' * 500}" for i in range(16)]
        weights = batch["decoder_loss_weights"]
        scale = jnp.float32(self._data.spikes.get(number, 1.0))
        return batch | {"decoder_loss_weights": weights * scale}


def guarded(model_dir, spikes, **arguments):
    defaults = dict(guard=GUARD, periods=PERIODS, eval_data=None, total_steps=12)
    data = SpikyData(spikes=spikes, dies_at=arguments.pop("dies_at", None))
    return run(model_dir, ScaledModel(), data=data, **(defaults | arguments))


def events(model_dir, name):
    return {x["step"]: x[name] for x in logged(model_dir) if name in x}


# --- One step ---


def one_step(scale, partitioning=ONE_DEVICE, guard=GUARD, steps_before=0, places=4):
    """((state before, after), window) of a step behind some that are as they should."""
    model = ScaledModel()
    batch = tiny_runs.on_device(tiny_models.batch(16), partitioning)
    batch["decoder_loss_weights"] = batch["decoder_loss_weights"].astype(jnp.float32)
    params = state.abstract_variables(model, partitioning, batch)
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    abstract = state.abstract_state(params, optimizer, partitioning)
    fresh = state.init_params(model, jax.random.key(0), batch, params, partitioning)
    now = state.fresh_state(fresh, optimizer, abstract)
    rng = jax.device_put(jax.random.key(0), partitioning.replicated)
    update = steps.make_update(model, optimizer, partitioning)
    window = compiling.empty_window(update, abstract, batch, rng, partitioning)
    window = {**window, KEY: spike_guard.empty_guard(places, partitioning)}
    schedule = model.optimizer_def.learning_rate
    step = steps.make_train_step(update, places, guard=guard, schedule=schedule)
    with partitioning.activate():
        step = tiny_models.jit(step)
        for _ in range(steps_before):
            now, window = step(now, window, batch, rng)
        weights = batch["decoder_loss_weights"] * jnp.float32(scale)
        spiky = batch | {"decoder_loss_weights": weights}
        after, window = step(now, window, spiky, rng)
    return jax.device_get((now, after)), jax.device_get(window)


@pytest.mark.parametrize(
    "scale, mesh, reason",
    [
        (float("nan"), None, 1),
        (float("inf"), None, 1),
        (1000.0, None, 3),
        (1000.0, (4, 2), 3),
    ],
    ids=str,
)
def test_a_skipped_step_changes_nothing_but_its_number(scale, mesh, reason):
    partitioning = Partitioning(*mesh) if mesh else ONE_DEVICE
    (before, after), window = one_step(scale, partitioning, steps_before=6)
    tiny_runs.assert_same_bits(after.params, before.params)
    tiny_runs.assert_same_bits(after.opt_state, before.opt_state)
    assert after.step == before.step + 1 == 7
    band, ring = window[KEY]
    assert ring.reason.tolist() == [0, 0, reason, 0]
    assert (band.streak, band.skipped, band.count) == (1, 1, 6)
    assert np.all(np.isfinite(band.mean))
    assert window["grad_norm"].count == 2  # of steps 5 and 6: what is skipped is not


def test_a_step_inside_the_band_counts_and_the_band_settles_first():
    (before, after), window = one_step(1.2, steps_before=6)
    assert np.any(
        after.params["decoder"]["kernel"] != before.params["decoder"]["kernel"]
    )
    assert window[KEY].band.count == 7
    (before, after), window = one_step(1000.0, steps_before=2)
    assert window[KEY].band.skipped == 0
    (before, after), window = one_step(float("nan"), steps_before=0)
    assert window[KEY].band.skipped == 1


def test_a_gradient_norm_that_leaves_its_band_is_a_spike():
    band = spike_guard.Band(
        np.zeros(2, np.float32), np.full(2, 0.01, np.float32), 99, 0, 0, 0
    )
    for loss, norm, reason in (
        (1.0, 1.0, 0),
        (1.0, 1.9, 0),
        (1.0, 2.1, 4),
        (2.1, 9.9, 3),
        (1.0, np.inf, 2),
        (np.nan, np.nan, 1),
        (1e-9, 0.0, 0),
    ):
        values = jnp.asarray([loss, norm], jnp.float32)
        assert SpikeGuard(deviations=6.0)._reason(values, band) == reason
    # 6 x sqrt(0.1^2 + 0.05^2) = 0.67 = log(1.96); 9 of them are log(2.73).
    wide = SpikeGuard(deviations=9.0)
    assert wide._reason(jnp.asarray([1.0, 2.1], jnp.float32), band) == 0


# --- Runs ---


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run with a spike at step 6 and too many from step 9 on, of 24 steps."""
    directory = tmp_path_factory.mktemp("straight")
    guarded(directory, SPIKES, **LONG)
    return directory


# Saved between logs as well.
LONG = dict(total_steps=24, periods=Periods(log=4, evaluate=100, checkpoint=3))
SPIKES = {5: 1000.0, **dict.fromkeys(range(8, 15), 1000.0), 20: float("nan")}


def test_skipped_steps_are_counted_and_told_with_their_images(straight):
    reasons = events(straight, "spike_guard/reason")
    assert list(reasons) == [6, *range(9, 16), 21]
    assert set(list(reasons.values())[:-1]) == {"loss left its band"}
    assert reasons[21] == "loss is not finite"
    ids = events(straight, "spike_guard/image_ids")[6]
    assert len(ids) == 16 and ids[3].startswith("5/3\\x1b<b>x") and len(ids[3]) == 100
    losses = events(straight, "spike_guard/loss")
    assert losses[6] > 1000 and losses[21] is None
    skipped = events(straight, "spike_guard/skipped")
    assert skipped == {4: 0, 8: 1, 12: 5, 16: 8, 20: 8, 24: 9}


def test_a_window_without_a_step_that_counts_has_no_loss(straight):
    losses = events(straight, "train/loss")
    assert list(losses) == [4, 8, 16, 20, 24]
    assert all(0 < loss < 10 for loss in losses.values())


def test_a_run_goes_back_to_its_last_good_checkpoint_and_goes_on_behind(straight):
    # At 6 and 9 it was saved within a streak.
    assert events(straight, "spike_guard/returned_to") == {12: 3}
    record = reading.read_record(str(straight / "checkpoint_24"))
    said = {"good_step": 24, "good_count": 11, "returns": [[3, 12]]}
    assert record["spike_guard"] == said


def test_the_logged_rate_is_that_of_the_optimizer(straight):
    """Whose schedule counts the steps that count: it was behind by the others."""
    schedule = ScaledModel().optimizer_def.learning_rate
    rates = events(straight, "train/learning_rate")
    # Skipped: 1 up to 8; then back from 12 to 3; 3 more, and 1 after 20.
    for step, lag in ((4, 0), (8, 1), (16, 12), (20, 12), (24, 13)):
        assert rates[step] == pytest.approx(float(schedule(jnp.int32(step - 1 - lag))))


@pytest.mark.parametrize("dies_at", [[7], [10, 13], [21, 23]], ids=str)
def test_a_guarded_run_that_is_killed_ends_as_if_nothing_happened(
    dies_at, tmp_path, straight
):
    for step in dies_at:
        with pytest.raises(tiny_runs.Killed):
            guarded(tmp_path, SPIKES, dies_at=step, **LONG)
    guarded(tmp_path, SPIKES, **LONG)
    assert logged(tmp_path) == logged(straight)
    tiny_runs.assert_same_bits(saved_params(tmp_path), saved_params(straight))
    for name in ("window", "spike_guard"):
        ours, theirs = (
            reading.read_record(str(folder / "checkpoint_24"))[name]
            for folder in (tmp_path, straight)
        )
        assert ours == theirs


def test_the_state_that_it_goes_back_to_is_that_checkpoint_to_the_bit(tmp_path):
    # Skipped up to the end: at step 12 the run is at checkpoint 8 again.
    guarded(tmp_path, dict.fromkeys(range(8, 12), 1e3), keep=None)
    first, last = (saved_params(tmp_path / f"checkpoint_{n}") for n in (8, 12))
    tiny_runs.assert_same_bits(first, last)


def test_a_checkpoint_to_go_back_to_outlives_newer_ones_within_a_streak(tmp_path):
    """`keep=1`: those of steps 5 and 6 are of a streak, 4 is the last good one."""
    guard = dataclasses.replace(GUARD, max_skips=8)
    periods = Periods(log=4, evaluate=100, checkpoint=1)
    spikes = dict.fromkeys(range(4, 99), 1000.0)
    with pytest.raises(tiny_runs.Killed):
        guarded(tmp_path, spikes, guard=guard, periods=periods, dies_at=7)
    assert reading.complete_steps(str(tmp_path))[0] == 4
    guarded(tmp_path, spikes, guard=guard, periods=periods, total_steps=14)
    assert events(tmp_path, "spike_guard/returned_to") == {12: 4}


def test_the_last_good_checkpoint_is_there_until_the_next_is(tmp_path, monkeypatch):
    """Step 4 is good, 5 is skipped, 6 counts: its save is cut off."""
    periods = Periods(log=4, evaluate=100, checkpoint=1)
    save = writing.ocp.AsyncCheckpointer.save

    def cut_off(self, path, *arguments, **options):
        if str(path).endswith("checkpoint_6"):
            raise tiny_runs.Killed
        save(self, path, *arguments, **options)

    monkeypatch.setattr(writing.ocp.AsyncCheckpointer, "save", cut_off)
    with pytest.raises(tiny_runs.Killed):
        guarded(tmp_path, {4: 1000.0}, periods=periods)
    assert reading.complete_steps(str(tmp_path)) == [4, 5]
    monkeypatch.undo()
    guarded(tmp_path, {4: 1000.0}, periods=periods, total_steps=7)
    assert reading.complete_steps(str(tmp_path)) == [7]


def test_a_run_without_a_guard_stops_at_the_same_batch(tmp_path):
    with pytest.raises(NotFiniteError):
        guarded(tmp_path, {5: float("nan")}, guard=None)


def test_a_guard_that_never_acts_changes_nothing(tmp_path):
    guarded(tmp_path / "with", {})
    guarded(tmp_path / "without", {}, guard=None)
    tiny_runs.assert_same_bits(
        saved_params(tmp_path / "with"), saved_params(tmp_path / "without")
    )
    assert [
        {name: x for name, x in line.items() if not name.startswith("spike_guard/")}
        for line in logged(tmp_path / "with")
    ] == logged(tmp_path / "without")


def test_a_guard_can_be_taken_on_and_left_out_between_sessions(tmp_path):
    guarded(tmp_path, {}, guard=None, total_steps=4)
    guarded(tmp_path, {5: float("nan")}, total_steps=8)
    assert events(tmp_path, "spike_guard/reason") == {6: "loss is not finite"}
    other = Periods(log=3, evaluate=100, checkpoint=4)
    guarded(tmp_path, {}, total_steps=12, periods=other)
    guarded(tmp_path, {}, guard=None, total_steps=16)


def test_frozen_parameters_and_microbatches_are_guarded_alike(tmp_path):
    model = ScaledModel(frozen=("encoder/.*",))
    data = SpikyData(spikes={9: 1000.0})
    run(
        tmp_path,
        model,
        data=data,
        guard=GUARD,
        periods=PERIODS,
        eval_data=None,
        num_microbatches=2,
    )
    assert list(events(tmp_path, "spike_guard/reason")) == [10]
    assert freezing.frozen_mask(saved_params(tmp_path, model), model.frozen)


def test_a_run_that_cannot_go_back_says_so(tmp_path):
    with pytest.raises(UserError, match="4 steps in a row .* no good checkpoint"):
        guarded(
            tmp_path / "a",
            dict.fromkeys(range(4, 99), 1000.0),
            guard=GUARD,
            periods=Periods(log=4, evaluate=100, checkpoint=100),
        )
    with pytest.raises(UserError, match="checkpoint_4 3 times already: other batches"):
        guarded(
            tmp_path / "b",
            dict.fromkeys(range(4, 99), 1000.0),
            total_steps=90,
            keep=2,
        )
    # 3 steps, 6, 12, then 24, each up to the next log.
    returns = events(tmp_path / "b", "spike_guard/returned_to")
    assert returns == {8: 4, 16: 4, 28: 4}
    assert reading.complete_steps(str(tmp_path / "b")) == [4, 44, 48]


def test_the_table_of_injected_spikes(monkeypatch):
    """What `benchmarks/spike_guard_table.py` claims, of all its cases."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    table = importlib.import_module("spike_guard_table")
    rows = {name: table.run(data, SpikeGuard()) for name, data in table.CASES.items()}
    untouched = float(rows["nothing"][-1])
    assert rows["nothing"][1:3] == ["0", "-"]
    assert rows["NaN, one batch"][1:3] == ["1 (151 to 151)", "-"]
    assert rows["loss x1000, one batch"][1:3] == ["1 (151 to 151)", "-"]
    skipped, returns = rows["poisoned, 40 batches"][1:3]
    assert (skipped, returns) == ("40 (151 to 190)", "160 to 150, 180 to 150")
    for name, row in rows.items():
        assert row[0] == "done" and abs(float(row[-1]) - untouched) < 0.05, name
    assert table.run(table.CASES["NaN, one batch"], None)[0] == "NotFiniteError"
    unguarded = table.run(table.CASES["poisoned, 40 batches"], None)
    assert float(unguarded[-1]) > 2 * untouched


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(deviations=0.0), "deviations=0.0 must be greater than 0"),
        (dict(deviations=float("inf")), "train.fine_tune.guard=None"),
        (dict(max_skips=0), "max_skips=0 must be at least 1"),
        (dict(settle_steps=0), "settle_steps=0 must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SpikeGuard(**options)


@pytest.mark.parametrize(
    "said",
    [7, {"good_step": "4"}, {"good_step": 4, "returns": [[1, 2, 3]]}, {"returns": 1}],
    ids=str,
)
def test_a_damaged_record_is_an_error_that_names_the_checkpoint(said, tmp_path):
    guarded(tmp_path, {}, total_steps=4)
    file = reading.record_file(str(tmp_path / "checkpoint_4"))
    with open(file) as text:
        record = json.load(text)
    with open(file, "w") as text:
        json.dump(record | {"spike_guard": said}, text)
    with pytest.raises(UserError, match="spike_guard = "):
        guarded(tmp_path, {})


def test_two_processes_skip_and_go_back_together(tmp_path):
    """Whatever is above the running mean is a spike: about every second step."""
    sizes = {"train": 24, "validation": 8, "test": 11}
    scenes.write_scenes(tmp_path / "data", seed=3, sizes=sizes)
    (tmp_path / "recipe.gin").write_text(tiny_processes.RECIPE)
    behind = [f"gin_configs/runs/{name}.gin" for name in ("instruments", "spike_guard")]
    values = {
        "TRAIN_STEPS": 8,
        "Periods__checkpoint": 1,
        "INSTRUMENTS_EVERY": 4,
        "SpikeGuard__deviations": 1e-6,
        "SpikeGuard__settle_steps": 1,
        "SpikeGuard__max_skips": 1,
    }
    folders = {}
    for count in (1, 2):
        folders[count] = tmp_path / str(count)
        arguments = tiny_processes.command(
            "train", tmp_path, folders[count], *behind, **values
        )
        name = f"run_{count}"
        with tiny_processes.started(tmp_path, name, count, [arguments]) as children:
            tiny_processes.finish(tmp_path, name, children)
    one, two = (logged(folder) for folder in folders.values())
    assert [sorted(line) for line in one] == [sorted(line) for line in two]
    names = "spike_guard/image_ids", "spike_guard/reason", "spike_guard/returned_to"
    for name in names:
        assert events(folders[1], name) == events(folders[2], name)
    assert events(folders[2], "spike_guard/returned_to")
    ids = events(folders[2], "spike_guard/image_ids")
    assert ids and all(len(x) == len(set(x)) == 8 for x in ids.values())
