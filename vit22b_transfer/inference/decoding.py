"""Greedy search, sampling and beam search, each one compiled loop with early exit.

A decode function is called as

    decode_fn(init_cache, step_fn, *, batch_size, max_decode_length, eos_id, rng)

with B sequences of K beams (K = 1 except in beam search) and at most T steps:

- `init_cache(K)` returns the cache: any pytree; position t of beam k of its
  self-attention part holds what `step_fn` wrote there.
- `step_fn(tokens [B, K], cache, index, ancestry [B, K, K, T])` returns the logits of
  the next token, [B, K, V], and the cache with position `index` of all K beams
  written. Beam k may attend position t as written by beam k' where
  `ancestry[b, k, k', t]` and t <= index.

So a beam that continues another one is told whose past is its own; nothing in the cache
moves. The table is K*K*T booleans per sequence, the cache K*T*H*D floats per layer.
Example with K = 2: both beams of step 1 continue beam 1 of step 0, so at index 1

    ancestry[b, 0] = [[0, 1], [1, 0]]   # t = 0 was written by beam 1, t = 1 by beam 0
    ancestry[b, 1] = [[0, 0], [1, 1]]   # t = 0 was written by beam 1, t = 1 by beam 1

written as rows k' and columns t. The first token fed is 0. Log-probabilities are
float32 whatever the logits are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from vit22b_transfer import UserError
from vit22b_transfer.inference import beams, sampling
from vit22b_transfer.inference.beams import PAD_ID, BatchSize, length_penalty
from vit22b_transfer.inference.controls import Controls

Cache = Any
InitCache = Callable[[int], Cache]
StepFn = Callable[..., tuple[Array, Cache]]


@flax.struct.dataclass
class Decoded:
    """What a decode function returns.

    tokens: int32 [B, T], up to and including EOS, 0 after it. A sequence that did not
      end within T steps has no EOS.
    scores: float32 [B]; what they are is said by the function that made them.
    steps: int32 scalar, how many times the model was called.
    settings: name and parameters of the method, for records of how a file was made.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    tokens: Any
    scores: Any
    steps: Any
    settings: tuple[tuple[str, Any], ...] = flax.struct.field(
        pytree_node=False, default=()
    )


def greedy(
    init_cache: InitCache,
    step_fn: StepFn,
    *,
    batch_size: BatchSize,
    max_decode_length: int,
    eos_id: int,
    rng: Array | None = None,
    controls: Controls | None = None,
) -> Decoded:
    """The most probable token at each step; of equal ones the smallest id.

    controls: rules that logits go through before.
    Scores: sum of the log-probabilities that the model itself gives the tokens (before
    any controls), EOS included.
    """
    del rng

    def choose(logits, index):
        del index
        return beams.first_largest(logits)

    return _decode_one_by_one(
        init_cache,
        step_fn,
        choose,
        shape=(batch_size, max_decode_length),
        eos_id=eos_id,
        controls=controls,
        settings=(("method", "greedy"),),
    )


