"""Controls of decoding: Hugging Face's processors, and each search that uses them."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_captions
import tiny_gemma
import tiny_models
import torch
import transformers

from vit22b_transfer import UserError
from vit22b_transfer.inference import answer_lists, decoding, infer
from vit22b_transfer.inference.controls import Controls

EOS, VOCAB, LENGTH, ROWS = 1, 7, 8, 6


def processed_by_hugging_face(controls, tokens, scores):
    """Their processors in the order in which `generate` has them."""
    processors = transformers.LogitsProcessorList()
    if controls.repetition_penalty != 1.0:
        processors.append(
            transformers.RepetitionPenaltyLogitsProcessor(controls.repetition_penalty)
        )
    if controls.no_repeat_ngram_size:
        processors.append(
            transformers.NoRepeatNGramLogitsProcessor(controls.no_repeat_ngram_size)
        )
    if controls.min_new_tokens:
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(
                0, controls.min_new_tokens, EOS, device="cpu"
            )
        )
    ids: Any = torch.tensor(tokens).long()
    return processors(ids, torch.tensor(scores)).numpy()


@pytest.mark.parametrize(
    "controls",
    [
        Controls(min_new_tokens=3),
        Controls(repetition_penalty=1.5),
        Controls(repetition_penalty=0.5),
        *(Controls(no_repeat_ngram_size=n) for n in (1, 2, 3, 8)),
        Controls(min_new_tokens=2, repetition_penalty=1.3, no_repeat_ngram_size=2),
    ],
)
def test_scores_are_those_of_hugging_face(controls):
    draw = np.random.default_rng(0)
    # Few different tokens, so that n-grams repeat; behind the text is anything.
    tokens = draw.integers(2, 5, (ROWS, LENGTH)).astype(np.int32)
    scores = draw.normal(size=(ROWS, VOCAB)).astype(np.float32)
    applied = jax.jit(functools.partial(controls.applied, eos_id=EOS))
    changed = 0
    for index in range(LENGTH):
        found = applied(scores, tokens, jnp.int32(index))
        expected = processed_by_hugging_face(controls, tokens[:, :index], scores)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        changed += (np.asarray(found) != scores).sum()
    assert changed or controls.no_repeat_ngram_size == LENGTH


def random_decoder(seed):
    """Logits that depend on index and last token, and the table of them."""
    shape = (LENGTH, VOCAB, VOCAB)
    table = 2 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)

    def step_fn(tokens, cache, index, ancestry):
        del ancestry
        return jnp.asarray(table)[index][tokens], cache

    return (lambda num_beams: ()), step_fn, table


def decode(decode_fn, seed, **arguments):
    init_cache, step_fn, table = random_decoder(seed)
    found = decode_fn(
        init_cache,
        step_fn,
        batch_size=1,
        max_decode_length=LENGTH,
        eos_id=EOS,
        **arguments,
    )
    tokens = np.asarray(found.tokens)[0].tolist()
    return tokens, float(found.scores[0]), table


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


ALL = Controls(min_new_tokens=3, repetition_penalty=1.4, no_repeat_ngram_size=2)


def test_greedy_takes_the_best_that_is_left_and_tells_the_models_score():
    for seed in range(4):
        tokens, score, table = decode(decoding.greedy, seed, controls=ALL)
        text, total = [], 0.0
        while len(text) < LENGTH and EOS not in text:
            logits = table[len(text), text[-1] if text else 0]
            past = np.array([text], np.int64)
            left = processed_by_hugging_face(ALL, past, logits[None])[0]
            text.append(int(left.argmax()))
            total += log_softmax(logits)[text[-1]]
        assert tokens == text + [0] * (LENGTH - len(text))
        np.testing.assert_allclose(score, total, rtol=1e-5)


def test_a_wide_beam_search_finds_the_best_text_that_the_rules_allow():
    controls = Controls(min_new_tokens=2, no_repeat_ngram_size=1)
    search = functools.partial(decoding.beam_search, num_beams=300, alpha=0.0)
    for seed in range(2):
        _, _, table = random_decoder(seed)
        best = (-np.inf, [])
        others = [token for token in range(VOCAB) if token != EOS]
        for size in range(2, len(others) + 1):
            for text in itertools.permutations(others, size):
                total, last = 0.0, 0
                for index, token in enumerate((*text, EOS)):
                    total += log_softmax(table[index, last])[token]
                    last = token
                best = max(best, (total, [*text, EOS]))
        tokens, score, _ = decode(search, seed, controls=controls)
        assert tokens == best[1] + [0] * (LENGTH - len(best[1]))
        np.testing.assert_allclose(score, best[0], rtol=1e-5)


def test_beams_multiply_log_probabilities_of_what_was_said():
    penalty = Controls(repetition_penalty=1.4)
    search = functools.partial(decoding.beam_search, num_beams=3, alpha=0.0)
    tokens, score, table = decode(search, 1, controls=penalty)
    text = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
    total = 0.0
    for index, token in enumerate(text):
        logits = table[index, text[index - 1] if index else 0]
        past = np.array([text[:index]], np.int64)
        logs = log_softmax(logits)[None].astype(np.float32)
        total += processed_by_hugging_face(penalty, past, logs)[0, token]
    np.testing.assert_allclose(score, total, rtol=1e-5)
    one = functools.partial(decoding.beam_search, num_beams=1, alpha=0.0)
    greedy = decode(decoding.greedy, 1, controls=ALL)[:2]
    assert decode(one, 1, controls=ALL)[:2] == greedy


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "gemma"])
def test_texts_of_both_families_keep_the_rules(family):
    controls = Controls(min_new_tokens=4, no_repeat_ngram_size=1)
    batch = tiny_models.batch(4)
    if family == "t5":
        bound = functools.partial(decoding.beam_search, controls=controls, num_beams=2)
        model = tiny_captions.model(bound, max_decode_length=6)
        params = tiny_models.model_params(model)
    else:
        bound = functools.partial(decoding.sample, controls=controls)
        module = tiny_gemma.prefix_lm_module("gemma", depth=1)
        model = tiny_gemma.prefix_lm_model(module, decode_fn=bound, max_decode_length=6)
        params = tiny_gemma.prefix_lm_params(module)
    predict = jax.jit(model.predict_batch)
    for row in np.asarray(predict(params, batch, jax.random.key(0))).tolist():
        text = row[: row.index(EOS)] if EOS in row else row
        assert len(text) >= 4 and len(set(text)) == len(text)


def test_settings_are_told_and_contradictions_refused(tmp_path):
    said = infer.decode_settings(functools.partial(decoding.greedy, controls=ALL))
    assert said["min_new_tokens"] == 3 and said["method"] == "greedy"
    for num_beams in (1, 2):
        bound = functools.partial(
            decoding.beam_search, controls=ALL, num_beams=num_beams
        )
        assert infer.decode_settings(bound)["repetition_penalty"] == 1.4
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "all off"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ]
    for wrong, told in refused:
        with pytest.raises(UserError, match=told):
            Controls(**wrong)
    for search in (decoding.greedy, decoding.beam_search):
        with pytest.raises(UserError, match="must be less"):
            decode(search, 0, controls=Controls(min_new_tokens=LENGTH))
    with pytest.raises(UserError, match="leave out the controls"):
        decode(
            answer_lists.from_list, 0, answers="no.txt", vocabulary=None, controls=ALL
        )
