"""Rows of the token table that no token has: never decoded, by either text family."""

import functools

import jax
import numpy as np
import pytest
import tiny_gemma
import tiny_models
from tiny_models import VOCAB_SIZE, jit

from vit22b_transfer.inference import decoding
from vit22b_transfer.models import multimodal

TOKENS = 12  # of a table of VOCAB_SIZE rows
METHODS = {
    "greedy": decoding.greedy,
    "sample": functools.partial(decoding.sample, temperature=3.0),
    "beam search": functools.partial(decoding.beam_search, num_beams=3),
}


def t5():
    model = tiny_models.image_text_model()
    shapes = {name: array.shape for name, array in tiny_models.batch().items()}
    fresh = jit(lambda key: model.get_initial_variables(key, shapes)["params"])
    return model.module, fresh(jax.random.key(0))


def gemma():
    module = tiny_gemma.prefix_lm_module("gemma")
    return module, tiny_gemma.prefix_lm_params(module)


def decoded(module, params, method, size):
    vocabulary = tiny_models.Vocabulary(size)
    model = multimodal.ImageTextModel(module, vocabulary, vocabulary, decode_fn=method)
    predict = jit(functools.partial(model.predict_batch, rng=jax.random.key(3)))
    return np.asarray(predict(params, tiny_models.batch(8)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "methods"),
    [(t5, list(METHODS)), (gemma, ["greedy"])],
    ids=["T5", "Gemma"],
)
def test_ids_beyond_the_vocabulary_are_never_decoded(family, methods):
    module, params = family()
    # Without it there are such ids, else this shows nothing.
    free = decoded(module, params, METHODS["greedy"], VOCAB_SIZE)
    assert free.max() >= TOKENS
    for name in methods:
        ids = decoded(module, params, METHODS[name], TOKENS)
        assert 1 < ids.max() < TOKENS, name
