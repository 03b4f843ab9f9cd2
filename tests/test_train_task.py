"""Training the real model on a registered task, killed and resumed."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import seqio
import tiny_captions
import tiny_runs
from flax import traverse_util
from tiny_captions import BATCH_SIZE, LENGTHS, ONE_DEVICE

from vit22b_transfer.checkpoints import reading
from vit22b_transfer.data.augmentation import Augmentation
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.inputs import EvalData, TrainData
from vit22b_transfer.training.train import Periods, fine_tune

TASK = "train_task_test"
STEPS = 6


@dataclasses.dataclass(frozen=True)
class ShortData(TrainData):
    """Training data whose process dies after some batches."""

    lasts: int = 0

    def batches(self, model, partitioning, *, seed, start_step):
        batches = super().batches(model, partitioning, seed=seed, start_step=start_step)
        return Dying(batches, self.lasts - start_step)


class Dying:
    def __init__(self, batches, count):
        self._batches, self._left = batches, itertools.islice(batches, count)
        self.counters = batches.counters

    def __next__(self):
        for batch in self._left:
            return batch
        raise tiny_runs.Killed

    def close(self):
        self._batches.close()


def model(vocabulary=None):
    schedule = optimizers.cosine(1e-2, total_steps=STEPS)
    return tiny_captions.model(
        vocabulary=vocabulary,
        num_encoder_layers=0,
        optimizer_def=optimizers.adafactor(schedule),
    )


def run(model_dir, data_class=TrainData, the_model=None, **arguments):
    task = dict(feature_lengths=LENGTHS, batch_size=BATCH_SIZE)
    return fine_tune(
        the_model or model(),
        model_dir=str(model_dir),
        data=data_class(TASK, "train", **task, **arguments),
        eval_data=EvalData([TASK], "test", **task),
        total_steps=STEPS,
        partitioning=ONE_DEVICE,
        periods=Periods(log=2, evaluate=3, checkpoint=2),
        seed=3,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the files of the task, which is registered."""
    folder = tmp_path_factory.mktemp("train_task")
    tiny_captions.write_folder(folder)
    tiny_captions.register(TASK, folder)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """Two directories: of a straight run and of one that was killed at step 3.

    What is drawn at random of their images is drawn again by the one that goes on.
    """
    drawn = Augmentation(crop_area=(0.05, 1.0), flip=True)
    result = run(folder / "straight", augmentation=drawn)
    with pytest.raises(tiny_runs.Killed):
        run(folder / "killed", ShortData, lasts=3, augmentation=drawn)
    assert reading.latest_step(str(folder / "killed")) == 2
    run(folder / "killed", augmentation=drawn)
    return folder / "straight", folder / "killed", result


def saved(path):
    """The whole train state in a directory's latest checkpoint."""
    arrays = reading.saved_arrays(reading.resolve(str(path)))
    abstract = {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=ONE_DEVICE.replicated
        )
        for name, array in arrays.items()
    }
    abstract = traverse_util.unflatten_dict(abstract, sep="/")
    return reading.restore_tree(str(path), abstract)


@pytest.mark.slow
def test_a_task_trains_bit_for_bit_the_same_after_a_kill(runs):
    straight, killed, _ = runs
    tiny_runs.assert_same_bits(saved(killed), saved(straight))
    assert tiny_runs.logged(killed) == tiny_runs.logged(straight)


@pytest.mark.slow
def test_the_loss_falls_and_every_task_is_evaluated(runs):
    straight, _, result = runs
    lines = tiny_runs.logged(straight)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert f"eval/{TASK}/loss" in result.metrics
    assert np.isfinite(result.metrics[f"eval/{TASK}/sequence_accuracy"])


@pytest.mark.slow
def test_skipped_images_are_counted_to_the_end(runs):
    result = runs[2]
    assert result.counters["examples"] == STEPS * BATCH_SIZE
    assert result.counters["skipped_images"] > 0


def test_a_task_in_another_vocabulary_cannot_train_the_model(folder, tmp_path):
    other = model(seqio.ByteVocabulary(extra_ids=5))
    with pytest.raises(ValueError, match="has inputs in the vocabulary"):
        run(tmp_path, the_model=other)
