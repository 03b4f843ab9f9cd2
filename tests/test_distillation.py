"""Distillation: distances by independent definitions, the teacher, what learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
import tiny_classifier
import tiny_models
import tiny_runs
from flax.traverse_util import flatten_dict
from torch_peers import torch

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import restoring
from vit22b_transfer.models import distillation, lora
from vit22b_transfer.models import mixup as mixing
from vit22b_transfer.models.preparation import Preparation
from vit22b_transfer.models.token_distances import TokenDistance, cosine
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.train import InitialCheckpoint, Periods

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

CLASSES = 7
SIZE = tiny_models.IMAGE_SIZE
RULES = (("teacher/(.*)", r"\1"), (".*", None))
STUDENT = tiny_models.tower_config(depth=1, pooling="gap")
# Another width: nothing of the student's shapes fits it.
TEACHER = tiny_models.tower_config(depth=1, width=48, pooling="gap")


def logits(seed, scale=3.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal((6, CLASSES))).astype(np.float32)


def values(function, *arrays, **options):
    return np.asarray(function(*map(jnp.asarray, arrays), **options))


# --- Distances ---


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_that_of_scipy_optax_and_torch(temperature):
    student, teacher = logits(0), logits(1)
    found = values(
        distillation.kl_divergence, student, teacher, temperature=temperature
    )
    lower = [x.astype(np.float64) / temperature for x in (student, teacher)]
    shares = [scipy.special.softmax(x, axis=-1) for x in lower]
    by_scipy = scipy.stats.entropy(shares[1], shares[0], axis=-1)
    np.testing.assert_allclose(found, temperature**2 * by_scipy, rtol=2e-5)
    log_student = jax.nn.log_softmax(jnp.asarray(lower[0], jnp.float32))
    by_optax = optax.losses.kl_divergence(log_student, jnp.asarray(shares[1]))
    np.testing.assert_allclose(found, temperature**2 * by_optax, rtol=2e-5)
    by_torch = torch.nn.functional.kl_div(
        torch.log_softmax(torch.tensor(lower[0]), -1),
        torch.log_softmax(torch.tensor(lower[1]), -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    np.testing.assert_allclose(found, temperature**2 * by_torch.numpy(), rtol=2e-5)


def test_the_divergence_is_big_visions_with_labels_clipped_inside_the_logarithm():
    """Where the teacher is sure of a class, too: logits 60 apart."""
    student, teacher = logits(0), logits(1)
    teacher[2, 3] += 60.0
    found = values(distillation.kl_divergence, student, teacher, temperature=2.0)
    shares = scipy.special.softmax(teacher.astype(np.float64) / 2.0, axis=-1)
    cross = -(shares * scipy.special.log_softmax(student.astype(np.float64) / 2, -1))
    entropy = -(shares * np.log(np.maximum(shares, 1e-8)))
    np.testing.assert_allclose(found, 4.0 * (cross - entropy).sum(-1), rtol=1e-5)


def test_a_high_temperature_compares_the_logits_themselves():
    """Hinton et al. 2015, equation 4: half the mean square of centred differences."""
    student, teacher = logits(0), logits(1)
    found = values(distillation.kl_divergence, student, teacher, temperature=300.0)
    apart = student - teacher
    apart = apart - apart.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, (apart**2).mean(-1) / 2, rtol=3e-2)


def test_whoever_says_the_same_is_at_no_distance_and_agrees():
    same, shifted = logits(2), logits(2) + np.float32(5.0)
    for temperature in (1.0, 4.0):
        found = values(
            distillation.kl_divergence, same, shifted, temperature=temperature
        )
        np.testing.assert_allclose(found, 0.0, atol=1e-5)
    assert not values(distillation.euclidean_distance, same, same).max() > 1e-5
    told = distillation.distances(jnp.asarray(same), jnp.asarray(shifted))
    assert np.all(np.asarray(told["teacher_agreement"]) == 1.0)
    np.testing.assert_allclose(told["teacher_distance"], 5.0 * CLASSES**0.5, rtol=1e-5)
    gradient = jax.grad(lambda x: distillation.euclidean_distance(x, x).sum())
    assert np.all(np.isfinite(gradient(jnp.asarray(same))))


def test_agreement_asks_for_the_teachers_best_class():
    student = np.array([[4.0, 3.0, 2.0, 1.0]] * 4, np.float32)
    teacher = np.eye(4, dtype=np.float32)
    for top, expected in ((1, [1, 0, 0, 0]), (3, [1, 1, 1, 0])):
        found = values(distillation.agreement, student, teacher, top=top)
        np.testing.assert_array_equal(found, expected)


# --- The model ---


def batch(seed=0, size=tiny_runs.BATCH_SIZE):
    """Images of greys, one label each; the last has none."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, (size, 1)).astype(np.int32)
    images = rng.integers(0, 40, (size, *SIZE, 3)) + 36 * labels[..., None, None]
    return {
        "encoder_input_images": np.minimum(images, 255).astype(np.uint8),
        "labels": labels,
        "label_weights": (np.arange(size) < size - 1).astype(np.float32)[:, None],
    }


