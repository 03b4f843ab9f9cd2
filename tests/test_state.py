"""The train state is born, kept and trained in parts; no device holds it all."""

import functools
import math

import jax
import numpy as np
import pytest
import tiny_models
import tiny_runs

from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import compiling, optimizers, state, steps

BATCH = tiny_models.batch(8, inputs=4, targets=5)
# The meshes of fsdp.gin and activations_2d_fsdp.gin.
MESHES = {
    "fsdp": Partitioning(8, 1, parameter_partitioning_dims=2),
    "2d": Partitioning(4, 2, 2, 2),
}
SIZES = dict(width=64, mlp_dim=128, num_heads=8)
# Matrices lie in eight parts. By T5X's rules some vectors are on all devices, and in
# "2d" the kernel of the patches, a matrix with one axis to split, is in two parts.
EIGHTH = 1 / 8 + 0.05


@functools.cache
def model():
    return tiny_models.image_text_model(
        tiny_models.tower_config(**SIZES, depth=1),
        tiny_models.text_config(**SIZES, num_encoder_layers=0, num_decoder_layers=1),
        optimizer_def=optimizers.adamw(optimizers.constant(1e-3)),
    )


@functools.cache
def abstract_of(mesh):
    """The abstract state on a mesh."""
    params = state.abstract_variables(model(), MESHES[mesh], BATCH)
    return state.abstract_state(params, model().optimizer_def, MESHES[mesh])


@functools.cache
def born(mesh):
    """(parameters, the program that made them)."""
    with MESHES[mesh].activate():
        init = state.initializer(model(), BATCH, abstract_of(mesh).params)
        program = init.lower(jax.random.key(0)).compile()
    return program(jax.random.key(0)), program


def num_bytes(tree):
    """Bytes of all arrays of a tree, and of what one device holds of them."""
    sizes = [
        (math.prod(shape) * leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
        for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape))
    ]
    return sum(sizes[::2]), sum(sizes[1::2])


def assert_same_shardings(tree, abstract):
    for leaf, like in zip(
        jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_are_born_in_parts(mesh):
    params, program = born(mesh)
    assert_same_shardings(params, abstract_of(mesh).params)
    whole, part = num_bytes(params)
    assert part <= EIGHTH * whole
    # No device makes all of them on the way: there are random bits and some copies.
    memory = program.memory_analysis()
    assert memory.output_size_in_bytes <= 1.1 * part
    assert memory.temp_size_in_bytes < whole / 2


def test_parameters_are_the_same_on_every_mesh():
    first, second = (jax.device_get(born(mesh)[0]) for mesh in MESHES)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, second
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_optimizer_state_lies_with_its_parameters_and_stays_there(mesh):
    partitioning, abstract = MESHES[mesh], abstract_of(mesh)
    params = jax.tree.map(lambda x: x.copy(), born(mesh)[0])
    first = state.fresh_state(params, model().optimizer_def, abstract)
    assert_same_shardings(first, abstract)
    whole, part = num_bytes(first.opt_state)
    assert whole >= 2 * num_bytes(params)[0]
    assert part <= EIGHTH * whole

    batch = tiny_runs.on_device(BATCH, partitioning)
    rng = jax.device_put(jax.random.key(0), partitioning.replicated)
    update = steps.make_update(model(), model().optimizer_def, partitioning)
    window = compiling.empty_window(update, abstract, batch, rng, partitioning)
    step = compiling.compile_train_step(
        steps.make_train_step(update, 1), abstract, window, batch, rng, partitioning
    )
    whole, part = num_bytes(abstract)
    inputs = num_bytes((batch, window))[1]
    assert step.memory_analysis().argument_size_in_bytes <= 1.02 * (part + inputs)
    assert part <= EIGHTH * whole
    after, _ = step(first, window, batch, rng)
    assert_same_shardings(after, abstract)
