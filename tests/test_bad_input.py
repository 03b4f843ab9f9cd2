"""What a user is told of bad input, by `vit22b` and by `train` and `infer`."""

import dataclasses
import io
import json
import os
import re
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import seqio
import tiny_captions
from PIL import Image

from vit22b_transfer import cli
from vit22b_transfer.checkpoints import identity
from vit22b_transfer.data import preprocessors, sources
from vit22b_transfer.demo import scenes
from vit22b_transfer.inference import infer

RECIPE = "gin_configs/recipes/scenes_caption_vqa.gin"


# ----- One line from `vit22b train`, before anything is compiled --------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    scenes.write_scenes(folder, sizes={"train": 4, "validation": 2, "test": 2})
    return folder


@pytest.fixture
def spoilt(drawn, tmp_path, monkeypatch):
    """A copy of the data that a test may spoil, and where commands look for it."""
    folder = tmp_path / "data"
    shutil.copytree(drawn, folder)
    monkeypatch.setenv("VIT22B_DATA_DIR", str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def told(capsys, command, *arguments):
    """The error of `vit22b` on the recipe: one line, without a traceback."""
    assert cli.main([command, f"--gin_file={RECIPE}", *arguments]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "node" not in error, "TensorFlow's words around ours"
    message = error.splitlines()[-1]
    assert message.startswith("vit22b: error: ")
    return message


def train_error(capsys, model_dir, *arguments):
    arguments = ("--gin.BATCH_SIZE=8", *arguments)
    return told(capsys, "train", f"--gin.MODEL_DIR={str(model_dir)!r}", *arguments)


def first_image(folder):
    return min((folder / "images" / "train").iterdir())


def rewrite(folder, name, change):
    """Changes the content of an annotation file of the training split."""
    path = folder / "annotations" / f"{name}_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(folder):
    path = first_image(folder)
    path.write_bytes(path.read_bytes()[:300])


def enormous_png():
    """A PNG whose header says that it has 40000 x 40000 pixels."""
    file = io.BytesIO()
    Image.new("L", (10, 10)).save(file, format="PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 40_000, 40_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def without_annotations_of(content, key, number):
    content["annotations"] = [
        entry for entry in content["annotations"] if entry[key] != number
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil,message",
    [
        (truncate, "image '1': .*000000000001.jpg: corrupt or truncated image"),
        (lambda f: first_image(f).write_bytes(b""), "image '1': .*is empty .0 bytes"),
        (
            lambda f: first_image(f).write_bytes(enormous_png()),
            "image '1': .*the image is too large to decode: 40000x40000 = 1,6",
        ),
        (
            lambda f: first_image(f).write_bytes(b"no image at all"),
            "image '1': .*not an image in a known format",
        ),
        (lambda f: first_image(f).unlink(), "missing image file: .*000000000001.jpg"),
        (
            lambda f: shutil.rmtree(f / "images" / "train"),
            "images/train is not a directory; an image folder is expected",
        ),
        (
            lambda f: (f / "annotations" / "captions_train.json").unlink(),
            "captions_train.json does not exist",
        ),
        (
            lambda f: (f / "annotations" / "answers_train.json").write_text('{"a": [}'),
            "answers_train.json, line 1, column 8: malformed JSON",
        ),
        (
            lambda f: rewrite(f, "captions", lambda c: c["images"].pop(0)),
            "annotation without image: .* is about image 1, which is not in 'images'",
        ),
        (
            lambda f: rewrite(
                f, "captions", lambda c: without_annotations_of(c, "image_id", 1)
            ),
            "image without captions: image 1",
        ),
        (
            lambda f: rewrite(
                f, "captions", lambda c: c["annotations"][0].update(caption=" ")
            ),
            "empty caption: annotation .* of image 1",
        ),
        (
            lambda f: rewrite(
                f, "captions", lambda c: c["annotations"].append(c["annotations"][0])
            ),
            "duplicate annotation id: annotation",
        ),
        (
            lambda f: rewrite(f, "answers", lambda c: c["annotations"].pop(0)),
            "question without answers: question .* in .*answers_train.json",
        ),
        (
            lambda f: rewrite(f, "questions", lambda c: c["questions"].pop(0)),
            "annotation without question: question id",
        ),
        (
            lambda f: rewrite(
                f, "questions", lambda c: c["questions"].append(c["questions"][0])
            ),
            "duplicate question id",
        ),
    ],
)
def test_bad_data_is_told_in_one_line_that_names_it(
    spoilt, tmp_path, capsys, spoil, message
):
    spoil(spoilt)
    error = train_error(capsys, tmp_path / "model")
    assert_matches(error, message)


def assert_matches(text, pattern):
    assert re.search(pattern, text), text


def test_a_directory_of_data_that_is_not_set_names_the_variable(
    spoilt, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("VIT22B_DATA_DIR")
    error = train_error(capsys, tmp_path / "model")
    assert_matches(error, "environment variable VIT22B_DATA_DIR, which is not set")


def test_an_unwritable_model_dir_is_told(spoilt, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = train_error(capsys, tmp_path / "file" / "model")
    assert_matches(error, "model_dir '.*file/model' .* cannot be written")


@pytest.mark.slow
def test_a_batch_that_the_mesh_cannot_divide_is_told(spoilt, tmp_path, capsys):
    error = train_error(capsys, tmp_path / "model", "--gin.BATCH_SIZE=12")
    assert_matches(error, "batch_size 12 does not divide by 8")


@pytest.mark.slow
def test_misspelt_tasks_and_splits_name_the_nearest(spoilt, tmp_path, capsys):
    error = train_error(capsys, tmp_path / "m", "--gin.TRAIN_TASK='scenes_mixtur'")
    assert_matches(error, "no task or mixture 'scenes_mixtur'. Nearest: scenes_mixture")
    error = train_error(capsys, tmp_path / "m", "--gin.inputs.TrainData.split='trian'")
    assert_matches(error, "has no split 'trian'; it has test, train, validation")


def test_inference_before_training_is_told(spoilt, tmp_path, capsys):
    error = told(capsys, "infer", f"--gin.MODEL_DIR={str(tmp_path / 'nothing')!r}")
    assert_matches(error, "checkpoint '.*nothing': there is no directory")


def test_recipes_are_found_from_any_directory(spoilt, tmp_path, capsys, monkeypatch):
    """gin would take folders on Python's path for packages, and fail at them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIT22B_DATA_DIR")
    assert_matches(train_error(capsys, "model"), "VIT22B_DATA_DIR, which is not set")


# ----- Skipped by policy, counted, reported at the end --------------------------------

UNUSUAL = ("alpha.png", "cmyk.jpg", "grey.png", "rotated.jpg", "sixteen_bits.png")
UNREADABLE = ("empty.jpg", "enormous.png", "truncated.jpg")
TASK = "bad_input"
DATA = infer.SplitToRead(TASK, "test", tiny_captions.LENGTHS, tiny_captions.BATCH_SIZE)


def write_images(folder):
    """Unusual and unreadable images, a caption each, and two captions to skip."""
    size = (tiny_captions.SIZE, tiny_captions.SIZE)
    colors = Image.new("RGB", size, (200, 30, 60))
    colors.convert("CMYK").save(folder / "cmyk.jpg")
    colors.convert("L").save(folder / "grey.png")
    colors.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.full(size, 40_000, np.uint16)).save(folder / "sixteen_bits.png")
    orientation = Image.Exif()
    orientation[0x0112] = 6
    colors.save(folder / "rotated.jpg", exif=orientation)
    jpeg = io.BytesIO()
    colors.save(jpeg, format="JPEG")
    (folder / "truncated.jpg").write_bytes(jpeg.getvalue()[:200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "enormous.png").write_bytes(enormous_png())
    lines = [
        {"file_name": name, "caption": "a dog"}
        for name in (*UNUSUAL, *UNREADABLE, "not_there.jpg")
    ]
    lines.append({"file_name": "grey.png", "caption": " "})
    text = "\n".join(map(json.dumps, lines))
    (folder / "captions.jsonl").write_text(text)


def register(folder, policy):
    files = sources.CaptionFiles(folder / "captions.jsonl", folder)
    source = sources.CaptionFileSource(
        {"train": files, "test": files}, on_bad_record="skip"
    )
    seqio.TaskRegistry.remove(TASK)
    return seqio.TaskRegistry.add(
        TASK,
        source=source,
        preprocessors=preprocessors.image_text_preprocessors(
            "caption", preprocessors.ReadingOptions(on_bad_image=policy)
        ),
        output_features=preprocessors.image_text_features(seqio.ByteVocabulary()),
        postprocess_fn=preprocessors.references_and_predictions,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_captions.write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def restored(checkpoint):
    return infer.restore(
        tiny_captions.model(),
        tiny_captions.ONE_DEVICE,
        checkpoint,
        tiny_captions.LENGTHS,
        tiny_captions.BATCH_SIZE,
    )


@pytest.mark.slow
def test_a_split_with_bad_images_is_predicted_and_they_are_reported_at_the_end(
    restored, tmp_path, capsys, caplog
):
    write_images(tmp_path)
    register(tmp_path, "skip")
    result = infer.predict_split(restored, DATA, output=str(tmp_path / "out.jsonl"))
    with open(result.path, encoding="utf-8") as file:
        lines = {line["image_id"]: line for line in map(json.loads, file)}
    assert sorted(lines) == sorted((*UNUSUAL, *UNREADABLE))
    for name, line in lines.items():
        assert ("error" in line) == (name in UNREADABLE)
        assert ("prediction" not in line) == (name in UNREADABLE)
        assert "metadata" not in line
    assert "too large" in lines["enormous.png"]["error"]
    assert result.num_bad_images == len(UNREADABLE)
    report = " ".join(capsys.readouterr().out.split())
    assert "5 predictions in " in report and "3 images could not be read" in report
    left_out = "left out of the split: 1 x missing image file, 1 x empty caption"
    assert left_out in report
    assert f"{TASK} test, 8 examples read: 3 skipped images" in caplog.text
    assert "2 skipped records" in caplog.text
    # Each kind of loss is warned of where it was met, with the image's name, and once.
    assert "the first to be seen" not in caplog.text
    assert caplog.text.count("skipping image") == 1
    # Nothing is forgotten when the predictions are there already.
    infer.predict_split(restored, DATA, output=str(tmp_path / "out.jsonl"))
    assert left_out in " ".join(capsys.readouterr().out.split())


def test_an_unreadable_image_ends_inference_unless_told_to_skip(restored, tmp_path):
    write_images(tmp_path)
    register(tmp_path, "error")
    with pytest.raises(ValueError, match="^image 'empty.jpg': .*empty.* count them.$"):
        infer.predict_split(restored, DATA, output=str(tmp_path / "out.jsonl"))
    assert not os.path.exists(tmp_path / "out.jsonl")


def test_a_file_name_that_is_no_utf_8_stops_no_other_image_of_its_folder(
    restored, tmp_path, capsys
):
    """As for new images; what a line would say nothing of is not in it."""
    image = Image.new("RGB", (tiny_captions.SIZE, tiny_captions.SIZE), (200, 30, 60))
    folder = os.fsencode(tmp_path / "new")
    os.mkdir(folder)
    for name in (b"a.png", b"caf\xe9.png", "café.png".encode(), b"._a.png"):
        with open(os.path.join(folder, name), "wb") as file:
            image.save(file, "PNG")
    source = sources.ImageFolderSource({"test": tmp_path / "new"})
    tiny_captions.register(TASK, tmp_path, source=source)
    result = infer.predict_split(restored, DATA, output=str(tmp_path / "out.jsonl"))
    with open(result.path, encoding="utf-8") as file:
        lines = {line["image_id"]: line for line in map(json.loads, file)}
    assert sorted(lines) == ["a.png", "caf\\xe9.png", "café.png"]
    assert result.num_bad_images == 1
    bad = lines.pop("caf\\xe9.png")
    message = "the file name is no UTF-8 text: caf\\xe9.png; rename the file"
    assert bad["error"] == message
    assert "prediction" not in bad
    for line in lines.values():
        assert list(line) == ["index", "image_id", "prompt", "prediction", "score"]
        assert line["prediction"] is not None


# ----- Checkpoints of another model ---------------------------------------------------


def refusal(checkpoint, model):
    with pytest.raises(ValueError) as error:
        infer.restore(
            model,
            tiny_captions.ONE_DEVICE,
            checkpoint,
            tiny_captions.LENGTHS,
            tiny_captions.BATCH_SIZE,
        )
    return str(error.value)


def test_a_checkpoint_of_other_shapes_is_refused_naming_the_parameters(checkpoint):
    model = tiny_captions.model()
    text = dataclasses.replace(model.module.text, mlp_dim=24)
    message = refusal(checkpoint, with_text(model, text))
    assert "does not fit the model" in message
    assert_matches(message, r"mlp/w\w+/kernel: shape .* in the checkpoint, .*24")


def with_text(model, text):
    model.module = model.module.clone(text=text)
    return model


def test_a_checkpoint_of_another_vocabulary_is_refused(checkpoint, tmp_path):
    other = tiny_captions.model(vocabulary=seqio.ByteVocabulary(extra_ids=7))
    copy = tmp_path / "checkpoint_7"
    shutil.copytree(checkpoint, copy)
    record = {"vocabularies": identity.vocabulary_record(other)}
    (copy / "run" / "metadata").write_text(json.dumps(record))
    message = refusal(str(copy), tiny_captions.model())
    assert "the model's input_vocabulary is not the one that" in message
    assert "ByteVocabulary with 266 tokens" in message