def sample(
    init_cache: InitCache,
    step_fn: StepFn,
    *,
    batch_size: BatchSize,
    max_decode_length: int,
    eos_id: int,
    rng: Array | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    controls: Controls | None = None,
) -> Decoded:
    """One random sequence each.

    rng: a key, or one for each sequence, which then depends on no other.
    temperature: logits are divided by it.
    top_k: only the k most probable tokens may be drawn; 0: all of them.
    top_p: only the smallest set of most probable tokens whose mass is at least top_p
      (Holtzman et al. 2020), after temperature and top_k; 1.0: all of them.
    controls: rules that logits go through before all these.
    Scores: sum of the log-probabilities that the model itself gives the tokens (before
    controls, temperature, top_k and top_p), EOS included.
    """
    if rng is None:
        raise UserError("sample needs rng, a jax.random.key; greedy needs none.")
    if not temperature > 0.0:
        raise UserError(
            f"temperature is {temperature}; sample needs one above 0. For the limit 0 "
            "use greedy."
        )
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; it must be 0 (off) or more.")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p is {top_p}; it must be in (0, 1], 1.0 being off.")

    keys = rng
    if not (jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) and rng.ndim):
        keys = jax.random.split(rng, batch_size)

    def choose(logits, index):
        return sampling.sample_tokens(
            jax.vmap(jax.random.fold_in, (0, None))(keys, index),
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    return _decode_one_by_one(
        init_cache,
        step_fn,
        choose,
        shape=(batch_size, max_decode_length),
        eos_id=eos_id,
        controls=controls,
        settings=(
            ("method", "sample"),
            ("temperature", temperature),
            ("top_k", top_k),
            ("top_p", top_p),
            ("keys", "of examples"),
        ),
    )


class _Sequences(NamedTuple):
    index: Int32[Array, ""]
    last: Int32[Array, "batch"]
    tokens: Int32[Array, "batch length"]
    scores: Float32[Array, "batch"]
    ended: Bool[Array, "batch"]
    cache: Cache


def _decode_one_by_one(
    init_cache, step_fn, choose, *, shape, eos_id, controls, settings
):
    """Decoded, where `choose(float32 logits [B, V], index)` gives the next tokens."""
    batch_size, max_decode_length = shape
    if controls is not None:
        controls.check(max_decode_length)
        settings += controls.settings
    ancestry = jnp.ones((batch_size, 1, 1, max_decode_length), bool)

    def unfinished(state):
        return (state.index < max_decode_length) & ~jnp.all(state.ended)

    def step(state):
        logits, cache = step_fn(state.last[:, None], state.cache, state.index, ancestry)
        logits = logits[:, 0].astype(jnp.float32)
        allowed = logits
        if controls is not None:
            allowed = controls.applied(logits, state.tokens, state.index, eos_id)
        chosen = choose(allowed, state.index)
        log_probs = beams.log_probs_of(logits, chosen[:, None])[:, 0]
        chosen = jnp.where(state.ended, PAD_ID, chosen)
        return _Sequences(
            index=state.index + 1,
            last=chosen,
            tokens=lax.dynamic_update_slice(
                state.tokens, chosen[:, None], (jnp.int32(0), state.index)
            ),
            scores=state.scores + jnp.where(state.ended, 0.0, log_probs),
            ended=state.ended | (chosen == eos_id),
            cache=cache,
        )

    start = _Sequences(
        index=jnp.int32(0),
        last=jnp.full(batch_size, PAD_ID, jnp.int32),
        tokens=jnp.full(shape, PAD_ID, jnp.int32),
        scores=jnp.zeros(batch_size, jnp.float32),
        ended=jnp.zeros(batch_size, bool),
        cache=init_cache(1),
    )
    end = lax.while_loop(unfinished, step, start)
    return Decoded(end.tokens, end.scores, end.index, settings)


def beam_search(
    init_cache: InitCache,
    step_fn: StepFn,
    *,
    batch_size: BatchSize,
    max_decode_length: int,
    eos_id: int,
    rng: Array | None = None,
    num_beams: int = 4,
    alpha: float = 0.6,
    controls: Controls | None = None,
) -> Decoded:
    """The best finished hypothesis of each beam search, by penalised score.

    Each step ranks the 2K best one-token continuations of the K alive beams: those that
    end are hypotheses, the K best others stay alive (T5X's rule). The search ends when
    no alive beam can still beat the best hypothesis: log-probabilities only fall, so
    that bound is the alive one's, penalised at full length. If nothing has ended by
    `max_decode_length` the best alive beam is returned. One beam is greedy search.

    alpha: 0 or more; 0 turns the length penalty off, more favours long sequences.
    controls: rules that log-probabilities go through before they rank; of one beam, as
      in greedy search, logits.
    Scores: sum of log-probabilities / `length_penalty(tokens with EOS, alpha)`. With a
    repetition penalty and several beams it is part of them.
    """
    if num_beams < 1:
        raise UserError(f"num_beams is {num_beams}; it must be at least 1.")
    if alpha < 0.0:
        raise UserError(f"alpha is {alpha}; it must be at least 0.")
    settings = (("method", "beam_search"), ("num_beams", num_beams), ("alpha", alpha))
    if num_beams == 1:
        decoded = greedy(
            init_cache,
            step_fn,
            batch_size=batch_size,
            max_decode_length=max_decode_length,
            eos_id=eos_id,
            controls=controls,
        )
        settings += () if controls is None else controls.settings
        return _penalised(decoded, eos_id, alpha, settings)
    if controls is not None:
        controls.check(max_decode_length)
        settings += controls.settings
    full_penalty = length_penalty(max_decode_length, alpha)

    def unfinished(state):
        can_improve = state.score < state.log_probs[:, 0] / full_penalty
        return (state.index < max_decode_length) & jnp.any(can_improve)

    def step(state):
        index = state.index
        last = lax.dynamic_index_in_dim(
            state.alive, jnp.maximum(index - 1, 0), axis=2, keepdims=False
        )
        logits, cache = step_fn(last, state.cache, index, state.ancestry)
        adjust = controls and functools.partial(
            controls.applied_to_beams, tokens=state.alive, index=index, eos_id=eos_id
        )
        candidates = beams.expand(logits, state.log_probs, adjust)
        ends = candidates.token == eos_id
        finished, score = beams.keep_finished(state, candidates, ends, alpha)
        alive, log_probs, ancestry, _ = beams.keep_alive(state, candidates, ends)
        return beams.Beams(
            index + 1, alive, log_probs, finished, score, ancestry, cache
        )

    end = lax.while_loop(
        unfinished,
        step,
        beams.initial(
            init_cache(num_beams),
            num_beams=num_beams,
            batch_size=batch_size,
            max_decode_length=max_decode_length,
        ),
    )
    ended = end.score > -jnp.inf
    return Decoded(
        jnp.where(ended[:, None], end.finished, end.alive[:, 0]),
        jnp.where(ended, end.score, end.log_probs[:, 0] / full_penalty),
        end.index,
        settings,
    )


def _penalised(decoded, eos_id, alpha, settings):
    """A greedy result with beam search's score."""
    length = decoded.tokens.shape[1]
    is_eos = decoded.tokens == eos_id
    lengths = jnp.where(
        jnp.any(is_eos, axis=1),
        jnp.argmax(is_eos, axis=1).astype(jnp.int32) + 1,
        length,
    )
    penalty = length_penalty(lengths.astype(jnp.float32), alpha)
    return decoded.replace(scores=decoded.scores / penalty, settings=settings)


def decode_settings(decode_fn: Any) -> dict[str, Any]:
    """The method and parameters of a decode function, however they were bound.

    Asked of its own result, so that bindings by gin or functools.partial are seen.
    """
    # Larger than any top_k or number of beams; nothing is computed.
    vocab_size = 1 << 24

    def step_fn(tokens, cache, index, ancestry):
        del index, ancestry
        return jnp.zeros((*tokens.shape, vocab_size), jnp.float32), cache

    def decode(rng):
        return decode_fn(
            lambda num_beams: (),
            step_fn,
            batch_size=1,
            max_decode_length=1 << 12,  # longer than any answer of a list
            eos_id=1,
            rng=rng,
        )

    decoded = jax.eval_shape(decode, jax.random.key(0))
    return dict(decoded.settings) or {"method": _name(decode_fn)}


def _name(function):
    function = getattr(function, "func", function)
    return getattr(function, "__qualname__", type(function).__qualname__)
