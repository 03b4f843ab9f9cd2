"""Contrastive losses: pinned values, and rings that equal the whole matrix."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import NamedSharding, PartitionSpec

from vit22b_transfer import UserError
from vit22b_transfer.models import contrastive_losses as losses
from vit22b_transfer.partitioning.rules import Partitioning

BATCH, WIDTH = 24, 16


def embeddings(rows, width, seed=0):
    rng = np.random.default_rng(seed)
    pair = [rng.standard_normal((rows, width)) for _ in range(2)]
    return [np.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in pair]


def arguments(rows=BATCH, width=WIDTH, *, scale=10.0, bias=-2.71, weights=None):
    images, texts = embeddings(rows, width)
    weights = np.ones(rows) if weights is None else weights
    return images, texts, *map(np.float32, (scale, bias)), np.float32(weights)


def gradients(function, partitioning, values):
    """(loss, gradients of all but the weights) compiled for a mesh."""
    rows = NamedSharding(partitioning.mesh, PartitionSpec("data"))
    values = [
        jax.device_put(x, rows if np.ndim(x) else partitioning.replicated)
        for x in values
    ]
    with partitioning.activate():
        compiled = tiny_models.jit(jax.value_and_grad(function, (0, 1, 2, 3)))
        return compiled(*values)


@pytest.mark.parametrize(
    "form, bias, value",
    [("sigmoid", -2.71, 15.5140219141068), ("softmax", 0.0, 9.981823395612784)],
)
def test_values_of_big_visions_losses(form, bias, value):
    values = arguments(6, 4, bias=bias)
    loss = losses.whole_loss(*map(jnp.asarray, values), form=form) / 6
    np.testing.assert_allclose(loss, value, rtol=1e-6)


@pytest.mark.parametrize("size, value", [(256, 10.011622), (32_768, 11.487631)])
def test_the_first_sigmoid_loss_of_a_batch_without_similarities(size, value):
    """Of a row of the matrix: the whole one of 32,768 pairs has 4 GB."""
    row = np.full((1, size), -10.0, np.float32)
    signed = np.where(np.arange(size)[None] == 0, row, -row)
    loss = float(-jnp.sum(jax.nn.log_sigmoid(signed)))
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    if size == 256:
        zeros = jnp.zeros((size, 4))
        given = (zeros, zeros, jnp.float32(10), jnp.float32(-10), jnp.ones(size))
        whole = losses.whole_loss(*given, form="sigmoid") / size
        np.testing.assert_allclose(whole, value, rtol=1e-5)


def some_missing():
    weights = np.ones(BATCH)
    weights[[0, 5, BATCH - 1]] = 0
    return weights


@functools.cache
def of_whole_matrix(form, all_pairs):
    whole = functools.partial(losses.whole_loss, form=form)
    weights = None if all_pairs else some_missing()
    return gradients(whole, Partitioning(1, 1), arguments(weights=weights))


# On one device, on eight, and on three of a mesh with another axis, of which each has
# an even number of pairs (8) or an odd one (3).
@pytest.mark.parametrize(
    "mesh, form, gradient, all_pairs",
    [
        *[((8, 1), f, g, False) for f in losses.FORMS for g in losses.GRADIENTS],
        ((1, 1), "sigmoid", "recomputed", False),
        ((3, 2), "sigmoid", "autodiff", True),
        ((3, 2), "softmax", "recomputed", True),
    ],
    ids=str,
)
def test_rings_equal_the_whole_matrix_and_its_gradients(
    mesh, form, gradient, all_pairs
):
    expected = of_whole_matrix(form, all_pairs)
    ring = functools.partial(losses.chunked_loss, form=form, gradient=gradient)
    weights = None if all_pairs else some_missing()
    found = gradients(ring, Partitioning(*mesh), arguments(weights=weights))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for name, one, other in zip("ixsb", found[1], expected[1], strict=True):
        # The bias of a softmax has no gradient but rounding.
        size = max(float(jnp.max(jnp.abs(other))), 1.0)
        np.testing.assert_allclose(one, other, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("form", losses.FORMS)
def test_pairs_that_do_not_count_are_as_if_they_were_not_there(form):
    weights = some_missing()
    there = weights > 0
    values = arguments(weights=weights)
    fewer = (values[0][there], values[1][there], *values[2:4], values[4][there])
    one, other = (
        losses.whole_loss(*map(jnp.asarray, given), form=form)
        for given in (values, fewer)
    )
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_no_pair_at_all_costs_nothing():
    for form in losses.FORMS:
        values = arguments(weights=np.zeros(BATCH))
        ring = functools.partial(losses.chunked_loss, form=form)
        loss, found = gradients(ring, Partitioning(4, 1), values)
        assert loss == 0 and not any(np.any(x) for x in found)


def program(gradient, devices, *, rows=64, width=32, form="softmax"):
    """The compiled gradients of `rows` pairs a device."""
    partitioning = Partitioning(devices, 1)
    sharding = NamedSharding(partitioning.mesh, PartitionSpec("data"))
    table = jax.ShapeDtypeStruct((rows * devices, width), np.float32, sharding=sharding)
    number = jax.ShapeDtypeStruct((), np.float32)
    weights = jax.ShapeDtypeStruct((rows * devices,), np.float32, sharding=sharding)
    function = functools.partial(losses.whole_loss, form=form)
    if gradient != "whole":
        function = functools.partial(losses.chunked_loss, form=form, gradient=gradient)
    with partitioning.activate():
        traced = tiny_models.jit(jax.grad(function, (0, 1, 2, 3)))
        return traced.lower(table, table, number, number, weights).compile()


def temporary(gradient, devices, **arguments):
    analysis = program(gradient, devices, **arguments).memory_analysis()
    return analysis.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("form", losses.FORMS)
def test_memory_of_the_ring_does_not_grow_with_the_devices(form):
    ring = [temporary("recomputed", devices, form=form) for devices in (2, 4, 8)]
    # With two, the one step of the loop is written out.
    assert max(ring) <= 1.05 * ring[0] and ring[2] <= 1.01 * ring[1], ring
    whole = [temporary("whole", devices, form=form) for devices in (2, 8)]
    assert whole[1] > 3 * whole[0] and whole[1] > 2 * ring[2], (whole, ring)
    # No array of all pairs, nor of the texts of all devices.
    text = program("recomputed", 8, form=form).as_text()
    assert "[512" not in text and "collective-permute" in text
    assert "all-gather" not in text
    # Half of the texts goes each way.
    ways = re.findall(r"source_target_pairs=\{(\{0,\d\})", text)
    assert ways.count("{0,1}") == ways.count("{0,7}") > 0


def test_differentiated_step_by_step_the_ring_keeps_the_texts_that_passed():
    four, eight = (temporary("autodiff", devices) for devices in (4, 8))
    texts = 4 * 64 * 32 * 4  # of four devices more
    assert 0.9 * texts <= eight - four <= 3 * texts, (four, eight)


def test_a_batch_that_does_not_divide_is_an_error():
    with (
        Partitioning(5, 1).activate(),
        pytest.raises(UserError, match="24 pairs does not divide by the 5 devices"),
    ):
        losses.chunked_loss(*map(jnp.asarray, arguments()), form="sigmoid")


@pytest.mark.parametrize("images, texts, weights", [(1, 3, 3), (3, 2, 3), (3, 3, 1)])
def test_unequal_pairs_are_an_error_though_they_would_broadcast(images, texts, weights):
    message = f"got {images} images, {texts} texts and {weights} weights"
    made = jnp.ones((images, 4)), jnp.ones((texts, 4)), jnp.float32(1), jnp.float32(0)
    with pytest.raises(UserError, match=message):
        unchecked = losses.chunked_loss.__wrapped__
        unchecked(*made, jnp.ones(weights), form="sigmoid")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "triplet"}, "form is 'triplet'; valid are sigmoid, softmax"),
        (
            {"form": "sigmoid", "gradient": "none"},
            "gradient is 'none'; valid are recomputed, autodiff",
        ),
    ],
)
def test_other_words_are_errors(options, message):
    unchecked = losses.chunked_loss.__wrapped__
    with pytest.raises(UserError, match=message):
        unchecked(*map(jnp.asarray, arguments()), **options)


def test_embeddings_have_length_one_but_nothing_stays_nothing():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(losses.normalized(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
