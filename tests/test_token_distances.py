"""Distances of tokens in a distillation: by torch, through a learned map, by layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax.traverse_util import flatten_dict
from test_distillation import STUDENT, TEACHER, batch, plain
from tiny_models import tower_config
from torch_peers import torch

from vit22b_transfer import UserError
from vit22b_transfer.models import distillation, freezing, lora, token_distances
from vit22b_transfer.models.token_distances import (
    TokenDistance,
    cosine,
    normalised_square,
)

# A class token and a register before the patches, and another width at another layer.
SEVERAL = tower_config(depth=2, width=48, pooling="cls", num_registers=1)


def tokens(seed, length=4, width=32):
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((5, length, width)) + 1).astype(np.float32)


def by_torch(distance, student, teacher):
    """Of each image, from torch's own LayerNorm and cosine."""
    both = [torch.tensor(np.asarray(x)) for x in (student, teacher)]
    if distance is cosine:
        return 1 - torch.nn.functional.cosine_similarity(*both, dim=-1).mean(-1).numpy()
    width = both[0].shape[-1:]
    normal = [torch.nn.functional.layer_norm(x, width, eps=1e-6) for x in both]
    return ((normal[0] - normal[1]) ** 2).mean((1, 2)).numpy()


@pytest.mark.parametrize("distance, most", [(normalised_square, 4.0), (cosine, 2.0)])
def test_a_distance_is_that_of_torch_and_nothing_between_equals(distance, most):
    student, teacher = jnp.asarray(tokens(0)), jnp.asarray(tokens(1))
    found = distance(student, teacher)
    np.testing.assert_allclose(found, by_torch(distance, student, teacher), rtol=1e-5)
    np.testing.assert_allclose(distance(student, 3.0 * student), 0.0, atol=1e-5)
    np.testing.assert_allclose(distance(student, -student), most, rtol=1e-5)
    # Where all values of a token are equal there is a gradient, too.
    gradient = jax.grad(lambda x: distance(x, teacher).sum())(jnp.zeros_like(student))
    assert np.all(np.isfinite(gradient))


def student_of(teacher, distance, student=STUDENT, **layers):
    compared = TokenDistance(distance, 0.5, **layers)
    taught = distillation.Distillation(teacher, 2.0, tokens=compared)
    return plain(student, distillation=taught)


def fresh(model):
    """Fresh variables, abstract."""
    shapes = {name: array.shape for name, array in batch().items()}
    return jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, shapes), jax.random.key(0)
    )


@functools.cache
def values(model):
    """Random parameters of the student, its teacher and the map."""
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype),
        fresh(model)["params"],
    )


def patches_of(tower, params, layer=None):
    """Patch tokens of a tower, which stand last."""
    output = tower.build().apply(
        {"params": params["encoder"]["tower"]},
        jnp.asarray(batch()["encoder_input_images"]),
        intermediates=() if layer is None else (layer,),
    )
    found = output.tokens if layer is None else output.intermediates[layer]
    return np.asarray(found)[:, -4:]


CASES = {
    "mapped": (normalised_square, TEACHER, {}),
    "mapped, two layers": (
        cosine,
        SEVERAL,
        {"student_layer": "stem", "teacher_layer": "block_0"},
    ),
    "of one width": (cosine, tower_config(depth=1, pooling="gap"), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_loss_has_the_distance_of_the_mapped_tokens(name):
    distance, teacher, layers = CASES[name]
    model = student_of(teacher, distance, **layers)
    params, rows = values(model), batch()
    first = patches_of(STUDENT, params, layers.get("student_layer"))
    second = patches_of(teacher, params["teacher"], layers.get("teacher_layer"))
    assert ("token_map" in params) == (name != "of one width")
    if (linear := params.get("token_map")) is not None:
        axes = fresh(model)["params_axes"]["token_map"]
        assert axes.keys() == {"kernel_axes", "bias_axes"}
        first = first @ np.asarray(linear["kernel"]) + np.asarray(linear["bias"])
    each = by_torch(distance, first, second)
    alone = plain(STUDENT, distillation=distillation.Distillation(teacher, 2.0))
    real = rows["label_weights"][:, 0]

    def loss(params):
        return model.loss_fn(params, rows, None)

    (found, metrics), gradient = tiny_models.jit(
        jax.value_and_grad(loss, has_aux=True)
    )(params)
    classes, _ = tiny_models.jit(lambda p: alone.loss_fn(p, rows, None))(
        {name: part for name, part in params.items() if name != "token_map"}
    )
    np.testing.assert_allclose(found - classes, 0.5 * (each * real).sum(), rtol=2e-4)
    told = metrics["teacher_token_distance"]
    np.testing.assert_allclose(told.total, (each * real).sum(), rtol=2e-5)
    assert told.count == real.sum()
    for path, part in flatten_dict(gradient, sep="/").items():
        assert np.any(part) != path.startswith("teacher/"), path


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: student_of(
                tower_config(depth=1, patch_size=4, pooling="gap"), cosine
            ),
            "makes 4 tokens of an image, the teacher's 16",
        ),
        (
            lambda: student_of(TEACHER, cosine, teacher_layer="block_7"),
            "no intermediate 'block_7'; nearest",
        ),
        (lambda: TokenDistance(cosine, 0.0), "weight of a token distance is 0.0"),
        (
            lambda: distillation.Distillation(
                TEACHER, tokens=TokenDistance(cosine), cached=True
            ),
            "no tokens to compare with",
        ),
    ],
)
def test_tokens_that_cannot_be_compared_are_refused(make, message):
    with tiny_models.without_type_checks(), pytest.raises(UserError, match=message):
        fresh(make())


def test_lora_trains_the_map_as_it_does_the_head():
    updates = lora.LoraConfig(2, 4.0, (".*attention/query/kernel",))
    taught = distillation.Distillation(TEACHER, tokens=TokenDistance(cosine))
    model = plain(STUDENT, distillation=taught, lora=updates)
    mask = flatten_dict(
        freezing.frozen_mask(fresh(model)["params"], model.frozen), sep="/"
    )
    trained = {path.split("/")[0] for path, frozen in mask.items() if not frozen}
    assert trained == {"encoder", "head", token_distances.SCOPE}
