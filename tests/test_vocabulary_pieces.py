"""Losses over pieces of a vocabulary are those of whole logits, never made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gemma
import tiny_models
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import jit, relative_difference

from vit22b_transfer.models import losses, vocabulary_pieces
from vit22b_transfer.models.vocabulary_pieces import Head, token_terms
from vit22b_transfer.partitioning.rules import Partitioning

RNG = np.random.default_rng(0)
STATES = jnp.asarray(RNG.standard_normal((2, 3, 8)), jnp.float32)


def table_of(size):
    return jnp.asarray(RNG.standard_normal((size, 8)), jnp.float32)


def whole(states, table, targets, softcap=None):
    logits = jnp.einsum("bte,ve->btv", states, table)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return losses.terms_of_logits(logits, targets)


def in_pieces(states, table, targets, softcap=None, *, piece, axis=0):
    head = Head(table.T if axis else table, axis, softcap)
    return token_terms(states, head, targets, piece=piece)


def of_all_terms(function, states, table, targets):
    """A number that depends on all terms, with weights of their own."""
    terms = function(states, table, targets)
    weights = jnp.cos(jnp.arange(6.0).reshape(2, 3))
    return sum(
        jnp.sum(factor * weights * jnp.sin(0.1 * term))
        for factor, term in zip((1.0, 0.7, 0.3), terms[:3], strict=True)
    )


# 16 parts of 5 rows; 4 parts of 9; one part of 37.
@pytest.mark.slow
@pytest.mark.parametrize("size, piece", [(80, 32), (80, 48), (36, 8), (37, 10)])
@pytest.mark.parametrize("axis, softcap", [(0, None), (1, None), (0, 2.0)])
def test_terms_and_gradients_are_those_of_whole_logits(size, piece, axis, softcap):
    table = table_of(size)
    targets = jnp.asarray([[0, size - 1, 7], [size // 2, 7, 1]], jnp.int32)
    ours = functools.partial(in_pieces, softcap=softcap, piece=piece, axis=axis)
    theirs = functools.partial(whole, softcap=softcap)
    results = []
    for function in (ours, theirs):
        gradient = jax.grad(functools.partial(of_all_terms, function), (0, 1))
        both = jit(lambda *x, f=function, g=gradient: (f(*x), g(*x)))
        results.append(jax.device_get(both(STATES, table, targets)))
    (terms, gradients), (expected, expected_gradients) = results
    assert relative_difference(terms[:3], expected[:3]) <= 1e-6
    np.testing.assert_array_equal(terms.best, expected.best)
    assert relative_difference(gradients, expected_gradients) <= 2e-6


def test_of_equal_logits_the_first_token_is_the_best():
    table = jnp.zeros((80, 8)).at[jnp.asarray([70, 33, 34])].set(STATES[0, 0])
    targets = jnp.zeros((2, 3), jnp.int32)
    assert in_pieces(STATES, table, targets, piece=16).best[0, 0] == 33


def test_huge_logits_are_finite():
    targets = jnp.zeros((2, 3), jnp.int32)
    function = functools.partial(in_pieces, piece=16)
    gradient = jax.grad(functools.partial(of_all_terms, function), (0, 1))
    results = gradient(1e4 * STATES, table_of(80), targets)
    assert all(np.all(np.isfinite(x)) for x in results)


# --- Models ---

MODELS = {
    "tied T5": lambda: tiny_models.image_text_model(
        text=tiny_models.text_config(tied_logits=True), **OPTIONS
    ),
    "T5": lambda: tiny_models.image_text_model(**OPTIONS),
    "Gemma 2": lambda: tiny_gemma.prefix_lm_model(
        tiny_gemma.prefix_lm_module("gemma2", blind=True, depth=1), **OPTIONS
    ),
}
OPTIONS = dict(label_smoothing=0.1, z_loss=1e-3)
BATCH = tiny_models.batch(2)


def everything(model):
    def run(params):
        step = jax.value_and_grad(model.loss_fn, has_aux=True)(params, BATCH, None)
        return step, model.score_batch(params, BATCH)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_a_large_vocabulary_never_makes_its_logits(name, monkeypatch):
    model = MODELS[name]()
    params = (
        tiny_gemma.prefix_lm_params(model.module)
        if name == "Gemma 2"
        else tiny_models.model_params(model)
    )
    shape = f"f32[2,6,{tiny_models.VOCAB_SIZE}]"
    assert shape in str(jax.make_jaxpr(everything(model))(params))
    expected = jit(everything(model))(params)
    monkeypatch.setattr(vocabulary_pieces, "PIECE", 32)
    assert shape not in str(jax.make_jaxpr(everything(model))(params))
    assert relative_difference(jit(everything(model))(params), expected) <= 1e-5


@pytest.mark.parametrize("axis", [0, 1])
def test_a_sharded_vocabulary_stays_where_it_is(axis):
    partitioning = Partitioning(data=2, model=4)
    table, targets = table_of(160), jnp.asarray([[0, 159, 7], [80, 7, 1]], jnp.int32)
    spec = PartitionSpec("model", None) if axis == 0 else PartitionSpec(None, "model")
    placed = jax.device_put(
        table.T if axis else table, NamedSharding(partitioning.mesh, spec)
    )

    def loss(states, table):
        terms = token_terms(states, Head(table, axis), targets, piece=64)
        return jnp.sum(terms.log_z - terms.picked)

    step = jit(jax.grad(loss, (0, 1)))
    with partitioning.activate():
        compiled = step.lower(STATES, placed).compile()
    assert "all-gather" not in compiled.as_text()
    expected = step(STATES, jnp.asarray(jax.device_get(placed)))
    assert relative_difference(compiled(STATES, placed), expected) <= 1e-5


def test_temporary_memory_does_not_grow_with_the_vocabulary():
    def temporary(function, size):
        def loss(states, table, targets):
            terms = function(states, table, targets)
            return jnp.sum(terms.log_z - terms.picked)

        arguments = (
            jax.ShapeDtypeStruct((4, 64, 8), jnp.float32),
            jax.ShapeDtypeStruct((size, 8), jnp.float32),
            jax.ShapeDtypeStruct((4, 64), jnp.int32),
        )
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = functools.partial(in_pieces, piece=1024)
    # Beyond the gradient of the table.
    small, large = (temporary(ours, size) - 32 * size for size in (4096, 16384))
    assert large < 1.5 * small
    assert temporary(whole, 16384) > 4 * temporary(ours, 16384)
