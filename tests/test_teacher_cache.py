"""A teacher's logits on disk: as those of a live one, and of no other picture."""

import dataclasses
import functools
import itertools

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio
import tensorflow as tf
import tiny_classifier
import tiny_models
import tiny_runs
from array_tasks import ArraySource
from gin_files import CONFIGS, ROOT, read_recipe
from tiny_classifier import LENGTHS, NUM_CLASSES, SIZE
from tiny_runs import ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading, restoring, writing
from vit22b_transfer.data.augmentation import Augmentation
from vit22b_transfer.data.teacher_cache import TeacherCache
from vit22b_transfer.inference import cache_features
from vit22b_transfer.models.distillation import Distillation
from vit22b_transfer.planning import jobs
from vit22b_transfer.recipes import loading
from vit22b_transfer.training import optimizers, run_settings, state, train
from vit22b_transfer.training.inputs import EvalData, TrainData
from vit22b_transfer.training.train import InitialCheckpoint, Periods, fine_tune

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

TASK = "teacher_cache_test"
NUM_EXAMPLES, NUM_PICTURES = 21, 10
RULES = (("teacher/(.*)", r"\1"), (".*", None))
# Another width than the student's.
TEACHER = tiny_models.tower_config(depth=1, width=48, pooling="gap")


def picture(number):
    """Example `number` shows one of ten pictures of noise, so some of them twice."""
    seed = tf.stack([tf.cast(number % NUM_PICTURES, tf.int32), 0])
    pixels = tf.random.stateless_uniform([SIZE, SIZE, 3], seed, 0, 256, tf.int32)
    return tiny_classifier.example(number) | {"images": tf.cast(pixels, tf.uint8)}


def pictures(name=TASK, make=picture):
    return tiny_classifier.register(name, NUM_EXAMPLES, make=make)


@pytest.fixture(scope="module", autouse=True)
def task():
    pictures()
    yield
    seqio.TaskRegistry.remove(TASK)


def student(teacher=TEACHER, *, cached=True, label_weight=0.5, **arguments):
    """SGD compiles fastest."""
    taught = Distillation(teacher, 2.0, label_weight, cached=cached)
    return tiny_classifier.classifier(
        None, optax.sgd(1e-2), distillation=taught, **arguments
    )


def write_teacher(folder, seed=0, tower=TEACHER, head_bias=None):
    """A checkpoint of a classifier with random parameters, or another bias."""
    model = tiny_classifier.classifier(tower, optax.sgd(1e-2))
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    params = tiny_models.random_params(model.module, images, seed=seed)
    if head_bias is not None:
        params["head"]["bias"] = jnp.full([NUM_CLASSES], head_bias)
    optimizer = optimizers.freeze(model.optimizer_def, params, ())
    abstract = state.abstract_state(params, optimizer, ONE_DEVICE)
    folder.mkdir(exist_ok=True)
    writer = writing.CheckpointWriter(str(folder))
    whole = state.fresh_state(params, optimizer, abstract)
    writer.save(1, state.to_checkpoint_tree(whole), {})
    writer.close()
    return str(folder / "checkpoint_1")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher):
    return TeacherCache(str(tmp_path_factory.mktemp("cache")), teacher)


ARGUMENTS = dict(feature_lengths=LENGTHS, batch_size=8)


def train_data(cache, task=TASK, **more):
    return TrainData(task, "train", **ARGUMENTS, teacher_cache=cache, **more)


def eval_data(cache, task=TASK):
    return EvalData([task], "test", **ARGUMENTS, teacher_cache=cache)


def write(cache, model=None, task=TASK):
    return cache_features.cache_features(
        model or student(),
        partitioning=ONE_DEVICE,
        data=train_data(cache, task),
        eval_data=eval_data(cache, task),
        examples_per_shard=4,
    )


@pytest.fixture(scope="module")
def written(cache):
    return write(cache)


def batch_of(data, model, step=0):
    with data.batches(model, ONE_DEVICE, seed=1, start_step=step) as stream:
        return jax.tree.map(np.asarray, dict(next(stream)))


@functools.cache
def restored(path):
    """Parameters of a live model: a random student, the teacher of a checkpoint."""
    model = student(cached=False)
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    params = dict(tiny_models.random_params(model.module, images, seed=3))
    plain = tiny_classifier.classifier(TEACHER, optax.sgd(1e-2))
    abstract = state.abstract_variables(
        plain, ONE_DEVICE, {"encoder_input_images": images}
    )
    params["teacher"] = restoring.restore_whole(path, abstract)
    return params


def test_each_picture_is_shown_to_the_teacher_once(cache, written, capfd):
    for found in written:
        assert (found.num_examples, found.num_encoded) == (NUM_EXAMPLES, NUM_PICTURES)
        assert (found.num_shards, found.num_kept) == (6, 0)
    again = write(cache)
    assert [(x.num_encoded, x.num_kept) for x in again] == [(0, 6), (0, 6)]
    assert "the teacher was run on 0 images" in capfd.readouterr().out


