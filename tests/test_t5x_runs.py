"""Whole runs under real T5X: its launchers on our recipes, and runs that change hands.

Needs T5X beside the project; `test_t5x_contract.py` needs none. The launchers take
about fifteen minutes on two cores: `-m "not slow"` leaves them out.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5x_launchers
import tiny_imports
import tiny_models
import tiny_runs
from t5x_launchers import command

from vit22b_transfer.checkpoints import reading
from vit22b_transfer.data.converters import ImageTextFeatureConverter
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.train import Periods

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
t5x_train = pytest.importorskip("t5x.train", reason=_REASON)
t5x_adapter = pytest.importorskip("vit22b_transfer.t5x_adapter", reason=_REASON)

import tensorflow as tf  # noqa: E402
from t5x import partitioning as t5x_partitioning  # noqa: E402
from t5x import trainer as t5x_trainer  # noqa: E402
from t5x import utils as t5x_utils  # noqa: E402

FROZEN = ("encoder/tower/.*",)


@pytest.fixture(autouse=True)
def settings_of_t5x():
    """JAX's default promotion, as T5X adds arrays of different types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# --- Runs of some steps, in either runtime ---


def model_of(*, frozen=(), **settings):
    """A tiny image-text model with dropout; a frozen tower is in bfloat16."""
    schedule = optimizers.cosine(3e-3, total_steps=100, warmup_steps=2)
    return tiny_models.image_text_model(
        tiny_models.tower_config(
            depth=1, param_dtype=jnp.bfloat16 if frozen else jnp.float32
        ),
        tiny_models.text_config(
            num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.1
        ),
        frozen=frozen,
        feature_converter_cls=ImageTextFeatureConverter,
        **{"optimizer_def": optimizers.adamw(schedule, weight_decay=0.1)} | settings,
    )


def train_in_ours(model_dir, model, total_steps, **arguments):
    tiny_runs.run(
        model_dir,
        model,
        total_steps=total_steps,
        eval_data=None,
        periods=Periods(log=1, evaluate=100, checkpoint=100),
        keep=None,
        **arguments,
    )
    return {
        line["step"]: line["train/loss"]
        for line in tiny_runs.logged(model_dir)
        if "train/loss" in line
    }


def train_in_t5x(
    model_dir,
    model,
    start_step,
    total_steps,
    *,
    microbatches=None,
    batch=tiny_runs.text_batch,
    initial=None,
):
    """T5X's own train loop on the batches of `tiny_runs.Data`; losses by step."""

    def batches(config, shard_id, num_shards, converter):
        drawn = [batch(step) for step in range(start_step, total_steps)]
        return tf.data.Dataset.from_tensor_slices(
            {name: np.stack([b[name] for b in drawn]) for name in drawn[0]}
        ).repeat()

    class Recorder(t5x_trainer.Trainer):
        def train(self, batch_iter, num_steps, start_step=None):
            summary = super().train(batch_iter, num_steps, start_step)
            values = summary.result()
            step = int(self.train_state.step)
            losses[step] = float(values["loss"].value)
            rates[step] = float(values["learning_rate"].value)
            return summary

    losses, rates = {}, {}
    t5x_train.train(
        model=t5x_adapter.for_t5x(model),
        model_dir=t5x_adapter.absolute_path(str(model_dir)),
        train_dataset_cfg=t5x_utils.DatasetConfig(
            mixture_or_task_name="none",
            task_feature_lengths={},
            split="train",
            batch_size=tiny_runs.BATCH_SIZE,
            shuffle=False,
            seed=None,
            pack=False,
        ),
        train_eval_dataset_cfg=None,
        infer_eval_dataset_cfg=None,
        checkpoint_cfg=t5x_utils.CheckpointConfig(
            save=t5x_utils.SaveCheckpointConfig(period=100, dtype=None),
            restore=None,
        ),
        partitioner=t5x_partitioning.PjitPartitioner(model_parallel_submesh=(1, 2)),
        train_state_initializer_cls=functools.partial(
            t5x_adapter.TrainStateInitializer, initial=initial
        ),
        trainer_cls=functools.partial(
            t5x_adapter.mean_gradient_trainer,
            trainer_cls=functools.partial(
                Recorder, learning_rate_fn=None, num_microbatches=microbatches
            ),
        ),
        total_steps=total_steps,
        eval_steps=1,
        eval_period=0,
        stats_period=1,
        random_seed=0,
        summarize_config_fn=lambda *arguments: None,
        get_dataset_fn=batches,
        verify_matching_vocabs_fn=None,  # the batches are of no task
    )
    for step, rate in rates.items():
        expected = model.optimizer_def.learning_rate(step - 1)
        np.testing.assert_allclose(rate, expected, rtol=1e-6)
    return losses


