"""Labelled images on disk: class lists, hierarchies, sources, tasks, batches."""

import itertools
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_classifier
import tiny_models
from PIL import Image

from tasks import classification
from vit22b_transfer import UserError
from vit22b_transfer.data import batches, class_lists, label_converters, tasks
from vit22b_transfer.data.labelled_sources import (
    ClassFolderSource,
    LabelFiles,
    LabelFileSource,
)
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import ImageFolderSource
from vit22b_transfer.evaluation import evaluate, label_metrics
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.inputs import EvalData, TrainData
from vit22b_transfer.training.train import Periods, fine_tune

ONE_DEVICE = Partitioning(data=1, model=1)
SIZE = tiny_classifier.SIZE
LENGTHS = {"images": SIZE, "labels": 3}
CLASSES = "animal\ncat\ndog\ntabby\ncar\n"


@pytest.fixture(autouse=True)
def no_task_left_over():
    before = set(seqio.TaskRegistry.names())
    yield
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)


@pytest.fixture
def folder(tmp_path):
    """`classes.txt` and an image of each of some names."""
    (tmp_path / "classes.txt").write_text(CLASSES)
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / name)
    return tmp_path


def written(path, text):
    path.write_text(text)
    return path


# --- Class lists and hierarchies ---


def test_a_label_has_all_its_ancestors_as_labels(folder):
    lines = "child,parent\ntabby,cat\ncat,animal\ndog,animal\ntabby,car\ntabby,cat\n"
    hierarchy = written(folder / "hierarchy.csv", lines)
    classes = class_lists.read(folder / "classes.txt", hierarchy)
    assert classes.with_ancestors([3]) == (0, 1, 3, 4)
    assert classes.with_ancestors([2, 1]) == (0, 1, 2)
    assert classes.with_ancestors([4]) == (4,)


def test_a_long_chain_and_a_wide_lattice_are_read_in_time(folder):
    names = [f"c{n}" for n in range(3000)]
    path = written(folder / "many.txt", "\n".join(names))
    chain = "".join(f"{a},{b}\n" for a, b in itertools.pairwise(names))
    classes = class_lists.read(path, written(folder / "chain.csv", chain))
    assert len(classes.with_ancestors([0])) == 3000
    # Two parents each, level by level: 2^100 ways up, and 200 classes.
    both = "".join(
        f"c{2 * n + i},c{2 * n + 2 + j}\n"
        for n in range(100)
        for i in range(2)
        for j in range(2)
    )
    classes = class_lists.read(path, written(folder / "lattice.csv", both))
    assert classes.with_ancestors([0]) == (0, *range(2, 202))


