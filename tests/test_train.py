"""The training loop: what a step computes, what a run leaves, and how it ends."""

import json
import os
import signal
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
import tiny_runs
from clu import metrics as clu_metrics
from tiny_runs import ONE_DEVICE, Data, EvalData, LinearModel, logged, run, saved_params

from vit22b_transfer.checkpoints import reading
from vit22b_transfer.models import freezing
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, state, steps
from vit22b_transfer.training.train import InitialCheckpoint, Periods

EIGHT_DEVICES = Partitioning(data=4, model=2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The directory of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    run(directory)
    return directory


# --- Resuming ---


def assert_same_end(directory, uninterrupted, partitioning=ONE_DEVICE):
    tiny_runs.assert_same_bits(
        saved_params(directory, partitioning=partitioning),
        saved_params(uninterrupted, partitioning=partitioning),
    )
    assert logged(directory) == logged(uninterrupted)


# Log every 4, evaluate every 3, save every 5 of 12 steps: before any checkpoint, right
# after one, in the middle of a logging window, after the last one.
@pytest.mark.parametrize("dies_at", [[2], [5], [7, 7, 11]])
def test_a_killed_run_ends_bit_for_bit_as_if_nothing_happened(
    dies_at, tmp_path, uninterrupted
):
    for step in dies_at:
        with pytest.raises(tiny_runs.Killed):
            run(tmp_path, data=Data(dies_at=step))
    run(tmp_path)
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_run_on_a_mesh_resumes_bit_for_bit(tmp_path):
    run(tmp_path / "straight", partitioning=EIGHT_DEVICES)
    with pytest.raises(tiny_runs.Killed):
        run(tmp_path / "killed", partitioning=EIGHT_DEVICES, data=Data(dies_at=6))
    run(tmp_path / "killed", partitioning=EIGHT_DEVICES)
    assert_same_end(tmp_path / "killed", tmp_path / "straight", EIGHT_DEVICES)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_resumable_state(
    number, tmp_path, uninterrupted
):
    handler = signal.getsignal(number)
    stop = Data(events={6: lambda: os.kill(os.getpid(), number)})
    result = run(tmp_path, data=stop)
    assert result.interrupted and result.step == 7
    assert reading.latest_step(str(tmp_path)) == 7
    assert signal.getsignal(number) is handler
    assert not run(tmp_path).interrupted
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_signal_before_the_first_step_stops_before_it(tmp_path, uninterrupted, capfd):
    stop = Data(events={0: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    result = run(tmp_path, data=stop)
    assert result.interrupted and (result.step, result.checkpoint) == (0, "")
    assert reading.latest_step(str(tmp_path)) is None
    shown = capfd.readouterr()
    assert "SIGTERM: stopping after what is running; again: at once" in shown.err
    assert "stopped: no checkpoint yet, no loss was logged" in shown.out
    with pytest.raises(tiny_runs.Killed):
        run(tmp_path, data=Data(dies_at=7))
    stop = Data(events={5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    result = run(tmp_path, data=stop)
    assert result.interrupted and result.step == 5
    assert not run(tmp_path).interrupted
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.slow
def test_logged_steps_without_a_checkpoint_are_told_and_done_again(
    tmp_path, uninterrupted, capsys
):
    with pytest.raises(tiny_runs.Killed):
        run(tmp_path, data=Data(dies_at=4))
    capsys.readouterr()
    with pytest.raises(tiny_runs.Killed):
        run(tmp_path, data=Data(dies_at=8))
    again = "logged steps have no whole checkpoint"
    assert f"4 {again} (1 to 4): they are done again" in capsys.readouterr().out
    run(tmp_path)
    assert f"3 {again} (6 to 8)" in capsys.readouterr().out
    run(tmp_path)
    assert again not in capsys.readouterr().out
    assert_same_end(tmp_path, uninterrupted)


KILLED_RUN = """
import os, signal, sys
import tiny_runs

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

tiny_runs.run(sys.argv[1], data=tiny_runs.Data(events={8: kill}))
"""


@pytest.mark.slow
def test_a_process_killed_outright_can_be_started_again(tmp_path, uninterrupted):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run(tmp_path)
    assert_same_end(tmp_path, uninterrupted)


def test_a_finished_run_is_left_as_it_is(tmp_path, uninterrupted):
    before = sorted(os.listdir(uninterrupted))
    lines = logged(uninterrupted)
    result = run(uninterrupted)
    assert result.step == 12 and not result.interrupted
    assert logged(uninterrupted) == lines
    after = {name for name in os.listdir(uninterrupted) if "tfevents" not in name}
    assert after == {name for name in before if "tfevents" not in name}
    with pytest.raises(ValueError, match="already at step 12, beyond total_steps=8"):
        run(uninterrupted, total_steps=8)


def test_another_seed_gives_another_run(tmp_path, uninterrupted):
    run(tmp_path, seed=1)
    ours, theirs = saved_params(tmp_path), saved_params(uninterrupted)
    assert np.any(ours["decoder"]["kernel"] != theirs["decoder"]["kernel"])


# --- The step ---


def one_update(model, batch, partitioning=ONE_DEVICE, *, step=0, **options):
    """(how far one update moved the parameters, its metrics); all start alike."""
    batch = tiny_runs.on_device(batch, partitioning)
    abstract = state.abstract_variables(model, partitioning, batch)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.device_put(
            rng.standard_normal(leaf.shape).astype(leaf.dtype) / 8, leaf.sharding
        ),
        abstract,
    )
    optimizer = optimizers.freeze(model.optimizer_def, abstract, model.frozen)
    before = state.TrainState(jnp.int32(step), params, optimizer.init(params))
    update = steps.make_update(model, optimizer, partitioning, **options)
    with partitioning.activate():
        after, metrics = jax.jit(update)(before, batch, jax.random.key(0))
    moved = jax.tree.map(
        lambda a, b: np.asarray(a) - np.asarray(b), params, after.params
    )
    return moved, {name: float(m.compute()) for name, m in metrics.items()}


def assert_close(actual, expected, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
        actual,
        expected,
    )


def plain_model(**arguments):
    """No dropout, and updates that are the gradients."""
    sgd = optimizers.sgd(1.0, momentum=0.0, clip_norm=None)
    return LinearModel(sgd, keep_rate=1.0, **arguments)


@pytest.mark.parametrize(
    ("count", "partitioning"), [(4, ONE_DEVICE), (2, EIGHT_DEVICES)]
)
def test_microbatches_give_the_gradients_of_the_full_batch(count, partitioning):
    batch = tiny_models.batch(16, seed=3)
    # No two microbatches weigh the same, and one example weighs nothing.
    factors = np.linspace(0.0, 2.0, 16, dtype=np.float32)[:, None]
    batch["decoder_loss_weights"] = batch["decoder_loss_weights"] * factors
    full_grads, full_metrics = one_update(plain_model(), batch)
    grads, metrics = one_update(
        plain_model(), batch, partitioning, num_microbatches=count
    )
    assert_close(grads, full_grads)
    for name, value in full_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_gradients_are_divided_by_the_weight_of_the_batch_once():
    batch = tiny_models.batch(16)
    heavy = batch | {"decoder_loss_weights": 5 * batch["decoder_loss_weights"]}
    grads, metrics = one_update(plain_model(), batch)
    same, heavy_metrics = one_update(plain_model(), heavy)
    assert_close(grads, same)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    np.testing.assert_allclose(heavy_metrics["loss"], metrics["loss"], rtol=1e-6)


class NotedNoise(LinearModel):
    """Notes a number that its key decides, and the square of the number."""

    def loss_fn(self, params, batch, dropout_rng):
        loss, metrics = super().loss_fn(params, batch, dropout_rng)
        noise = tiny_runs.quick_noise(dropout_rng, ())
        one = jnp.ones(())
        noted = {"noise": noise, "squared": noise * noise}
        return loss, metrics | {
            name: clu_metrics.Average(total=value, count=one)
            for name, value in noted.items()
        }


def test_each_step_draws_other_dropout():
    batch, model = tiny_models.batch(16), NotedNoise()
    noise = [one_update(model, batch, step=step)[1]["noise"] for step in (0, 1, 2, 1)]
    assert len(set(noise[:3])) == 3
    assert noise[3] == noise[1]


def test_each_microbatch_draws_other_dropout():
    batch = tiny_models.batch(16)
    _, metrics = one_update(NotedNoise(), batch, num_microbatches=4)
    # The variance among the four: rounding leaves about 1e-7 of equal numbers.
    assert metrics["squared"] - metrics["noise"] ** 2 > 1e-3


def test_a_batch_without_any_weight_moves_nothing():
    batch = tiny_models.batch(16)
    batch["decoder_loss_weights"] = 0 * batch["decoder_loss_weights"]
    grads, _ = one_update(plain_model(), batch)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


FROZEN = ("encoder/tower/.*",)


def test_frozen_parameters_keep_their_bits_and_their_bfloat16(tmp_path):
    optimizer = optimizers.adamw(1e-2, weight_decay=0.1, decay_patterns=[".*"])
    model = LinearModel(optimizer, frozen=FROZEN, tower_dtype="bfloat16")
    run(tmp_path, model, keep=None)
    first, last = (
        saved_params(tmp_path / f"checkpoint_{step}", model) for step in (5, 12)
    )
    assert last["encoder"]["tower"]["kernel"].dtype == jnp.bfloat16
    tiny_runs.assert_same_bits(last["encoder"], first["encoder"])
    assert np.all(last["decoder"]["kernel"] != first["decoder"]["kernel"])
    arrays = reading.saved_arrays(str(tmp_path / "checkpoint_12"))
    states = [name for name in arrays if name.startswith("state/param_states")]
    assert any(name.endswith("mu/decoder/kernel") for name in states)
    assert not any("tower" in name for name in states)


def compiled_update(model):
    """The compiled update; nothing is allocated."""
    batch = tiny_runs.on_device(tiny_models.batch(16), ONE_DEVICE)
    abstract = state.abstract_variables(model, ONE_DEVICE, batch)
    optimizer = optimizers.freeze(model.optimizer_def, abstract, model.frozen)
    before = state.abstract_state(abstract, optimizer, ONE_DEVICE)
    update = jax.jit(steps.make_update(model, optimizer, ONE_DEVICE), donate_argnums=0)
    lowered = update.lower(before, batch, jax.random.key(0))
    # Faster to compile, and nothing that is compared depends on it.
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.slow
def test_a_frozen_tower_costs_no_backward_pass_and_no_activations():
    def costs(frozen):
        model = tiny_models.image_text_model(
            tiny_models.tower_config(width=64, depth=1, mlp_dim=256),
            tiny_models.text_config(num_encoder_layers=0, num_decoder_layers=1),
            # Clipping and the logged norm read all gradients there are.
            optimizer_def=optimizers.sgd(1e-3, momentum=0.0, clip_norm=1.0),
            frozen=frozen,
        )
        compiled = compiled_update(model)
        memory = compiled.memory_analysis().temp_size_in_bytes
        return compiled.cost_analysis()["flops"], memory

    (flops, memory), (frozen_flops, frozen_memory) = costs(()), costs(FROZEN)
    # Every weight costs a forward pass 2 operations per token and a backward pass 4.
    tokens, weights = 16 * 4, 64 * (3 * 8 * 8 + 4 * 64 + 2 * 256)
    assert flops - frozen_flops > 4 * tokens * weights * 0.8
    assert frozen_memory < 0.6 * memory


# --- What a run logs ---


def test_a_logged_value_is_the_weighted_mean_of_its_window(tmp_path, uninterrupted):
    run(tmp_path, periods=Periods(log=1, evaluate=100, checkpoint=100))
    single = [line for line in logged(tmp_path) if "train/loss" in line]
    windows = [line for line in logged(uninterrupted) if "train/loss" in line]
    assert [line["step"] for line in single] == list(range(1, 13))
    assert [line["step"] for line in windows] == [4, 8, 12]
    weights = [
        tiny_models.batch(tiny_runs.BATCH_SIZE, seed=step)["decoder_loss_weights"].sum()
        for step in range(12)
    ]
    for line, start in zip(windows, (0, 4, 8), strict=True):
        part = slice(start, start + 4)
        losses = [step["train/loss"] for step in single[part]]
        np.testing.assert_allclose(
            line["train/loss"], np.average(losses, weights=weights[part]), rtol=1e-6
        )
        assert line["train/learning_rate"] == single[start + 3]["train/learning_rate"]


def test_the_logged_learning_rate_is_the_one_the_step_used(tmp_path):
    schedule = optimizers.cosine(1e-2, total_steps=12, warmup_steps=2)
    model = LinearModel(optimizers.adamw(schedule))
    run(tmp_path, model, periods=Periods(log=1), eval_data=None)
    rates = [line["train/learning_rate"] for line in logged(tmp_path)]
    expected = [float(schedule(jnp.int32(step))) for step in range(12)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-9)


def test_an_optimizer_that_tells_no_schedule_logs_no_learning_rate(tmp_path):
    run(tmp_path, LinearModel(optax.adam(1e-3)), total_steps=4, eval_data=None)
    assert "train/learning_rate" not in logged(tmp_path)[-1]


def test_the_evaluated_loss_does_not_depend_on_the_batch_size(uninterrupted):
    model, params = LinearModel(), saved_params(uninterrupted)
    batch = tiny_runs.on_device(tiny_models.batch(20, seed=99), ONE_DEVICE)
    _, metrics = model.eval_fn(params, batch)
    last = logged(uninterrupted)[-1]
    assert last["step"] == 12
    for name, metric in metrics.items():
        np.testing.assert_allclose(
            last[f"eval/tiny/{name}"], metric.compute(), rtol=1e-6
        )


def test_an_evaluation_without_targets_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="task 'tiny', split 'validation': no example"):
        run(tmp_path, eval_data=EvalData(examples=0))


def test_a_run_off_a_terminal_reports_in_plain_lines(tmp_path, capsys):
    result = run(tmp_path, periods=Periods(log=4), eval_data=None)
    lines = capsys.readouterr().out.splitlines()
    report = next(line for line in lines if line.startswith("step 4/12"))
    assert "loss" in report and "examples/s" in report and "ETA 0:00:0" in report
    assert lines[-1].startswith(f"done: {result.checkpoint}, best loss ")
    assert result.counters == {"examples": 12 * tiny_runs.BATCH_SIZE}


def test_tensorboard_shows_what_metrics_jsonl_holds(uninterrupted):
    from tensorboard.compat.proto import event_pb2

    shown = {}
    name = min(n for n in os.listdir(uninterrupted) if "tfevents" in n)
    data = (uninterrupted / name).read_bytes()
    while data:
        # TFRecord: length, its checksum, the record, its checksum.
        length = struct.unpack("<Q", data[:8])[0]
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            shown.setdefault(event.step, {})[value.tag] = value.simple_value
        data = data[16 + length :]
    for line in logged(uninterrupted):
        for tag, value in line.items():
            if tag != "step":
                np.testing.assert_allclose(shown[line["step"]][tag], value, rtol=1e-6)


# --- Starting from a checkpoint ---


def test_a_run_starts_from_part_of_a_checkpoint_and_says_which(
    tmp_path, uninterrupted, capsys
):
    model = LinearModel(optimizers.adamw(0.0))
    rules = [(r"decoder/.*", None)]
    initial = InitialCheckpoint(str(uninterrupted), rules)
    run(tmp_path, model, initial=initial, total_steps=4, eval_data=None, seed=1)
    printed = capsys.readouterr().out
    assert "loaded: 3" in printed and "kept: 1\n  decoder/kernel" in printed
    params, source = saved_params(tmp_path), saved_params(uninterrupted)
    tiny_runs.assert_same_bits(params["encoder"], source["encoder"])
    assert np.all(params["decoder"]["kernel"] != source["decoder"]["kernel"])


def test_another_vocabulary_cannot_resume_a_run_and_loses_nothing(
    tmp_path, uninterrupted
):
    lines = logged(uninterrupted)
    with pytest.raises(ValueError, match="not the one .* was trained with"):
        run(uninterrupted, LinearModel(vocab_size=60), total_steps=20)
    assert logged(uninterrupted) == lines
    assert reading.latest_step(str(uninterrupted)) == 12


# --- Bad input ---


def test_a_loss_that_is_not_finite_stops_before_the_next_checkpoint(tmp_path):
    broken = Data(broken=(6,))
    with pytest.raises(
        FloatingPointError, match="loss .* is nan at step 8; .*_5 is un"
    ):
        run(tmp_path, data=broken)
    assert reading.complete_steps(str(tmp_path)) == [5]
    broken = Data(broken=(9,))
    with pytest.raises(FloatingPointError, match="at step 10; .*_5 is untouched"):
        run(tmp_path, data=broken)
    assert reading.complete_steps(str(tmp_path)) == [5]


def test_batches_that_do_not_divide_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"batch of 16 .* 4 x num_microbatches=3.* 12"):
        run(tmp_path, partitioning=EIGHT_DEVICES, num_microbatches=3)


def test_numbers_of_steps_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="total_steps=0"):
        run(tmp_path, total_steps=0)
    with pytest.raises(ValueError, match="period evaluate=0"):
        Periods(evaluate=0)


def test_a_model_without_an_optax_optimizer_cannot_be_trained(tmp_path):
    model = LinearModel()
    model.optimizer_def = None
    with pytest.raises(ValueError, match="optimizer_def is None; to train it must be"):
        run(tmp_path, model)


def test_an_unwritable_model_dir_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        run(tmp_path / "file" / "run")


def test_a_relative_model_dir_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("here", total_steps=4, eval_data=None)
    assert result.checkpoint == str(tmp_path / "here" / "checkpoint_4")
    assert json.loads((tmp_path / "here" / "metrics.jsonl").read_text())["step"] == 4
    assert freezing.frozen_mask(saved_params("here"), ()) is not None
