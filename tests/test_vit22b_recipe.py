"""The optimizer and the schedule of ViT-22B: pinned numbers, and a reference in NumPy.

The numbers were computed once with the program that ViT-G was trained with.
"""

import gin
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from gin_files import CONFIGS, ROOT, read_recipe

from vit22b_transfer import UserError
from vit22b_transfer.data.augmentation import Augmentation
from vit22b_transfer.models import multimodal
from vit22b_transfer.recipes import loading
from vit22b_transfer.training import optimizers, train

SHAPES = {"b": (48,), "k": (64, 48), "m": (64, 4, 48)}
HEAD = [(r"(.*/)?head/kernel", 100.0)]


@pytest.fixture(autouse=True)
def no_gin_left_over():
    yield
    gin.clear_config()


def gradients(step, shapes):
    """Each array from a generator of its own, of the same seed."""

    def draw(shape):
        return np.float32(np.random.default_rng(100 + step).standard_normal(shape))

    return {name: draw(shape) for name, shape in shapes.items()}


@pytest.mark.slow
def test_the_updates_of_twenty_steps_have_the_pinned_sizes():
    optimizer = optimizers.adafactor(1.0, clip_norm=None)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state, sizes = optimizer.init(params), []
    # Not compiled: XLA leaves the rounding of 0.9 times a bfloat16 momentum out.
    for step in range(20):
        updates, state = optimizer.update(gradients(step, SHAPES), state, params)
        sizes.append(
            [float(jnp.sqrt(jnp.mean(updates[name] ** 2))) for name in ("b", "k", "m")]
        )
    pinned = {
        0: [0.1000000, 0.1000628, 0.1000637],
        1: [0.1175446, 0.1344739, 0.1350184],
        19: [0.2442805, 0.2249935, 0.2263876],
    }
    for step, expected in pinned.items():
        np.testing.assert_allclose(sizes[step], expected, rtol=0, atol=1e-6)


def nested(flat):
    return {
        "body": {
            "kernel": flat["k"],
            "scale": flat["b"],
            "wide": {"kernel": flat["m"]},
        },
        "head": {"kernel": flat["h"], "bias": flat["c"]},
    }


def flattened(tree):
    body, head = tree["body"], tree["head"]
    wide, names = body["wide"]["kernel"], ("k", "b", "m", "h", "c")
    values = (body["kernel"], body["scale"], wide, head["kernel"], head["bias"])
    return dict(zip(names, values, strict=True))


def reference(params, shapes, steps, peak, schedule):
    """The whole recipe in float32: clip, factored RMS, average, decay, schedule."""
    f32, low = np.float32, ml_dtypes.bfloat16
    decay = {"k": 0.03, "m": 0.03, "h": 3.0}
    rows, cols, full = {}, {}, {}
    momentum = {name: np.zeros(shape, low) for name, shape in shapes.items()}
    for step in range(steps):
        grads = gradients(step, shapes)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        beta = f32(min(0.999, 1.0 - (step + 1.0) ** -0.8))
        for name, param in params.items():
            g = grads[name] / norm if norm > 1 else grads[name]
            square = g**2 + f32(1e-30)
            small, large = np.argsort(g.shape)[-2:] if g.ndim > 1 else (0, 0)
            if g.ndim > 1 and g.shape[small] >= 32:
                mean = square.mean(large)
                rows[name] = beta * rows.get(name, f32(0)) + (1 - beta) * mean
                mean = square.mean(small)
                cols[name] = beta * cols.get(name, f32(0)) + (1 - beta) * mean
                row = np.expand_dims(rows[name], large)
                moment = row / row.mean(small, keepdims=True)
                moment = moment * np.expand_dims(cols[name], small)
            else:
                full[name] = beta * full.get(name, f32(0)) + (1 - beta) * square
                moment = full[name]
            old = (momentum[name] * low(0.9)).astype(f32)
            new = old + f32(0.1) * g / np.sqrt(moment)
            momentum[name] = new.astype(low)
            update = new + f32(decay.get(name, 0.0)) * param
            params[name] = param - f32(peak * schedule(step)) * update
    return params