@pytest.mark.parametrize(
    "lines, message",
    [
        ("tabby,cat\ncat,animal\nanimal,tabby\n", "in a circle: .*tabby.* -> "),
        ("cat,cat\n", "circle: cat -> cat"),
        ("tabbi,cat\n", "line 1: there is no class 'tabbi' .*nearest: 'tabby'"),
        ("cat,animal\ncat\n", "line 2: 1 columns; a line is child,parent"),
        ("cat,zzzz\n", "'zzzz' in the class list; none is near"),
        ("cat,\x1b[31m\n", "no class '[^\x1b]*31m'"),
    ],
)
def test_a_wrong_hierarchy_is_said(folder, lines, message):
    path = written(folder / "hierarchy.csv", lines)
    with pytest.raises(UserError, match=message):
        class_lists.read(folder / "classes.txt", path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("cat\n", "lists one class, 'cat': there is nothing to tell apart"),
        ("cat\ndog\ncat\n", "line 3: class 'cat' stands in line 1 already"),
        ("", "is empty"),
    ],
)
def test_a_wrong_class_list_is_said(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        class_lists.names(written(tmp_path / "classes.txt", text))


# --- Sources ---


def labelled(folder, text, suffix=".jsonl", **options):
    path = written(folder / f"labels{suffix}", text)
    return LabelFileSource(
        {"train": LabelFiles(path, folder)}, classes=folder / "classes.txt", **options
    )


def records(source, split="train"):
    return [source.record(split, n) for n in range(source.num_records(split))]


def told(source):
    return [(r.image_id, r.labels, r.references) for r in records(source)]


EXPECTED = [("b.png", (1, 4), ("cat", "car")), ("a.png", (2,), ("dog",))]


@pytest.mark.parametrize(
    "suffix, text",
    [
        (".csv", "file_name,label\nb.png,car\na.png,dog\nb.png,cat\n"),
        (".csv", "label_id,file_name\n4,b.png\n2,a.png\n1,b.png\n"),
        (
            ".jsonl",
            '{"file_name": "b.png", "labels": ["car", 1]}\n'
            '{"file_name": "a.png", "label": "dog"}\n'
            '{"file_name": "b.png", "label": "cat"}\n',
        ),
    ],
    ids=["names", "ids", "JSON lines"],
)
def test_labels_of_an_image_are_those_of_all_its_lines(folder, suffix, text):
    assert told(labelled(folder, text, suffix)) == EXPECTED


def test_a_source_gives_ancestors(folder):
    hierarchy = written(folder / "hierarchy.csv", "tabby,cat\ncat,animal\n")
    source = labelled(
        folder, "file_name,label\na.png,tabby\n", ".csv", hierarchy=hierarchy
    )
    assert told(source) == [("a.png", (0, 1, 3), ("animal", "cat", "tabby"))]


BAD = {
    "unknown class": ('"label": "catt"', "'catt' is not in .*nearest: 'cat'"),
    "label out of range": ('"label": 5', r"line 2: 5; the ids .* are 0 to 4"),
    "image without labels": ('"labels": []', "line 2: c.png"),
    "malformed entry": ('"labels": [1.5]', "1.5 is no text"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_label_is_an_error_or_leaves_out_its_image_and_is_counted(folder, reason):
    field, message = BAD[reason]
    text = '{"file_name": "a.png", "label": "cat"}\n'
    text += '{"file_name": "c.png", ' + field + "}\n"
    with pytest.raises(UserError, match=f"{reason}: .*{message}"):
        records(labelled(folder, text))
    # Another line with a good label does not make it a good image.
    if reason in ("unknown class", "label out of range"):
        text += '{"file_name": "c.png", "label": "dog"}\n'
    source = labelled(folder, text, on_bad_record="skip")
    assert told(source) == [("a.png", (1,), ("cat",))]
    assert source.report() == {"train": {reason: 1}}


@pytest.mark.parametrize(
    "suffix, text, message",
    [
        (".txt", "a.png\tcat\n", r"read from .jsonl, .csv"),
        (".csv", "file_name,class\na.png,cat\n", "file_name and label or label_id"),
        (".csv", "file_name,label,label_id\na.png,cat,1\n", "label or label_id"),
        (".csv", "file_name,label_id\na.png,1e3\n", "label_id '1e3' is no number"),
        (".csv", "file_name,label_id\na.png,-1\n", "label out of range: .* -1;"),
        (".csv", "file_name,label\na.png,\n", "image without labels"),
        (".csv", "file_name,label\nz.png,cat\n", "missing image file"),
    ],
)
def test_a_wrong_file_of_labels_is_said(folder, suffix, text, message):
    with pytest.raises(UserError, match=message):
        records(labelled(folder, text, suffix))


def test_a_class_folder_is_a_class(tmp_path, caplog):
    root = tiny_classifier.draw_folders(tmp_path, train=2, validation=1)
    (root / "train/flat/deeper").mkdir()
    (root / "train/flat/000.png").rename(root / "train/flat/deeper/000.png")
    (root / "train/readme.md").write_text("no image")
    source = ClassFolderSource({"train": root / "train"}, classes=root / "classes.txt")
    found = records(source)
    assert [r.image_id for r in found[:4]] == [
        "falling/000.png",
        "falling/001.png",
        "flat/001.png",
        "flat/deeper/000.png",
    ]
    assert [r.labels for r in found] == [(n // 2,) for n in range(8)]
    assert "1 files do not end in" in caplog.text


def test_a_folder_of_no_class_and_an_image_in_none_are_bad_records(tmp_path, caplog):
    root = tiny_classifier.draw_folders(tmp_path, train=2, validation=1)
    listed = written(root / "some.txt", "falling\nflat\nuprihgt\n")

    def source(**options):
        return ClassFolderSource({"train": root / "train"}, classes=listed, **options)

    with pytest.raises(UserError, match="rising/00.*'rising' is not in"):
        records(source())
    (root / "train/rising/000.png").rename(root / "train/x.png")
    skipping = source(on_bad_record="skip")
    assert len(records(skipping)) == 4
    assert skipping.report() == {
        "train": {"image without labels": 1, "unknown class": 3}
    }
    assert "1 of 3 classes have no image (uprihgt)" in caplog.text
    with pytest.raises(UserError, match="x.png lies in no folder of a class"):
        written(root / "some.txt", "falling\nflat\nrising\nupright\n")
        records(source())


# --- Converter and batches ---


def read(name, num_classes=5, lengths=LENGTHS, split="train"):
    """The batches of a pass, and the counters."""
    with batches.eval_batches(
        name,
        split,
        feature_lengths=lengths,
        converter_cls=lambda **options: label_converters.ImageLabelFeatureConverter(
            num_classes=num_classes, **options
        ),
        batch_size=2,
        partitioning=ONE_DEVICE,
    ) as rows:
        return [
            ({n: np.asarray(x) for n, x in b.features.items()}, b.examples)
            for b in rows
        ], rows.counters.counts()


def test_batches_have_labels_with_padding_and_what_evaluation_needs(folder):
    (folder / "c.png").write_text("no image")
    lines = "file_name,label\na.png,dog\nb.png,cat\nb.png,car\nc.png,cat\n"
    classification.register_classification(
        "labels",
        labelled(folder, lines, ".csv"),
        options=ReadingOptions(on_bad_image="skip"),
    )
    found, counts = read("labels")
    np.testing.assert_array_equal(found[0][0]["labels"], [[2, 0, 0], [1, 4, 0]])
    np.testing.assert_array_equal(found[0][0]["label_weights"], [[1, 0, 0], [1, 1, 0]])
    # The image that cannot be read weighs nothing, nor does the row that fills up.
    assert not found[1][0]["label_weights"].any()
    assert counts["skipped_images"] == 1 and counts["without_labels"] == 0
    assert found[1][1][0]["label_names"] == ["cat"]
    assert found[0][1][1]["label_ids"] == [1, 4]


@pytest.mark.parametrize(
    "num_classes, length, message",
    [
        (
            4,
            3,
            "label 4 of image b.png is out of range: the model's 4 classes .*0 to 3",
        ),
        (5, 1, "image 'b.png' has 2 labels, the feature length is 1"),
    ],
)
def test_labels_beyond_the_model_are_an_error_that_names_the_image(
    folder, num_classes, length, message
):
    lines = "file_name,label\na.png,dog\nb.png,cat\nb.png,car\n"
    classification.register_classification("labels", labelled(folder, lines, ".csv"))
    with pytest.raises(UserError, match=message):
        read("labels", num_classes, LENGTHS | {"labels": length})


def test_the_converter_alone_refuses_too_many_labels_and_drops_doubles():
    def example(number):
        made = tiny_classifier.example(number)
        return made | {"labels": tf.constant([3, 1, 3])}

    tiny_classifier.register("doubles", 2, make=example)
    found, _ = read("doubles", split="test")
    np.testing.assert_array_equal(found[0][0]["labels"], [[3, 1, 0]] * 2)
    with pytest.raises(UserError, match="labels of image 0 are at most 1 by .*got 2"):
        read("doubles", lengths=LENGTHS | {"labels": 1}, split="test")


def test_nothing_is_lost_of_a_task_without_any_labels(folder):
    classification.register_classification(
        "new", ImageFolderSource({"test": folder}), metric_fns=()
    )
    found, counts = read("new", split="test")
    assert counts["without_labels"] == 0 and counts["examples"] == 3
    assert not any(batch["label_weights"].any() for batch, _ in found)
    assert "label_ids" not in found[0][1][0]


def test_an_image_that_is_no_ascii_is_named_as_it_is(folder):
    (folder / "a.png").rename(folder / "caf\N{LATIN SMALL LETTER E WITH ACUTE}'s.png")
    lines = "file_name,label\ncaf\N{LATIN SMALL LETTER E WITH ACUTE}'s.png,car\n"
    classification.register_classification("labels", labelled(folder, lines, ".csv"))
    with pytest.raises(UserError, match="of image caf\u00e9's.png is out of range"):
        read("labels", 4)


@pytest.mark.parametrize("num_classes", [4, 6])
def test_a_model_has_as_many_classes_as_the_list_of_its_task(folder, num_classes):
    lines = "file_name,label\na.png,animal\n"
    classification.register_classification("labels", labelled(folder, lines, ".csv"))
    model = tiny_classifier.classifier(num_classes=num_classes)
    message = f"has 5 names, but the model has {num_classes} .*NUM_CLASSES=5"
    data = TrainData("labels", "train", LENGTHS, 2)
    with pytest.raises(UserError, match=message):
        data.batches(model, ONE_DEVICE, seed=0, start_step=0)
    names = class_lists.names(folder / "classes.txt")
    model = tiny_classifier.classifier(
        num_classes=num_classes, class_names=lambda: names
    )
    with pytest.raises(
        UserError, match=f"has 5 names, but the model has {num_classes}"
    ):
        tasks.check_classes("labels", model)
    tasks.check_classes("labels", tiny_classifier.classifier(num_classes=5))


def test_an_option_of_texts_is_refused():
    with pytest.raises(UserError, match="on_long_text='error' has no effect"):
        classification.register_classification(
            "labels",
            ImageFolderSource({"test": "/nowhere"}),
            options=ReadingOptions(on_long_text="error"),
        )


# --- TFDS ---


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set of TFDS with three images, the last one without a label."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tf.int64,
            "file_name": tfds.features.Text(),
        }
    )
    there = folder / "tiny_pictures/1.0.0"
    there.mkdir(parents=True)
    file = str(there / "tiny_pictures-train.tfrecord-00000-of-00001")
    pictures = tiny_models.images(3, SIZE, SIZE, 3)
    with tf.io.TFRecordWriter(file) as writer:
        for picture, label, name in zip(pictures, [2, 0, -1], "xyz", strict=True):
            record = {"image": picture, "label": label, "file_name": name}
            writer.write(features.serialize_example(features.encode_example(record)))
    split = tfds.core.SplitInfo(name="train", shard_lengths=[3], num_bytes=0)
    tfds.folder_dataset.write_metadata(
        data_dir=str(there), features=features, split_infos=[split]
    )
    return str(folder)


def test_a_data_set_of_tfds_is_read_when_a_run_asks_for_it(tfds_folder):
    for number, (name, options) in enumerate(
        {
            "nowhere:1.0.0": {"data_dir": "/nowhere"},
            "tiny_pictures:1.0.0": {"data_dir": tfds_folder, "id_feature": "file_name"},
        }.items()
    ):
        classification.register_tfds(
            f"pictures_{number}", name, splits={"train": "train"}, **options
        )
    found, counts = read("pictures_1")
    labels = np.concatenate([batch["labels"][:, 0] for batch, _ in found])
    weights = np.concatenate([batch["label_weights"][:, 0] for batch, _ in found])
    by_name = {
        example["image_id"]: (label, weight)
        for example, label, weight in zip(
            [e for _, part in found for e in part], labels, weights, strict=False
        )
    }
    assert by_name == {"x": (2, 1.0), "y": (0, 1.0), "z": (0, 0.0)}
    assert counts["without_labels"] == 1


def test_a_feature_that_a_data_set_of_tfds_lacks_is_said(tfds_folder):
    classification.register_tfds(
        "pictures",
        "tiny_pictures:1.0.0",
        splits={"train": "train"},
        data_dir=tfds_folder,
        label="labels",
    )
    with pytest.raises(UserError, match="no feature 'labels'; it has file_name, image"):
        read("pictures")
    with pytest.raises(UserError, match="has no version.*cifar10:3.0.2"):
        classification.register_tfds("p", "cifar10", splits={"train": "train"})


# --- All of it ---


@pytest.mark.slow
def test_fine_tuning_learns_what_no_pixel_tells(tmp_path):
    """Stripes at four angles, in random colours: chance is one in four."""
    root = tiny_classifier.draw_folders(tmp_path)
    splits = {name: root / name for name in ("train", "validation")}
    classification.register_classification(
        "stripes",
        ClassFolderSource(splits, classes=root / "classes.txt"),
        metric_fns=(label_metrics.multi_label,),
    )
    lengths, steps = {"images": SIZE, "labels": 1}, 40
    schedule = optimizers.cosine(1e-2, total_steps=steps, warmup_steps=5)
    model = tiny_classifier.classifier(
        optimizer_def=optimizers.adamw(schedule),
        all_scores=True,
        class_names=lambda: class_lists.names(root / "classes.txt"),
    )
    fine_tune(
        model,
        model_dir=str(tmp_path / "model"),
        data=TrainData("stripes", "train", lengths, 32),
        eval_data=EvalData(["stripes"], "validation", lengths, 32),
        total_steps=steps,
        partitioning=ONE_DEVICE,
        periods=Periods(log=steps, evaluate=steps, checkpoint=steps),
    )
    scores = evaluate.evaluate_checkpoint(
        model,
        partitioning=ONE_DEVICE,
        checkpoint=str(tmp_path / "model"),
        tasks="stripes",
        split="validation",
        feature_lengths=lengths,
        batch_size=32,
        output_dir=str(tmp_path),
    )["stripes"]
    assert scores.num_scored == 24
    assert scores.metrics["accuracy"] >= 0.9
    assert scores.metrics["accuracy"] == scores.metrics["example/accuracy"]
    assert scores.metrics["mean_average_precision"] >= 0.9
    (path,) = tmp_path.glob("stripes*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    right = [line["class_name"] == line["image_id"].split("/")[0] for line in lines]
    assert np.mean(right) == pytest.approx(scores.metrics["accuracy"])
