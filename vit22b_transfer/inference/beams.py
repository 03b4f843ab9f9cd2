"""What beam searches are made of: alive beams, continuations, the best that ended.

A search ranks the 2K best one-token continuations of its K alive beams in each step;
which continuations there are is its own: `expand` offers all tokens of the vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

PAD_ID = 0
# Ids that a largest logit is first looked for in.
_GROUP = 128
# A number; in a program that is exported for any size, a symbol of `jax.export`.
BatchSize = Any


class Beams(NamedTuple):
    """State of beam search.

    The alive beams are sorted, best first; a log-probability of -inf marks an empty
    place. Of the finished hypotheses only the best is ever returned, and a hypothesis
    that is not the best now never becomes it, so the best is all that is kept.
    """

    index: Int32[Array, ""]
    alive: Int32[Array, "batch beams length"]
    log_probs: Float32[Array, "batch beams"]
    finished: Int32[Array, "batch length"]
    score: Float32[Array, "batch"]
    ancestry: Bool[Array, "batch beams beams length"]
    cache: Any


class Candidates(NamedTuple):
    """One-token continuations of the alive beams, best first."""

    parent: Int32[Array, "batch candidates"]
    token: Int32[Array, "batch candidates"]
    log_probs: Float32[Array, "batch candidates"]


def length_penalty(
    length: int | Float[Array, "..."], alpha: float
) -> float | Float[Array, "..."]:
    """((5 + length) / 6) ** alpha (Wu et al. 2016, eq. 14); EOS counts."""
    return ((5.0 + length) / 6.0) ** alpha


def log_probs_of(
    logits: Float[Array, "*batch vocab"], ids: Int32[Array, "*batch n"]
) -> Float32[Array, "*batch n"]:
    """float32 log-probabilities of the tokens `ids` [..., n] under logits [..., V].

    Shifted by the maximum as in log_softmax, so that none is above zero: the bound that
    ends beam search relies on it. The whole [..., V] of them is never formed.
    """
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)
    return (jnp.take_along_axis(logits, ids, axis=-1) - top) - jnp.log(total)


def first_largest(logits: Float[Array, "batch vocab"]) -> Int32[Array, "batch"]:
    """The smallest of the ids of the largest logits, as `jnp.argmax`.

    The largest of each group of ids is found first: that alone is a fast loop on CPUs.
    """
    batch, vocab = logits.shape
    size = _GROUP if vocab % _GROUP == 0 else 1
    groups = logits.reshape(batch, vocab // size, size)
    group = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
    members = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    return (group * size + jnp.argmax(members, axis=-1)).astype(jnp.int32)


def initial(
    cache: Any, *, batch_size: BatchSize, num_beams: int, max_decode_length: int
) -> Beams:
    """The state before the first token: one beam is alive."""
    tokens = jnp.full((batch_size, num_beams, max_decode_length), PAD_ID, jnp.int32)
    # All beams begin equal: with more than one alive the search would follow copies.
    first = jnp.where(jnp.arange(num_beams) == 0, 0.0, -jnp.inf)
    return Beams(
        index=jnp.int32(0),
        alive=tokens,
        log_probs=jnp.broadcast_to(
            first.astype(jnp.float32)[None], (batch_size, num_beams)
        ),
        finished=tokens[:, 0],
        score=jnp.full(batch_size, -jnp.inf, jnp.float32),
        ancestry=jnp.broadcast_to(
            jnp.eye(num_beams, dtype=bool)[None, :, :, None],
            (batch_size, num_beams, num_beams, max_decode_length),
        ),
        cache=cache,
    )


def expand(
    logits: Float[Array, "batch beams vocab"],
    log_probs: Float32[Array, "batch beams"],
    adjust: Callable[[Array], Array] | None = None,
) -> Candidates:
    """The 2K best continuations: K beams have at most K ends, so K go on.

    adjust: what log-probabilities [B, K, V] go through before they rank; at most zero
      as they are.
    """
    batch_size, num_beams, vocab_size = logits.shape
    per_beam = min(2 * num_beams, vocab_size)
    # In float32: XLA's CPU top_k of bfloat16 falls back to a sort, 100 times slower.
    logits = logits.astype(jnp.float32)
    if adjust is None:
        _, ids = lax.top_k(logits, per_beam)
        best = log_probs_of(logits, ids)
    else:
        best, ids = lax.top_k(adjust(jax.nn.log_softmax(logits)), per_beam)
    totals = log_probs[:, :, None] + best
    totals, places = lax.top_k(
        totals.reshape(batch_size, num_beams * per_beam), 2 * num_beams
    )
    token = jnp.take_along_axis(
        ids.reshape(batch_size, num_beams * per_beam), places, axis=1
    )
    parent = places // per_beam
    return Candidates(parent.astype(jnp.int32), token.astype(jnp.int32), totals)


def keep_finished(
    state: Beams,
    candidates: Candidates,
    ends: Bool[Array, "batch candidates"],
    alpha: float,
) -> tuple[Int32[Array, "batch length"], Float32[Array, " batch"]]:
    """Tokens and score of the best hypothesis, the candidates that end included."""
    penalty = length_penalty(state.index.astype(jnp.float32) + 1.0, alpha)
    scores = jnp.where(ends, candidates.log_probs / penalty, -jnp.inf)
    best = jnp.argmax(scores, axis=1)[:, None]
    score = jnp.take_along_axis(scores, best, axis=1)[:, 0]
    tokens = continued(state, candidates, best)[:, 0]
    better = score > state.score
    return (
        jnp.where(better[:, None], tokens, state.finished),
        jnp.where(better, score, state.score),
    )


def keep_alive(
    state: Beams, candidates: Candidates, ends: Bool[Array, "batch candidates"]
) -> tuple[Array, Array, Array, Array]:
    """Tokens, log-probabilities and ancestry of the K best that do not end.

    Last the places of these among the candidates, [batch, beams].
    """
    num_beams, length = state.alive.shape[1:]
    log_probs, kept = lax.top_k(
        jnp.where(ends, -jnp.inf, candidates.log_probs), num_beams
    )
    parent = jnp.take_along_axis(candidates.parent, kept, axis=1)
    inherited = jnp.take_along_axis(state.ancestry, parent[:, :, None, None], axis=1)
    own = jnp.eye(num_beams, dtype=bool)[None, :, :, None]
    past = (jnp.arange(length) <= state.index)[None, None, None, :]
    return (
        continued(state, candidates, kept),
        log_probs,
        jnp.where(past, inherited, own),
        kept,
    )


def continued(
    state: Beams, candidates: Candidates, chosen: Int32[Array, "batch n"]
) -> Int32[Array, "batch n length"]:
    """Token sequences [B, n, T] of the candidates at the places `chosen` [B, n]."""
    parent = jnp.take_along_axis(candidates.parent, chosen, axis=1)
    token = jnp.take_along_axis(candidates.token, chosen, axis=1)
    past = jnp.take_along_axis(state.alive, parent[:, :, None], axis=1)
    return lax.dynamic_update_slice(
        past, token[:, :, None], (jnp.int32(0), jnp.int32(0), state.index)
    )
