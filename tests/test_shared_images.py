"""Images that repeat are encoded once, and predictions are the same."""

import types

import numpy as np
import pytest
import tiny_captions
import tiny_gemma
import tiny_models

from vit22b_transfer.data import batches
from vit22b_transfer.inference import decoding, predicting
from vit22b_transfer.inference.shared_images import SharedImages
from vit22b_transfer.partitioning.rules import Partitioning

ROWS = 8


def repeating(pattern):
    """A batch whose images are those of the letters, and what is said of it."""
    features = dict(tiny_models.batch(ROWS))
    distinct = features["encoder_input_images"]
    images = np.stack([distinct[ord(letter) - ord("a")] for letter in pattern])
    features["encoder_input_images"] = images
    return types.SimpleNamespace(
        features=features, repeated=batches.repeated_images(features)
    )


def t5():
    model = tiny_captions.model()
    return model, tiny_models.model_params(model, seed=1)


def prefix_lm():
    module = tiny_gemma.prefix_lm_module("gemma2", depth=1)
    model = tiny_gemma.prefix_lm_model(module, decode_fn=decoding.greedy)
    return model, tiny_gemma.prefix_lm_params(module)


def test_repeated_images_are_those_of_the_row_before():
    said = repeating("aabbbcaa").repeated
    assert said.tolist() == [0, 1, 0, 1, 1, 0, 0, 1]
    assert batches.repeated_images({}).tolist() == []
    assert batches.repeated_images(
        {"encoder_input_images": np.zeros((1, 2))}
    ).tolist() == [0]


@pytest.mark.parametrize(
    "make, devices",
    [pytest.param(t5, 1, marks=pytest.mark.slow), (t5, 2), (prefix_lm, 1)],
    ids=["T5", "T5 on two", "Gemma"],
)
def test_predictions_are_those_of_encoding_each(make, devices):
    model, params = make()
    mesh = Partitioning(data=devices)
    shared, predict = SharedImages(model, mesh), predicting.make_predict(model, mesh)
    encoded = []
    encode = shared._encode
    shared.__dict__["_encode"] = lambda *x: encoded.append(len(x[2])) or encode(*x)
    with mesh.activate():
        for pattern in ("aaaabbbb", "aabbccdd", "aaaaaaaa"):
            batch = repeating(pattern)
            assert shared.pays(batch)
            tokens, aux = shared(params, batch, np.uint32(0), np.uint32(0))
            expected = predict(params, batch.features, np.uint32(0), np.uint32(0))
            np.testing.assert_array_equal(tokens, expected[0])
            np.testing.assert_allclose(aux["scores"], expected[1]["scores"], atol=1e-4)
    # As many as there are, one for each device at a time.
    assert encoded == ([1] * 7 if devices == 1 else [2] * 4)
    assert not shared.pays(repeating("abbcdefg"))
    assert not shared.pays(types.SimpleNamespace(repeated=np.zeros(0, bool)))
