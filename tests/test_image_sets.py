"""Several images per example: from JSON lines to a trained and asked model."""

import json

import numpy as np
import pytest
import seqio
import tiny_captions
import tiny_models
from PIL import Image
from tiny_captions import ONE_DEVICE

from tasks.vqa import register_vqa
from vit22b_transfer import UserError
from vit22b_transfer.data import batches
from vit22b_transfer.data.converters import MultiImageTextFeatureConverter
from vit22b_transfer.data.image_sets import ImageSetSource
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import CaptionFiles

SIZE = tiny_captions.SIZE
LENGTHS = {"images": (2, SIZE, SIZE), "inputs": 24, "targets": 6}
GREYS = {"dark.png": 40, "light.png": 200, "mid.png": 120}


@pytest.fixture
def folder(tmp_path):
    for name, grey in GREYS.items():
        pixels = np.full((SIZE, SIZE, 3), grey, np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def pairs(*names, **fields):
    return {"file_names": list(names), "question": "same?", "target": "no"} | fields


def source_of(folder, lines, **options):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text)
    files = CaptionFiles(folder / "pairs.jsonl", folder)
    splits = {"train": files, "test": files}
    return ImageSetSource(splits, images_per_example=2, **options)


def registered(source, **options):
    seqio.TaskRegistry.remove("pairs_test")
    return register_vqa(
        "pairs_test",
        source,
        several_images=True,
        vocabulary=seqio.ByteVocabulary(),
        options=ReadingOptions(**options),
    )


def read(lengths=LENGTHS, **arguments):
    with batches.eval_batches(
        "pairs_test",
        "test",
        feature_lengths=lengths,
        converter_cls=MultiImageTextFeatureConverter,
        batch_size=2,
        partitioning=ONE_DEVICE,
    ) as rows:
        return list(rows), rows.counters


def test_the_images_of_an_example_keep_their_order(folder):
    lines = [
        pairs("dark.png", "light.png"),
        pairs("light.png", "dark.png", id=7),
        pairs("mid.png", "mid.png", target="yes", references=["yes", "yeah"]),
    ]
    registered(source_of(folder, lines))
    (first, last), _ = read()
    images = first.features["encoder_input_images"]
    assert images.shape == (2, 2, SIZE, SIZE, 3)
    assert images[:, :, 0, 0, 0].tolist() == [[40, 200], [200, 40]]
    assert first.examples[0]["image_id"] == "dark.png light.png"
    assert first.examples[1]["image_id"] == "7"
    assert last.examples[0]["references"] == ["yes", "yeah"]
    assert last.examples[0]["inputs_pretokenized"] == "answer en same?"


@pytest.mark.slow
def test_a_model_answers_from_both_images(folder):
    registered(source_of(folder, [pairs("dark.png", "light.png")] * 2))
    (batch,), _ = read()
    model = tiny_captions.model()
    params = tiny_models.model_params(model)
    loss, metrics = model.eval_fn(params, batch.features)
    assert np.isfinite(loss) and metrics["loss"].count > 0
    features = {name: np.asarray(value) for name, value in batch.features.items()}
    swapped = features["encoder_input_images"][:, ::-1]
    features["encoder_input_images"] = swapped
    assert model.eval_fn(params, features)[0] != loss
    assert model.predict_batch(params, batch.features).shape == (2, 6)


def test_one_unreadable_image_leaves_out_its_example(folder):
    lines = [pairs("dark.png", "light.png"), pairs("mid.png", "mid.png")]
    registered(source_of(folder, lines), on_bad_image="skip")
    (folder / "light.png").write_bytes(b"no image")
    (batch,), counters = read()
    assert counters.lost["skipped_images"] == 1
    assert not batch.features["encoder_input_images"][0].any()
    assert not batch.features["decoder_loss_weights"][0].any()
    assert batch.features["decoder_loss_weights"][1].any()


@pytest.mark.parametrize(
    "line, message",
    [
        (pairs("dark.png"), "line 2: 1 file_names, but images_per_example is 2"),
        (pairs("dark.png", 3), r"file_names \['dark.png', 3\] are no texts"),
        (pairs("dark.png", "gone.png"), "'gone.png' is not in"),
        (pairs("dark.png", "mid.png", target=1), "'target' has a wrong type"),
        (pairs("dark.png", "mid.png", references="yes"), "'references' is no list"),
        (pairs("dark.png", "mid.png", id=[]), "'id' has a wrong type"),
        ({"question": "?"}, "'file_names' is missing"),
        ([1], "line 2"),
    ],
)
def test_a_bad_line_is_named_or_counted(folder, line, message):
    lines = [pairs("dark.png", "light.png"), line]
    with pytest.raises(UserError, match=message):
        source_of(folder, lines).num_records("train")
    source = source_of(folder, lines, on_bad_record="skip")
    assert source.num_records("train") == 1
    assert sum(source.report()["train"].values()) == 1


def test_a_length_for_another_number_of_images_is_an_error(folder):
    registered(source_of(folder, [pairs("dark.png", "light.png")]))
    with pytest.raises(UserError, match="has 2 images, but .* asks for 3"):
        read({**LENGTHS, "images": (3, SIZE, SIZE)})
    with pytest.raises(UserError, match=r"must be \(number, height, width\)"):
        read({**LENGTHS, "images": SIZE})
