"""Eight simulated devices compute what one computes.

Each of the four meshes of eight devices under two settings of the axis rules, each of
the four settings on two meshes.
"""

import functools

import jax
import numpy as np
import pytest
from tiny_models import (
    batch,
    image_text_model,
    jit,
    model_params,
    relative_difference,
    text_config,
    tower_config,
)

from vit22b_transfer.inference import decoding
from vit22b_transfer.partitioning.rules import Partitioning

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
RULES = [(1, 1), (1, 2), (2, 1), (2, 2)]
# In the suite each mesh once and each setting once.
TRAINED = [
    pytest.param((8, 1), (1, 1), marks=pytest.mark.slow),
    ((8, 1), (1, 2)),
    ((4, 2), (2, 1)),
    pytest.param((4, 2), (2, 2), marks=pytest.mark.slow),
    ((2, 4), (1, 1)),
    pytest.param((2, 4), (1, 2), marks=pytest.mark.slow),
    pytest.param((1, 8), (2, 1), marks=pytest.mark.slow),
    ((1, 8), (2, 2)),
]
DECODED = [
    pytest.param((8, 1), (1, 1), marks=pytest.mark.slow),
    pytest.param((4, 2), (2, 2), marks=pytest.mark.slow),
    ((2, 4), (1, 2)),
    pytest.param((1, 8), (2, 1), marks=pytest.mark.slow),
]
BATCH = batch(8, inputs=4, targets=5)
SIZES = dict(num_heads=8, width=32, mlp_dim=64)  # all divide by eight
VARIANTS = {
    "separate": dict(
        tower=dict(depth=1),
        text=dict(num_encoder_layers=0, num_decoder_layers=1),
    ),
    "fused": dict(
        tower=dict(depth=1, fused_projections=True),
        text=dict(num_encoder_layers=1, num_decoder_layers=1),
    ),
    "scanned": dict(
        tower=dict(depth=2, fused_projections=True, scan_layers=True, remat="dots"),
        text=dict(num_encoder_layers=1, num_decoder_layers=1, scan_layers=True),
    ),
}


def variant_of(mesh, rules):
    """Separate, fused or scanned: each of them on more than one mesh."""
    if (mesh, rules) in [((4, 2), (2, 2)), ((2, 4), (1, 2))]:
        return "scanned"
    odd = (MESHES.index(mesh) + RULES.index(rules)) % 2
    return "fused" if odd else "separate"


@functools.cache
def model_of(variant):
    options = VARIANTS[variant]
    return image_text_model(
        tower_config(**SIZES, **options["tower"]),
        text_config(**SIZES, head_dim=4, **options["text"]),
    )


@functools.cache
def params_of(variant):
    return model_params(model_of(variant))


def train_step(variant):
    model = model_of(variant)

    def run(params, batch):
        (loss, metrics), gradients = jax.value_and_grad(model.loss_fn, has_aux=True)(
            params, batch, None
        )
        return dict(loss=loss, metrics=metrics, gradients=gradients)

    return jit(run)


def predict(variant):
    """Greedy and beam search of one model: [(token ids, {"scores"}), ...]."""
    searches = (decoding.greedy, functools.partial(decoding.beam_search, num_beams=3))
    module = model_of(variant).module
    models = [
        image_text_model(module.tower, module.text, decode_fn=search)
        for search in searches
    ]
    return jit(lambda p, b: [model.predict_batch_with_aux(p, b) for model in models])


@functools.cache
def one_device(variant, step):
    """(compiled program, result) on one device."""
    arguments = params_of(variant), BATCH
    compiled = step(variant).lower(*arguments).compile()
    return compiled, jax.device_get(compiled(*arguments))


def eight_devices(mesh, rules, variant, step):
    """(compiled program, parameters as placed, result as it came)."""
    partitioning = Partitioning(*mesh, *rules)
    model = model_of(variant)
    shapes = {name: array.shape for name, array in BATCH.items()}
    variables = jax.eval_shape(
        lambda key: model.get_initial_variables(key, shapes), jax.random.key(0)
    )
    shardings = partitioning.params_shardings(
        variables["params"], variables["params_axes"]
    )
    params = jax.device_put(params_of(variant), shardings)
    batch = {
        name: jax.device_put(array, partitioning.batch_sharding(array.ndim))
        for name, array in BATCH.items()
    }
    with partitioning.activate():
        compiled = step(variant).lower(params, batch).compile()
        return compiled, params, compiled(params, batch)


@pytest.mark.parametrize("mesh, rules", TRAINED, ids=str)
def test_loss_metrics_and_gradients_are_those_of_one_device(mesh, rules):
    variant = variant_of(mesh, rules)
    alone, expected = one_device(variant, train_step)
    compiled, params, result = eight_devices(mesh, rules, variant, train_step)
    assert relative_difference(jax.device_get(result), expected) <= 1e-5

    # Each device does an eighth of the work and what the rules leave on all of them,
    share = compiled.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    assert share < 0.3
    # and gradients lie where their parameters lie, unasked.
    split = 0
    for parameter, gradient in zip(
        jax.tree.leaves(params), jax.tree.leaves(result["gradients"]), strict=True
    ):
        assert gradient.sharding.is_equivalent_to(parameter.sharding, parameter.ndim)
        split += not gradient.sharding.is_fully_replicated
    kernels = [x for x in jax.tree.leaves(params) if x.ndim >= 2]
    parts = max(x.size // x.addressable_shards[0].data.size for x in kernels)
    assert parts == (8 if rules[1] == 2 else mesh[1])
    assert (split > 0) == (parts > 1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, rules", DECODED, ids=str)
def test_predictions_are_those_of_one_device(mesh, rules):
    variant = variant_of(mesh, rules)
    _, expected = one_device(variant, predict)
    _, _, result = eight_devices(mesh, rules, variant, predict)
    for actual, alone in zip(jax.device_get(result), expected, strict=True):
        np.testing.assert_array_equal(actual[0], alone[0])
        np.testing.assert_allclose(actual[1]["scores"], alone[1]["scores"], atol=1e-4)
    greedy, beam = expected
    assert greedy[0].shape == beam[0].shape == (8, 5)
    assert len(np.unique(greedy[0])) > 5, "predictions that differ prove more"
