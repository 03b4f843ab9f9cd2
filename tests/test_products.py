"""Products in bfloat16 on a CPU: the numbers of float32's, in every layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_models import jit, relative_difference

from vit22b_transfer.inference import beams
from vit22b_transfer.models import layers, products, stacking
from vit22b_transfer.planning import trace

EPSILON = 2.0**-8
EQUATIONS = (
    "BQNH,BKNH->BNQK",
    "BKNH,BNQK->BQNH",
    "BQKGH,BSKH->BKGQS",
    "BSKH,BKGQS->BQKGH",
    "BNQH,BNHK->BNQK",
    "BKGQS,BKSH->BQKGH",
)
LINEAR = "linear"


def a_case(seed):
    """(equation, shapes of both, order of the first's axes, order of the result's)."""
    random = np.random.default_rng(seed)
    equation = [*EQUATIONS, LINEAR, LINEAR][seed % 8]
    some = iter(random.choice([1, 2, 3, 7, 8, 9, 16, 33], 9).tolist())
    if equation == LINEAR:
        shape = [next(some) for _ in range(random.integers(1, 5))]
        shapes = shape, [shape[-1], next(some)]
        ndim = len(shape)
    else:
        terms = equation.split("->")[0].split(",")
        sizes = {letter: next(some) for letter in sorted(set("".join(terms)))}
        shapes = tuple([sizes[letter] for letter in term] for term in terms)
        ndim = len(equation.split("->")[1])
    orders = random.permutation(len(shapes[0])), random.permutation(ndim)
    return equation, shapes, *([int(i) for i in order] for order in orders)


@pytest.mark.parametrize("seed", range(24))
def test_products_and_gradients_equal_float32s_in_every_layout(seed):
    equation, shapes, order, out_order = a_case(seed)
    random = np.random.default_rng(seed)
    stored = [shapes[0][i] for i in order], shapes[1][:-2] + shapes[1][:-3:-1]
    a, b = (jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in stored)
    back = [order.index(i) for i in range(len(order))]

    def loss(product, a, b):
        y = product(a.transpose(back), b.swapaxes(-1, -2)).transpose(out_order)
        weights = jnp.arange(1, y.size + 1, dtype=jnp.float32).reshape(y.shape)
        weights = jnp.sin(weights).astype(jnp.bfloat16).astype(jnp.float32)
        return jnp.sum(y.astype(jnp.float32) * weights), y

    def ours(a, b):
        if equation == LINEAR:
            return products.linear(a, b)
        return products.einsum(equation, a, b)

    def plain(a, b):
        if equation == LINEAR:
            return a @ b
        return jnp.einsum(equation, a, b)

    def results(product, a, b):
        run = jit(lambda a, b: jax.grad(loss, (1, 2), has_aux=True)(product, a, b))
        gradients, y = run(a, b)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (y, *gradients))

    found = results(ours, a, b)
    expected = results(plain, a.astype(jnp.float32), b.astype(jnp.float32))
    assert relative_difference(found, expected) <= EPSILON


def dots(text):
    """The lines of a jaxpr's products."""
    return [line for line in text.splitlines() if "dot_general" in line]


def test_accelerators_round_as_they_write():
    x, kernel = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 16), jnp.bfloat16)
    here = dots(str(jax.make_jaxpr(products.linear)(x, kernel)))
    with products.as_on_accelerators():
        traced = jax.make_jaxpr(lambda *a: products.linear(*a))(x, kernel)
        elsewhere = dots(str(traced))
        assert products.kept_dtype(jnp.bfloat16) == jnp.bfloat16
    assert [line.split(" = ")[0].split(":")[1] for line in here] == ["f32[4,16]"]
    assert [line.split(" = ")[0].split(":")[1] for line in elsewhere] == ["bf16[4,16]"]
    assert products.kept_dtype(jnp.bfloat16) == jnp.float32


def test_plans_are_made_of_what_accelerators_compute():
    x = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
    program = trace.trace(
        lambda x, kernel: products.linear(x, kernel), (x, kernel), ((), ())
    )
    (step,) = [step for step, _ in program.all_steps() if step.dot is not None]
    assert [value.itemsize for value in step.writes] == [2]


class _Stack(nn.Module):
    """Two layers of one product each, which rematerialise as `policy` says."""

    policy: str

    @nn.compact
    def __call__(self, x):
        block = stacking.remat_block(_Block, self.policy, scanned=False)
        return block(name="second")(block(name="first")(x))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = layers.Dense(8, 24, ("embed", "mlp"), dtype=jnp.bfloat16, name="wide")(x)
        return layers.Dense(24, 8, ("mlp", "embed"), dtype=jnp.bfloat16)(jnp.sin(y))


def test_rematerialisation_keeps_the_rounded_products():
    stack = _Stack("dots")
    x = jnp.ones((5, 8), jnp.bfloat16)
    params = stack.init(jax.random.key(0), x)
    _, backward = jax.vjp(lambda params: stack.apply(params, x), params)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == (5, 24)]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("vocab", [259, 1280])
def test_the_first_of_the_largest_logits(vocab):
    random = np.random.default_rng(0)
    logits = random.integers(0, 40, (64, vocab)).astype(np.float32)
    logits[1] = -np.inf
    logits[2, [5, 7]] = np.nan
    logits[3, :] = 2.0
    logits[4, -1] = np.inf
    np.testing.assert_array_equal(
        jit(beams.first_largest)(logits), np.argmax(logits, axis=-1)
    )