def test_batches_are_the_live_ones_and_what_the_teacher_says(cache, written, teacher):
    """In any epoch; of an evaluation too, whose last batch is filled up."""
    model, params = student(), restored(teacher)["teacher"]
    says = tiny_models.jit(
        lambda images: model.teacher.apply({"params": params}, images)
    )
    for step in (0, 7):
        live = batch_of(train_data(None), student(cached=False), step)
        found = batch_of(train_data(cache), model, step)
        logits = found.pop("teacher_logits")
        np.testing.assert_allclose(
            logits, says(live["encoder_input_images"]), rtol=2e-6, atol=2e-6
        )
        assert logits.dtype == np.float32 and found.keys() == live.keys()
        for name, value in live.items():
            np.testing.assert_array_equal(found[name], value)
    with eval_data(cache).batches(TASK, model, ONE_DEVICE) as stream:
        rows = [np.asarray(x.features["teacher_logits"]) for x in stream]
    # An order of the pictures, and three rows of nothing.
    assert [len(x) for x in rows] == [8, 8, 8] and not rows[2][5:].any()
    np.testing.assert_array_equal(rows[0][0], rows[1][2])


def test_the_loss_is_the_live_one_without_the_teachers_parameters(
    cache, written, teacher
):
    params, model = restored(teacher), student()
    rows = batch_of(train_data(cache), model)
    own = {name: part for name, part in params.items() if name != "teacher"}
    abstract = state.abstract_variables(model, ONE_DEVICE, rows)
    assert jax.tree.map(np.shape, own) == jax.tree.map(lambda x: x.shape, abstract)
    assert model.given == () == model.frozen

    def of(model, params):
        function = jax.value_and_grad(
            lambda p: model.loss_fn(p, rows, None), has_aux=True
        )
        return tiny_models.jit(function)(params)

    (ours, told), gradient = of(model, own)
    (theirs, live), both = of(student(cached=False), params)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert told.keys() == live.keys() >= {"teacher_agreement", "teacher_divergence"}
    for name, metric in live.items():
        found, value = told[name].compute(), metric.compute()
        np.testing.assert_allclose(found, value, rtol=2e-6)
    del both["teacher"]
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient, both)), strict=True):
        tiny_models.assert_within(1e-5, ours, theirs, "gradient")


def run(folder, model, cache, initial=None, steps=3):
    return fine_tune(
        model,
        model_dir=str(folder),
        data=train_data(cache),
        eval_data=eval_data(cache),
        total_steps=steps,
        partitioning=ONE_DEVICE,
        initial=initial,
        periods=Periods(log=1, evaluate=3, checkpoint=3),
    )


def test_a_training_is_the_live_one_and_keeps_its_teacher(
    cache, written, teacher, tmp_path
):
    initial = InitialCheckpoint(teacher, RULES)
    run(tmp_path / "live", student(cached=False), None, initial)
    run(tmp_path / "cached", student(), cache)
    ours, theirs = (tiny_runs.logged(tmp_path / x) for x in ("cached", "live"))
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert any("eval/teacher_cache_test/teacher_agreement" in line for line in ours)
    names = tiny_runs.arrays_of(tmp_path / "cached")
    assert names and not any("teacher" in name for name in names)
    other = TeacherCache(cache.directory, write_teacher(tmp_path / "other", seed=5))
    with pytest.raises(UserError, match="not be one run: teacher was .* is now"):
        run(tmp_path / "cached", student(), other, steps=4)


def test_what_a_run_learned_from_is_in_its_settings(cache):
    found = run_settings.of_data(train_data(cache), None)["teacher"]
    assert found == reading.classifier_digest(cache.teacher)
    assert run_settings.of_data(train_data(None), None)["teacher"] is None
    assert "teacher" in run_settings.EXACT


def test_a_picture_that_the_teacher_was_not_shown_is_named(cache, written):
    """The fingerprint is the same, as where a file of that name has other content."""

    def changed(number):
        example = picture(number)
        pixel = tf.cast(number == 13, tf.uint8)[None, None, None]
        corner = tf.pad(pixel, [[0, SIZE - 1], [0, SIZE - 1], [0, 2]])
        return example | {"images": example["images"] ^ corner}

    pictures(make=changed)
    try:
        with pytest.raises(UserError, match="not shown the image 13 of task"):
            for step in range(3):
                batch_of(train_data(cache), student(), step)
    finally:
        pictures()


def flipped_at_random(dataset, seeds=None):
    return dataset


