"""What the loops, batches and files take beside image + two texts.

A classifier walks through training, resuming, evaluation, inference and real T5X; a
model whose loss spans the batch is kept from microbatches; a tower that is no ViT is
built by its configuration.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tiny_classifier
import tiny_models
import tiny_runs
from flax import linen as nn
from tiny_classifier import LENGTHS

from vit22b_transfer import UserError
from vit22b_transfer.data import batches
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.inference import infer
from vit22b_transfer.models import encoder_decoder, layers, towers
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, steps
from vit22b_transfer.training.inputs import EvalData, TrainData
from vit22b_transfer.training.train import Periods, fine_tune

TASK = "tiny_labels"
ONE_DEVICE = Partitioning(data=1, model=1)
BATCH_SIZE = 8
STEPS = 30
READING = dict(
    feature_lengths=LENGTHS,
    converter_cls=tiny_classifier.LabelConverter,
    batch_size=BATCH_SIZE,
    partitioning=ONE_DEVICE,
)


def classifier(**arguments):
    schedule = optimizers.cosine(1e-2, total_steps=STEPS)
    return tiny_classifier.classifier(
        optimizer_def=optimizers.adamw(schedule), all_scores=True, **arguments
    )


def train(model_dir, total_steps=STEPS, partitioning=ONE_DEVICE, **arguments):
    return fine_tune(
        classifier(),
        model_dir=str(model_dir),
        data=TrainData(TASK, "train", LENGTHS, BATCH_SIZE),
        eval_data=EvalData([TASK], "test", LENGTHS, BATCH_SIZE),
        total_steps=total_steps,
        partitioning=partitioning,
        periods=Periods(log=10, evaluate=STEPS, checkpoint=10),
        **arguments,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a classifier trained for `STEPS` steps, and how it ended."""
    tiny_classifier.register(TASK)
    folder = tmp_path_factory.mktemp("classifier")
    return folder, train(folder)


@pytest.mark.slow
def test_a_classifier_learns_is_resumed_and_evaluated(trained, tmp_path):
    folder, result = trained
    assert result.metrics[f"eval/{TASK}/accuracy"] == 1.0
    assert result.counters == {
        "examples": STEPS * BATCH_SIZE,
        "skipped_images": 0,
        "without_labels": 0,
        "skipped_records": 0,
    }
    train(tmp_path, total_steps=STEPS)
    tiny_runs.assert_same_bits(
        tiny_runs.arrays_of(tmp_path), tiny_runs.arrays_of(folder)
    )


@pytest.mark.slow
def test_its_labels_are_predicted_in_order_and_scored(trained, tmp_path):
    folder, _ = trained
    arguments = dict(
        partitioning=ONE_DEVICE,
        checkpoint=str(folder),
        split="test",
        feature_lengths=LENGTHS,
        batch_size=BATCH_SIZE,
    )
    files = [
        infer.infer_split(
            classifier(),
            task=TASK,
            output=str(tmp_path / f"{size}.jsonl"),
            **arguments | {"partitioning": mesh},
        ).path
        for size, mesh in ((1, ONE_DEVICE), (8, Partitioning(data=4, model=2)))
    ]
    one, eight = ([json.loads(line) for line in open(file)] for file in files)
    assert [line["prediction"] for line in one] == [n % 4 for n in range(21)]
    for line, other in zip(one, eight, strict=True):
        assert line["index"] == other["index"]
        assert line["prediction"] == other["prediction"]
        assert len(line["all_scores"]) == tiny_classifier.NUM_CLASSES
        np.testing.assert_allclose(line["all_scores"], other["all_scores"], rtol=1e-4)
        assert line["score"] == max(line["all_scores"])
        assert line["metadata"]["true_label"] == line["index"] % 4

    scores = evaluate.evaluate_checkpoint(
        classifier(), tasks=TASK, output_dir=str(tmp_path / "eval"), **arguments
    )[TASK]
    assert scores.metrics["accuracy"] == 1.0
    likelihood = np.mean([np.exp(line["score"]) for line in one])
    np.testing.assert_allclose(scores.metrics["likelihood"], likelihood, rtol=1e-5)
    assert scores.metrics["example/accuracy"] == 1.0
    assert scores.num_scored == 21 and scores.num_empty == 0


def test_labels_that_a_task_lacks_are_an_error_in_training_and_empty_after(trained):
    tiny_classifier.register("unlabelled", features=("images",))
    with (
        pytest.raises(UserError, match="'unlabelled' has no labels to train on"),
        batches.train_batches("unlabelled", "train", seed=0, **READING) as rows,
    ):
        next(rows)

    def drop_labels(number):
        example = tiny_classifier.example(number)
        del example["labels"]
        return example

    tiny_classifier.register("unlabelled", features=("images",), make=drop_labels)
    with batches.eval_batches("unlabelled", "test", **READING) as rows:
        for batch in rows:
            assert not np.any(batch.features["label_weights"])


def test_a_feature_that_is_no_vector_is_never_made_up():
    def drop_images(number):
        example = tiny_classifier.example(number)
        del example["images"]
        return example

    tiny_classifier.register("blind_labels", features=("labels",), make=drop_images)
    with (
        pytest.raises(UserError, match="'blind_labels' gives no images"),
        batches.eval_batches("blind_labels", "test", **READING) as rows,
    ):
        next(rows)


@pytest.mark.parametrize(
    "lengths, message",
    [
        ({"images": 8}, r"must name \['images', 'labels'\]"),
        ({"images": 8, "labels": 0}, "labels must be a positive number of values"),
        ({"images": 8, "inputs": 4, "targets": 4}, r"must name \['images', 'labels'\]"),
    ],
)
def test_the_converter_says_which_lengths_are_asked_for(lengths, message):
    with pytest.raises(UserError, match=message):
        batches.batch_shapes(tiny_classifier.LabelConverter, lengths, 2)


