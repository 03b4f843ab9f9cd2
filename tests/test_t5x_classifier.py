"""A classifier under real T5X: the same steps, evaluated and told alike.

Needs T5X beside the project.
"""

import json

import numpy as np
import pytest
import tiny_classifier
import tiny_models
import tiny_runs

from vit22b_transfer import UserError
from vit22b_transfer.models.distillation import Distillation
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.train import InitialCheckpoint

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
pytest.importorskip("t5x.train", reason=_REASON)
pytest.importorskip("vit22b_transfer.t5x_adapter", reason=_REASON)

import t5x_launchers  # noqa: E402
from test_t5x_runs import (  # noqa: E402
    arrays_of,
    assert_same_arrays,
    assert_same_curve,
    settings_of_t5x,  # noqa: F401
    train_in_ours,
    train_in_t5x,
)

NUM_CLASSES = 7


def batch(seed):
    """Greys that tell the first of one to three labels; the last image has none."""
    rng = np.random.default_rng(seed)
    size = tiny_runs.BATCH_SIZE
    count = rng.integers(1, 4, size)
    count[-1] = 0
    labels = np.stack([rng.permutation(NUM_CLASSES)[:3] for _ in range(size)])
    given = np.arange(3)[None] < count[:, None]
    return {
        "encoder_input_images": np.broadcast_to(
            (36 * labels[:, :1, None, None]).astype(np.uint8),
            (size, *tiny_models.IMAGE_SIZE, 3),
        ),
        "labels": np.where(given, labels, 0).astype(np.int32),
        "label_weights": given.astype(np.float32),
    }


def model_of(loss, frozen=()):
    schedule = optimizers.cosine(3e-3, total_steps=100, warmup_steps=2)
    tower = tiny_models.tower_config(depth=1)
    bias = {"head_bias": -4.0} if loss == "sigmoid" else {}
    return tiny_classifier.classifier(
        tower,
        optimizers.adamw(schedule, weight_decay=0.1),
        num_classes=NUM_CLASSES,
        loss=loss,
        label_smoothing=0.1,
        frozen=frozen,
        **bias,
    )


@pytest.mark.parametrize(
    "loss, microbatches, frozen",
    [("softmax", None, ()), ("sigmoid", 2, ("encoder/tower/layers_0/.*",))],
)
def test_ten_steps_of_a_classifier_are_the_same(tmp_path, loss, microbatches, frozen):
    ours = train_in_ours(
        tmp_path / "ours", model_of(loss, frozen), 10, data=tiny_runs.Data(batch=batch)
    )
    theirs = train_in_t5x(
        tmp_path / "t5x",
        model_of(loss, frozen),
        0,
        10,
        microbatches=microbatches,
        batch=batch,
    )
    assert_same_curve(theirs, ours)
    assert ours[10] < ours[1]
    assert_same_arrays(
        arrays_of(tmp_path / "t5x", 10),
        arrays_of(tmp_path / "ours", 10),
        tolerance=1e-4,
    )


def test_ten_steps_of_a_student_are_the_same_and_leave_its_teacher(tmp_path):
    """Mixup draws from the keys of each runtime, so both see the images as they are."""
    train_in_ours(
        tmp_path / "teacher", model_of("softmax"), 3, data=tiny_runs.Data(batch=batch)
    )
    schedule = optimizers.cosine(3e-3, total_steps=100, warmup_steps=2)

    def student():
        return tiny_classifier.classifier(
            tiny_models.tower_config(depth=1, pooling="gap"),
            optimizers.adamw(schedule),
            num_classes=NUM_CLASSES,
            distillation=Distillation(tiny_models.tower_config(depth=1), 2.0, 0.5),
        )

    rules = (("teacher/(.*)", r"\1"), (".*", None))
    initial = InitialCheckpoint(str(tmp_path / "teacher"), rules)
    ours = train_in_ours(
        tmp_path / "ours",
        student(),
        10,
        data=tiny_runs.Data(batch=batch),
        initial=initial,
    )
    theirs = train_in_t5x(
        tmp_path / "t5x", student(), 0, 10, batch=batch, initial=initial
    )
    assert_same_curve(theirs, ours)
    assert ours[10] < ours[1]
    found = arrays_of(tmp_path / "t5x", 10)
    assert_same_arrays(found, arrays_of(tmp_path / "ours", 10), tolerance=1e-4)
    for name, value in arrays_of(tmp_path / "teacher", 3).items():
        if name.startswith("target/"):
            kept = found[name.replace("target/", "target/teacher/", 1)]
            assert kept.tobytes() == value.tobytes()
    with pytest.raises(UserError, match="teacher/.* is learned from and not trained"):
        train_in_t5x(tmp_path / "random", student(), 0, 1, batch=batch)


@pytest.mark.slow
def test_t5x_trains_evaluates_and_infers_the_recipe_of_a_folder(tmp_path):
    tiny_classifier.draw_folders(tmp_path)
    environment = {
        "MY_TRAIN_FOLDER": str(tmp_path / "train"),
        "MY_VALIDATION_FOLDER": str(tmp_path / "validation"),
        "MY_NEW_IMAGES": str(tmp_path / "validation"),
        "MY_CLASSES": str(tmp_path / "classes.txt"),
    }
    arguments = [
        "--gin_file=gin_configs/recipes/image_folder.gin",
        "--gin.NUM_CLASSES=4",
        "--gin.IMAGE_SIZE=(16, 16)",
        "--gin.vit.vit22b_config.depth=1",
        "--gin.BATCH_SIZE=8",
        "--gin.TRAIN_STEPS=30",
        "--gin.WARMUP_STEPS=3",
        f"--gin.MODEL_DIR='{tmp_path / 'model'}'",
        f"--gin.OUTPUT='{tmp_path / 'out'}'",
        "--gin.INFER_TASK='my_image_folder'",
        "--gin.INFER_SPLIT='validation'",
        "--gin.partitioning.PjitPartitioner.num_partitions=1",
    ]
    for job in ("train", "eval", "infer"):
        t5x_launchers.command(
            environment,
            1,
            f"t5x.{job}",
            f"--gin_file=gin_configs/runs/t5x_{job}.gin",
            *arguments,
        )
    scores = tmp_path / "model/inference_eval/my_image_folder-metrics.jsonl"
    accuracy = json.loads(scores.read_text().splitlines()[-1])["accuracy"]
    lines = [
        json.loads(line)
        for path in (tmp_path / "out").glob("*of-00001")
        for line in path.read_text().splitlines()
    ]
    names = sorted(tiny_classifier.ANGLES)
    assert len(lines) == 24
    right = [
        names[int(line["prediction"])] == line["image_id"].split("/")[0]
        for line in lines
    ]
    assert np.mean(right) == pytest.approx(accuracy)
