"""Models of image-text pairs under real T5X: the same steps, metrics and scores."""

import functools
import json

import jax
import numpy as np
import pytest
import seqio
import test_contrastive
import tiny_pairs
import tiny_runs
from flax.traverse_util import unflatten_dict

from vit22b_transfer.checkpoints import reading
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.models import contrastive
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.train import Periods

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
t5x_train = pytest.importorskip("t5x.train", reason=_REASON)
t5x_adapter = pytest.importorskip("vit22b_transfer.t5x_adapter", reason=_REASON)

import tensorflow as tf  # noqa: E402
from t5x import eval as t5x_eval  # noqa: E402
from t5x import infer as t5x_infer  # noqa: E402
from t5x import partitioning as t5x_partitioning  # noqa: E402
from t5x import trainer as t5x_trainer  # noqa: E402
from t5x import utils as t5x_utils  # noqa: E402

pictures, registered = test_contrastive.pictures, test_contrastive.registered
STEPS = 10


@pytest.fixture(autouse=True)
def settings_of_t5x():
    """JAX's default promotion, as T5X adds arrays of different types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _nothing(*arguments, **options):
    """In place of T5X's summary of its gin configuration, of which there is none."""


def partitioner():
    return t5x_partitioning.PjitPartitioner(model_parallel_submesh=(1, 2))


def config(task, split, batch_size=8):
    return t5x_utils.DatasetConfig(
        mixture_or_task_name=task,
        task_feature_lengths=test_contrastive.RUN_LENGTHS,
        split=split,
        batch_size=batch_size,
        shuffle=False,
        seed=0,
        pack=False,
    )


def restore(model_dir):
    return t5x_utils.RestoreCheckpointConfig(
        path=t5x_adapter.latest_checkpoint(str(model_dir)), mode="specific", dtype=None
    )


def batch_of(step):
    return tiny_pairs.batch(tiny_runs.BATCH_SIZE, seed=step, missing=[step % 7])


class Stream(tiny_runs.Stream):
    """Batches of pairs, drawn by their step."""

    def __next__(self):
        batch = batch_of(self._step)
        self._step += 1
        self.counters.examples += tiny_runs.BATCH_SIZE
        return tiny_runs.on_device(batch, self._partitioning)


class Data(tiny_runs.Data):
    """In place of `inputs.TrainData`."""

    def batches(self, model, partitioning, *, seed, start_step):
        return Stream(partitioning, seed, start_step, self)


def steps_model(**arguments):
    schedule = optimizers.cosine(3e-3, total_steps=100, warmup_steps=2)
    optimizer = optimizers.adamw(schedule, weight_decay=0.1)
    return tiny_pairs.model(optimizer, **arguments)


def train_in_t5x(model_dir, model):
    """T5X's own loop on the batches of our run; losses by step."""

    def batches(dataset_config, shard_id, num_shards, converter):
        drawn = [batch_of(step) for step in range(STEPS)]
        return tf.data.Dataset.from_tensor_slices(
            {name: np.stack([b[name] for b in drawn]) for name in drawn[0]}
        ).repeat()

    losses = {}

    class Recorder(t5x_trainer.Trainer):
        def train(self, batch_iter, num_steps, start_step=None):
            summary = super().train(batch_iter, num_steps, start_step)
            losses[int(self.train_state.step)] = float(summary.result()["loss"].value)
            return summary

    t5x_train.train(
        model=t5x_adapter.for_t5x(model),
        model_dir=str(model_dir),
        train_dataset_cfg=config("none", "train", tiny_runs.BATCH_SIZE),
        train_eval_dataset_cfg=None,
        infer_eval_dataset_cfg=None,
        checkpoint_cfg=t5x_utils.CheckpointConfig(
            save=t5x_utils.SaveCheckpointConfig(period=100, dtype=None), restore=None
        ),
        partitioner=partitioner(),
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
        get_dataset_fn=batches,
        verify_matching_vocabs_fn=None,  # the batches are of no task
    )
    return losses


def arrays_of(model_dir):
    path = reading.resolve(str(model_dir))
    abstract = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=tiny_runs.ONE_DEVICE.replicated
        )
        for name, leaf in reading.saved_arrays(path).items()
    }
    tree = unflatten_dict(abstract, sep="/")
    return reading.flatten(jax.tree.map(np.asarray, reading.read_arrays(path, tree)))