def test_a_loss_over_the_batch_refuses_microbatches():
    model = classifier()
    model.mixup = 0.2
    optimizer = model.optimizer_def
    steps.make_update(model, optimizer, ONE_DEVICE)
    with pytest.raises(UserError, match="compares all examples of a batch"):
        steps.make_update(model, optimizer, ONE_DEVICE, num_microbatches=2)


@dataclasses.dataclass(frozen=True)
class PoolingTowerConfig:
    """A tower that is no ViT: mean colours of tiles, mixed by one layer."""

    width: int = 16
    tile: int = 4
    image_size: tuple[int, int] = tiny_models.IMAGE_SIZE
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    dtype: object = jnp.float32
    param_dtype: object = jnp.float32
    pooled: bool = True

    def build(self):
        return PoolingTower(self)

    def without_pooling(self):
        return dataclasses.replace(self, pooled=False)

    def num_tokens(self, height, width):
        return (height // self.tile) * (width // self.tile)

    def token_settings(self):
        return {"width": str(self.width), "tile": str(self.tile)}


class PoolingTower(nn.Module):
    config: PoolingTowerConfig

    @nn.compact
    def __call__(self, images, *, intermediates=()):
        cfg = self.config
        x = images.astype(jnp.float32) / 255.0
        batch, height, width, _ = x.shape
        tiles = (height // cfg.tile, cfg.tile, width // cfg.tile, cfg.tile)
        x = x.reshape(batch, *tiles, 3).mean(axis=(2, 4)).reshape(batch, -1, 3)
        x = layers.Dense(3, cfg.width, ("patch", "embed"), name="mix")(x)
        pooled = x.mean(axis=1) if cfg.pooled else None
        return towers.TowerOutput(x, pooled, {})


@pytest.mark.slow
def test_a_tower_that_is_no_vit_is_paired_with_a_text_model():
    model = tiny_models.image_text_model(PoolingTowerConfig())
    params = tiny_models.model_params(model)
    assert params["encoder"]["tower"]["mix"]["kernel"].shape == (3, 16)
    loss, _ = model.eval_fn(params, tiny_models.batch(2))
    assert np.isfinite(loss)
    grads = jax.grad(lambda p: model.loss_fn(p, tiny_models.batch(2), None)[0])(params)
    assert np.any(grads["encoder"]["tower"]["mix"]["kernel"])


def test_what_a_tower_cannot_do_is_said_by_its_configuration():
    with pytest.raises(UserError, match="needs a tower with the field 'int8_kernels'"):
        tiny_models.image_text_model(PoolingTowerConfig(), int8_tower=True)


def test_a_text_configuration_is_no_tower():
    assert isinstance(PoolingTowerConfig(), towers.TowerConfig)
    assert not isinstance(tiny_models.text_config(), towers.TowerConfig)
    with pytest.raises(Exception, match="tower"):
        encoder_decoder.ImageTextModule(
            tiny_models.text_config(), tiny_models.text_config()
        )


def test_a_classifier_trains_in_t5x_as_in_ours(trained, tmp_path):
    reason = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
    t5x_train = pytest.importorskip("t5x.train", reason=reason)
    t5x_utils = pytest.importorskip("t5x.utils", reason=reason)
    from t5x import partitioning as t5x_partitioning
    from t5x import trainer as t5x_trainer

    from vit22b_transfer import t5x_adapter

    def config(split):
        return t5x_utils.DatasetConfig(
            mixture_or_task_name=TASK,
            task_feature_lengths=LENGTHS,
            split=split,
            batch_size=BATCH_SIZE,
            shuffle=False,
            seed=0,
            pack=False,
        )

    losses = {}

    class Recorder(t5x_trainer.Trainer):
        def train(self, batch_iter, num_steps, start_step=None):
            summary = super().train(batch_iter, num_steps, start_step)
            losses[int(self.train_state.step)] = float(summary.result()["loss"].value)
            return summary

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        t5x_train.train(
            model=t5x_adapter.for_t5x(classifier()),
            model_dir=str(tmp_path),
            train_dataset_cfg=config("train"),
            train_eval_dataset_cfg=None,
            infer_eval_dataset_cfg=None,
            checkpoint_cfg=t5x_utils.CheckpointConfig(
                save=t5x_utils.SaveCheckpointConfig(period=STEPS, dtype=None),
                restore=None,
            ),
            partitioner=t5x_partitioning.PjitPartitioner(model_parallel_submesh=(1, 2)),
            trainer_cls=functools.partial(
                t5x_adapter.mean_gradient_trainer,
                trainer_cls=functools.partial(
                    Recorder, learning_rate_fn=None, num_microbatches=None
                ),
            ),
            total_steps=STEPS,
            eval_steps=1,
            eval_period=0,
            stats_period=1,
            random_seed=0,
            summarize_config_fn=lambda *arguments: None,
        )
    assert losses[STEPS] < 0.5 * losses[1]
    # What T5X trained, our runtime restores and evaluates.
    scores = evaluate.evaluate_checkpoint(
        classifier(),
        tasks=TASK,
        output_dir=str(tmp_path / "eval"),
        partitioning=ONE_DEVICE,
        checkpoint=str(tmp_path),
        split="test",
        feature_lengths=LENGTHS,
        batch_size=BATCH_SIZE,
    )[TASK]
    assert scores.metrics["accuracy"] == 1.0
    assert seqio.TaskRegistry.get(TASK).metric_fns