def arrays_of(model_dir, step):
    """Every array of a checkpoint, parameters and optimizer state, by name."""
    return tiny_runs.arrays_of(reading.checkpoint_path(str(model_dir), step))


def assert_same_curve(actual, expected):
    assert actual.keys() == expected.keys()
    for step, loss in expected.items():
        assert abs(actual[step] - loss) <= 1e-5 * abs(loss), step


def assert_same_arrays(actual, expected, *, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        scale = max(np.abs(value.astype(np.float32)).max(), 1e-6)
        difference = np.abs(
            actual[name].astype(np.float32) - value.astype(np.float32)
        ).max()
        assert difference <= tolerance * scale, name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Ten steps in our runtime, per frozen patterns: (directory, loss by step)."""

    @functools.cache
    def run(frozen):
        model_dir = tmp_path_factory.mktemp("ours")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return model_dir, train_in_ours(model_dir, model_of(frozen=frozen), 10)

    return run


@pytest.mark.parametrize("microbatches", [None, 2])
def test_ten_steps_in_t5x_are_ten_steps_in_ours(uninterrupted, tmp_path, microbatches):
    """Dropout included: both derive its keys from seed and step in the same way."""
    ours, losses = uninterrupted(())
    model = model_of()
    if microbatches:
        # Dropout differs by microbatch, so this is against our full batch without it.
        text = dataclasses.replace(model.module.text, dropout_rate=0.0)
        model.module = model.module.clone(text=text)
        ours = tmp_path / "ours"
        losses = train_in_ours(ours, model, 10)
    theirs = train_in_t5x(tmp_path / "t5x", model, 0, 10, microbatches=microbatches)
    assert_same_curve(theirs, losses)
    assert losses[10] < losses[1]
    assert_same_arrays(
        arrays_of(tmp_path / "t5x", 10), arrays_of(ours, 10), tolerance=1e-4
    )


@pytest.mark.slow
def test_gradients_are_means_for_an_optimizer_that_sees_their_scale(tmp_path):
    """AdamW behind a clip would not: SGD without one moves by the gradients."""
    model = model_of(optimizer_def=optimizers.sgd(0.05, clip_norm=None))
    text = dataclasses.replace(model.module.text, dropout_rate=0.0)
    model.module = model.module.clone(text=text)
    ours = train_in_ours(tmp_path / "ours", model, 3)
    for microbatches in (None, 2):
        folder = tmp_path / f"t5x_{microbatches}"
        theirs = train_in_t5x(folder, model, 0, 3, microbatches=microbatches)
        assert_same_curve(theirs, ours)
        assert_same_arrays(
            arrays_of(folder, 3), arrays_of(tmp_path / "ours", 3), tolerance=1e-4
        )
    assert ours[3] < ours[1]


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [None, 2])
def test_an_int8_tower_is_not_differentiated(tmp_path, microbatches):
    """T5X's own step differentiates all parameters, which of int8 ones is an error."""
    model = model_of(int8_tower=True)
    text = dataclasses.replace(model.module.text, dropout_rate=0.0)
    model.module = model.module.clone(text=text)
    ours = train_in_ours(tmp_path / "ours", model, 3)
    theirs = train_in_t5x(tmp_path / "t5x", model, 0, 3, microbatches=microbatches)
    assert_same_curve(theirs, ours)
    first, last = arrays_of(tmp_path / "t5x", 0), arrays_of(tmp_path / "t5x", 3)
    int8 = {name for name, value in first.items() if value.dtype == np.int8}
    assert int8 and not any("param_states" in name for name in int8)
    for name in first:
        if name.startswith("target/"):
            still = first[name].tobytes() == last[name].tobytes()
            assert still == ("/tower/" in name), name


@pytest.mark.parametrize("frozen", [(), FROZEN], ids=["trained", "frozen-bfloat16"])
def test_a_run_goes_from_t5x_to_ours_and_back(uninterrupted, tmp_path, frozen):
    ours, losses = uninterrupted(frozen)
    model = model_of(frozen=frozen)
    curve = train_in_t5x(tmp_path, model, 0, 4)
    before = arrays_of(tmp_path, 0)
    curve |= train_in_ours(tmp_path, model, 7)
    curve |= train_in_t5x(tmp_path, model, 7, 10)
    assert_same_curve(curve, losses)
    after = arrays_of(tmp_path, 10)
    assert_same_arrays(after, arrays_of(ours, 10), tolerance=1e-4)
    assert int(after["state/step"]) == 10
    tower = [name for name in after if name.startswith("target/encoder/tower/")]
    assert tower
    for name in tower:
        same = after[name].tobytes() == before[name].tobytes()
        assert same == bool(frozen), name
        assert after[name].dtype == (jnp.bfloat16 if frozen else jnp.float32)
    moments = [name for name in after if "/mu/" in name]
    assert any("decoder" in name for name in moments)
    assert any("/tower/" in name for name in moments) == (not frozen)


def test_a_checkpoint_of_another_shape_is_refused_by_name_in_both(tmp_path):
    """T5X's own restore hands over arrays of any shape without a word."""
    model, wider = model_of(), model_of()
    text = dataclasses.replace(wider.module.text, vocab_size=72)
    wider.module = wider.module.clone(text=text)
    train_in_t5x(tmp_path, model, 0, 1)
    with pytest.raises(Exception, match=r'"embedding" in "/token_embedder".*72, 24'):
        train_in_t5x(tmp_path, wider, 1, 2)
    with pytest.raises(ValueError, match=r"embedding: shape \(64, 24\) in the check"):
        train_in_ours(tmp_path, wider, 2)


# --- The launchers ---

# recipe -> the tasks it evaluates; all but the last are run in every setting
RECIPES = {
    "scenes_vqa": ("scenes_vqa",),
    "scenes_captioning": ("scenes_captioning",),
    "scenes_paligemma": ("scenes_captioning", "scenes_vqa"),
}
SPLIT_BOTH_WAYS = [
    "--gin.partitioning.standard_logical_axis_rules.activation_partitioning_dims=2",
    "--gin.partitioning.standard_logical_axis_rules.parameter_partitioning_dims=2",
]
MESH = ["--gin.partitioning.PjitPartitioner.model_parallel_submesh=(1,2)"]
SETTINGS = {
    "one-device": (1, []),
    "eight-devices": (8, MESH),
    "eight-devices-2d": (8, [*MESH, *SPLIT_BOTH_WAYS]),
}
STEPS = 30
FROZEN_TOWER = "gin_configs/models/frozen_tower.gin"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Drawn scenes and a vocabulary, as environment variables."""
    return t5x_launchers.draw(tmp_path_factory.mktemp("scenes"))


CASES = [
    *((recipe, setting, []) for recipe in list(RECIPES)[:2] for setting in SETTINGS),
    ("scenes_paligemma", "eight-devices-2d", []),
    ("scenes_paligemma", "one-device", [FROZEN_TOWER, "gin_configs/runs/augment.gin"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("recipe, setting, more", CASES)
def test_launchers_train_evaluate_and_infer(drawn, tmp_path, recipe, setting, more):
    devices, overrides = SETTINGS[setting]
    common = [
        *(f"--gin_file={f}" for f in [f"gin_configs/recipes/{recipe}.gin", *more]),
        f"--gin.MODEL_DIR={str(tmp_path)!r}",
        "--gin.BATCH_SIZE=16",
        "--gin.TRAIN_STEPS=30",
        "--gin.WARMUP_STEPS=5",
    ]
    runs = "--gin_file=gin_configs/runs/t5x_"
    command(
        drawn,
        devices,
        "t5x.train",
        f"{runs}train.gin",
        *common,
        *overrides,
        "--gin.train.stats_period=10",
        "--gin.train.eval_period=30",
        "--gin.utils.SaveCheckpointConfig.period=30",
        "--gin.train.eval_steps=1",
    )
    losses = logged_losses(tmp_path / "train")
    assert losses[STEPS] < 0.8 * losses[10]
    if more:
        assert_frozen_tower_stood_still(tmp_path)

    command(drawn, devices, "t5x.eval", f"{runs}eval.gin", *common, *overrides)
    command(drawn, devices, "vit22b_transfer.cli", "eval", *common)
    ours = json.loads((tmp_path / "metrics.json").read_text())
    for task in RECIPES[recipe]:
        scored = (tmp_path / f"inference_eval/{task}-metrics.jsonl").read_text()
        theirs = json.loads(scored.splitlines()[-1])
        expected = {
            name: value
            for name, value in ours[f"{task}/test"]["metrics"].items()
            if not name.startswith("token/")
        }
        assert theirs == {"step": STEPS} | expected

    command(drawn, devices, "t5x.infer", f"{runs}infer.gin", *common, *overrides)
    task = RECIPES[recipe][-1]
    (written,) = tmp_path.glob(f"{task}-predict.jsonl-00000-of-00001")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    own = Path(ours[f"{task}/test"]["predictions"]).read_text().splitlines()
    assert [line["prediction"] for line in lines] == [
        json.loads(line)["prediction"] for line in own
    ]
    for line in lines:
        assert line.keys() == {"image_id", "inputs", "prediction"}
        fields = {"inputs_pretokenized", "targets_pretokenized", "image_id"}
        assert line["inputs"].keys() - {"question_id"} == fields
        assert all(isinstance(value, str) for value in line["inputs"].values())
    told = [json.loads(line)["image_id"] for line in own]
    assert [line["image_id"] for line in lines] == told


def assert_frozen_tower_stood_still(model_dir):
    first, last = arrays_of(model_dir, 0), arrays_of(model_dir, STEPS)
    moved = {name for name in first if first[name].tobytes() != last[name].tobytes()}
    assert moved and not any("/tower/" in name for name in moved)
    assert not any("/tower/" in name for name in first if "param_states" in name)


def logged_losses(folder):
    """Loss by step, from the summaries that T5X writes for TensorBoard."""
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        e.step: float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors("loss")
    }


@pytest.mark.slow
def test_the_finetune_file_starts_from_the_parameters_of_a_checkpoint(drawn, tmp_path):
    """Of our own runtime here; the steps and the optimizer start anew."""
    common = [
        "--gin_file=gin_configs/recipes/scenes_vqa.gin",
        "--gin.BATCH_SIZE=16",
        "--gin.WARMUP_STEPS=1",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    command(
        drawn,
        1,
        "vit22b_transfer.cli",
        "train",
        *common,
        f"--gin.MODEL_DIR={str(first)!r}",
        "--gin.TRAIN_STEPS=3",
    )
    command(
        drawn,
        1,
        "t5x.train",
        "--gin_file=gin_configs/runs/t5x_finetune.gin",
        *common,
        f"--gin.MODEL_DIR={str(second)!r}",
        f"--gin.INITIAL_CHECKPOINT_PATH={str(first / 'checkpoint_3')!r}",
        "--gin.TRAIN_STEPS=2",
        "--gin.train.eval_period=2",
        "--gin.utils.SaveCheckpointConfig.period=2",
        "--gin.EVAL_STEPS=1",
        "--gin.EVALUATOR_NUM_EXAMPLES=16",
    )
    start, source = arrays_of(second, 0), arrays_of(first, 3)
    for name, value in start.items():
        if name.startswith("target/"):
            assert value.tobytes() == source[name].tobytes(), name
    assert int(start["state/step"]) == 0
    assert (second / "inference_eval/scenes_vqa-metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, make, files",
    [
        ("scenes_paligemma", tiny_imports.paligemma, []),
        (
            "scenes_paligemma",
            tiny_imports.paligemma,
            ["gin_configs/models/frozen_tower.gin"],
        ),
        ("scenes_vqa", tiny_imports.tower_and_t5, []),
    ],
    ids=["PaliGemma", "PaliGemma with a frozen tower", "SigLIP and T5"],
)
def test_the_finetune_file_starts_from_imported_weights(
    drawn, tmp_path, recipe, make, files
):
    """A projection that the import lacks is fresh; infers as it was trained."""
    imported = make(tmp_path)
    folder, steps = tmp_path / "run", 3
    files = [f"gin_configs/recipes/{recipe}.gin", f"{imported}/model.gin", *files]
    common = [
        *(f"--gin_file={file}" for file in files),
        f"--gin.MODEL_DIR={str(folder)!r}",
        "--gin.BATCH_SIZE=16",
        "--gin.WARMUP_STEPS=1",
        f"--gin.TRAIN_STEPS={steps}",
    ]
    command(
        drawn,
        1,
        "t5x.train",
        "--gin_file=gin_configs/runs/t5x_finetune.gin",
        *common,
        f"--gin.INITIAL_CHECKPOINT_PATH={str(imported / 'checkpoint_0')!r}",
        f"--gin.train.eval_period={steps}",
        f"--gin.utils.SaveCheckpointConfig.period={steps}",
        "--gin.EVAL_STEPS=1",
        "--gin.EVALUATOR_NUM_EXAMPLES=16",
    )
    source, start, end = (
        arrays_of(imported, 0),
        arrays_of(folder, 0),
        arrays_of(folder, steps),
    )
    source = {n: value for n, value in source.items() if n.startswith("target/")}
    for name, value in source.items():
        assert value.tobytes() == start[name].tobytes(), name
    fresh = {n for n in start if n.startswith("target/")} - source.keys()
    assert all("encoder/projection" in name for name in fresh)
    assert bool(fresh) == (make is tiny_imports.tower_and_t5)
    still = {n for n in source if end[n].tobytes() == source[n].tobytes()}
    towers = {n for n in source if "/tower/" in n}
    assert still == (towers if len(files) > 2 else set())
    command(drawn, 1, "t5x.infer", "--gin_file=gin_configs/runs/t5x_infer.gin", *common)
    (written,) = folder.glob("scenes_vqa-predict.jsonl-00000-of-00001")
    command(drawn, 1, "vit22b_transfer.cli", "infer", *common)
    (own,) = folder.glob("scenes_vqa-test-*.jsonl")
    theirs, ours = (
        [json.loads(line)["prediction"] for line in path.read_text().splitlines()]
        for path in (written, own)
    )
    assert theirs == ours
