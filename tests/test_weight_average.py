"""The average of the weights: its numbers, where it is kept, how it is evaluated."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_captions
import tiny_models
import tiny_runs
from test_t5x_options import checked
from tiny_runs import Data, Killed, LinearModel, run

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import averages, writing
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.inference import infer
from vit22b_transfer.models import freezing
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.recipes.reader import RecipeError
from vit22b_transfer.training import optimizers, state

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

TOWER = ("encoder/tower/.*",)
EIGHT_DEVICES = Partitioning(data=4, model=2)


def optimizer(**options):
    return optimizers.sgd(0.1, **({"ema_decay": 0.6} | options))


def test_it_is_the_mean_that_its_decay_says():
    """In float64; the decay grows from 2 / 11 to its own."""
    made, rng = optimizer(clip_norm=None), np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)}
    opt_state, expected = made.init(params), np.float64(params["a"])
    for count in range(1, 15):
        grads = {"a": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)}
        updates, opt_state = made.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = min(0.6, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * np.float64(params["a"])
        average = opt_state[-1].weight_average["a"]
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)
    assert decay == 0.6


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_small_steps_of_bfloat16_weights_are_not_lost(dtype):
    """And a step may give away the memory of weights and average, as ours does."""
    made = optimizers.sgd(1.0, momentum=0.0, clip_norm=None, ema_decay=0.999)
    params = {"a": jnp.ones(2, dtype)}
    opt_state = made.init(params)
    assert opt_state[-1].weight_average["a"].dtype == jnp.float32
    grads = {"a": -jnp.ones(2, dtype)}
    step = jax.jit(functools.partial(made.update, grads), donate_argnums=(0, 1))
    average = step(opt_state, params)[1][-1].weight_average["a"]
    np.testing.assert_allclose(average, 1 + 9 / 11, rtol=1e-6)


def test_it_changes_no_update_and_costs_nothing_when_off():
    params = {"a": jnp.ones(2)}
    with_it, without = optimizer(), optimizer(ema_decay=None)
    first, _ = with_it.update(params, with_it.init(params), params)
    second, _ = without.update(params, without.init(params), params)
    tiny_runs.assert_same_bits(first, second)
    leaves = [jax.tree.leaves(made.init(params)) for made in (with_it, without)]
    assert len(leaves[0]) == len(leaves[1]) + 2


# --- In checkpoints ---


def model(frozen=(), **options):
    return LinearModel(optimizer(**options), frozen=frozen)


def average_in(directory, made, partitioning=tiny_runs.ONE_DEVICE):
    """(averaged parameters, how many) of the latest checkpoint in a directory."""
    abstract = tiny_runs.abstract_params(made, partitioning)
    params, count = averages.restore(str(directory), abstract, model=made)
    for leaf, like in zip(
        jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    return jax.tree.map(np.asarray, params), count


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("averaged")
    run(directory, model())
    return directory


def test_a_killed_run_ends_with_the_same_average_to_the_bit(trained, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, model(), data=Data(dies_at=7))
    run(tmp_path, model())
    first, second = (average_in(path, model()) for path in (trained, tmp_path))
    tiny_runs.assert_same_bits(first[0], second[0])
    assert first[1] == len(tiny_runs.PARAMETERS)
    last = tiny_runs.saved_params(trained, model())
    assert tiny_models.relative_difference(first[0], last) > 1e-3


def test_microbatches_and_a_mesh_give_the_same_average(trained, tmp_path):
    made = LinearModel(optimizer(), keep_rate=1.0)
    for name, options in (
        ("whole", {}),
        ("parts", {"num_microbatches": 4}),
        ("mesh", {"partitioning": EIGHT_DEVICES}),
    ):
        run(tmp_path / name, made, total_steps=4, eval_data=None, **options)
    whole, parts = (average_in(tmp_path / n, made)[0] for n in ("whole", "parts"))
    mesh = average_in(tmp_path / "mesh", made, EIGHT_DEVICES)[0]
    assert tiny_models.relative_difference(parts, whole) < 1e-4
    assert tiny_models.relative_difference(mesh, whole) < 1e-4


def test_it_is_laid_out_like_the_parameters():
    params = tiny_runs.abstract_params(model(), EIGHT_DEVICES)
    abstract = state.abstract_state(params, optimizer(), EIGHT_DEVICES)
    average = abstract.opt_state[-1].weight_average
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(average))
    for kept, like in zip(
        jax.tree.leaves(average), jax.tree.leaves(params), strict=True
    ):
        assert kept.sharding == like.sharding


def test_frozen_parameters_have_none_and_stay_as_they_are(tmp_path):
    made = LinearModel(optimizer(), frozen=TOWER, tower_dtype="bfloat16")
    run(tmp_path, made)
    params, count = average_in(tmp_path, made)
    assert count == 2
    assert not any("tower" in name for name in averages.names(str(tmp_path)))
    _, frozen = freezing.split_frozen(params, TOWER)
    _, saved = freezing.split_frozen(tiny_runs.saved_params(tmp_path, made), TOWER)
    tiny_runs.assert_same_bits(frozen, saved)


def test_a_checkpoint_without_one_and_another_optimizer_are_refused(trained, tmp_path):
    plain = model(ema_decay=None)
    run(tmp_path, plain, total_steps=2)
    with pytest.raises(UserError, match="no average .* without ema_decay.*ema.gin"):
        average_in(tmp_path, plain)
    with pytest.raises(UserError, match="optimizer.ema_decay was not set, is now 0.6"):
        run(tmp_path, model(), total_steps=4)
    # What is kept does not fit, allowed or not.
    allowed = {"allow_changes": ("optimizer",)}
    with pytest.raises(UserError, match="optimizer state is of another optimizer"):
        run(tmp_path, model(), total_steps=4, **allowed)
    with pytest.raises(UserError, match="weight_average.*not in the model"):
        run(trained, plain, total_steps=14, **allowed)
    other = LinearModel(optimizer(), vocab_size=tiny_runs.VOCAB + 1)
    with pytest.raises(UserError, match="vocabular"):
        average_in(trained, other)


def test_an_average_that_does_not_fit_the_model_is_named(trained):
    abstract = tiny_runs.abstract_params(model())
    kernel = abstract["decoder"]["kernel"]
    cases = {
        "not in the model": {**abstract, "decoder": {}},
        "decoder/bias": {**abstract, "decoder": {"kernel": kernel, "bias": kernel}},
        r"decoder/kernel .*shape \(8, 64\) in the checkpoint, \(4, 64\)": {
            **abstract,
            "decoder": {"kernel": kernel.update(shape=(4, *kernel.shape[1:]))},
        },
        "has it as int8": {
            **abstract,
            "decoder": {"kernel": kernel.update(dtype=jnp.int8)},
        },
    }
    for words, wanted in cases.items():
        with pytest.raises(UserError, match=words):
            averages.restore(str(trained), wanted, model=model())


def test_two_averages_in_one_checkpoint_are_refused(tmp_path):
    """Of a chain of a user's own; neither is taken without a word."""
    kept = {str(i): {"weight_average": {"a": np.ones(2)}} for i in range(2)}
    write(tmp_path, {"a": np.ones(2)}, kept)
    with pytest.raises(UserError, match="several averages of a: .*/0/.* and .*/1/"):
        averages.names(str(tmp_path))