@pytest.mark.slow
def test_the_whole_recipe_equals_its_reference_step_by_step():
    """Clipped, 3.0 in the head, 0.03 in other kernels, none elsewhere."""
    shapes = SHAPES | {"h": (48, 40), "c": (40,)}
    rng = np.random.default_rng(0)
    start = {n: np.float32(rng.standard_normal(s)) for n, s in shapes.items()}
    optimizer = optimizers.adafactor(
        optimizers.rsqrt(
            0.1, total_steps=40, warmup_steps=5, cooldown_steps=0.25, timescale=10
        ),
        weight_decay=0.03,
        decay_factors=HEAD,
        clip_norm=1.0,
    )

    def schedule(step):
        factor = min(1.0, step / 5) / np.sqrt(1 + max(0.0, step - 5) / 10)
        return factor * min(1.0, (40 - step) / 10)

    params = nested(start)
    state = optimizer.init(params)
    for step in range(20):
        grads = nested(gradients(step, shapes))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = reference(dict(start), shapes, 20, 0.1, schedule)
    for name, value in flattened(params).items():
        difference = np.abs(np.asarray(value) - expected[name])
        # A momentum on the edge between two bfloat16 numbers may fall to either side.
        assert np.mean(difference <= 1e-6) > 0.995, name
        assert difference.max() < 1e-3, name


# Steps of the paper's training -> learning rates, with a peak of 1e-3.
RATES = {
    5_000: 5e-4,
    10_000: 1e-3,
    20_000: 7.0710678e-4,
    100_000: 3.1622777e-4,
    147_000: 2.6082027e-4,
    162_000: 1.2422600e-4,
    177_000: 0.0,
}
PHASES = [(10_000, 30_000, 10_000), (10 / 177, 30 / 177, 10 / 177)]


@pytest.mark.parametrize("warmup, cooldown, timescale", PHASES, ids=["steps", "parts"])
def test_the_schedule_has_the_rates_of_the_paper(warmup, cooldown, timescale):
    schedule = optimizers.rsqrt(
        1e-3,
        total_steps=177_000,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        timescale=timescale,
    )
    for step, rate in RATES.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(rate, 1e-6), step


