"""Decoding that answers from a list: beam search over a trie of the answers' tokens.

Each state of the trie is a row of its continuations: tokens and next states. The first
state, with hundreds of continuations, is a row of its own; the others are as wide as
the widest of them. Log-probabilities are gathered for the continuations alone, and are
those of the full vocabulary, so that scores compare with those of free decoding.
(Rows in place of dense tables as in Su et al. 2026, arXiv 2602.22647. Renormalising
over the continuations would be another ranking; it is not offered.)
"""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32

from vit22b_transfer import UserError
from vit22b_transfer.inference import beams, decoding
from vit22b_transfer.inference.controls import Controls


@dataclasses.dataclass(frozen=True)
class AnswerTrie:
    """Answers as rows.

    root_tokens, root_next: [R], continuations of the first state.
    tokens, next_states, valid: [states, M], of all others, 0 and False where a row has
      fewer. State 0 has none: it is where an answer has ended.
    longest: tokens of the longest answer, EOS included.
    repeated: answers that are the same tokens as another.
    digest: of the answers' tokens, in any order.
    """

    root_tokens: Int32[np.ndarray, " root"]
    root_next: Int32[np.ndarray, " root"]
    tokens: Int32[np.ndarray, "states width"]
    next_states: Int32[np.ndarray, "states width"]
    valid: Bool[np.ndarray, "states width"]
    longest: int
    repeated: int
    digest: str


def trie(answers: Sequence[Sequence[int]], eos_id: int) -> AnswerTrie:
    """The trie of answers as token ids without EOS, which is put behind each.

    An answer that begins another one has both ends.

    Raises:
      UserError: for no answers, or one without tokens.
    """
    ended = [(*map(int, answer), eos_id) for answer in answers]
    if not ended or min(map(len, ended)) < 2:
        what = "an answer is blank" if ended else "there are no answers"
        raise UserError(f"{what}; a list needs one answer or more, each of some text.")
    distinct = sorted(set(ended))
    # States are the beginnings of answers; 0 is the end, 1 the empty beginning.
    states: dict[tuple[int, ...], int] = {(): 1}
    children: dict[int, dict[int, int]] = {0: {}, 1: {}}
    for answer in distinct:
        for length, token in enumerate(answer):
            here = states[answer[:length]]
            if token == eos_id:
                children[here][token] = 0
                continue
            after = states.setdefault(answer[: length + 1], len(states) + 1)
            children.setdefault(after, {})
            children[here][token] = after
    root = children[1]
    width = max(len(row) for state, row in children.items() if state != 1)
    shape = (len(children), max(1, width))
    tokens, next_states = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    valid = np.zeros(shape, bool)
    for state, row in children.items():
        if state != 1:
            tokens[state, : len(row)] = list(row)
            next_states[state, : len(row)] = list(row.values())
            valid[state, : len(row)] = True
    return AnswerTrie(
        np.array(list(root), np.int32),
        np.array(list(root.values()), np.int32),
        tokens,
        next_states,
        valid,
        max(map(len, ended)),
        len(ended) - len(distinct),
        hashlib.sha256(repr(distinct).encode()).hexdigest()[:16],
    )


class _Search(NamedTuple):
    """Beams, and the state of the trie that each alive one is in."""

    beams: beams.Beams
    states: Int32[Array, "batch beams"]


def from_list(
    init_cache: decoding.InitCache,
    step_fn: decoding.StepFn,
    *,
    batch_size: beams.BatchSize,
    max_decode_length: int,
    eos_id: int,
    answers: str,
    vocabulary: Any,
    rng: Array | None = None,
    num_beams: int = 8,
    alpha: float = 0.0,
    controls: Controls | None = None,
) -> decoding.Decoded:
    """The best of the answers in a file, one to a line, by beam search.

    With as many beams as answers it is the best of all; with fewer, an answer whose
    beginning is not among the best is lost. Each answer is the tokens that `vocabulary`
    makes of it, no other.

    alpha: of `decoding.length_penalty`; 0: scores are log-probabilities.
    Scores: sum of the log-probabilities of the tokens, EOS included, over the full
    vocabulary, / `length_penalty`.

    Raises:
      UserError: if there are controls: an answer of the list is one, however short; if
        the file has no answers, or one has more than `max_decode_length`
        tokens.
    """
    from vit22b_transfer.data import records, text_files

    if controls is not None:
        raise UserError(
            "answers from a list are what the list says: leave out the controls of "
            "decoding (gin_configs/models/decoding_controls.gin)."
        )
    lines = text_files.lines(records.resolve_path(answers))
    texts = [line.strip() for _, line in lines]
    found = trie([vocabulary.encode(text) for text in texts], eos_id)
    if found.repeated:
        logging.getLogger(__name__).warning(
            "%s: %d answers are the same tokens as others", answers, found.repeated
        )
    return from_trie(
        init_cache,
        step_fn,
        found,
        batch_size=batch_size,
        max_decode_length=max_decode_length,
        eos_id=eos_id,
        num_beams=num_beams,
        alpha=alpha,
    )


