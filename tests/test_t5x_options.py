"""The table of what our options are under T5X, and the check of a recipe against it.

T5X is not needed: gin reads the recipe, and what T5X's own files say is put beside it.
"""

import importlib
import inspect
from typing import Any

import gin
import gin_files
import pytest
from gin import config as gin_config
from gin_files import CONFIGS, ROOT

from vit22b_transfer.models import multimodal
from vit22b_transfer.recipes import loading, t5x_bindings, t5x_options
from vit22b_transfer.recipes.reader import Reader, Recipe, RecipeError
from vit22b_transfer.training import train

VQA = CONFIGS / "recipes/vqav2.gin"
# What T5X's run files and ours for it say of their own.
OF_T5X = {
    ("", "t5x.utils.SaveCheckpointConfig"): {"keep": None},
    ("", "t5x.partitioning.PjitPartitioner"): {
        "num_partitions": 1,
        "model_parallel_submesh": None,
    },
    ("train", "t5x.utils.DatasetConfig"): {"split": "train"},
    ("train_eval", "t5x.utils.DatasetConfig"): {"split": "validation"},
    ("RANDOM_SEED", "gin.macro"): {"value": None},
    # T5X's own, whatever their value: of its own models.
    ("DROPOUT_RATE", "gin.macro"): {"value": 0.1},
}


@pytest.fixture(autouse=True)
def no_gin_left_over():
    yield
    gin.clear_config()


def checked(job, *overrides, behind=(), t5x: Any = None, recipe=VQA):
    """The sentences of `t5x_bindings.check` for a recipe, else that of VQAv2."""
    paths = [CONFIGS / f"{name}.gin" for name in behind]
    read = gin_files.read_recipe(recipe, *overrides, behind=paths)
    loading.install(read, train.fine_tune, [str(ROOT)])
    model = gin_config._CONFIG["", f"{train.__name__}.fine_tune"]["model"]
    own = {("", "vit22b_transfer.t5x_adapter.for_t5x"): {"model": model}}
    seed = gin_config.ConfigurableReference("RANDOM_SEED/gin.macro", True)
    own[("", "t5x.train.train")] = {"random_seed": seed}
    for key, values in (OF_T5X | own | (t5x or {})).items():
        gin_config._CONFIG[key] = gin_config._CONFIG.get(key, {}) | values
    return t5x_bindings.check(job)


# --- The table ---


def resolved(selector):
    module, _, name = selector.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("selector", t5x_options.TABLE)
def test_every_parameter_has_a_row_and_no_row_is_left_over(selector):
    """A new option of our runtime says here what it is under T5X."""
    jobs, rows = t5x_options.TABLE[selector]
    assert set(jobs) <= set(t5x_options.JOBS)
    assert set(rows) == set(inspect.signature(resolved(selector)).parameters)


def test_the_exceptions_of_one_job_name_what_there_is():
    for job, selector, parameter in t5x_options.IN_ONE_JOB:
        assert job in t5x_options.JOBS
        assert parameter in inspect.signature(resolved(selector)).parameters


def test_all_that_shipped_files_configure_is_shared_or_in_the_table():
    said = Recipe((), ())
    for path in [*gin_files.RECIPES, *gin_files.BEHIND]:
        name = path.relative_to(ROOT).as_posix()
        Reader(said, [str(ROOT)], ()).read(name, "tested")
    names = {binding.name for binding in said.bindings.values()}
    ours = {name for name in names if name.startswith("vit22b_transfer.")}
    assert len(ours) > 20
    shared = {name for name in ours if name.startswith(t5x_options.SHARED)}
    assert ours - shared <= set(t5x_options.TABLE)


# --- The check ---


@pytest.mark.parametrize("job", ["train", "eval", "infer", "precompile"])
def test_a_shipped_recipe_is_heeded_in_every_job(job):
    assert checked(job) == []
    assert checked(job, behind=["runs/augment"]) == []


def test_what_is_t5x_own_matter_is_told():
    (told,) = checked("train", "train.Periods.checkpoint=7")
    assert told.startswith("train.Periods.checkpoint = 7 does nothing under T5X: ")
    assert "utils.SaveCheckpointConfig.period" in told


KEEP = ("", "t5x.utils.SaveCheckpointConfig")
MESH = ("", "t5x.partitioning.PjitPartitioner")
AXES = ("", "t5x.partitioning.standard_logical_axis_rules")


def test_a_live_teacher_is_heeded_and_a_cached_one_refused_by_name():
    classes = CONFIGS / "recipes/image_folder.gin"
    for name in ("distill", "distill_tokens", "distill_tokens_cosine"):
        assert checked("train", behind=[f"runs/{name}"], recipe=classes) == []
    words = "TrainData.teacher_cache.*not the cached logits of a teacher"
    for job in ("train", "precompile"):
        with pytest.raises(RecipeError, match=words):
            checked(job, behind=["runs/distill_cached"], recipe=classes)


