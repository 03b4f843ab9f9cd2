"""The classifier: its losses, metrics and predictions, by their definitions."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_classifier
import tiny_models
from flax.traverse_util import flatten_dict

from vit22b_transfer import UserError
from vit22b_transfer.models import classifier, freezing, lora
from vit22b_transfer.models import mixup as mixing
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import inputs, microbatches

CLASSES = 7
SIZE = tiny_models.IMAGE_SIZE
IDS = np.array([[3, 0, 0], [1, 6, 0], [0, 2, 5], [0, 0, 0], [4, 0, 0]], np.int32)
COUNTS = np.array([1, 2, 3, 0, 1])  # the fourth image has no label
WEIGHTS = (np.arange(3)[None] < COUNTS[:, None]).astype(np.float32)
SHAPES = {"encoder_input_images": (5, *SIZE, 3), "labels": (5, 3)}
HOT = np.zeros((5, CLASSES), np.float32)
for row, count in enumerate(COUNTS):
    HOT[row, IDS[row, :count]] = 1.0
REAL = COUNTS > 0


def batch(**changed):
    images = jnp.asarray(tiny_models.images(5, *SIZE, 3, seed=1))
    whole = {"encoder_input_images": images, "labels": IDS, "label_weights": WEIGHTS}
    return whole | changed


def model_of(**arguments):
    return tiny_classifier.classifier(**{"num_classes": CLASSES} | arguments)


@functools.cache
def made():
    """Parameters of a model, and its logits of the batch's images."""
    module, images = model_of().module, batch()["encoder_input_images"]
    params = tiny_models.random_params(module, images, seed=2)
    return params, np.asarray(module.apply({"params": params}, images))


@pytest.fixture
def params():
    return made()[0]


@pytest.fixture
def logits():
    return made()[1]


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_losses_are_sums_over_the_labelled_images(params, logits, loss, smoothing):
    model = model_of(loss=loss, label_smoothing=smoothing)
    targets = HOT[REAL]
    if loss == "softmax":
        targets = targets / targets.sum(axis=1, keepdims=True)
        targets = optax.smooth_labels(jnp.asarray(targets), smoothing)
        each = optax.softmax_cross_entropy(logits[REAL], targets)
    else:
        targets = optax.smooth_labels(jnp.asarray(targets), smoothing)
        each = optax.sigmoid_binary_cross_entropy(logits[REAL], targets).sum(axis=1)
    each = np.asarray(each)
    for function in (model.eval_fn, lambda p, b: model.loss_fn(p, b, None)):
        found, metrics = function(params, batch())
        np.testing.assert_allclose(found, each.sum(), rtol=2e-6)
        assert float(metrics["loss"].count) == REAL.sum() == 4
        assert metrics["loss"].total == found


def test_rows_that_fill_up_a_batch_change_nothing(params):
    small, whole = model_of().eval_fn(params, batch())
    filled = {
        name: np.concatenate([rows, np.zeros_like(rows)])
        for name, rows in batch().items()
    }
    loss, metrics = model_of().eval_fn(params, filled)
    np.testing.assert_allclose(loss, small, rtol=1e-6)
    for name, metric in metrics.items():
        np.testing.assert_allclose(metric.compute(), whole[name].compute(), rtol=1e-6)


def test_weights_between_0_and_1_mix_labels(params, logits):
    """What mixes images need only give the labels of both, and their shares."""
    mixed = batch(
        labels=np.array([[3, 5, 0]] * 5), label_weights=np.array([[0.25, 0.75, 0]] * 5)
    )
    targets = classifier.label_targets(mixed, CLASSES)
    np.testing.assert_allclose(targets[0], [0, 0, 0, 0.25, 0, 0.75, 0])
    loss, _ = model_of().loss_fn(params, mixed, None)
    expected = optax.softmax_cross_entropy(logits, np.asarray(targets)).sum()
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    same = batch(
        labels=np.array([[3, 3, 0]] * 5), label_weights=np.array([[0.25, 0.75, 0]] * 5)
    )
    assert classifier.label_targets(same, CLASSES)[0, 3] == 1.0


