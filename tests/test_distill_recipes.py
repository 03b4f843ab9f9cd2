"""gin_configs/runs/distill.gin: behind a recipe, in any order, and on pictures."""

import dataclasses
import inspect
import itertools

import gin
import pytest
import seqio
import test_train_task
import tiny_classifier
import tiny_runs
from gin_files import CONFIGS, ROOT, read_recipe
from test_distillation import RULES, STUDENT, TEACHER

from tasks.classification import register_classification
from vit22b_transfer import UserError
from vit22b_transfer.data.augmentation import Augmentation
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.models.distillation import Distillation
from vit22b_transfer.models.token_distances import (
    TokenDistance,
    cosine,
    normalised_square,
)
from vit22b_transfer.recipes import loading
from vit22b_transfer.training import optimizers, train
from vit22b_transfer.training.inputs import TrainData
from vit22b_transfer.training.train import InitialCheckpoint, Periods, fine_tune

RECIPE = CONFIGS / "recipes/image_folder.gin"
DISTILL = CONFIGS / "runs/distill.gin"
TOKENS = CONFIGS / "runs/distill_tokens.gin"
BY_COSINE = CONFIGS / "runs/distill_tokens_cosine.gin"
BESIDE = [
    CONFIGS / f"runs/{name}.gin" for name in ("mixup", "augment", "ema", "instruments")
]
TASK = "distilled_stripes"
LENGTHS = {"images": tiny_classifier.SIZE, "labels": 1}


@pytest.fixture(autouse=True)
def no_gin_left_over():
    yield
    gin.clear_config()


def made_by(*overrides, behind):
    read = read_recipe(RECIPE, *overrides, behind=behind)
    return loading.arguments(read, train.fine_tune, [str(ROOT)])


def test_it_stands_beside_what_changes_a_training_in_any_order():
    for order in ([DISTILL, *BESIDE], [*BESIDE, DISTILL]):
        made = made_by(behind=order)
        model = made["model"]
        assert model.distillation.teacher.width == 768
        assert model.module.tower.width == 192
        assert model.mixup == 1.0 and model.frozen == ("teacher/.*",)
        assert model.optimizer_def.ema_decay == 0.9999
        assert made["data"].augmentation == Augmentation(
            crop_area=(0.05, 1.0), flip=True
        )
        assert made["instruments"].every == 100
        assert made["initial"].path == "/nowhere/checkpoint_2"
        assert made["initial"].rules == RULES


def test_its_settings_arrive_and_a_teachers_tower_has_its_own():
    model = made_by(
        "TEMPERATURE=4.0",
        "LABEL_WEIGHT=0.5",
        "vit.vit22b_config.depth=3",
        "teacher/vit.vit22b_config.depth=5",
        behind=[DISTILL],
    )["model"]
    assert (model.distillation.temperature, model.distillation.label_weight) == (4, 0.5)
    assert (model.module.tower.depth, model.distillation.teacher.depth) == (3, 5)


def plainly(tokens):
    """With the distance itself: gin and the checks of types have wrappers around it."""
    return dataclasses.replace(tokens, distance=inspect.unwrap(tokens.distance))


def test_tokens_beside_the_classes_arrive_in_either_order():
    layers = (
        "TOKEN_WEIGHT=0.5",
        "STUDENT_LAYER='block_1'",
        "TEACHER_LAYER='block_5'",
    )
    for file, overrides, expected in (
        (TOKENS, (), TokenDistance(normalised_square)),
        (BY_COSINE, layers, TokenDistance(cosine, 0.5, "block_1", "block_5")),
    ):
        for order in ([file, *BESIDE], [*BESIDE, DISTILL, file]):
            made = made_by(*overrides, behind=order)
            found = made["model"].distillation.tokens
            assert plainly(found) == plainly(expected)
            assert made["initial"].rules == RULES


@pytest.mark.parametrize(
    "name, message",
    [
        ("models/multi_label", "two softmaxes, but the loss is sigmoid"),
        ("runs/from_checkpoint", "sets train.InitialCheckpoint.path"),
    ],
)
def test_what_contradicts_it_is_refused_in_either_order(name, message):
    for order in itertools.permutations([DISTILL, CONFIGS / f"{name}.gin"]):
        with pytest.raises(UserError, match=message):
            made_by(behind=order)


def test_behind_a_recipe_of_texts_it_is_refused():
    read = read_recipe(CONFIGS / "recipes/scenes_vqa.gin", behind=[DISTILL])
    with pytest.raises(UserError, match="distillation, but .* this run is ImageText"):
        loading.arguments(read, train.fine_tune, [str(ROOT)])


# --- On pictures ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of drawn stripes, whose task is registered."""
    folder = tmp_path_factory.mktemp("stripes")
    tiny_classifier.draw_folders(folder, train=8, validation=3)
    splits = {name: str(folder / name) for name in ("train", "validation")}
    source = ClassFolderSource(splits, classes=str(folder / "classes.txt"))
    register_classification(TASK, source)
    yield folder
    seqio.TaskRegistry.remove(TASK)


def model_of(tower, **arguments):
    schedule = optimizers.cosine(3e-3, total_steps=6)
    optimizer = optimizers.adamw(schedule, ema_decay=0.9)
    return tiny_classifier.classifier(tower, optimizer, mixup=1.0, **arguments)


STUDENT_OF_STRIPES = {"distillation": Distillation(TEACHER, 2.0)}


def run(model_dir, model, initial=None, data_class=TrainData, **more):
    return fine_tune(
        model,
        model_dir=str(model_dir),
        data=data_class(
            TASK,
            "train",
            LENGTHS,
            8,
            augmentation=Augmentation(crop_area=(0.5, 1.0), flip=True),
            **more,
        ),
        total_steps=6,
        partitioning=tiny_runs.ONE_DEVICE,
        initial=initial,
        periods=Periods(log=2, evaluate=6, checkpoint=2),
    )


@pytest.mark.slow
def test_crops_mixup_and_average_go_on_to_the_bit_and_both_ways_evaluate(
    folder, tmp_path
):
    run(tmp_path / "teacher", model_of(TEACHER))
    initial = InitialCheckpoint(str(tmp_path / "teacher"), RULES)

    def student():
        return model_of(STUDENT, **STUDENT_OF_STRIPES)

    run(tmp_path / "straight", student(), initial)
    with pytest.raises(tiny_runs.Killed):
        run(tmp_path / "killed", student(), initial, test_train_task.ShortData, lasts=5)
    run(tmp_path / "killed", student(), initial)
    straight = tiny_runs.arrays_of(tmp_path / "straight")
    tiny_runs.assert_same_bits(tiny_runs.arrays_of(tmp_path / "killed"), straight)
    averages = [name for name in straight if "weight_average" in name]
    assert averages and not any("teacher/" in name for name in averages)
    for weights in ("trained", "average"):
        scores = [
            evaluate.evaluate_checkpoint(
                model,
                partitioning=tiny_runs.ONE_DEVICE,
                checkpoint=str(tmp_path / "straight"),
                tasks=TASK,
                split="validation",
                feature_lengths=LENGTHS,
                batch_size=8,
                output_dir=str(tmp_path / name),
                weights=weights,
            )[TASK].metrics
            for name, model in (("both", student()), ("alone", model_of(STUDENT)))
        ]
        assert scores[0]["accuracy"] == scores[1]["accuracy"]
        assert 0 <= scores[0]["example/teacher_agreement"] <= 1
        assert "example/teacher_agreement" not in scores[1]
