import functools
import importlib
import json
import logging
import math

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

import tasks.coco
import tasks.my_captions
import tasks.my_vqa
import tasks.scenes  # noqa: F401
from tasks.captioning import register_captioning
from tasks.vqa import register_vqa
from vit22b_transfer.data import images, task_metrics, vocabularies
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.records import Tally
from vit22b_transfer.data.sources import (
    CaptionFiles,
    CaptionFileSource,
    ImageFolderSource,
)
from vit22b_transfer.demo import scenes

LENGTHS = {"images": 64, "inputs": 64, "targets": 96}
SCENES_TASKS = {
    "scenes_captioning": ("train", "validation", "test"),
    "scenes_vqa": ("train", "validation", "test"),
    "scenes_captioning_compositional": ("test",),
    "scenes_vqa_compositional": ("test",),
}
BYTES = seqio.ByteVocabulary()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes") / "data"
    scenes.write_scenes(directory, sizes=dict.fromkeys(scenes.SPLITS, 6))
    return directory


@pytest.fixture
def scenes_here(data_dir, monkeypatch):
    monkeypatch.setenv("VIT22B_DATA_DIR", str(data_dir))
    return data_dir


@pytest.fixture
def register():
    """Registers tasks that are gone after the test."""
    added = []

    def make(function, name, *args, **options):
        added.append(name)
        return function(name, *args, **options)

    yield make
    for name in added:
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)


def examples(task, split="train", lengths=LENGTHS):
    dataset = task.get_dataset(lengths, split, shuffle=False)
    return list(dataset.as_numpy_iterator())


def assert_valid(example, size=64):
    assert example["images"].shape == (size, size, 3)
    assert example["images"].dtype == np.uint8
    for name in ("inputs", "targets"):
        assert example[name].dtype == np.int32
        assert example[name].ndim == 1
        assert example[name][-1] == 1 and 0 not in example[name]
    text = {k: example[k] for k in ("image_id", "question_id", "image_error")}
    assert all(isinstance(value, bytes) for value in text.values())
    assert "images_pretokenized" not in example
    assert not {"image", "image_path"} & set(example)


# The drawn scenes


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SCENES_TASKS))
def test_every_split_of_the_scenes_tasks_gives_valid_examples(scenes_here, name):
    task = seqio.get_mixture_or_task(name)
    assert tuple(task.splits) == SCENES_TASKS[name]
    for split in task.splits:
        found = examples(task, split)
        assert len(found) == task.num_input_examples(split)
        for example in found:
            assert_valid(example)


def test_captioning_shows_the_scene_and_asks_for_its_captions(scenes_here):
    found = examples(seqio.TaskRegistry.get("scenes_captioning"), "test")
    for index, example in enumerate(found):
        config = scenes.SceneConfig()
        scene = scenes.describe_scene(config, seed=0, split="test", index=index)
        difference = example["images"].astype(int) - scene.image
        assert np.abs(difference).mean() < 4
        assert example["inputs_pretokenized"] == b"caption en"
        assert BYTES.decode(example["inputs"]) == "caption en"
        assert BYTES.decode(example["targets"]) == scene.captions[0]
        assert [r.decode() for r in example["references"]] == scene.captions
        assert example["image_error"] == b""


def test_vqa_asks_the_question_and_expects_the_answer(scenes_here):
    found = examples(seqio.TaskRegistry.get("scenes_vqa"), "validation")
    config = scenes.SceneConfig()
    scene = scenes.describe_scene(config, seed=0, split="validation", index=0)
    for example, question in zip(found, scene.questions, strict=False):
        prompt = f"answer en {question.text}"
        assert BYTES.decode(example["inputs"]) == prompt
        assert example["inputs_pretokenized"].decode() == prompt
        assert example["targets_pretokenized"].decode() == question.answer
        assert BYTES.decode(example["targets"]) == question.answer
        assert len(example["references"]) == 10
        assert example["question_id"].startswith(example["image_id"])


