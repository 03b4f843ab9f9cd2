"""Token losses over pieces of a vocabulary: the logits of a batch never exist whole.

Those of 512 positions over 257,152 tokens are half a gigabyte in float32, and their
gradient as much again. Here they are made for a piece of the vocabulary at a time; the
backward pass makes them again, from the hidden states and the logarithm of the
normaliser (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models").
That is a product more, for memory that does not grow with the vocabulary.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit22b_transfer.models.losses import TokenTerms

# Tokens of a piece: products of this width are as fast as whole ones.
PIECE = 16_384
# A piece has as much of each of these parts: a mesh may shard the vocabulary so far,
# and every device has something of every piece.
_PARTS = 16


class Head(NamedTuple):
    """How hidden states become logits.

    table: [V, E], or [E, V] if `vocab_axis` is 1; taken in the dtype of the states.
    softcap: bounds the logits smoothly, `softcap * tanh(logits / softcap)`.
    """

    # Any: under jax.eval_shape and in tree operations the leaf is no array.
    table: Any
    vocab_axis: int
    softcap: float | None = None


def token_terms(
    states: Float[Array, "batch length embed"],
    head: Head,
    targets: Int[Array, "batch length"],
    *,
    piece: int,
) -> TokenTerms:
    """What `losses.terms_of_logits` gives of the logits of `head`, piece by piece.

    Products are accumulated in float32. piece: tokens at a time, such as `PIECE`.
    """
    return _terms(states, head.table, targets, head.vocab_axis, head.softcap, piece)


class _Pieces:
    """A vocabulary as [parts, rows], of which a piece is some of the rows."""

    def __init__(self, shape: tuple[int, ...], axis: int, piece: int):
        self.axis, self.shape = axis, shape
        self.parts = math.gcd(shape[axis], _PARTS)
        self.rows = shape[axis] // self.parts
        self.size = min(self.rows, max(1, piece // self.parts))

    def split(self, table):
        """[parts, rows, E], or [E, parts, rows]."""
        split = (self.parts, self.rows)
        before, after = self.shape[: self.axis], self.shape[self.axis + 1 :]
        return table.reshape(*before, *split, *after)

    def whole(self, split):
        """The inverse of `split`."""
        return split.reshape(self.shape)

    def ids(self, start, size):
        """Tokens [parts, size] of a piece."""
        rows = start + jax.lax.broadcasted_iota(jnp.int32, (self.parts, size), 1)
        parts = jax.lax.broadcasted_iota(jnp.int32, (self.parts, size), 0)
        return parts * self.rows + rows

    def fold(self, step, carry):
        """`step(carry, start, size)` for all pieces; the last one may be smaller."""
        count, rest = divmod(self.rows, self.size)

        def body(carry, number):
            return step(carry, number * self.size, self.size), None

        carry, _ = jax.lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))
        return step(carry, count * self.size, rest) if rest else carry

    @property
    def letters(self) -> str:
        """Of a piece of the table, in einsum's notation."""
        return "epr" if self.axis else "pre"


def _logits(pieces, split, states, start, size, softcap):
    """(a piece of the table, its logits [B, T, parts, size] in float32)."""
    rows = jax.lax.dynamic_slice_in_dim(split, start, size, axis=pieces.axis + 1)
    rows = rows.astype(states.dtype)
    equation = f"bte,{pieces.letters}->btpr"
    logits = jnp.einsum(equation, states, rows, preferred_element_type=jnp.float32)
    return rows, logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _terms(states, table, targets, axis, softcap, piece):
    pieces = _Pieces(table.shape, axis, piece)
    split = pieces.split(table)
    lowest = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
    zeros = jnp.zeros(targets.shape, jnp.float32)
    none = jnp.full(targets.shape, jnp.iinfo(jnp.int32).max)

    def step(carry, start, size):
        top, powers, picked, total, best = carry
        _, logits = _logits(pieces, split, states, start, size, softcap)
        ids = pieces.ids(start, size)
        largest = jnp.max(logits, axis=(2, 3))
        is_largest = logits == largest[..., None, None]
        first = jnp.min(
            jnp.where(is_largest, ids[None, None], none[..., None, None]), axis=(2, 3)
        )
        best = jnp.where(
            largest > top,
            first,
            jnp.where(largest == top, jnp.minimum(first, best), best),
        )
        new = jnp.maximum(top, largest)
        powers = powers * jnp.exp(top - new) + jnp.sum(
            jnp.exp(logits - new[..., None, None]), axis=(2, 3)
        )
        is_target = ids[None, None] == targets[..., None, None]
        picked = picked + jnp.sum(jnp.where(is_target, logits, 0.0), axis=(2, 3))
        return new, powers, picked, total + jnp.sum(logits, axis=(2, 3)), best

    carry = pieces.fold(step, (lowest, zeros, zeros, zeros, none))
    top, powers, picked, total, best = carry
    return TokenTerms(top + jnp.log(powers), picked, total, best)


def _forward(states, table, targets, axis, softcap, piece):
    terms = _terms(states, table, targets, axis, softcap, piece)
    return terms, (states, table, targets, terms.log_z)


def _backward(axis, softcap, piece, saved, gradients):
    states, table, targets, log_z = saved
    of_log_z, of_picked, of_total = (x[..., None, None] for x in gradients[:3])
    pieces = _Pieces(table.shape, axis, piece)
    split = pieces.split(table)

    def step(carry, start, size):
        of_states, of_table = carry
        rows, logits = _logits(pieces, split, states, start, size, softcap)
        is_target = pieces.ids(start, size)[None, None] == targets[..., None, None]
        gradient = of_log_z * jnp.exp(logits - log_z[..., None, None]) + of_total
        gradient = gradient + jnp.where(is_target, of_picked, 0.0)
        if softcap is not None:
            gradient = gradient * (1.0 - jnp.square(logits / softcap))
        gradient = gradient.astype(states.dtype)
        of_states = of_states + jnp.einsum(
            f"btpr,{pieces.letters}->bte",
            gradient,
            rows,
            preferred_element_type=jnp.float32,
        )
        of_rows = jnp.einsum(
            f"bte,btpr->{pieces.letters}",
            states,
            gradient,
            preferred_element_type=jnp.float32,
        )
        of_table = jax.lax.dynamic_update_slice_in_dim(
            of_table, of_rows.astype(table.dtype), start, axis=pieces.axis + 1
        )
        return of_states, of_table

    begin = jnp.zeros(states.shape, jnp.float32), jnp.zeros_like(split)
    of_states, of_table = pieces.fold(step, begin)
    return of_states.astype(states.dtype), pieces.whole(of_table), None


_terms.defvjp(_forward, _backward)