def plain(tower, **arguments):
    schedule = optimizers.cosine(3e-3, total_steps=100, warmup_steps=2)
    optimizer = optimizers.adamw(schedule, weight_decay=0.1)
    return tiny_classifier.classifier(
        tower, optimizer, num_classes=CLASSES, **arguments
    )


def student_of(teacher=TEACHER, *, temperature=1.0, label_weight=0.0, **arguments):
    taught = distillation.Distillation(teacher, temperature, label_weight)
    return plain(STUDENT, distillation=taught, **arguments)


@functools.cache
def both():
    """Parameters of a student with its teacher, none of them as they start."""
    model = student_of()
    shapes = {name: array.shape for name, array in batch().items()}
    images = jnp.asarray(batch()["encoder_input_images"])
    params = dict(tiny_models.random_params(model.module, images, seed=3))
    teacher = plain(TEACHER).module
    params["teacher"] = tiny_models.random_params(teacher, images, seed=4)
    fresh = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, shapes), jax.random.key(0)
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh["params"])
    axes = flatten_dict(fresh["params_axes"], sep="/")
    assert axes["teacher/head/kernel_axes"] == axes["head/kernel_axes"]
    return params


def said(module, params, images):
    return np.asarray(module.apply({"params": params}, jnp.asarray(images)))


@pytest.mark.parametrize(
    "temperature, label_weight, smoothing", [(1.0, 0.0, 0.0), (3.0, 0.5, 0.2)]
)
@pytest.mark.parametrize("mixup", [None, 1.0])
def test_the_loss_compares_what_both_say_of_the_same_mixed_pixels(
    temperature, label_weight, smoothing, mixup
):
    rows, key, params = batch(), jax.random.key(5), both()
    settings = {"temperature": temperature, "label_weight": label_weight}
    model = student_of(**settings, mixup=mixup, label_smoothing=smoothing)
    images, real = rows["encoder_input_images"], rows["label_weights"][:, 0]
    targets = np.eye(CLASSES, dtype=np.float32)[rows["labels"][:, 0]] * real[:, None]
    if mixup:
        images, targets = mixing.mixup(key, jnp.asarray(images), jnp.asarray(targets))
    student = said(model.module, params, images)
    teacher = said(plain(TEACHER).module, params["teacher"], images)
    each = values(distillation.kl_divergence, student, teacher, temperature=temperature)
    smooth = (1 - smoothing) * np.asarray(targets) + smoothing / CLASSES
    cross = np.asarray(optax.softmax_cross_entropy(student, smooth))
    expected = ((each + label_weight * cross) * real).sum()
    loss, metrics = model.loss_fn(params, rows, key)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert float(metrics["loss"].count) == real.sum() == len(real) - 1
    apart = {
        "agreement": student.argmax(-1) == teacher.argmax(-1),
        "divergence": values(distillation.kl_divergence, student, teacher),
        "distance": np.linalg.norm(student - teacher, axis=-1),
    }
    for name, of_each in apart.items():
        told = metrics[f"teacher_{name}"].compute()
        np.testing.assert_allclose(told, of_each[real > 0].mean(), rtol=2e-5)


def test_the_gradient_is_the_students_alone():
    model, params = student_of(label_weight=1.0), both()
    gradient = jax.grad(lambda p: model.loss_fn(p, batch(), None)[0])(params)
    for path, values_ in flatten_dict(gradient, sep="/").items():
        assert np.any(values_) != path.startswith("teacher/"), path


def test_predictions_and_scores_are_the_students():
    model, alone = student_of(), plain(STUDENT)
    params = both()
    own = {name: part for name, part in params.items() if name != "teacher"}
    for method in ("predict_batch", "score_batch"):
        np.testing.assert_array_equal(
            getattr(model, method)(params, batch()),
            getattr(alone, method)(own, batch()),
        )
    _, told = jax.eval_shape(model.eval_fn, params, batch())
    assert {f"teacher_{x}" for x in ("agreement", "distance", "divergence")} <= {*told}


