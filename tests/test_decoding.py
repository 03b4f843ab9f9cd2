"""Decode functions against plain Python searches and against each other."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit22b_transfer.inference import decoding, sampling

EOS = 1


# ----- A toy decoder with a real self-attention cache -----------------------------

WIDTH = 8


def toy_parameters(seed, batch_size, vocab_size, length):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "embedding": array(vocab_size, WIDTH),
        # Large enough that sequences of many lengths are the best ones.
        "position": 2.0 * array(length, WIDTH),
        "image": array(batch_size, 3, WIDTH),
        **{name: array(WIDTH, WIDTH) for name in ("q", "k", "v", "cross", "out")},
        "head": 2.0 * array(WIDTH, vocab_size),
    }


def toy_decoder(params, length):
    """init_cache and step_fn of one layer of self and cross attention."""
    batch_size = params["image"].shape[0]

    def init_cache(num_beams):
        empty = jnp.zeros((batch_size, num_beams, length, WIDTH), jnp.float32)
        return {"k": empty, "v": empty, "cross": params["image"] @ params["cross"]}

    def step_fn(tokens, cache, index, ancestry):
        x = params["embedding"][tokens] + params["position"][index][None, None]
        k, v = (
            cache[name].at[:, :, index].set(x @ params[name]) for name in ("k", "v")
        )
        seen = ancestry & (jnp.arange(length) <= index)[None, None, None, :]
        weights = jnp.einsum("bke,bjte->bkjt", x @ params["q"], k)
        weights = jnp.where(seen, weights, -jnp.inf)
        flat = jax.nn.softmax(weights.reshape(*weights.shape[:2], -1))
        x = x + jnp.einsum("bkjt,bjte->bke", flat.reshape(weights.shape), v)
        cross = jax.nn.softmax(jnp.einsum("bke,bse->bks", x, cache["cross"]))
        x = x + jnp.einsum("bks,bse->bke", cross, params["image"])
        logits = jnp.tanh(x @ params["out"]) @ params["head"]
        return logits, {**cache, "k": k, "v": v}

    return init_cache, step_fn


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class NumpyBeam:
    """One hypothesis of the toy decoder, owning its keys and values."""

    def __init__(self, params, row, tokens=(), log_prob=0.0, keys=(), values=()):
        self.params = {name: np.asarray(p, float) for name, p in params.items()}
        self.row = row
        self.tokens, self.log_prob = tuple(tokens), log_prob
        self.keys, self.values = tuple(keys), tuple(values)

    def next_log_probs(self):
        """Appends to this hypothesis' own cache; returns log-probabilities [V]."""
        p = self.params
        x = p["embedding"][self.tokens[-1] if self.tokens else 0]
        x = x + p["position"][len(self.tokens)]
        self.keys += (x @ p["k"],)
        self.values += (x @ p["v"],)
        x = x + softmax(np.stack(self.keys) @ (x @ p["q"])) @ np.stack(self.values)
        image = p["image"][self.row]
        x = x + softmax((image @ p["cross"]) @ x) @ image
        return log_softmax(np.tanh(x @ p["out"]) @ p["head"])

    def extend(self, token, log_prob):
        return NumpyBeam(
            self.params,
            self.row,
            (*self.tokens, token),
            log_prob,
            self.keys,
            self.values,
        )


class TableBeam:
    """One hypothesis of a table log_probs[step, last token, next token]."""

    def __init__(self, table, tokens=(), log_prob=0.0):
        self.table, self.tokens, self.log_prob = table, tuple(tokens), log_prob

    def next_log_probs(self):
        return self.table[len(self.tokens), self.tokens[-1] if self.tokens else 0]

    def extend(self, token, log_prob):
        return TableBeam(self.table, (*self.tokens, token), log_prob)


