"""Matrix products in the form that is fastest where they run.

XLA hands a product of two bfloat16 arrays on a CPU to the library that knows the
bfloat16 units only where the result may stay in float32: two to ten times as fast
(benchmarks/bfloat16_step.py). So there the sums are asked for in float32 and rounded
after it, which gives the same numbers. Other devices round as they write.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

# Name of a result whose sums are rounded apart from it, for rematerialisation.
NAME = "product"

# Of dimensions of a batch, in an einsum beside i and o.
_LETTERS = "abcdefgh"

_for_accelerators = contextvars.ContextVar("for_accelerators", default=False)


@contextlib.contextmanager
def as_on_accelerators() -> Iterator[None]:
    """Context in which a CPU traces the products that a GPU or TPU would trace."""
    token = _for_accelerators.set(True)
    try:
        yield
    finally:
        _for_accelerators.reset(token)


def rounds_apart(*dtypes: Any) -> bool:
    """Whether products of these operands and result are summed apart from rounding."""
    narrow = all(jnp.dtype(dtype) == jnp.bfloat16 for dtype in dtypes)
    return narrow and jax.default_backend() == "cpu" and not _for_accelerators.get()


def kept_dtype(dtype: Any) -> Any:
    """The dtype of keys and values that a loop of decoding keeps and multiplies.

    A CPU writes into bfloat16 arrays, and multiplies their vectors, by way of float32.
    """
    return jnp.float32 if rounds_apart(dtype) else dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    out_dtype: Any = None,
) -> Float[Array, "*batch outputs"]:
    """`x @ kernel`, summed in float32 where devices can; in `out_dtype` or x's dtype.

    Its weight gradient is one dot in the kernel's own layout. Autodiff would emit the
    transposed product and transpose it back: on a CPU in bfloat16 that leaves the fast
    matmul and costs several times the forward pass.
    """
    return _linear(x, kernel, out_dtype)


def _linear(x, kernel, out_dtype):
    if rounds_apart(x.dtype, kernel.dtype, out_dtype or x.dtype):
        y = rounded_einsum(_equation(x), x, kernel)
        # Named, so that rematerialisation keeps this one and not the sums.
        return checkpoint_name(y, NAME)
    return jnp.einsum(
        "...i,io->...o", x, kernel, preferred_element_type=out_dtype or x.dtype
    )


def _equation(x):
    batch = _LETTERS[: x.ndim - 1]
    return f"{batch}i,io->{batch}o"


def _linear_forward(x, kernel, out_dtype):
    # Not `linear`: inside a custom gradient, remat policies would not see the dot.
    return _linear(x, kernel, out_dtype), (x, kernel)


def _linear_backward(out_dtype, saved, grad):
    x, kernel = saved
    grad = grad.astype(x.dtype)
    if rounds_apart(x.dtype, kernel.dtype):
        return _backward(_equation(x), saved, grad)
    batch = tuple(range(x.ndim - 1))
    grad_x = jnp.einsum("...o,io->...i", grad, kernel)
    grad_kernel = jax.lax.dot_general(x, grad, ((batch, batch), ((), ())))
    return grad_x, grad_kernel


linear.defvjp(_linear_forward, _linear_backward)


def einsum(
    equation: str, a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`jnp.einsum` of two arrays of one dtype, and its gradients of the same form.

    No ellipsis; each letter stands in two or in all three of the terms of `equation`.
    """
    if not rounds_apart(a.dtype, b.dtype):
        return jnp.einsum(equation, a, b)
    return _einsum(equation, a, b)


def rounded_einsum(
    equation: str, a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The same without gradients: summed in float32, rounded to the dtype of `a`.

    Every transposition is written out, which leaves [batch, m, k] by [batch, k, n]: of
    other forms XLA promises some to the library and then computes them by nothing at
    all (`Unsupported element type for DotThunk`).
    """
    operands, out = equation.split("->")
    of_a, of_b = operands.split(",")
    shared = [letter for letter in out if letter in of_a and letter in of_b]
    summed = [letter for letter in of_a if letter not in out]
    rows = [letter for letter in of_a if letter in out and letter not in of_b]
    columns = [letter for letter in of_b if letter in out and letter not in of_a]
    sizes = dict(zip(of_a + of_b, a.shape + b.shape, strict=True))
    if 1 in (math.prod(sizes[i] for i in rows), math.prod(sizes[i] for i in columns)):
        # With a vector XLA multiplies by itself, in float32. What a loop multiplies in
        # every step is converted before it.
        wide = (x.astype(jnp.float32) for x in (a, b))
        return jnp.einsum(equation, *wide).astype(a.dtype)
    a = _transposed(a, of_a, shared + rows + summed)
    b = _transposed(b, of_b, shared + summed + columns)
    first, of_sums = len(shared), range(len(summed))
    y = jax.lax.dot_general(
        a,
        b,
        (
            (
                tuple(first + len(rows) + i for i in of_sums),
                tuple(first + i for i in of_sums),
            ),
            (tuple(range(first)), tuple(range(first))),
        ),
        preferred_element_type=jnp.float32,
    )
    y = y.astype(a.dtype)
    return _transposed(y, shared + rows + columns, list(out))


def _transposed(x, letters, wanted):
    return jnp.transpose(x, [list(letters).index(letter) for letter in wanted])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation, a, b):
    return rounded_einsum(equation, a, b)


def _forward(equation, a, b):
    # Not `_einsum`: inside a custom gradient, remat policies would not see the dot.
    return rounded_einsum(equation, a, b), (a, b)


def _backward(equation, saved, grad):
    a, b = saved
    operands, out = equation.split("->")
    of_a, of_b = operands.split(",")
    return (
        rounded_einsum(f"{out},{of_b}->{of_a}", grad, b),
        rounded_einsum(f"{of_a},{out}->{of_b}", a, grad),
    )


_einsum.defvjp(_forward, _backward)


def promoted(array: jax.Array, rank: int) -> jax.Array:
    """`array` with leading axes of size one, so that no rank is promoted silently."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


@jax.custom_vjp
def add_bias(
    y: Float[Array, "*batch outputs"], bias: Float[Array, " outputs"]
) -> Float[Array, "*batch outputs"]:
    """`y + bias` in y's dtype; the bias's gradient is summed in float32.

    Autodiff would sum it in y's dtype: in bfloat16, XLA's slowest sum on a CPU.
    """
    return y + promoted(bias.astype(y.dtype), y.ndim)


def _add_bias_forward(y, bias):
    # The empty array tells the dtype.
    return add_bias.fun(y, bias), bias[:0]


def _add_bias_backward(like, grad):
    batch = tuple(range(grad.ndim - 1))
    total = jnp.sum(grad, axis=batch, dtype=jnp.float32)
    return grad, total.astype(like.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)