def test_ten_steps_of_pairs_in_t5x_are_ten_steps_in_ours(tmp_path, monkeypatch):
    chunked = []
    of_losses = contrastive.contrastive_losses
    found = of_losses.batch_devices

    def noted():
        chunked.append(found() is not None)
        return found()

    monkeypatch.setattr(of_losses, "batch_devices", noted)
    tiny_runs.run(
        tmp_path / "ours",
        steps_model(frozen_tower=True),
        total_steps=STEPS,
        data=Data(),
        eval_data=None,
        periods=Periods(log=1, evaluate=100, checkpoint=100),
    )
    ours = {
        line["step"]: line["train/loss"]
        for line in tiny_runs.logged(tmp_path / "ours")
        if "train/loss" in line
    }
    chunked.clear()
    theirs = train_in_t5x(tmp_path / "t5x", steps_model(frozen_tower=True))
    assert chunked and all(chunked), "T5X's mesh is known to the loss"
    assert theirs.keys() == ours.keys()
    for step, loss in ours.items():
        assert abs(theirs[step] - loss) <= 1e-5 * abs(loss), step
    assert ours[STEPS] < ours[1]
    one, other = arrays_of(tmp_path / "t5x"), arrays_of(tmp_path / "ours")
    assert one.keys() == other.keys()
    for name, value in other.items():
        if name.endswith("key/bias"):  # no attention depends on it: rounding alone
            continue
        scale = max(np.abs(value.astype(np.float32)).max(), 1e-6)
        assert np.abs(one[name] - value).max() <= 1e-4 * scale, name


@pytest.mark.slow
def test_t5x_evaluates_and_scores_what_our_runtime_does(registered, tmp_path):
    model = test_contrastive.byte_model(frozen_tower=True)
    folder = tmp_path / "run"
    test_contrastive.train(model, folder, 20)
    ours = evaluate.evaluate_checkpoint(
        model,
        partitioning=tiny_runs.ONE_DEVICE,
        checkpoint=str(folder),
        tasks=registered,
        split="test",
        feature_lengths=test_contrastive.RUN_LENGTHS,
        batch_size=8,
        output_dir=str(tmp_path / "ours"),
    )
    scores = {}
    for name in ("theirs", "scores"):
        (tmp_path / name).mkdir()

    class Evaluator(seqio.Evaluator):
        def evaluate(self, *arguments, **options):
            metrics, outputs = super().evaluate(*arguments, **options)
            scores.update(metrics.result())
            return metrics, outputs

    for task in registered:
        t5x_eval.evaluate(
            model=t5x_adapter.for_t5x(model),
            dataset_cfg=config(task, "test"),
            restore_checkpoint_cfg=restore(folder),
            partitioner=partitioner(),
            output_dir=str(tmp_path / "theirs"),
            inference_evaluator_cls=functools.partial(
                Evaluator, logger_cls=[], use_memory_cache=False
            ),
            summarize_config_fn=_nothing,
        )
    # T5X scores the image that could not be read as any other.
    assert scores["tiny_zero_shot"]["classes"] == 4
    expected = ours["tiny_zero_shot"].metrics["top1"]
    assert abs(scores["tiny_zero_shot"]["top1"] - expected) <= 100 / 16

    expected = ours["tiny_pairs"].metrics["image_to_text_recall@10"]
    assert abs(scores["tiny_pairs"]["image_to_text_recall@10"] - expected) <= 100 / 16

    t5x_infer.infer(
        mode="score",
        checkpoint_period=8,
        model=t5x_adapter.for_t5x(model),
        dataset_cfg=config("tiny_pairs", "test"),
        restore_checkpoint_cfg=restore(folder),
        partitioner=partitioner(),
        output_dir=str(tmp_path / "scores"),
        summarize_config_fn=_nothing,
    )
    (path,) = (tmp_path / "scores").glob("tiny_pairs-score.jsonl-00000-of-00001")
    theirs = [json.loads(line)["score"] for line in open(path)]
    (path,) = (tmp_path / "ours").glob("tiny_pairs*.jsonl")
    lines = [json.loads(line) for line in open(path)]
    for line, score in zip(lines, theirs, strict=True):
        if "error" not in line:
            assert abs(line["score"] - score) <= 1e-4 * max(1, abs(score))
