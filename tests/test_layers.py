"""Single layers: values against NumPy, gradients against autodiff, stacking."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    assert_within,
    jit,
    random_params,
    relative_difference,
    stack_layers,
)

from vit22b_transfer.models import (
    attention,
    layers,
    multi_head_attention,
    products,
    stacking,
)

BFLOAT16_EPSILON = 2.0**-8


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize(
    "dtype, out_dtype, batch",
    [
        (jnp.float32, None, (2, 3)),
        (jnp.float32, None, ()),
        (jnp.bfloat16, None, (2, 3)),
        (jnp.bfloat16, jnp.float32, (3,)),
    ],
)
def test_gradients_of_linear_equal_autodiffs(dtype, out_dtype, batch):
    x = normal(*batch, 16, dtype=dtype)
    kernel = normal(16, 8, seed=1, dtype=dtype)

    def plain(x, kernel):
        return jnp.einsum(
            "...i,io->...o", x, kernel, preferred_element_type=out_dtype or x.dtype
        )

    def value_and_gradients(product):
        def loss(x, kernel):
            y = product(x, kernel)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        grad = jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        gradients, y = grad(x, kernel)
        return y, *gradients

    ours = value_and_gradients(lambda x, k: products.linear(x, k, out_dtype))
    autodiff = value_and_gradients(plain)
    assert [a.dtype for a in ours] == [a.dtype for a in autodiff]
    # In bfloat16 each side rounds once more or less: the incoming gradient, or a sum.
    tolerance = 2 * BFLOAT16_EPSILON if dtype == jnp.bfloat16 else 1e-6
    assert relative_difference(ours, autodiff) <= tolerance


def test_the_weight_gradient_of_linear_is_one_product_without_transposition():
    def loss(x, kernel):
        return jnp.sum(products.linear(x, kernel).astype(jnp.float32))

    x, kernel = normal(4, 5, 16), normal(16, 8)
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=1))(x, kernel))
    assert "dot_general" in text and "transpose[" not in text


@pytest.mark.parametrize("centering", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_norm_equals_its_formula_in_float64(centering, use_bias):
    norm = layers.Norm(16, centering=centering, use_bias=use_bias, epsilon=1e-3)
    x = 3.0 * normal(2, 5, 16) + 1.0
    params = random_params(norm, x)
    y = np.asarray(x, np.float64)
    if centering:
        y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3) * np.float64(params["scale"])
    y = y + np.float64(params["bias"]) if use_bias else y
    assert_within(1e-5, jit(norm.apply)({"params": params}, x), y)
    assert set(params) == ({"scale", "bias"} if use_bias else {"scale"})


def test_norm_computes_in_float32_and_returns_its_dtype():
    norm = layers.Norm(64, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = normal(2, 64, dtype=jnp.bfloat16)
    params = random_params(norm, x)
    assert params["scale"].dtype == jnp.bfloat16
    y = jit(norm.apply)({"params": params}, x)
    exact = jit(layers.Norm(64).apply)({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    assert_within(0.0, y, exact.astype(jnp.bfloat16))


def test_attention_equals_its_formula_with_mask_bias_and_scale():
    query, key, value = normal(2, 3, 4, 8), normal(2, 5, 4, 8), normal(2, 5, 4, 8)
    bias = normal(1, 4, 3, 5, seed=3)
    mask = np.random.default_rng(4).random((2, 1, 3, 5)) < 0.6
    mask[..., 0] = True
    logits = 0.3 * np.einsum("bqnh,bknh->bnqk", query, key) + np.asarray(bias)
    weights = np.exp(logits) * mask
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnqk,bknh->bqnh", weights, value)
    actual = attention.attend(
        query, key, value, mask=jnp.asarray(mask), bias=bias, scale=0.3
    )
    assert_within(1e-5, actual, expected)


def test_cached_attention_equals_attention_in_its_own_layout():
    query, key, value = normal(2, 3, 4, 8), normal(2, 5, 4, 8), normal(2, 5, 4, 8)
    bias, mask = normal(1, 4, 1, 5, seed=3), normal(2, 1, 3, 5, seed=4) < 0.5
    options = dict(mask=mask.at[..., 0].set(True), bias=bias, scale=0.3)
    expected = attention.attend(query, key, value, **options)
    actual = attention.attend_cached(
        query, key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), **options
    )
    assert_within(1e-6, actual, expected)


def test_masked_keys_have_no_weight_at_all():
    query, key, value = normal(1, 3, 2, 8), normal(1, 5, 2, 8), normal(1, 5, 2, 8)
    mask = jnp.asarray([True, True, False, True, False])[None, None, None]
    wild = jnp.where(mask[0, 0, 0][None, :, None, None], 0.0, 1e4)
    attend = functools.partial(attention.attend, mask=mask)
    actual = attend(query, key + wild, value + wild)
    assert_within(0.0, actual, attend(query, key, value))


def test_attention_with_projected_keys_equals_attention_from_inputs():
    attention = multi_head_attention.MultiHeadAttention(
        16, 2, 8, qk_norm=True, qkv_bias=True
    )
    x, kv = normal(2, 3, 16), normal(2, 5, 16, seed=1)
    variables = {"params": random_params(attention, x, kv)}
    key, value = attention.apply(variables, kv, method="project_key_value")
    whole = attention.apply(variables, x, kv)
    parts = attention.apply(variables, x, key, value, method="attend_projected")
    assert_within(0.0, parts, whole)


@pytest.mark.parametrize("gated", [False, True])
def test_mlp_equals_its_formula(gated):
    mlp = layers.Mlp(16, 24, jnp.tanh, gated=gated)
    x = normal(2, 3, 16)
    params = random_params(mlp, x)

    def dense(name, x):
        kernel, bias = (np.float64(params[name][part]) for part in ("kernel", "bias"))
        return np.float64(x) @ kernel + bias

    if gated:
        hidden = np.tanh(dense("wi_0", x)) * dense("wi_1", x)
    else:
        hidden = np.tanh(dense("wi", x))
    assert_within(1e-5, jit(mlp.apply)({"params": params}, x), dense("wo", hidden))


def test_mlp_drops_out_only_in_training():
    mlp = layers.Mlp(16, 24, jnp.tanh, dropout_rate=0.5)
    x = normal(2, 3, 16)
    variables = {"params": random_params(mlp, x)}
    plain = mlp.apply(variables, x)
    without = layers.Mlp(16, 24, jnp.tanh).apply(variables, x)
    assert_within(0.0, plain, without)
    dropped = mlp.apply(variables, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert np.max(np.abs(dropped - plain)) > 0.01


def test_embedding_looks_up_rows_and_its_tied_logits_are_scaled_products():
    embedding = layers.Embedding(11, 16)
    tokens = jnp.asarray([[3, 0, 10]])
    params = random_params(embedding, tokens)
    table, x = params["embedding"], normal(1, 3, 16)
    looked_up = jit(embedding.apply)({"params": params}, tokens)
    assert_within(0.0, looked_up, table[tokens])
    logits = embedding.apply({"params": params}, x, method="attend")
    expected = np.float64(x) @ np.float64(table).T / 4.0
    assert_within(1e-5, logits, expected)


def test_dense_returns_its_out_dtype_from_bfloat16_operands():
    dense = layers.Dense(
        16,
        8,
        ("embed", "vocab"),
        dtype=jnp.bfloat16,
        out_dtype=jnp.float32,
    )
    x = normal(2, 16)
    params = random_params(dense, x)
    logits = jit(dense.apply)({"params": params}, x)
    assert logits.dtype == jnp.float32
    rounded = [np.float64(a.astype(jnp.bfloat16)) for a in (x, params["kernel"])]
    # The product is not rounded to bfloat16, whose error here would be 1e-2.
    assert_within(1e-5, logits, rounded[0] @ rounded[1] + np.float64(params["bias"]))


def test_stacking_layers_is_the_inverse_of_unstacking():
    depth, width = 3, 4
    tree = {
        "layers": {"mlp": {"kernel": normal(depth, width, 2)}, "s": normal(depth)},
        "decoder": {"layers": {"s": normal(depth, width)}, "norm": normal(width)},
    }
    unrolled = stacking.unstack_layers(tree)
    assert set(unrolled) == {"decoder", *(f"layers_{i}" for i in range(depth))}
    last = unrolled[f"layers_{depth - 1}"]["mlp"]["kernel"]
    assert_within(0.0, last, tree["layers"]["mlp"]["kernel"][-1])
    jax.tree.map(functools.partial(assert_within, 0.0), stack_layers(unrolled), tree)


def test_relative_position_bias_depends_on_the_distance_only():
    bias = layers.RelativePositionBias(2, bidirectional=True)
    variables = {"params": {"rel_embedding": normal(2, 32)}}
    values = jit(lambda: bias.apply(variables, 40, 40))()[0]
    assert_within(0.0, values[:, 1:, 1:], values[:, :-1, :-1])
    assert np.all(values[:, 0, 1] != values[:, 1, 0])