def from_trie(
    init_cache: decoding.InitCache,
    step_fn: decoding.StepFn,
    answers: AnswerTrie,
    *,
    batch_size: beams.BatchSize,
    max_decode_length: int,
    eos_id: int,
    num_beams: int,
    alpha: float = 0.0,
) -> decoding.Decoded:
    """As `from_list`, of a trie."""
    if num_beams < 1 or alpha < 0:
        raise UserError(f"num_beams is {num_beams}, alpha {alpha}; 1 and 0 at least.")
    if answers.longest > max_decode_length:
        raise UserError(
            f"an answer has {answers.longest} tokens with its end, but texts are "
            f"decoded up to {max_decode_length}: raise the feature length `targets`."
        )
    rows = tuple(map(jnp.asarray, (answers.tokens, answers.next_states, answers.valid)))
    root = jnp.asarray(answers.root_tokens), jnp.asarray(answers.root_next)
    penalty = decoding.length_penalty(max_decode_length, alpha)

    def advanced(search, candidates, after, cache):
        state = search.beams
        ends = candidates.token == eos_id
        finished, score = beams.keep_finished(state, candidates, ends, alpha)
        alive, log_probs, ancestry, kept = beams.keep_alive(state, candidates, ends)
        # An empty place is in the state that nothing continues.
        states = jnp.where(
            log_probs > -jnp.inf, jnp.take_along_axis(after, kept, axis=1), 0
        )
        index = state.index + 1
        fields = (index, alive, log_probs, finished, score, ancestry, cache)
        return _Search(beams.Beams(*fields), states)

    def logits_of(state):
        last = lax.dynamic_index_in_dim(
            state.alive, jnp.maximum(state.index - 1, 0), axis=2, keepdims=False
        )
        return step_fn(last, state.cache, state.index, state.ancestry)

    def first_step(state):
        logits, cache = logits_of(state)
        tokens, after = (jnp.broadcast_to(x, (batch_size, x.shape[0])) for x in root)
        totals = beams.log_probs_of(logits[:, 0], tokens)
        parent = jnp.zeros_like(tokens)
        search = _Search(state, jnp.ones((batch_size, num_beams), jnp.int32))
        candidates, after = _best(totals, parent, tokens, after, num_beams)
        return advanced(search, candidates, after, cache)

    def step(search):
        state = search.beams
        logits, cache = logits_of(state)
        tokens, after, valid = (row[search.states] for row in rows)
        totals = state.log_probs[:, :, None] + beams.log_probs_of(logits, tokens)
        totals = jnp.where(valid, totals, -jnp.inf)
        parent = jnp.broadcast_to(
            jnp.arange(num_beams, dtype=jnp.int32)[None, :, None], tokens.shape
        )
        totals, parent, tokens, after = (
            x.reshape(batch_size, -1) for x in (totals, parent, tokens, after)
        )
        candidates, after = _best(totals, parent, tokens, after, num_beams)
        return advanced(search, candidates, after, cache)

    def unfinished(search):
        state = search.beams
        can_improve = state.score < state.log_probs[:, 0] / penalty
        return (state.index < max_decode_length) & jnp.any(can_improve)

    start = beams.initial(
        init_cache(num_beams),
        batch_size=batch_size,
        num_beams=num_beams,
        max_decode_length=max_decode_length,
    )
    end = lax.while_loop(unfinished, step, first_step(start)).beams
    settings = (
        ("method", "from_list"),
        ("answers", answers.digest),
        ("num_beams", num_beams),
        ("alpha", alpha),
    )
    return decoding.Decoded(end.finished, end.score, end.index, settings)


def _best(totals, parent, token, after, num_beams):
    """The 2K best continuations, filled up with impossible ones, and their states."""
    missing = max(0, 2 * num_beams - totals.shape[1])
    fill = ((0, 0), (0, missing))
    totals = jnp.pad(totals, fill, constant_values=-jnp.inf)
    best, places = lax.top_k(totals, 2 * num_beams)
    parent, token, after = (
        jnp.take_along_axis(jnp.pad(x, fill), places, axis=1)
        for x in (parent, token, after)
    )
    return beams.Candidates(parent, token, best), after