def test_a_phase_is_a_number_of_steps_or_a_fraction_of_all():
    def rate(step, **phases):
        return float(optimizers.constant(1.0, **phases)(jnp.int32(step)))

    assert rate(5, total_steps=100, warmup_steps=0.1) == 0.5
    assert rate(95, total_steps=100, cooldown_steps=0.1) == 0.5
    # A short run has all phases: a hundredth of 20 steps is one.
    assert rate(0, total_steps=20, warmup_steps=0.01) == 0.0
    assert rate(1, total_steps=20, warmup_steps=0.01) == 1.0
    assert rate(0, total_steps=20, warmup_steps=0.0) == 1.0
    half = optimizers.cosine(1.0, total_steps=10, warmup_steps=0.4)
    assert float(half(jnp.int32(2))) == 0.5


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: optimizers.constant(1.0, warmup_steps=0.1), "needs total_steps"),
        (
            lambda: optimizers.cosine(1.0, total_steps=9, warmup_steps=2.5),
            "warmup_steps=2.5 must be a whole number of steps, or a fraction",
        ),
        (
            lambda: optimizers.rsqrt(1.0, total_steps=9, cooldown_steps=-0.1),
            "cooldown_steps=-0.1 must be a whole",
        ),
        (
            lambda: optimizers.rsqrt(1.0, total_steps=9, timescale=0),
            "timescale=0 must be at least 1 step",
        ),
        (
            lambda: optimizers.rsqrt(
                1.0, total_steps=10, warmup_steps=0.6, cooldown_steps=0.6
            ),
            "warmup_steps=6 and cooldown_steps=6 do not fit",
        ),
        (lambda: optimizers.sgd(1.0, clip_norm=0.0), "clip_norm=0.0 must be greater"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def pre_training(*overrides, behind=()):
    """What the training of ViT-22B by its recipe is called with."""
    files = ["gin_configs/recipes/vit22b_pretrain.gin", *behind]
    overrides = ["VIT='22B/14'", "NUM_CLASSES=29_593", "CLASSES='/c'", *overrides]
    read = loading.read(files, ["MODEL_DIR='/m'", *overrides], [str(ROOT)])
    return loading.arguments(read, train.fine_tune, [str(ROOT)])


def test_the_recipe_of_pre_training_has_all_of_it():
    made = pre_training()
    model, tower = made["model"], made["model"].module.tower
    sizes = (tower.width, tower.depth, tower.patch_size, tower.image_size)
    assert sizes == (6144, 48, 14, (224, 224))
    assert tower.parallel and tower.qk_norm and tower.scan_layers
    assert (tower.dtype, tower.param_dtype) == ("bfloat16", jnp.float32)
    assert (model.loss, model.module.head_bias) == ("sigmoid", -10.0)
    assert (model.label_smoothing, model.mixup) == (0.0, None)
    for step, rate in RATES.items():
        used = float(model.optimizer_def.learning_rate(jnp.int32(step)))
        assert used == pytest.approx(rate, 1e-5), step
    settings, rules = model.optimizer_def.settings, model.optimizer_def.rules
    assert settings["name"] == "adafactor" and settings["clip_norm"] == 1.0
    decays = [
        rules.weight_decay * rules.decay_factor(name)
        for name in ("head/kernel", "encoder/tower/layers/mlp/wi/kernel", "head/bias")
    ]
    assert decays == [3.0, 0.03, 0.0]
    data = made["data"]
    assert data.augmentation == Augmentation(crop_area=(0.05, 1.0), flip=True)
    assert (data.batch_size, made["total_steps"]) == (65_536, 177_000)
    assert data.feature_lengths == {"images": (224, 224), "labels": 1}


@pytest.mark.parametrize("size", [448, 672, 756])
def test_pre_training_goes_on_at_a_larger_size(size):
    made = pre_training(
        f"IMAGE_SIZE=({size}, {size})",
        "INITIAL_CHECKPOINT='/m/checkpoint_177000'",
        "INITIAL_IMAGE_SIZE=(224, 224)",
        behind=["gin_configs/runs/from_other_size.gin"],
    )
    tower, initial = made["model"].module.tower, made["initial"]
    assert made["data"].feature_lengths["images"] == tower.image_size == (size, size)
    assert initial.image_size == (224, 224)
    assert tower.grid_of(*initial.image_size) == (16, 16)


def test_the_gin_files_are_the_recipe():
    recipe = CONFIGS / "recipes/scenes_caption_vqa.gin"
    names = ("optimizer_vit22b", "schedule_vit22b")
    behind = [CONFIGS / f"runs/{name}.gin" for name in names]
    overrides = ("TRAIN_STEPS=177_000", "LEARNING_RATE=1e-3")
    for paths in (behind, behind[::-1]):
        read = read_recipe(recipe, *overrides, behind=paths)
        made = loading.install(read, multimodal.ImageTextModel, [str(ROOT)])()
        optimizer = made.optimizer_def
        for step, rate in RATES.items():
            used = float(optimizer.learning_rate(jnp.int32(step)))
            assert used == pytest.approx(rate, 1e-5), step
        decay = optimizer.rules.decay_factor
        assert optimizer.rules.weight_decay == 0.03
        assert decay("decoder/logits_dense/kernel") == decay("head/kernel") == 100.0
        assert decay("encoder/tower/layers_0/mlp/wi/kernel") == 1.0
        assert decay("decoder/layers_0/mlp/overhead/kernel") == 1.0
        assert decay("head/bias") == decay("encoder/tower/encoder_norm/scale") == 0.0
