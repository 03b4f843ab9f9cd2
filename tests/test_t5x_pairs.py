"""Models of image-text pairs under real T5X: the same steps, metrics and scores."""

import functools
import json

import numpy as np
import pytest
import seqio
import test_contrastive
import tiny_pairs
import tiny_runs

from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.models import contrastive
from vit22b_transfer.training import optimizers

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
pytest.importorskip("t5x.train", reason=_REASON)
t5x_adapter = pytest.importorskip("vit22b_transfer.t5x_adapter", reason=_REASON)

from t5x import eval as t5x_eval  # noqa: E402
from t5x import infer as t5x_infer  # noqa: E402
from t5x import partitioning as t5x_partitioning  # noqa: E402
from t5x import utils as t5x_utils  # noqa: E402
from test_t5x_runs import (  # noqa: E402
    arrays_of,
    assert_same_curve,
    settings_of_t5x,  # noqa: F401
    train_in_ours,
    train_in_t5x,
)

pictures, registered = test_contrastive.pictures, test_contrastive.registered
STEPS = 10


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


def steps_model(**arguments):
    schedule = optimizers.cosine(3e-3, total_steps=100, warmup_steps=2)
    optimizer = optimizers.adamw(schedule, weight_decay=0.1)
    return tiny_pairs.model(optimizer, **arguments)


def test_ten_steps_of_pairs_in_t5x_are_ten_steps_in_ours(tmp_path, monkeypatch):
    chunked = []
    of_losses = contrastive.contrastive_losses
    found = of_losses.batch_devices

    def noted():
        chunked.append(found() is not None)
        return found()

    monkeypatch.setattr(of_losses, "batch_devices", noted)
    ours = train_in_ours(
        tmp_path / "ours",
        steps_model(frozen_tower=True),
        STEPS,
        data=tiny_runs.Data(batch=batch_of),
    )
    chunked.clear()
    theirs = train_in_t5x(
        tmp_path / "t5x", steps_model(frozen_tower=True), 0, STEPS, batch=batch_of
    )
    assert chunked and all(chunked), "T5X's mesh is known to the loss"
    assert_same_curve(theirs, ours)
    assert ours[STEPS] < ours[1]
    one, other = (arrays_of(tmp_path / name, STEPS) for name in ("t5x", "ours"))
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