def test_hits_are_those_of_any_label(params, logits):
    _, metrics = model_of().eval_fn(params, batch())
    order = np.argsort(-logits, axis=1)
    for name, count in (("accuracy", 1), ("accuracy_top_5", 5)):
        hits = [HOT[row, order[row, :count]].any() for row in np.flatnonzero(REAL)]
        np.testing.assert_allclose(metrics[name].compute(), np.mean(hits))
    few = model_of(num_classes=4)
    params = tiny_models.random_params(few.module, batch()["encoder_input_images"])
    _, metrics = few.eval_fn(params, batch(labels=np.minimum(IDS, 3)))
    assert set(metrics) == {"loss", "accuracy"}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_scores_and_predictions_are_log_probabilities(params, logits, loss):
    model = model_of(loss=loss, label_smoothing=0.1, all_scores=True)
    softmax = loss == "softmax"
    logs = np.asarray((jax.nn.log_softmax if softmax else jax.nn.log_sigmoid)(logits))
    found, more = model.score_batch(params, batch(), return_intermediates=True)
    if softmax:
        expected = (HOT * logs).sum(axis=1) / np.maximum(COUNTS, 1)
    else:
        expected = HOT * logs + (1 - HOT) * np.asarray(jax.nn.log_sigmoid(-logits))
        expected = expected.sum(axis=1) * REAL
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(more["logits"], logits, rtol=1e-5, atol=1e-6)
    best, aux = model.predict_batch_with_aux(params, batch())
    np.testing.assert_array_equal(best, logits.argmax(axis=1))
    np.testing.assert_array_equal(best, model.predict_batch(params, batch()))
    np.testing.assert_allclose(aux["all_scores"], logs, rtol=1e-4, atol=1e-5)
    order = np.argsort(-logits, axis=1)[:, :5]
    np.testing.assert_array_equal(aux["top_classes"], order)
    assert np.all(aux["scores"] == aux["top_scores"][:, 0])


def test_a_record_names_the_class_where_names_are_given():
    names = tuple("abcdefg")
    row = (np.int32(2), {"scores": np.float32(-1), "top_classes": np.array([2, 1])})
    record = model_of(class_names=lambda: names).prediction_record(*row)
    assert (record["prediction"], record["class_name"]) == (2, "c")
    assert "class_name" not in model_of().prediction_record(*row)
    with pytest.raises(
        UserError, match="list has 3 names, but the model has 7 classes"
    ):
        model_of(class_names=lambda: names[:3]).prediction_record(*row)


def test_the_head_starts_where_many_classes_do_not_drown_the_first_steps():
    model = model_of(loss="sigmoid", head_bias=-10.0)
    variables = model.get_initial_variables(jax.random.key(0), SHAPES)
    head = variables["params"]["head"]
    assert not np.any(head["kernel"]) and np.all(head["bias"] == -10.0)
    loss, _ = model.loss_fn(variables["params"], batch(), None)
    # ln(1 + e^-10) for each class that is not there, 10 more for each that is.
    expected = REAL.sum() * CLASSES * np.log1p(np.exp(-10.0)) + 10.0 * COUNTS.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    axes = variables["params_axes"]["head"]
    assert axes["kernel_axes"].names == ("embed", "classes")
    assert axes["bias_axes"].names == ("classes",)


def test_any_number_of_classes_lies_on_any_mesh():
    """Seven do not divide by two."""
    variables = jax.eval_shape(
        lambda rng: model_of().get_initial_variables(rng, SHAPES), jax.random.key(0)
    )
    for settings in (
        {},
        {"activation_partitioning_dims": 2},
        {"parameter_partitioning_dims": 2},
    ):
        mesh = Partitioning(data=4, model=2, **settings)
        mesh.params_shardings(
            flax.core.unfreeze(variables["params"]), variables["params_axes"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["map", "gap", "cls"])
def test_the_pooled_vector_is_the_towers_own(pooling):
    tower = tiny_models.tower_config(depth=1, pooling=pooling)
    model = model_of(tower=tower)
    images = batch()["encoder_input_images"]
    params = tiny_models.random_params(model.module, images)
    pooled = tower.build().apply({"params": params["encoder"]["tower"]}, images).pooled
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"][None]
    found = model.module.apply({"params": params}, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def paths(tree):
    return set(flatten_dict(tree, sep="/"))


def trained_by(model):
    """The paths of the parameters that a step changes."""
    variables = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, SHAPES), jax.random.key(0)
    )
    trained, frozen = freezing.split_frozen(variables["params"], model.frozen)

    def loss(part, frozen):
        return model.loss_fn(freezing.merge_frozen(part, frozen), batch(), None)[0]

    assert jax.eval_shape(jax.grad(loss), trained, frozen)["head"].keys() == {
        "kernel",
        "bias",
    }
    return paths(trained)


