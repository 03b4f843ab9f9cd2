"""Answers from a list: never another one, and the best where beams are wide enough."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tiny_captions
import tiny_gemma
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from vit22b_transfer import UserError
from vit22b_transfer.inference import answer_lists, decoding, infer

EOS, LENGTH, ROWS = 1, 6, 8


def random_decoder(seed, batch=ROWS, vocab=12):
    """(init_cache, step_fn) of logits that depend on the index and the last token."""
    table = 4 * jax.random.normal(
        jax.random.key(seed), (batch, LENGTH, vocab, vocab), jnp.float32
    )

    def step_fn(tokens, cache, index, ancestry):
        del ancestry
        rows = jnp.arange(batch)[:, None]
        return table[rows, index, tokens], cache

    return (lambda num_beams: ()), step_fn, np.asarray(table)


def scored(table, answer):
    """The log-probability of an answer with EOS, of each row."""
    totals = np.zeros(len(table))
    last = 0
    for index, token in enumerate((*answer, EOS)):
        logits = table[:, index, last].astype(np.float64)
        totals += logits[:, token] - np.log(np.exp(logits).sum(axis=1))
        last = token
    return totals


def decoded(seed, answers, num_beams, alpha=0.0):
    init_cache, step_fn, table = random_decoder(seed)
    found = answer_lists.from_trie(
        init_cache,
        step_fn,
        answer_lists.trie(answers, EOS),
        batch_size=ROWS,
        max_decode_length=LENGTH,
        eos_id=EOS,
        num_beams=num_beams,
        alpha=alpha,
    )
    texts = [
        tuple(int(t) for t in row[: list(row).index(EOS)])
        for row in np.asarray(found.tokens)
    ]
    return texts, np.asarray(found.scores), table


answer = st.lists(st.integers(2, 11), min_size=1, max_size=LENGTH - 1).map(tuple)
# Few tokens: many answers begin others.
crowded = st.lists(st.integers(2, 3), min_size=1, max_size=LENGTH - 1).map(tuple)
lists = st.lists(st.one_of(answer, crowded), min_size=1, max_size=12)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(lists, st.integers(1, 4), st.integers(0, 3))
def test_no_other_answer_is_ever_given(answers, num_beams, seed):
    texts, scores, table = decoded(seed, answers, num_beams)
    assert set(texts) <= set(answers)
    for row, (text, score) in enumerate(zip(texts, scores, strict=True)):
        np.testing.assert_allclose(score, scored(table, text)[row], atol=1e-4)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(lists, st.integers(0, 3))
def test_with_a_beam_for_each_it_is_the_best_of_all(answers, seed):
    texts, scores, table = decoded(seed, answers, num_beams=12)
    every = {one: scored(table, one) for one in answers}
    for row, score in enumerate(scores):
        assert texts[row] in answers
        best = max(every, key=lambda one, row=row: every[one][row])
        assert texts[row] == best
        np.testing.assert_allclose(score, every[best][row], atol=1e-4)


@pytest.mark.slow
def test_with_no_beam_to_spare_answers_that_begin_others_are_found():
    """Every 13th text of up to five tokens, as many beams, 200 decoders.

    Scores per token: what is less probable than an answer that has ended can still win.
    """
    tokens = (2, 3, 4)
    texts = [one for n in range(1, 6) for one in itertools.product(tokens, repeat=n)]
    answers, rows = [(2,), (3, 4), *texts[5::13]], 200
    init_cache, step_fn, table = random_decoder(7, batch=rows, vocab=5)
    found = answer_lists.from_trie(
        init_cache,
        step_fn,
        answer_lists.trie(answers, EOS),
        batch_size=rows,
        max_decode_length=LENGTH,
        eos_id=EOS,
        num_beams=len(answers),
        alpha=1.0,
    )
    penalties = [decoding.length_penalty(len(one) + 1, 1.0) for one in answers]
    every = np.stack([scored(table, one) for one in answers])
    every /= np.array(penalties)[:, None]
    np.testing.assert_allclose(found.scores, every.max(axis=0), atol=1e-4)
    for row, best in zip(np.asarray(found.tokens), every.argmax(axis=0), strict=True):
        expected = [*answers[best], EOS]
        assert row[: len(expected)].tolist() == expected


def test_a_length_penalty_ranks_by_what_it_divides():
    answers = [(2,), (2, 3), (3, 2, 4, 5)]
    texts, scores, table = decoded(1, answers, num_beams=3, alpha=0.6)
    for row, score in enumerate(scores):
        values = {
            one: scored(table, one)[row] / decoding.length_penalty(len(one) + 1, 0.6)
            for one in answers
        }
        assert texts[row] == max(values, key=lambda one: values[one])
        np.testing.assert_allclose(score, max(values.values()), atol=1e-4)


def test_the_rows_of_a_trie():
    found = answer_lists.trie([(5, 6), (5,), (7,), (5, 6)], EOS)
    assert found.root_tokens.tolist() == [5, 7]
    assert (found.longest, found.repeated) == (3, 1)
    five = found.root_next[0]
    assert found.tokens[five, found.valid[five]].tolist() == [1, 6]
    assert not found.valid[0].any()
    same = answer_lists.trie([(7,), (5, 6), (5,)], EOS)
    assert same.digest == found.digest != answer_lists.trie([(7,)], EOS).digest
    for answers in ([], [()]):
        with pytest.raises(UserError, match="a list needs one answer or more"):
            answer_lists.trie(answers, EOS)


# ----- Models ---------------------------------------------------------------------


def t5():
    # As many tokens as the table has rows: `score_batch` counts all of them.
    model = tiny_captions.model(vocabulary=seqio.ByteVocabulary(extra_ids=61))
    return model, tiny_models.model_params(model, seed=1)


def prefix_lm():
    module = tiny_gemma.prefix_lm_module("gemma2", depth=1)
    model = tiny_gemma.prefix_lm_model(module)
    return model, tiny_gemma.prefix_lm_params(module)


@pytest.mark.slow
@pytest.mark.parametrize("make", [t5, prefix_lm], ids=["T5", "Gemma"])
def test_both_text_families_give_the_answer_that_scores_best(make):
    model, params = make()
    answers = [(4, 5), (4,), (9, 3, 7), (4, 5, 6), (2, 2)]
    found = answer_lists.trie(answers, EOS)
    model.decode_fn = lambda *x, rng, **how: answer_lists.from_trie(
        *x, found, num_beams=5, **how
    )
    batch = dict(tiny_models.batch(3))
    length = batch["decoder_target_tokens"].shape[1]
    tokens, aux = jax.jit(model.predict_batch_with_aux)(params, batch)
    score = jax.jit(model.score_batch)
    scores = []
    for one in answers:
        row = np.zeros(length, np.int32)
        row[: len(one) + 1] = (*one, EOS)
        targets = np.tile(row, (3, 1))
        inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        scores.append(
            score(
                params,
                batch
                | {
                    "decoder_target_tokens": targets,
                    "decoder_input_tokens": inputs,
                    "decoder_loss_weights": (targets > 0).astype(np.int32),
                },
            )
        )
    scores = np.stack(scores)
    np.testing.assert_allclose(aux["scores"], scores.max(axis=0), atol=1e-4)
    for row, best in enumerate(scores.argmax(axis=0)):
        given_tokens = np.asarray(tokens)[row]
        expected = (*answers[best], EOS)
        assert given_tokens[: len(expected)].tolist() == list(expected)


def test_a_file_of_answers_is_part_of_the_settings(tmp_path):
    path = tmp_path / "answers.txt"
    path.write_text("yes\nno\nyes\n")
    vocabulary = seqio.ByteVocabulary()
    bound = functools.partial(
        answer_lists.from_list, answers=str(path), vocabulary=vocabulary
    )
    said = infer.decode_settings(bound)
    assert said["method"] == "from_list" and said["num_beams"] == 8
    path.write_text("yes\nno\n")
    assert infer.decode_settings(bound) == said
    path.write_text("yes\nperhaps\n")
    assert infer.decode_settings(bound) != said
    init_cache, step_fn, _ = random_decoder(0, vocab=300)
    with pytest.raises(UserError, match="an answer has 8 tokens with its end"):
        bound(
            init_cache, step_fn, batch_size=ROWS, max_decode_length=LENGTH, eos_id=EOS
        )