def test_the_mixture_draws_three_questions_to_a_caption(scenes_here):
    dataset = seqio.get_mixture_or_task("scenes_mixture").get_dataset(
        LENGTHS, "train", shuffle=True, seed=0, num_epochs=None
    )
    prompts = [BYTES.decode(e["inputs"]) for e in dataset.take(60).as_numpy_iterator()]
    questions = sum(prompt.startswith("answer en ") for prompt in prompts)
    assert questions == 46  # three to one, as this seed draws
    assert prompts.count("caption en") == 60 - questions


@pytest.mark.parametrize("name", list(SCENES_TASKS))
def test_the_tasks_metrics_reward_right_predictions(scenes_here, name):
    task = seqio.TaskRegistry.get(name)
    found = examples(task, "test")
    right = [
        task.postprocess_fn(e["targets_pretokenized"], example=e, is_target=False)
        for e in found
    ]
    targets = [task.postprocess_fn(None, example=e, is_target=True) for e in found]
    assert all(isinstance(t, list) and isinstance(t[0], str) for t in targets)
    assert task.metric_fns
    for metric in task.metric_fns:
        good = metric(targets, right)
        bad = metric(targets, ["zebra"] * len(right))
        assert good and good.keys() == bad.keys()
        for key in good:
            assert good[key] >= bad[key]
        assert any(good[key] > bad[key] for key in good)


def test_registration_touches_no_file(monkeypatch):
    monkeypatch.delenv("VIT22B_DATA_DIR", raising=False)
    task = seqio.TaskRegistry.get("scenes_vqa")
    with pytest.raises(ValueError, match="environment variable VIT22B_DATA_DIR, which"):
        task.num_input_examples("test")


def test_the_vocabulary_comes_from_the_environment(data_dir, tmp_path, monkeypatch):
    paths = scenes.scene_paths(data_dir, "train")
    vocabulary = vocabularies.train(
        [paths.captions], tmp_path / "v.model", vocab_size=320
    )
    monkeypatch.setenv("VIT22B_VOCABULARY", str(tmp_path / "v.model"))
    monkeypatch.setenv("VIT22B_DATA_DIR", str(data_dir))

    def forget():
        for registry in (seqio.MixtureRegistry, seqio.TaskRegistry):
            for name in [n for n in registry.names() if n.startswith("scenes_")]:
                registry.remove(name)

    forget()
    importlib.reload(tasks.scenes)
    try:
        task = seqio.TaskRegistry.get("scenes_captioning")
        assert task.output_features["targets"].vocabulary == vocabulary
        first = examples(task, "test")[0]
        assert_valid(first)
        text = vocabulary.decode(first["targets"].tolist())
        assert text == first["targets_pretokenized"].decode()
    finally:
        monkeypatch.delenv("VIT22B_VOCABULARY")
        forget()
        importlib.reload(tasks.scenes)


# Other people's data


def test_coco_and_vqav2_are_read_as_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("COCO_DIR", str(tmp_path))
    for folder, name in (
        ("val2014", "COCO_val2014_000000000007.jpg"),
        ("test2015", "COCO_test2015_000000000008.jpg"),
    ):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (30, 20)).save(tmp_path / folder / name)
    (tmp_path / "annotations").mkdir()

    def write(path, **content):
        (tmp_path / path).write_text(json.dumps(content))

    write(
        "annotations/captions_val2014.json",
        images=[{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}],
        annotations=[{"id": 1, "image_id": 7, "caption": "A black image."}],
    )
    question = {"image_id": 7, "question_id": 70, "question": "Is it black?"}
    write("v2_OpenEnded_mscoco_val2014_questions.json", questions=[question])
    write(
        "v2_mscoco_val2014_annotations.json",
        annotations=[question | {"answers": [{"answer": "yes"}] * 10}],
    )
    write(
        "v2_OpenEnded_mscoco_test2015_questions.json",
        questions=[{"image_id": 8, "question_id": 80, "question": "What?"}],
    )
    [caption] = examples(seqio.TaskRegistry.get("coco_captions"), "validation")
    [answered] = examples(seqio.TaskRegistry.get("vqav2"), "validation")
    [unanswered] = examples(seqio.TaskRegistry.get("vqav2"), "test")
    for example in (caption, answered, unanswered):
        assert_valid(example)
    assert caption["references"].tolist() == [b"A black image."]
    assert answered["inputs_pretokenized"] == b"answer en Is it black?"
    assert answered["targets_pretokenized"] == b"yes"
    assert unanswered["references"].shape == (0,)