@pytest.mark.parametrize(
    "job, overrides, t5x",
    [
        ("train", ["fine_tune.keep=2"], {KEEP: {"keep": 2}}),
        ("train", ["fine_tune.seed=2"], {("RANDOM_SEED", "gin.macro"): {"value": 2}}),
        ("train", ["Partitioning.model=2"], {MESH: {"num_partitions": 2}}),
        (
            "train",
            ["Partitioning.model=2"],
            {MESH: {"model_parallel_submesh": (1, 2, 1, 1)}},
        ),
        (
            "infer",
            ["Partitioning.parameter_partitioning_dims=2"],
            {AXES: {"parameter_partitioning_dims": 2}},
        ),
        ("train", [], {MESH: {"num_partitions": 4}}),
        ("train", ["fine_tune.num_microbatches=2"], {}),
        ("train", ["fine_tune.model_dir='/nowhere'"], {}),
        ("precompile", ["fine_tune.keep=2", "EvalData.split='test'"], {}),
        ("train", ["evaluate_checkpoint.seed=3", "infer_split.seed=3"], {}),
        ("eval", ["fine_tune.keep=3", "infer_split.seed=3"], {}),
        ("finetune", ["fine_tune.initial=None"], {}),
    ],
)
def test_what_t5x_heeds_is_taken(job, overrides, t5x):
    assert checked(job, *overrides, t5x=t5x) == []


@pytest.mark.parametrize(
    "job, overrides, behind, words",
    [
        ("train", ["fine_tune.keep=2"], [], "fine_tune.keep = 2: .*SaveCheckpointC"),
        ("train", ["fine_tune.seed=2"], [], "fine_tune.seed = 2: .*RANDOM_SEED"),
        ("train", ["fine_tune.eval_data=None"], [], "train_eval_dataset_cfg=None"),
        ("train", ["fine_tune.model_dir='/other'"], [], "'/other': .*MODEL_DIR"),
        ("train", ["fine_tune.total_steps=7"], [], "= 7: .*macro TRAIN_STEPS"),
        ("train", ["TrainData.batch_size=7"], [], "= 7: .*macro BATCH_SIZE"),
        ("train", ["TrainData.split='test'"], [], "train/utils.DatasetConfig.split"),
        ("train", ["EvalData.tasks=('a',)"], [], "macro EVAL_TASKS"),
        ("train", ["Partitioning.data=2"], [], "takes all devices"),
        ("train", [], ["meshes/model_parallel_2"], "model = 2: .*num_partitions"),
        ("eval", [], ["meshes/fsdp"], "parameter_partitioning_dims = 2"),
        ("infer", [], ["meshes/activations_2d_async"], "activations_2d.gin lays"),
        ("train", [], ["runs/cached_features"], "TrainData.cache.*not cached features"),
        ("precompile", [], ["runs/cached_features"], "TrainData.cache"),
        ("train", ["TrainData.augmentation=None"], ["runs/augment"], "AUGMENTATION"),
        ("precompile", [], ["models/int8_tower"], "int8_tower = True"),
        ("precompile", ["fine_tune.num_microbatches=2"], [], "on a whole batch"),
        ("eval", ["evaluate_checkpoint.seed=1"], [], "seed of its own"),
        ("infer", ["infer_split.seed=1"], [], "seed of its own"),
        ("infer", ["infer_split.output='/x'"], [], "macro OUTPUT"),
        ("eval", ["evaluate_checkpoint.split='test'"], [], "macro EVAL_SPLIT"),
    ],
)
def test_what_t5x_would_ignore_is_refused_by_name_with_the_way_out(
    job, overrides, behind, words
):
    with pytest.raises(RecipeError, match=words):
        checked(job, *overrides, behind=behind)


def test_all_of_it_is_told_at_once():
    with pytest.raises(RecipeError) as caught:
        checked("train", "fine_tune.keep=2", "fine_tune.seed=3", "Partitioning.data=4")
    assert len(str(caught.value).splitlines()) == 4


def test_another_model_than_t5x_is_given_is_refused():
    key = ("", "vit22b_transfer.t5x_adapter.for_t5x")
    with pytest.raises(RecipeError, match=r"fine_tune.model = @.*for_t5x.model"):
        checked("train", t5x={key: {"model": multimodal.ImageTextModel}})


def test_a_macro_that_nothing_uses_is_refused_as_in_our_runtime():
    """`--gin.INITIAL_CHECKPOINT_PATH` with t5x_train.gin, or a slip of the pen."""
    for name, value, words in (
        ("INITIAL_CHECKPOINT_PATH", "/x", "Did you mean INITIAL_CHECKPOINT or"),
        ("DROPOUT_RATE", 0.2, "regularization.gin"),
    ):
        with pytest.raises(RecipeError) as caught:
            checked("train", t5x={(name, "gin.macro"): {"value": value}})
        assert f"{name} = {value!r}" in str(caught.value) and words in str(caught.value)


def test_a_function_of_ours_that_the_table_lacks_is_refused():
    key = ("", "vit22b_transfer.training.logs.StepTimer")
    with pytest.raises(RecipeError, match="StepTimer.step = 3: T5X does not use it"):
        checked("train", t5x={key: {"step": 3}})


def test_values_are_read_as_they_are_bound():
    checked("train", "fine_tune.num_microbatches=4")
    initial = t5x_bindings.bound_to(f"{train.__name__}.fine_tune", "initial")
    assert initial == train.InitialCheckpoint("/nowhere/checkpoint_1")
    bound = t5x_bindings.bound_to(f"{train.__name__}.fine_tune", "num_microbatches")
    assert bound == 4
    assert t5x_bindings.bound_to("a.b", "c") is None
