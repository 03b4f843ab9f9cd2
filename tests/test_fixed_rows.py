"""`fixed_rows` (--deterministic): bytes that depend on neither batch nor devices."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_captions
import tiny_gemma
import tiny_models
from tiny_captions import LENGTHS

from vit22b_transfer import UserError, cli
from vit22b_transfer.inference import decoding, fixed_rows, infer, predicting
from vit22b_transfer.inference.prediction_files import read_lines
from vit22b_transfer.partitioning.rules import Partitioning

ROWS = 8
DECODE_FNS = {
    "greedy": decoding.greedy,
    "sample": decoding.sample,
    "beam": functools.partial(decoding.beam_search, num_beams=3),
}


def t5(decode_fn):
    model = tiny_captions.model(decode_fn)
    return model, tiny_models.model_params(model, seed=1)


def gemma(decode_fn):
    module = tiny_gemma.prefix_lm_module("gemma2", depth=1)
    model = tiny_gemma.prefix_lm_model(module, decode_fn=decode_fn)
    return model, tiny_gemma.prefix_lm_params(module)


def outputs(predict, mesh, params, batch_size):
    """Tokens and scores of eight rows, batch by batch."""
    rows, parts = tiny_models.batch(ROWS), []
    with mesh.activate():
        for number in range(ROWS // batch_size):
            of_batch = slice(number * batch_size, (number + 1) * batch_size)
            batch = {name: value[of_batch] for name, value in rows.items()}
            out = predict(params, batch, np.uint32(3), np.uint32(number))
            parts.append(jax.device_get(out))
    tokens = np.concatenate([tokens for tokens, _ in parts])
    return tokens, np.concatenate([aux["scores"] for _, aux in parts])


@pytest.mark.parametrize(
    "make, method",
    [
        (gemma, "greedy"),
        *(
            pytest.param(make, method, marks=pytest.mark.slow)
            for make, method in (
                (t5, "greedy"),
                (t5, "sample"),
                (t5, "beam"),
                (gemma, "sample"),
                (gemma, "beam"),
            )
        ),
    ],
)
def test_bytes_are_equal_whatever_batch_and_devices(make, method):
    model, params = make(DECODE_FNS[method])
    found = []
    for devices, batch_size in ((1, 2), (1, 8), (8, 8)):
        mesh = Partitioning(data=devices)
        predict = fixed_rows.FixedRows(model, mesh, 1)
        found.append(outputs(predict, mesh, params, batch_size))
    one = Partitioning(data=1)
    expected = outputs(predicting.make_predict(model, one), one, params, ROWS)
    np.testing.assert_array_equal(found[0][0], expected[0])
    np.testing.assert_allclose(found[0][1], expected[1], rtol=1e-5)
    for tokens, scores in found[1:]:
        assert tokens.tobytes() == found[0][0].tobytes()
        assert scores.tobytes() == found[0][1].tobytes()


def test_what_would_split_sums_is_refused():
    for mesh in (
        Partitioning(data=4, model=2),
        Partitioning(data=8, parameter_partitioning_dims=2),
    ):
        with pytest.raises(UserError, match="needs whole parameters .*data_parallel"):
            fixed_rows.check(mesh, 8, 1)
    with pytest.raises(UserError, match="8 does not divide by 16: 8 .* Use 16"):
        fixed_rows.check(Partitioning(data=8), 8, 2)
    with pytest.raises(UserError, match="fixed_rows is 0"):
        fixed_rows.check(Partitioning(data=1), 8, 0)
    assert cli.main(["eval", "--predictions", "x.jsonl", "--deterministic"]) == 1


# ----- Whole inferences -----------------------------------------------------------

TASK = "tiny_fixed_rows"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    tiny_captions.write_folder(folder)
    tiny_captions.register(TASK, folder)
    return tiny_captions.write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_a_file_is_the_same_from_batches_devices_and_shards(checkpoint, tmp_path):
    model = tiny_captions.model(decoding.sample)
    one, eight = (
        infer.restore(
            model, Partitioning(data=devices), checkpoint, LENGTHS, size, fixed_rows=1
        )
        for devices, size in ((1, 2), (8, 16))
    )
    small, large = (infer.SplitToRead(TASK, "test", LENGTHS, n) for n in (2, 16))
    whole = tmp_path / "whole.jsonl"
    infer.predict_split(one, small, output=str(whole), seed=3)
    assert len(list(read_lines(str(whole)))) == tiny_captions.NUM_IMAGES
    # Begun on one device by one of three shards, gone on with otherwise.
    mixed = tmp_path / "mixed.jsonl"
    assert infer.predict_shard(one, small, (0, 3), output=str(mixed), seed=3) is None
    result = infer.predict_split(eight, large, output=str(mixed), seed=3)
    assert not result.reused
    assert mixed.read_bytes() == whole.read_bytes()
    record = json.loads(pathlib.Path(f"{mixed}.run.json").read_text())
    assert record["fingerprint"]["fixed_rows"] == 1
    assert "batch_size" not in record["fingerprint"]
