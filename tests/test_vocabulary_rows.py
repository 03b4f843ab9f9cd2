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
    params = model.get_initial_variables(jax.random.key(0), shapes)["params"]
    return model.module, params


def gemma():
    module = tiny_gemma.prefix_lm_module("gemma")
    return module, tiny_gemma.prefix_lm_params(module)


@pytest.mark.parametrize("family", [t5, gemma], ids=["T5", "Gemma"])
def test_ids_beyond_the_vocabulary_are_never_decoded(family):
    module, params = family()
    batch = tiny_models.batch(8)
    for name, method in METHODS.items():
        decoded = {}
        for size in (VOCAB_SIZE, TOKENS):
            vocabulary = tiny_models.Vocabulary(size)
            model = multimodal.ImageTextModel(
                module, vocabulary, vocabulary, decode_fn=method
            )
            predict = jit(functools.partial(model.predict_batch, rng=jax.random.key(3)))
            decoded[size] = np.asarray(predict(params, batch))
        assert decoded[VOCAB_SIZE].max() >= TOKENS, name  # else this shows nothing
        assert 1 < decoded[TOKENS].max() < TOKENS, name