def test_a_users_own_captions_need_three_variables(data_dir, monkeypatch):
    train = scenes.scene_paths(data_dir, "train")
    monkeypatch.setenv("MY_CAPTIONS_JSON", str(train.captions))
    monkeypatch.setenv("MY_IMAGES", str(train.images))
    monkeypatch.setenv("MY_NEW_IMAGES", str(train.images))
    assert len(examples(seqio.TaskRegistry.get("my_captions"), "train")) == 30
    found = examples(seqio.TaskRegistry.get("my_new_images"), "test")
    assert [e["image_id"] for e in found] == sorted(e["image_id"] for e in found)
    assert len(found) == 6
    assert_valid(found[0])


def png(size=(8, 8), color=(200, 10, 30)):
    return tf.io.encode_png(np.full((*size, 3), color, np.uint8)).numpy()


def test_tfrecords_are_read_through_seqios_own_source(tmp_path, register):
    def feature(value):
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    path = tmp_path / "records"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number in range(3):
            fields = {"jpeg": png(), "id": number, "text": f"caption {number}".encode()}
            features = {k: feature(v) for k, v in fields.items()}
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    source = seqio.TFExampleDataSource(
        {"train": str(path)},
        {
            "jpeg": tf.io.FixedLenFeature([], tf.string),
            "id": tf.io.FixedLenFeature([], tf.int64),
            "text": tf.io.FixedLenFeature([], tf.string),
        },
    )
    names = {"image": "jpeg", "image_id": "id", "target": "text"}
    rename = functools.partial(seqio.preprocessors.rekey, key_map=names)
    task = register(register_captioning, "tfrecord", source, before=[rename])
    found = examples(task)
    assert len(found) == 3
    for number, example in enumerate(found):
        assert_valid(example)
        assert (example["images"] == (200, 10, 30)).all()
        assert example["image_id"] == str(number).encode()
        assert example["references"].tolist() == [f"caption {number}".encode()]
    shuffled = task.get_dataset(LENGTHS, "train", shuffle=True, seed=1)
    assert len(list(shuffled)) == 3


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Two pictures with captions, as a TFDS data set."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def _info(self):
        features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(2):
            image = np.full((6, 8, 3), 100 * number, np.uint8)
            yield number, {"image": image, "caption": f"number {number}"}


def test_tfds_is_read_through_seqios_own_source(tmp_path, register):
    TinyPictures(data_dir=tmp_path).download_and_prepare()
    source = seqio.TfdsDataSource("tiny_pictures:1.0.0", tfds_data_dir=str(tmp_path))
    names = {"image": "image", "target": "caption"}
    rename = functools.partial(seqio.preprocessors.rekey, key_map=names)
    task = register(register_captioning, "tfds", source, before=[rename])
    found = sorted(examples(task), key=lambda e: e["targets_pretokenized"])
    assert [int(e["images"].mean()) for e in found] == [0, 100]
    for example in found:
        assert_valid(example)
        assert example["image_id"] == b""


# Bad images


