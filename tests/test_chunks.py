"""Examples read by many threads, several in a call: their order, number and errors."""

import functools
import itertools
import time
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf
from PIL import Image

from tasks.classification import register_classification
from vit22b_transfer import UserError
from vit22b_transfer.data import (
    chunks,
    data_bench,
    decoded_images,
    preprocessors,
    streams,
)
from vit22b_transfer.data.host_batches import (
    Request,
    host_eval_batches,
    host_train_batches,
)
from vit22b_transfer.data.images import read_image
from vit22b_transfer.data.label_converters import ImageLabelFeatureConverter
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.data.order import HostShard
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.records import Tally

PICTURES, SIDE, BATCH = 40, 6, 8


def lines(numbers):
    """Examples: a number, as many words as it says, and an empty vector."""
    data = tf.data.Dataset.from_tensor_slices(np.array(numbers, np.int64))
    return data.map(
        lambda n: {
            "number": n,
            "words": tf.fill([n % 3], tf.as_string(n)),
            "none": tf.zeros([0], tf.int32),
        }
    )


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_every_example_comes_once_in_order_with_all_its_features(size, count):
    calls = []

    def double(numbers):
        calls.append(len(numbers))
        return 2 * numbers

    def function(examples):
        doubled = tf.numpy_function(double, [examples["number"]], tf.int64)
        doubled.set_shape([None])
        return {**examples, "number": doubled}

    data = lines(range(count))
    made = chunks.map_in_chunks(data, function, dict, size, needs=("number",))
    assert made.cardinality() == count
    found = list(made.as_numpy_iterator())
    assert [x["number"] for x in found] == [2 * n for n in range(count)]
    for n, x in enumerate(found):
        assert x["words"].tolist() == [str(n).encode()] * (n % 3)
        assert x["none"].shape == (0,) and x["none"].dtype == np.int32
    assert sum(calls) == count and len(calls) == -(-count // size)
    endless = chunks.map_in_chunks(data.repeat(), dict, dict, size, needs=("number",))
    assert not count or endless.cardinality() == tf.data.INFINITE_CARDINALITY


@pytest.mark.parametrize("size", [1, 4])
def test_features_of_any_kind_come_back_and_none_hides_another(size):
    def kinds(n):
        odd = {"number": n, "nested": {"none": tf.zeros([0])}} if size == 1 else {}
        rows = tf.RaggedTensor.from_row_lengths(tf.zeros([0]), tf.zeros([n], tf.int64))
        odd |= {"rows": rows} if size == 1 else {}
        return {"number": n, "a": tf.fill([n], n), "a/hidden": n, **odd}

    data = tf.data.Dataset.range(5).map(kinds)
    made = chunks.map_in_chunks(data, dict, dict, size, needs=("number",))
    assert made.element_spec == data.element_spec
    for n, x in enumerate(made):
        assert x["a"].numpy().tolist() == [n] * n and x["a/hidden"] == n
        assert size > 1 or x["nested"]["none"].shape == (0,)
        assert size > 1 or x["rows"].to_list() == [[]] * n
    assert n == 4


def test_a_name_and_a_problem_of_no_stated_shape_are_still_told(folder):
    def examples():
        for number in range(3):
            problem = "it was lost" if number == 2 else ""
            path = str(folder / "all" / f"{number:02}.png")
            yield {"image": path, "image_id": f"n{number}", "image_problem": problem}

    spec: Any = tf.TensorSpec(None, tf.string)
    specs = {"image": spec, "image_id": spec, "image_problem": spec}
    data = tf.data.Dataset.from_generator(examples, output_signature=specs)
    data = data.map(
        lambda x: {
            "image": tf.ensure_shape(tf.io.read_file(x["image"]), []),
            "image_id": x["image_id"],
            "image_problem": x["image_problem"],
        }
    )
    made = preprocessors.load_images(
        data, {"images": SIDE}, options=ReadingOptions(), tally=Tally()
    )
    found = []
    with pytest.raises(tf.errors.OpError, match="image '?n2'?: it was lost"):
        for example in made:
            found.append(int(example["images"][0, 0, 0]))
            assert "image_problem" not in example
    assert found == [0, 1]


def test_large_examples_are_read_one_by_one():
    sizes = [chunks.size_for(n) for n in (0, 3 * 32**2, 3 * 448**2, 3 * 4096**2)]
    assert sizes == [16, 16, 6, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of one color each, its number, and all of another shape."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "all").mkdir()
    for number in range(PICTURES):
        image = Image.new("RGB", (5 + number, 9), (number, 0, 0))
        image.save(folder / "all" / f"{number:02}.png")
    return folder


def request(folder, name="numbered_pictures", **options):
    seqio.TaskRegistry.remove(name)
    source = ClassFolderSource({"train": str(folder)}, classes=("all", "no"))
    register_classification(name, source, options=ReadingOptions(**options))
    converter = functools.partial(ImageLabelFeatureConverter, num_classes=2)
    return Request(name, "train", {"images": SIDE, "labels": 1}, converter, BATCH)


def seen(batches, count):
    taken = [
        batch.features["encoder_input_images"]
        for batch in itertools.islice(batches, count)
    ]
    batches.close()
    return np.stack(taken)


def test_batches_do_not_depend_on_how_many_threads_read_nor_on_resuming(
    folder, monkeypatch
):
    read = decoded_images.DecodedImages.read

    def slowly(self, source, *of, **options):
        # Those that are asked for first are ready last.
        time.sleep(0.0005 * (hash(source) % 5))
        return read(self, source, *of, **options)

    monkeypatch.setattr(decoded_images.DecodedImages, "read", slowly)
    asked = request(folder)
    found = {}
    with decoded_images.SMALL_SETS.keeping_none():
        for threads in (1, 2, 4):
            monkeypatch.setattr(tf.data, "AUTOTUNE", threads)
            for start in (0, 3):
                batches = host_train_batches(asked, 0, start, HostShard())
                found[threads, start] = seen(batches, 10 - start)
    for (_, start), batches in found.items():
        np.testing.assert_array_equal(batches, found[1, 0][start:])
    first_epoch = found[1, 0][: PICTURES // BATCH, :, 0, 0, 0]
    assert sorted(first_epoch.ravel()) == list(range(PICTURES))


def test_images_are_those_of_their_files(folder):
    batches = host_eval_batches(request(folder), 0, HostShard())
    pixels = seen(batches, PICTURES // BATCH).reshape(-1, SIDE, SIDE, 3)
    for number, image in enumerate(pixels):
        path = folder / "all" / f"{number:02}.png"
        np.testing.assert_array_equal(image, read_image(path, (SIDE, SIDE)))


def test_an_unreadable_image_ends_reading_at_its_own_example(folder, tmp_path):
    (tmp_path / "all").mkdir()
    for path in sorted((folder / "all").iterdir()):
        content = path.read_bytes()
        bad = path.name == "07.png"
        (tmp_path / "all" / path.name).write_bytes(content[:40] if bad else content)
    task = request(tmp_path).provider
    dataset = streams.task_examples(task, "train", {"images": SIDE, "labels": 1})
    numbers = []
    with pytest.raises(UserError, match=r"image '?all/07.png'?: .*Remove it"):
        for example in streams.as_numpy(dataset):
            numbers.append(example["images"][0, 0, 0])
    assert numbers == list(range(7))
    skipping = request(tmp_path, on_bad_image="skip")
    (first, *_) = host_eval_batches(skipping, 0, HostShard())
    assert first.features["encoder_input_images"][:, 0, 0, 0].tolist() == [*range(7), 0]
    assert first.flags[:, 0].tolist() == [0] * 7 + [1]


def test_data_bench_reads_labelled_images_as_well(folder):
    task = request(folder).name
    found = data_bench.measure(task, size=SIDE, batch_size=BATCH, seconds=0.1)
    assert found.examples and found.per_example > 0
    assert "images decoded and resized" in found.parts