def reading_of(cache, model=None):
    return batch_of(train_data(cache), model or student())


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda cache, _: train_data(
                cache, augmentation=Augmentation(crop_area=(0.5, 1.0))
            ),
            "shows others in every step. Leave .*augment.gin out",
        ),
        (lambda *_: student(mixup=1.0), "mixup=1.0 blends them anew"),
        (
            lambda cache, _: reading_of(
                cache, student(dataclasses.replace(TEACHER, mlp_dim=128))
            ),
            r"(?s)stale: .*tower.mlp_dim \('64' there, '128' here\)",
        ),
        (
            lambda cache, _: reading_of(
                cache, student(dataclasses.replace(TEACHER, pooling="map"))
            ),
            r"tower.pooling \('gap' there, 'map' here\)",
        ),
        (
            lambda cache, folder: reading_of(
                TeacherCache(cache.directory, write_teacher(folder, seed=5))
            ),
            "(?s)cached logits of a teacher of task .* are stale: .*weights",
        ),
        (
            lambda cache, folder: reading_of(
                TeacherCache(cache.directory, write_teacher(folder, head_bias=0.5))
            ),
            "(?s)cached logits of a teacher of task .* are stale: .*weights",
        ),
        (
            lambda cache, folder: reading_of(TeacherCache(str(folder), cache.teacher)),
            "there are no cached logits of a teacher of task",
        ),
        (lambda *_: reading_of(None), "the data has no teacher_cache"),
        (
            lambda cache, _: reading_of(cache, student(cached=False)),
            "has no effect: the model does not learn from cached logits",
        ),
        (
            lambda cache, _: reading_of(cache, tiny_classifier.classifier()),
            "has no effect: the model does not learn from cached logits",
        ),
        (lambda *_: write(None), "must have the same cache to write"),
        (
            lambda cache, folder: write(
                TeacherCache(
                    str(folder),
                    write_teacher(folder, tower=tiny_models.tower_config(depth=1)),
                )
            ),
            "does not fit the model",
        ),
        (
            lambda *_: student().eval_fn(
                restored_student(), batch_of(train_data(None), student(cached=False))
            ),
            "the batch has none. `vit22b eval` and `vit22b infer` go without",
        ),
    ],
)
def test_what_the_teacher_cannot_have_seen_is_refused(
    make, message, cache, written, tmp_path
):
    with tiny_models.without_type_checks(), pytest.raises(UserError, match=message):
        make(cache, tmp_path)


def restored_student():
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    return tiny_models.random_params(student().module, images, seed=3)


def test_a_task_that_draws_its_own_crops_is_refused(cache):
    name = f"{TASK}_random"
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=ArraySource(NUM_EXAMPLES, picture),
        preprocessors=[flipped_at_random],
        output_features=seqio.TaskRegistry.get(TASK).output_features,
    )
    try:
        for use in (write, lambda c, task: batch_of(train_data(c, task), student())):
            message = "draws random numbers .*: .*Run the teacher"
            with pytest.raises(UserError, match=message):
                use(cache, task=name)
    finally:
        seqio.TaskRegistry.remove(name)


# --- gin ---

RECIPE = CONFIGS / "recipes/image_folder.gin"


@pytest.fixture
def no_gin_left_over():
    yield
    gin.clear_config()


def made_by(*names, root=train.fine_tune):
    paths = [CONFIGS / f"runs/{name}.gin" for name in names]
    read = read_recipe(RECIPE, behind=paths)
    return loading.arguments(read, root, [str(ROOT)])


def test_one_gin_file_turns_a_recipe_to_its_cache(no_gin_left_over):
    for names in itertools.permutations(["distill_cached", "from_checkpoint"]):
        made = made_by(*names)
        found = TeacherCache("/cache", "/nowhere/checkpoint_2")
        assert made["data"].teacher_cache == made["eval_data"].teacher_cache == found
        lesson = made["model"].distillation
        assert lesson.cached and lesson.teacher.width == 768
        assert made["model"].module.tower.width == 192
        assert made["initial"].path == "/nowhere/checkpoint_1"
    job = jobs.Job.from_arguments(made_by("distill_cached"))
    assert job.batch["teacher_logits"].shape == (64, 7)
    assert job.variables()["params"].keys() == {"encoder", "head"}
    made = made_by("distill_cached", root=cache_features.cache_features)
    assert made["data"].teacher_cache == made["eval_data"].teacher_cache == found


@pytest.mark.parametrize(
    "name, message",
    [
        ("mixup", "mixup=1.0 blends them anew"),
        ("augment", "shows others in every step"),
        ("distill", "Distillation.cached"),
        ("distill_tokens", "Distillation.cached"),
    ],
)
def test_what_shows_the_teacher_other_pictures_is_refused_in_either_order(
    name, message, no_gin_left_over
):
    for names in itertools.permutations(["distill_cached", name]):
        with pytest.raises(UserError, match=message):
            made_by(*names)
