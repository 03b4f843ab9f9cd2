"""QK-clip: heads whose logits grew too large give the threshold, no other changes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_runs
from test_instruments import PARALLEL, TowerModel, params_of
from tiny_runs import ONE_DEVICE, assert_same_bits, logged, run

from vit22b_transfer import UserError
from vit22b_transfer.models import (
    grouped_attention,
    instruments,
    multi_head_attention,
)
from vit22b_transfer.training import instruments as readings
from vit22b_transfer.training import optimizers, state, steps
from vit22b_transfer.training.qk_clip import CLIPPED, QKClip
from vit22b_transfer.training.train import Periods

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

VIEW = grouped_attention.LayerView(
    jnp.ones((2, 1, 5, 5), bool), jnp.zeros((2, 5, 2), jnp.float32)
)
X = jax.random.normal(jax.random.key(0), (2, 5, 6))
OWN_KEYS = multi_head_attention.MultiHeadAttention(6, 4, 4, qkv_bias=True)
SHARED_KEYS = grouped_attention.GroupedQueryAttention(6, 4, 2, 4, 0.5)


def largest_logits(module, params, *inputs):
    recorded = instruments.Recorded(module)
    recorded.apply({"params": params}, *inputs)
    return recorded.told[instruments.LARGEST_LOGIT]


@pytest.mark.parametrize(
    "module, inputs",
    [(OWN_KEYS, (X, X)), (SHARED_KEYS, (X, VIEW))],
    ids=["own", "shared"],
)
def test_a_clipped_head_gives_the_threshold_and_the_others_what_they_gave(
    module, inputs
):
    params = tiny_models.random_params(module, *inputs)
    largest = largest_logits(module, params, *inputs)
    before = np.sort(np.asarray(largest.value))
    threshold = float(before[1] + before[2]) / 2  # two heads of four are above
    told = {"instruments/attention/largest_logit": largest}
    clipped, count = QKClip(threshold).clip({"attention": params}, told, ())
    after = largest_logits(module, clipped["attention"], *inputs).value
    np.testing.assert_allclose(
        after, np.minimum(np.asarray(largest.value), threshold), rtol=1e-5
    )
    assert count == 2
    shared = module is SHARED_KEYS
    assert shared == bool(
        jnp.array_equal(clipped["attention"]["key"]["kernel"], params["key"]["kernel"])
    )
    for name in ("value", "out"):
        assert_same_bits(clipped["attention"][name], params[name])


def test_a_logit_that_is_not_finite_clips_nothing():
    params = {"a": tiny_models.random_params(OWN_KEYS, X, X)}
    values = jnp.array([jnp.inf, jnp.nan, 1.0, 2.0])
    told = {"instruments/a/largest_logit": instruments.Largest(values)}
    clipped, count = QKClip(3.0).clip(params, told, ())
    assert count == 0
    assert_same_bits(clipped, params)


def test_what_cannot_be_clipped_is_said():
    params = {"a": tiny_models.random_params(OWN_KEYS, X, X)}
    normed = multi_head_attention.MultiHeadAttention(6, 4, 4, qk_norm=True)
    params["b"] = tiny_models.random_params(normed, X, X)
    assert QKClip(3.0).describe(params, ()) == (
        "QK-clip above 3: 1 attentions (not 1 with QK-norm)"
    )
    with pytest.raises(UserError, match="1 with QK-norm and 1 not trained are found"):
        QKClip(3.0).describe(params, ("a/key/.*",))
    with pytest.raises(UserError, match="attentions none are found"):
        QKClip(3.0).describe({}, ())
    for threshold in (0.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="must be greater than 0"):
            QKClip(threshold)


def step_of(threshold, **options):
    """(parameters after one step of a tower without QK-norm, its metrics)."""
    config = dataclasses.replace(PARALLEL, qk_norm=False)
    scanned = options.pop("scanned", False)
    config = dataclasses.replace(config, scan_layers=scanned)
    params = params_of(config)
    params = tiny_models.stack_layers(params) if scanned else params
    # Without moments and decay: what a step changes is the gradients and the clipping.
    model = TowerModel(config.build(), optimizers.sgd(1e-6))
    batch = tiny_runs.on_device(
        {"images": tiny_models.images(8, *tiny_models.IMAGE_SIZE, 3)}, ONE_DEVICE
    )
    abstract = state.abstract_variables(model, ONE_DEVICE, batch)
    first = state.abstract_state(abstract, model.optimizer_def, ONE_DEVICE)
    first = state.fresh_state(params, model.optimizer_def, first)
    clip = None if threshold is None else QKClip(threshold)
    update = steps.make_update(
        model, model.optimizer_def, ONE_DEVICE, qk_clip=clip, **options
    )
    with ONE_DEVICE.activate():
        after, metrics = tiny_models.jit(update)(first, batch, jax.random.key(0))
    return jax.device_get((after.params, metrics))


def test_scanned_layers_and_microbatches_are_clipped_alike():
    free, free_metrics = step_of(None, instrumented=True)
    told = readings.readings(readings.split(free_metrics)[1])[0]
    largest = [told[f"instruments/layers_{i}/attention/largest_logit"] for i in (0, 1)]
    threshold = min(largest) / 2  # in both layers
    expected, metrics = step_of(threshold)
    assert metrics[CLIPPED].compute() >= 2
    for i, name in itertools.product((0, 1), ("query", "key")):
        ours, theirs = (
            np.linalg.norm(params[f"layers_{i}"]["attention"][name]["kernel"])
            for params in (expected, free)
        )
        assert ours < 0.95 * theirs
    assert not readings.split(metrics)[1]  # nobody asked for instruments
    scanned, scanned_metrics = step_of(threshold, scanned=True)
    parts, parts_metrics = step_of(threshold, num_microbatches=2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, scanned, tiny_models.stack_layers(expected))
    jax.tree.map(close, parts, expected)
    for other in (scanned_metrics, parts_metrics):
        assert other[CLIPPED].compute() == metrics[CLIPPED].compute()


# --- A run ---

THRESHOLD = 1.5


def tiny_model():
    tower = tiny_models.tower_config(depth=1, pooling="none", qk_norm=False)
    text = tiny_models.text_config(num_encoder_layers=0, num_decoder_layers=1)
    optimizer = optimizers.adamw(3e-2)
    return tiny_models.image_text_model(tower, text, optimizer_def=optimizer)


def test_a_run_tells_how_many_heads_it_clips(tmp_path, capsys):
    run(
        tmp_path,
        tiny_model(),
        total_steps=2,
        periods=Periods(log=1, evaluate=20, checkpoint=2),
        eval_data=None,
        qk_clip=QKClip(THRESHOLD),
    )
    assert "QK-clip above 1.5: 3 attentions" in capsys.readouterr().out
    assert max(line[f"train/{CLIPPED}"] for line in logged(tmp_path)) > 0


def test_a_run_with_nothing_to_clip_is_refused(tmp_path):
    with pytest.raises(UserError, match="QK-clip has nothing to clip"):
        run(tmp_path, qk_clip=QKClip())