def write(model_dir, params, param_states):
    writer = writing.CheckpointWriter(str(model_dir), keep=None)
    states = {"step": np.int32(7), "param_states": param_states}
    writer.save(7, {"target": params, "state": states}, {})
    writer.close()


# --- Evaluated ---


TASK = "tiny_weight_average"


def test_evaluation_takes_the_average_and_writes_beside_the_trained(tmp_path, capsys):
    """The average of a checkpoint in place of its weights, which are all zero."""
    tiny_captions.write_folder(tmp_path)
    tiny_captions.register(TASK, tmp_path, metric_fns=(mean_length,))
    made = tiny_captions.model()
    params = tiny_models.model_params(made)
    zeros = jax.tree.map(np.zeros_like, params)
    kept = {"4": {"weight_average": params, "count": np.int32(3)}}
    write(tmp_path, zeros, kept)
    common = dict(
        partitioning=tiny_captions.ONE_DEVICE,
        checkpoint=str(tmp_path),
        feature_lengths=tiny_captions.LENGTHS,
        batch_size=tiny_captions.BATCH_SIZE,
    )
    restored = infer.restore(made, **common, weights="average")
    tiny_runs.assert_same_bits(
        jax.tree.map(np.asarray, restored.params), jax.tree.map(np.asarray, params)
    )
    evaluate.evaluate_checkpoint(
        made,
        **common,
        tasks=TASK,
        split="test",
        output_dir=str(tmp_path),
        weights="average",
    )
    out = " ".join(capsys.readouterr().out.split())
    count = len(jax.tree.leaves(params))
    assert f"the average of {count} parameters; 0 frozen in its training" in out
    entries = json.loads((tmp_path / "metrics.json").read_text())
    assert entries.keys() == {f"{TASK}/test/average"}
    predictions = entries[f"{TASK}/test/average"]["predictions"]
    assert predictions == str(tmp_path / f"{TASK}-test-checkpoint_7-average.jsonl")
    with (
        tiny_models.without_type_checks(),
        pytest.raises(UserError, match="weights='ema' must be one of trained, average"),
    ):
        infer.restore(made, **common, weights="ema")  # pyright: ignore


def mean_length(targets, predictions):
    return {"length": float(np.mean([len(text) for text in predictions]))}


# --- Under T5X ---


def test_t5x_trains_with_it_and_refuses_to_evaluate_it():
    assert checked("train", behind=["runs/ema"]) == []
    for job, name in (("eval", "evaluate_checkpoint"), ("infer", "infer_split")):
        with pytest.raises(RecipeError, match=f"{name}.weights = 'average': T5X reads"):
            checked(job, behind=["runs/ema"])
        assert checked(job, "WEIGHTS='trained'", behind=["runs/ema"]) == []