def python_beam_search(start, *, num_beams, alpha, length):
    """(tokens, score): every step is taken, every hypothesis kept, no tensors."""
    alive, finished = [start], []
    for _ in range(length):
        candidates = []
        for beam in alive:
            for token, log_prob in enumerate(beam.next_log_probs()):
                if log_prob > -np.inf:
                    candidates.append((beam.log_prob + log_prob, token, beam))
        candidates.sort(key=lambda c: -c[0])
        best = [b.extend(t, p) for p, t, b in candidates[: 2 * num_beams]]
        finished += [b for b in best if b.tokens[-1] == EOS]
        alive = [b for b in best if b.tokens[-1] != EOS][:num_beams]

    def score(beam):
        return beam.log_prob / ((5 + len(beam.tokens)) / 6) ** alpha

    winner = max(finished or alive, key=score)
    return winner.tokens, score(winner)


def without_padding(row):
    row = [int(t) for t in row]
    return tuple(row[: row.index(EOS) + 1]) if EOS in row else tuple(row)


@functools.partial(jax.jit, static_argnames=("decode_fn", "length"))
def decode_toy(params, rng=None, *, decode_fn, length):
    init_cache, step_fn = toy_decoder(params, length)
    return decode_fn(
        init_cache,
        step_fn,
        batch_size=params["image"].shape[0],
        max_decode_length=length,
        eos_id=EOS,
        rng=rng,
    )


@functools.partial(jax.jit, static_argnames=("decode_fn",))
def decode_table(table, rng=None, *, decode_fn):
    """Decodes logits[batch, step, last token, next token]; counts model calls."""
    batch_size, length = table.shape[:2]

    def step_fn(tokens, calls, index, ancestry):
        del ancestry
        rows = jnp.arange(batch_size)[:, None]
        return table[rows, index, tokens], calls + 1

    return decode_fn(
        lambda num_beams: jnp.int32(0),
        step_fn,
        batch_size=batch_size,
        max_decode_length=length,
        eos_id=EOS,
        rng=rng,
    )


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_table(seed, batch_size=6, length=5, vocab_size=5, scale=1.5):
    rng = np.random.default_rng(seed)
    shape = (batch_size, length, vocab_size, vocab_size)
    return (scale * rng.normal(size=shape)).astype(np.float32)


@functools.cache
def beam(num_beams, alpha):
    return functools.partial(decoding.beam_search, num_beams=num_beams, alpha=alpha)


@functools.cache
def sampler(**settings):
    return functools.partial(decoding.sample, **settings)


# ----- Beam search ----------------------------------------------------------------


@pytest.mark.parametrize("num_beams,alpha", [(2, 0.6), (3, 0.0), (4, 2.0)])
def test_ancestry_equals_a_search_that_copies_caches(num_beams, alpha):
    length, batch_size = 7, 5
    compared = 0
    for seed in range(4):
        params = toy_parameters(seed, batch_size, vocab_size=6, length=length)
        result = decode_toy(params, decode_fn=beam(num_beams, alpha), length=length)
        for row in range(batch_size):
            tokens, score = python_beam_search(
                NumpyBeam(params, row), num_beams=num_beams, alpha=alpha, length=length
            )
            assert without_padding(result.tokens[row]) == tokens
            np.testing.assert_allclose(result.scores[row], score, atol=1e-4)
            compared += len(tokens) > 2
    assert compared >= 5, "too few long sequences to show anything about the cache"


def test_a_wrong_ancestry_changes_the_search():
    # The test above would be empty if the toy did not depend on its past.
    length = 7
    params = toy_parameters(1, 5, vocab_size=6, length=length)
    init_cache, step_fn = toy_decoder(jax.tree.map(jnp.asarray, params), length)

    def forgets_parents(tokens, cache, index, ancestry):
        own = jnp.eye(ancestry.shape[1], dtype=bool)[None, :, :, None]
        own = jnp.broadcast_to(own, ancestry.shape)
        return step_fn(tokens, cache, index, own)

    settings = dict(batch_size=5, max_decode_length=length, eos_id=EOS)
    right = beam(3, 0.6)(init_cache, step_fn, **settings)
    wrong = beam(3, 0.6)(init_cache, forgets_parents, **settings)
    assert not np.allclose(right.scores, wrong.scores, atol=1e-3)