UPDATES = lora.LoraConfig(2, 4.0, (".*attention/(query|value)/kernel",))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"frozen_tower": True}, r"head/(kernel|bias)"),
        ({"frozen": ("encoder/.*",)}, r"head/(kernel|bias)"),
        ({"int8_tower": True}, r"head/(kernel|bias)"),
        ({"lora": UPDATES}, r"head/(kernel|bias)|.*/lora_[ab]"),
        ({"lora": UPDATES, "int8_tower": True}, r"head/(kernel|bias)|.*/lora_[ab]"),
    ],
    ids=["frozen tower", "patterns", "int8", "LoRA", "LoRA and int8"],
)
def test_what_freezes_keeps_its_promise_and_leaves_the_head(arguments, expected):
    found = trained_by(model_of(**arguments))
    assert found and all(re.fullmatch(expected, path) for path in found)
    assert any("lora" in path for path in found) == ("lora" in arguments)


def test_int8_stores_int8():
    model = model_of(int8_tower=True)
    params = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, SHAPES), jax.random.key(0)
    )
    types = {p: x.dtype for p, x in flatten_dict(params["params"], sep="/").items()}
    assert types["encoder/tower/patch_embedding/kernel"] == jnp.int8
    assert types["head/kernel"] == jnp.float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"loss": "softmx"}, "must be one of softmax, sigmoid. Nearest: softmax"),
        ({"num_classes": 1}, "fewer than 2 classes"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"head_bias": -10.0}, "softmax, which does not see"),
        (
            {"lora": UPDATES, "frozen_tower": True},
            "chooses no kernel.*The tower is frozen",
        ),
        (
            {"lora": lora.LoraConfig(2, 4.0, ("text/.*",))},
            "'text/.*' chooses no kernel",
        ),
        ({"frozen": ("encodr/.*",)}, "matches no parameter"),
        (
            {"tower": tiny_models.tower_config(depth=1, pooling="none")},
            "this tower has none",
        ),
    ],
)
def test_what_makes_no_classifier_is_refused(arguments, message):
    with tiny_models.without_type_checks(), pytest.raises(UserError, match=message):
        trained_by(model_of(**arguments))


def test_cached_features_are_refused_before_anything_is_read():
    with pytest.raises(UserError, match="takes what the tower pools"):
        inputs.cache_keys(None, model_of(), "no task", "train", {})
    with pytest.raises(UserError, match="tokens before any pooling"):
        model_of().get_initial_variables(
            jax.random.key(0), {"encoder_input_features": (5, 4, 32)}
        )


# --- Mixup ---


def test_mixup_is_of_training_alone_and_learns_both_labels(params):
    """Against the mixed batch given as one: the loss of `mixup`'s images and labels."""
    model, key = model_of(mixup=1.0), jax.random.key(4)
    plain, mixed = batch(), functools.partial(model.loss_fn, params, batch())
    images, targets = mixing.mixup(key, plain["encoder_input_images"], jnp.asarray(HOT))
    logits = np.asarray(model.module.apply({"params": params}, images))
    shares = targets / np.maximum(targets.sum(-1, keepdims=True), 1e-9)
    each = -(shares * jax.nn.log_softmax(logits)).sum(-1)
    loss, metrics = mixed(key)
    np.testing.assert_allclose(loss, each[REAL].sum(), rtol=1e-5)
    hits = HOT[np.arange(5), logits.argmax(-1)][REAL]
    np.testing.assert_allclose(metrics["accuracy"].compute(), hits.mean())
    assert float(mixed(jax.random.fold_in(key, 1))[0]) != float(loss)
    without = model_of().eval_fn(params, plain)[0]
    for same in (model.eval_fn(params, plain)[0], mixed(None)[0]):
        assert float(same) == float(without)


def test_mixup_refuses_microbatches_and_a_share_that_cannot_be_drawn():
    microbatches.check(model_of(), 2)
    with pytest.raises(UserError, match="num_microbatches=2, but the loss"):
        microbatches.check(model_of(mixup=0.2), 2)
    with pytest.raises(UserError, match="alpha -1.0; it must be above 0"):
        model_of(mixup=-1.0)