def test_a_teacher_that_says_nothing_of_its_images_takes_those_of_the_student():
    taught = distillation.Distillation(TEACHER)
    tower = tiny_models.tower_config(pooling="gap", preparation=Preparation())
    assert plain(tower, distillation=taught).teacher.tower is TEACHER


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": 0.0}, "temperature of a distillation is 0.0"),
        ({"temperature": float("inf")}, "temperature of a distillation is inf"),
        ({"label_weight": -1.0}, "label_weight of a distillation is -1.0"),
        ({"loss": "sigmoid"}, "compares two softmaxes, but the loss is sigmoid"),
        ({"label_smoothing": 0.1}, "learns nothing from labels"),
        (
            {"teacher": tiny_models.tower_config(preparation=Preparation())},
            "the student's tower does not say how, and the teacher's images",
        ),
        (
            {"teacher": tiny_models.tower_config(pooling="none")},
            "this tower has none",
        ),
    ],
)
def test_what_cannot_be_taught_is_refused(arguments, message):
    shapes = {name: array.shape for name, array in batch().items()}
    with tiny_models.without_type_checks(), pytest.raises(UserError, match=message):
        jax.eval_shape(
            lambda rng: student_of(**arguments).get_initial_variables(rng, shapes),
            jax.random.key(0),
        )


# --- In a training ---


def run(folder, model, total_steps, **arguments):
    return tiny_runs.run(
        folder,
        model,
        total_steps=total_steps,
        **{"data": tiny_runs.Data(batch=batch), "eval_data": None}
        | {"periods": Periods(log=1, evaluate=100, checkpoint=3)}
        | arguments,
    )


def mixed_student():
    """Of classes and tokens, which a map takes to the teacher's width."""
    tokens = TokenDistance(cosine)
    taught = distillation.Distillation(TEACHER, 2.0, tokens=tokens)
    return plain(STUDENT, distillation=taught, mixup=1.0)


def taught(folder, teacher, total_steps=6, **arguments):
    model = mixed_student()
    initial = InitialCheckpoint(str(teacher), RULES)
    return run(folder, model, total_steps, initial=initial, **arguments)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    run(folder, plain(TEACHER), 8)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("student")
    taught(folder, teacher, total_steps=6)
    return folder


def test_a_teacher_stays_what_it_was_and_has_no_optimizer_state(teacher, student):
    before, after = tiny_runs.arrays_of(teacher), tiny_runs.arrays_of(student)
    names = {n for n in before if n.startswith("target/")}
    assert names
    for name in names:
        kept = after[name.replace("target/", "target/teacher/", 1)]
        assert kept.tobytes() == before[name].tobytes(), name
    assert not [n for n in after if "state" in n.split("/")[0] and "teacher/" in n]
    losses = [
        line["train/loss"] for line in tiny_runs.logged(student) if "train/loss" in line
    ]
    assert losses[-1] < losses[0]


def test_a_killed_training_goes_on_to_the_bit_with_mixup(student, teacher, tmp_path):
    with pytest.raises(tiny_runs.Killed):
        taught(tmp_path, teacher, data=tiny_runs.Data(batch=batch, dies_at=4))
    # Without the teacher's checkpoint: the parameters are in the student's own.
    run(tmp_path, mixed_student(), 6)
    tiny_runs.assert_same_bits(
        tiny_runs.arrays_of(tmp_path), tiny_runs.arrays_of(student)
    )


def test_a_student_alone_is_read_from_the_checkpoint_of_both(student):
    abstract = tiny_runs.state.abstract_variables(
        plain(STUDENT), tiny_runs.ONE_DEVICE, batch()
    )
    shardings = tiny_runs.state.shardings_of(abstract)
    params = restoring.restore_params(str(student), abstract, shardings)
    saved = tiny_runs.arrays_of(student)
    for name, values_ in flatten_dict(params, sep="/").items():
        assert np.asarray(values_).tobytes() == saved[f"target/{name}"].tobytes()
    assert restoring.teacher_left_out(str(student), abstract) == sum(
        name.startswith(("target/teacher/", "target/token_map/")) for name in saved
    )
    assert {"target/token_map/kernel", "target/token_map/bias"} <= saved.keys()
    del abstract["head"]
    with pytest.raises(UserError, match="target/head/bias: not in the model"):
        restoring.restore_params(
            str(student), abstract, tiny_runs.state.shardings_of(abstract)
        )


def test_a_teacher_is_never_random(teacher, tmp_path):
    with pytest.raises(UserError, match="teacher/.* is learned from and not trained"):
        run(tmp_path, student_of(), 2)
    some = (("teacher/encoder/(.*)", r"encoder/\1"), (".*", None))
    with pytest.raises(UserError, match="teacher/head/.* neither loaded"):
        initial = InitialCheckpoint(str(teacher), some)
        run(tmp_path, student_of(), 2, initial=initial)


def test_a_student_whose_base_would_stay_random_is_refused(teacher, tmp_path):
    updates = lora.LoraConfig(2, 4.0, (".*attention/(query|value)/kernel",))
    initial = InitialCheckpoint(str(teacher), RULES)
    for arguments in ({"lora": updates}, {"frozen_tower": True}):
        with pytest.raises(UserError, match="encoder/tower/.* would stay random"):
            run(tmp_path, student_of(**arguments), 2, initial=initial)