@pytest.fixture
def pictures(tmp_path):
    """Five images, the second truncated and the fourth empty."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.jpg")
    data = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(data[: len(data) // 2])
    (folder / "3.jpg").write_bytes(b"")
    lines = [f"{number}.jpg\tpicture {number}" for number in range(5)]
    (folder / "captions.txt").write_text("\n".join(lines))
    return CaptionFileSource({"train": CaptionFiles(folder / "captions.txt", folder)})


def test_a_bad_image_stops_the_run_and_is_named(pictures, register):
    task = register(register_captioning, "strict", pictures)
    with pytest.raises(tf.errors.OpError, match=r"image '1\.jpg': .*truncated"):
        examples(task)


def test_a_skipped_image_keeps_its_place_and_weighs_nothing(pictures, register, caplog):
    options = ReadingOptions(on_bad_image="skip")
    task = register(register_captioning, "lenient", pictures, options=options)
    with caplog.at_level(logging.WARNING):
        found = examples(task)
    examples(task)  # met again, but counted once
    assert [e["image_id"].decode() for e in found] == [f"{n}.jpg" for n in range(5)]
    for number, example in enumerate(found):
        if number in (1, 3):
            assert not example["images"].any()
            assert example["targets"].shape == (0,)
        else:
            assert_valid(example)
            assert example["images"].any()
    assert b"truncated" in found[1]["image_error"]
    assert b"empty (0 bytes)" in found[3]["image_error"]
    assert sum(bool(example["image_error"]) for example in found) == 2
    assert caplog.text.count("skipping image") == 1


def test_the_only_bad_image_is_warned_of_once_however_often_it_is_read():
    tally = Tally()
    assert [tally.add("bad image", "1.jpg") for _ in range(3)] == [True, False, False]
    assert tally.counts() == {"bad image": 1}


def test_records_that_the_sources_of_a_mixture_left_out_are_added_up(
    pictures, tmp_path, register
):
    lines = tmp_path / "pictures" / "captions.txt"
    lines.write_text(lines.read_text() + "\nabsent.jpg\tx")
    for name in ("one", "two"):
        source = CaptionFileSource(
            {"train": CaptionFiles(lines, lines.parent)}, on_bad_record="skip"
        )
        register(register_captioning, name, source)
    mixture = seqio.MixtureRegistry.add("both", [("one", 1.0), ("two", 1.0)])
    try:
        registered.find_provider("both", "train")
        counts = registered.skipped_records(mixture, "train")
        assert counts == {"missing image file": 2}
    finally:
        seqio.MixtureRegistry.remove(mixture.name)


def test_too_many_pixels_are_refused(tmp_path, register):
    side = math.isqrt(images.MAX_PIXELS) + 1
    Image.new("1", (side, side)).save(tmp_path / "big.png")
    source = ImageFolderSource({"test": tmp_path})
    task = register(register_captioning, "pixels", source)
    with pytest.raises(tf.errors.OpError, match=r"'big\.png'.*limit of 89,478,485"):
        examples(task, "test")


# Sizes and lengths


def test_images_take_the_size_of_the_run(scenes_here):
    task = seqio.TaskRegistry.get("scenes_captioning")
    for asked, shape in ((48, (48, 48)), ((32, 80), (32, 80)), ((24, 40, 3), (24, 40))):
        found = examples(task, "test", LENGTHS | {"images": asked})
        assert found[0]["images"].shape == (*shape, 3)


@pytest.mark.parametrize("asked", [32, (48, 32), (32, 48, 3)])
def test_a_run_of_another_size_than_the_tasks_is_refused(scenes_here, register, asked):
    source = seqio.TaskRegistry.get("scenes_captioning").source
    options = ReadingOptions(image_size=48)
    task = register(register_captioning, "sized", source, options=options)
    with pytest.raises(ValueError, match="the task makes images of 48x48"):
        examples(task, "test", LENGTHS | {"images": asked})
    assert examples(task, "test", {**LENGTHS, "images": 48})[0]["images"].shape[0] == 48


def test_a_size_of_another_form_is_refused(scenes_here):
    task = seqio.TaskRegistry.get("scenes_captioning")
    with pytest.raises(ValueError, match=r"\(2, 8, 8\) is neither a side nor"):
        examples(task, "test", LENGTHS | {"images": (2, 8, 8)})


def test_an_open_image_size_is_an_error(scenes_here):
    task = seqio.TaskRegistry.get("scenes_captioning")
    with pytest.raises(ValueError, match="the size of the images is open"):
        examples(task, "test", {"inputs": 8, "targets": 8})


def test_long_texts_are_cut_before_the_end_and_counted(scenes_here, register, caplog):
    source = seqio.TaskRegistry.get("scenes_captioning").source
    task = register(register_captioning, "cut", source)
    with caplog.at_level(logging.WARNING):
        found = examples(task, "test", LENGTHS | {"targets": 9})
    whole = examples(task, "test")
    for short, long in zip(found, whole, strict=True):
        np.testing.assert_array_equal(short["targets"], [*long["targets"][:8], 1])
        assert short["targets_pretokenized"] == long["targets_pretokenized"]
    assert sum(bool(example["truncated_targets"]) for example in found) == 6
    assert caplog.text.count("truncated targets of image") == 1


def test_long_texts_can_be_errors(scenes_here, register):
    source = seqio.TaskRegistry.get("scenes_vqa").source
    options = ReadingOptions(on_long_text="error")
    task = register(register_vqa, "exact", source, options=options)
    with pytest.raises(tf.errors.OpError, match="inputs of image '.*' have .* tokens"):
        examples(task, "test", LENGTHS | {"inputs": 12})
    assert len(examples(task, "test")) == task.num_input_examples("test")


def test_a_long_text_is_cut_in_messages(register, tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text(f"file_name,caption\na.png,{'x' * 50_000}\n")
    files = CaptionFiles(tmp_path / "a.csv", tmp_path)
    task = register(register_captioning, "long", CaptionFileSource({"test": files}))
    with caplog.at_level(logging.WARNING):
        examples(task, "test", LENGTHS)
    (message,) = caplog.messages
    assert message.endswith("xx'... (50,000 characters) (later ones are only counted)")
    assert len(message) < 400


def test_a_text_that_just_fits_is_whole(scenes_here):
    task = seqio.TaskRegistry.get("scenes_vqa")
    whole = examples(task, "test")
    lengths = {name: max(len(e[name]) for e in whole) for name in ("inputs", "targets")}
    for fitted, free in zip(
        examples(task, "test", LENGTHS | lengths), whole, strict=True
    ):
        np.testing.assert_array_equal(fitted["inputs"], free["inputs"])
        np.testing.assert_array_equal(fitted["targets"], free["targets"])


# Your own questions


def test_own_questions_are_scored_with_one_answer_each(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "000000000007.jpg")
    question = {"image_id": 7, "question": "what is it", "question_id": 1}
    answer = {"image_id": 7, "question_id": 1, "answers": [{"answer": "a red dog"}]}
    for name, content in (
        ("QUESTIONS", {"questions": [question]}),
        ("ANSWERS", {"annotations": [answer]}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        monkeypatch.setenv(f"MY_VALIDATION_{name}_JSON", str(tmp_path / name))
    monkeypatch.setenv("MY_IMAGES", str(tmp_path))
    task = seqio.TaskRegistry.get("my_vqa")
    [example] = examples(task, "validation", LENGTHS | {"images": 16})
    image = images.decode((tmp_path / "000000000007.jpg").read_bytes())
    np.testing.assert_array_equal(example["images"], images.prepare(image, (16, 16)))
    scores = task_metrics.metrics(
        "my_vqa", [_texts(example)], ["a bed dog"], {"scores": [0.0]}
    )
    assert scores == {"exact_match": 0.0, "anls": pytest.approx(8 / 9)}
    with pytest.raises(tf.errors.OpError, match="inputs of image '7' have"):
        examples(task, "validation", LENGTHS | {"inputs": 12})


def _texts(example):
    """What a prediction file keeps of an example."""
    return {
        "targets_pretokenized": example["targets_pretokenized"].decode(),
        "references": [reference.decode() for reference in example["references"]],
    }


# Options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore'"),
        ({"on_long_text": "truncat"}, "Did you mean 'truncate'"),
        ({"resize_method": "bicubi"}, "Did you mean 'bicubic'"),
        ({"image_size": 0}, "must be positive"),
        ({"image_size": (8, -8)}, "must be positive"),
    ],
)
def test_options_are_checked_when_given(change, message):
    with pytest.raises(ValueError, match=message):
        ReadingOptions(**change)


@pytest.mark.parametrize("prompt", ["answer {answer}", "{question} {question}", "a {b"])
def test_prompts_hold_at_most_one_question(prompt, register):
    source = ImageFolderSource({"test": "nowhere"})
    with pytest.raises(ValueError, match="may contain {question} once"):
        register(register_vqa, "odd", source, prompt=prompt)


def test_a_source_without_images_is_explained(register):
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files: tf.data.Dataset.from_tensors({"target": "x"}),
        splits=["train"],
    )
    task = register(register_captioning, "blind", source)
    with pytest.raises(
        ValueError, match=r"either 'image_path' .* or 'image'.*\['target'\]"
    ):
        examples(task)