@pytest.mark.parametrize("num_beams,alpha", [(2, 0.0), (4, 0.6), (3, 2.0)])
def test_beam_search_equals_plain_python_on_random_tables(num_beams, alpha):
    for seed in range(8):
        table = random_table(seed)
        result = decode_table(table, decode_fn=beam(num_beams, alpha))
        for row, logits in enumerate(log_softmax(table)):
            tokens, score = python_beam_search(
                TableBeam(logits),
                num_beams=num_beams,
                alpha=alpha,
                length=table.shape[1],
            )
            assert without_padding(result.tokens[row]) == tokens
            np.testing.assert_allclose(result.scores[row], score, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_wide_beam_search_finds_what_exhaustive_search_finds(alpha):
    length, vocab_size = 4, 4
    table = random_table(7, batch_size=8, length=length, vocab_size=vocab_size)
    result = decode_table(table, decode_fn=beam(3**3, alpha))
    others = [t for t in range(vocab_size) if t != EOS]
    for row, logits in enumerate(log_softmax(table)):
        best_score, best_tokens = -np.inf, None
        for n in range(length):
            for start in itertools.product(others, repeat=n):
                tokens = (*start, EOS)
                log_prob = sum(
                    logits[i, last, token]
                    for i, (last, token) in enumerate(
                        zip((0, *tokens), tokens, strict=False)
                    )
                )
                score = log_prob / ((5 + n + 1) / 6) ** alpha
                if score > best_score:
                    best_score, best_tokens = score, tokens
        assert without_padding(result.tokens[row]) == best_tokens
        np.testing.assert_allclose(result.scores[row], best_score, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_one_beam_gives_greedy_tokens_and_their_penalised_score(alpha):
    params = toy_parameters(3, 8, vocab_size=6, length=9)
    greedy = decode_toy(params, decode_fn=decoding.greedy, length=9)
    one = decode_toy(params, decode_fn=beam(1, alpha), length=9)
    np.testing.assert_array_equal(one.tokens, greedy.tokens)
    lengths = [len(without_padding(row)) for row in greedy.tokens]
    assert len(set(lengths)) > 1
    penalty = ((5 + np.array(lengths)) / 6) ** alpha
    np.testing.assert_allclose(one.scores, greedy.scores / penalty, rtol=1e-6)


def test_beams_never_score_below_greedy_without_a_penalty():
    params = toy_parameters(11, 8, vocab_size=6, length=6)
    greedy = decode_toy(params, decode_fn=decoding.greedy, length=6)
    # Where greedy does not end within the limit, beam search prefers what ends.
    ended = np.array([EOS in row for row in np.asarray(greedy.tokens)])
    wide = decode_toy(params, decode_fn=beam(6, 0.0), length=6)
    assert ended.any()
    assert (np.asarray(wide.scores) >= np.asarray(greedy.scores) - 1e-5)[ended].all()


def test_search_without_any_end_returns_the_best_unfinished_sequence():
    table = random_table(0)
    table[..., EOS] = -np.inf
    result = decode_table(table, decode_fn=beam(3, 0.6))
    for row, logits in enumerate(log_softmax(table)):
        tokens, score = python_beam_search(
            TableBeam(logits), num_beams=3, alpha=0.6, length=5
        )
        assert EOS not in tokens
        assert without_padding(result.tokens[row]) == tokens
        np.testing.assert_allclose(result.scores[row], score, atol=1e-5)


def test_more_beams_than_tokens_still_finds_only_real_sequences():
    table = random_table(2, vocab_size=3, length=3)
    result = decode_table(table, decode_fn=beam(16, 0.6))
    assert np.isfinite(np.asarray(result.scores)).all()


# ----- Early exit, padding, scores ------------------------------------------------


def ending_table(ends, length, vocab_size=4):
    """Logits under which row b ends, nearly surely, with its token `ends[b]`."""
    table = np.zeros((len(ends), length, vocab_size, vocab_size), np.float32)
    table[..., 3] = 20.0
    for row, end in enumerate(ends):
        table[row, end, :, EOS] = 60.0
    return table


@pytest.mark.parametrize(
    "decode_fn", [decoding.greedy, sampler(temperature=0.5), beam(3, 0.6)]
)
def test_loop_stops_when_all_sequences_have_ended(decode_fn):
    table = ending_table([2, 5, 0], length=50)
    result = decode_table(table, jax.random.key(0), decode_fn=decode_fn)
    assert result.steps == 6
    np.testing.assert_array_equal(
        [without_padding(row) for row in result.tokens[:1]], [(3, 3, EOS)]
    )
    assert without_padding(result.tokens[2]) == (EOS,)


def test_loop_runs_to_the_limit_when_one_sequence_does_not_end():
    table = ending_table([2, 3], length=9)
    table[1, :, :, EOS] = -1e9
    result = decode_table(table, decode_fn=decoding.greedy)
    assert result.steps == 9
    assert EOS not in np.asarray(result.tokens[1])


def test_early_exit_does_not_change_any_result():
    # The same rows alone and beside one that never ends.
    table = random_table(5, batch_size=4, length=8)
    endless = random_table(6, batch_size=1, length=8)
    endless[..., EOS] = -1e9
    for decode_fn in (decoding.greedy, beam(2, 3.0)):
        alone = decode_table(table, decode_fn=decode_fn)
        beside = decode_table(np.concatenate([table, endless]), decode_fn=decode_fn)
        np.testing.assert_array_equal(alone.tokens, beside.tokens[:4])
        np.testing.assert_array_equal(alone.scores, beside.scores[:4])


@pytest.mark.parametrize(
    "decode_fn", [decoding.greedy, sampler(temperature=1.0), beam(3, 0.6)]
)
def test_everything_after_the_end_is_padding(decode_fn):
    for seed in range(5):
        table = random_table(seed, batch_size=8, length=12)
        result = decode_table(table, jax.random.key(seed), decode_fn=decode_fn)
        assert result.tokens.dtype == np.int32 and result.tokens.shape == (8, 12)
        for row in np.asarray(result.tokens):
            end = len(without_padding(row))
            assert (row[end:] == 0).all()


@pytest.mark.parametrize(
    "decode_fn",
    [decoding.greedy, sampler(temperature=0.7, top_k=3, top_p=0.9), beam(3, 0.0)],
)
def test_scores_are_the_models_log_probabilities_of_the_tokens(decode_fn):
    table = random_table(4, batch_size=8)
    result = decode_table(table, jax.random.key(1), decode_fn=decode_fn)
    for row, logits in enumerate(log_softmax(table)):
        tokens = without_padding(result.tokens[row])
        expected = sum(
            logits[i, last, token]
            for i, (last, token) in enumerate(zip((0, *tokens), tokens, strict=False))
        )
        np.testing.assert_allclose(result.scores[row], expected, atol=1e-5)


@pytest.mark.parametrize("decode_fn", [decoding.greedy, beam(3, 0.6)])
def test_bfloat16_logits_are_scored_in_float32(decode_fn):
    table = random_table(4, batch_size=8).astype(jnp.bfloat16)
    low = decode_table(table, jax.random.key(1), decode_fn=decode_fn)
    high = decode_table(
        table.astype(np.float32), jax.random.key(1), decode_fn=decode_fn
    )
    np.testing.assert_array_equal(low.tokens, high.tokens)
    np.testing.assert_allclose(low.scores, high.scores, rtol=1e-6)
    assert low.scores.dtype == np.float32


# ----- Sampling -------------------------------------------------------------------


def test_sampling_one_of_one_token_is_greedy():
    params = toy_parameters(5, 6, vocab_size=7, length=8)
    greedy = decode_toy(params, decode_fn=decoding.greedy, length=8)
    for seed in range(3):
        drawn = decode_toy(
            params, jax.random.key(seed), decode_fn=sampler(top_k=1), length=8
        )
        np.testing.assert_array_equal(drawn.tokens, greedy.tokens)
        np.testing.assert_allclose(drawn.scores, greedy.scores, rtol=1e-6)


def test_sampling_a_tiny_nucleus_or_temperature_is_greedy():
    table = random_table(9)
    greedy = decode_table(table, decode_fn=decoding.greedy)
    for settings in (dict(top_p=1e-6), dict(temperature=1e-4)):
        drawn = decode_table(table, jax.random.key(0), decode_fn=sampler(**settings))
        np.testing.assert_array_equal(drawn.tokens, greedy.tokens)


def test_sampling_is_a_function_of_its_key():
    table = random_table(1, batch_size=16)
    first, again, other = (
        decode_table(table, jax.random.key(k), decode_fn=sampler()).tokens
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_with_the_mass(top_p):
    logits = 3.0 * np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    probs = jax.nn.softmax(logits)
    kept = np.asarray(sampling.nucleus(probs, top_p))
    for row, keep in zip(np.asarray(probs, float), kept, strict=True):
        chosen = np.sort(row[keep])
        assert row[~keep].max(initial=0.0) < chosen[0]
        assert chosen.sum() >= top_p - 1e-6
        assert chosen[1:].sum() < top_p + 1e-6


def test_nucleus_of_everything_keeps_what_rounding_would_drop():
    probs = jax.nn.softmax(np.zeros((1, 49), np.float32))
    assert np.asarray(sampling.nucleus(probs, 0.9999999)).all()


def test_drawn_tokens_follow_the_filtered_distribution():
    logits = np.log(np.array([0.05, 0.4, 0.3, 0.15, 0.1], np.float32))
    rows = jnp.broadcast_to(logits[None], (20_000, 5))

    def frequencies(**settings):
        settings = dict(temperature=1.0, top_k=0, top_p=1.0) | settings
        keys = jax.random.split(jax.random.key(0), len(rows))
        drawn = sampling.sample_tokens(keys, rows, **settings)
        return np.bincount(drawn, minlength=5) / len(rows)

    expected = {
        (): [0.05, 0.4, 0.3, 0.15, 0.1],
        (("top_k", 2),): [0, 4 / 7, 3 / 7, 0, 0],
        (("top_p", 0.75),): [0, 0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0],
        # Of the two that top_k leaves (4/7 and 3/7) the first has the mass alone.
        (("top_k", 2), ("top_p", 0.5)): [0, 1, 0, 0, 0],
    }
    for settings, probs in expected.items():
        np.testing.assert_allclose(frequencies(**dict(settings)), probs, atol=0.015)
    squared = np.exp(2 * logits) / np.exp(2 * logits).sum()
    np.testing.assert_allclose(frequencies(temperature=0.5), squared, atol=0.015)


# ----- Refusals -------------------------------------------------------------------


@pytest.mark.parametrize(
    "decode_fn,message",
    [
        (sampler(temperature=0.0), "use greedy"),
        (sampler(temperature=-1.0), "above 0"),
        (sampler(temperature=float("nan")), "above 0"),
        (sampler(top_k=-1), "top_k is -1"),
        (sampler(top_k=6), "vocabulary has 5"),
        (sampler(top_p=0.0), "top_p is 0.0"),
        (sampler(top_p=1.5), "top_p is 1.5"),
        (beam(0, 0.6), "num_beams is 0"),
        (beam(2, -0.1), "alpha is -0.1"),
    ],
)
def test_meaningless_settings_are_refused(decode_fn, message):
    with pytest.raises(ValueError, match=message):
        decode_table(random_table(0), jax.random.key(0), decode_fn=decode_fn)


def test_sampling_without_a_key_is_refused():
    with pytest.raises(ValueError, match="needs rng"):
        decode_table(random_table(0), decode_fn=sampler())


def test_results_say_how_they_were_decoded():
    abstract = jax.eval_shape(
        functools.partial(decode_table, decode_fn=beam(2, 0.5)), random_table(0)
    )
    assert dict(abstract.settings) == {
        "method": "beam_search",
        "num_beams": 2,
        "alpha": 0.5,
    }
