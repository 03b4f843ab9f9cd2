"""Batches of registered tasks: order, resuming, padding, hosts, devices, errors."""

import itertools
import logging
import subprocess
import sys
import threading

import array_tasks
import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from array_tasks import LENGTHS, SIZE

from vit22b_transfer.data.batches import batch_shapes, eval_batches, train_batches
from vit22b_transfer.data.converters import (
    ImageTextFeatureConverter,
    MultiImageTextFeatureConverter,
)
from vit22b_transfer.data.host_batches import (
    Request,
    host_eval_batches,
    host_train_batches,
)
from vit22b_transfer.data.order import HostShard
from vit22b_transfer.partitioning.rules import Partitioning

RECORDS = 22


def without_targets(dataset):
    return dataset.map(lambda ex: {k: v for k, v in ex.items() if k != "targets"})


def odd_only(dataset):
    return dataset.filter(lambda ex: ex["images"][0, 0, 0] % 2 == 1)


@seqio.map_over_dataset(num_seeds=1)
def with_noise(example, seed):
    noise = tf.random.stateless_uniform([SIZE, SIZE, 3], seed, 0, 256, tf.int32)
    noise = tf.concat([example["images"][:1], tf.cast(noise[1:], tf.uint8)], axis=0)
    return {**example, "images": noise}


def with_bad_images(dataset):
    """Every fifth image could not be read, as policy 'skip' leaves it."""

    def spoil(example):
        bad = example["images"][0, 0, 0] % 5 == 0
        return {
            **example,
            "images": tf.zeros_like(example["images"]) if bad else example["images"],
            "targets": example["targets"][:0] if bad else example["targets"],
            "image_error": "corrupt" if bad else "",
        }

    return dataset.map(spoil)


def plain(number):
    """The example as a TFRecord holds it."""
    text = [f"say {number}".encode(), str(number).encode()]
    values = dict(zip(["inputs", "targets"], text, strict=True))
    features = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for name, value in values.items()
    }
    pixels = tf.train.Int64List(value=[number] * (SIZE * SIZE * 3))
    features["images"] = tf.train.Feature(int64_list=pixels)
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString()


def uint8_images(dataset):
    return dataset.map(lambda ex: {**ex, "images": tf.cast(ex["images"], tf.uint8)})


@pytest.fixture(scope="module")
def tfrecords(tmp_path_factory):
    """Name of a task over two TFRecord files."""
    folder = tmp_path_factory.mktemp("tfrecords")
    for shard in range(2):
        with tf.io.TFRecordWriter(str(folder / f"train-{shard}")) as writer:
            for number in range(shard, RECORDS, 2):
                writer.write(plain(number))
    source = seqio.TFExampleDataSource(
        {"train": str(folder / "train-*")},
        {
            "images": tf.io.FixedLenFeature([SIZE, SIZE, 3], tf.int64),
            "inputs": tf.io.FixedLenFeature([], tf.string),
            "targets": tf.io.FixedLenFeature([], tf.string),
        },
    )
    return array_tasks.add_task("tfrecords", source, [uint8_images]).name


@pytest.fixture(scope="module", autouse=True)
def tasks():
    """Registers the tasks and the mixture that the tests read."""

    preprocessors = {
        "indexed": [],
        "noisy": [with_noise],
        "odd": [odd_only],
        "spoilt": [with_bad_images],
    }
    for name, extra in preprocessors.items():
        array_tasks.add_task(name, array_tasks.ArraySource(RECORDS), extra)
    source = array_tasks.ArraySource(7, lambda n: array_tasks.example(n + 100))
    array_tasks.add_task("small", source)
    seqio.MixtureRegistry.remove("mixed")
    seqio.MixtureRegistry.add("mixed", [("indexed", 1.0), ("small", 2.0)])


@pytest.fixture(scope="module")
def mesh():
    return Partitioning(data=4, model=2)


def request(name, batch_size=8, split="train", max_examples=None, **lengths):
    return Request(
        name,
        split,
        LENGTHS | lengths,
        ImageTextFeatureConverter,
        batch_size,
        max_examples=max_examples,
    )


def train(name, steps, *, seed=0, start_step=0, shard=None, batch_size=8):
    """The host's batches of `steps` steps, as dictionaries of numpy."""
    batches = host_train_batches(
        request(name, batch_size), seed, start_step, shard or HostShard()
    )
    taken = [batch.features for batch in itertools.islice(batches, steps)]
    batches.close()
    return taken


def evaluate(
    name, *, start_index=0, shard=None, batch_size=8, split="test", max_examples=None
):
    requested = request(name, batch_size, split, max_examples)
    return list(host_eval_batches(requested, start_index, shard or HostShard()))


def numbers(batches):
    """Which examples the batches hold, in order."""
    return [int(row[0, 0, 0]) for b in batches for row in b["encoder_input_images"]]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("name", ["indexed", "mixed", "noisy", "odd", "tfrecords"])
def test_resuming_at_a_step_gives_the_batches_of_an_uninterrupted_run(name, tfrecords):
    uninterrupted = train(name, 9)
    assert_same(train(name, 4, start_step=5), uninterrupted[5:])


def test_training_batches_name_their_images(tfrecords, mesh):
    """By the ids that the task gives, of the rows that a host reads."""
    taken = host_train_batches(request("mixed"), 0, 5, HostShard(1, 2))
    for batch in itertools.islice(taken, 3):
        ids = [example["image_id"] for example in batch.examples]
        assert ids == [f"image{n}" for n in numbers([batch.features])]
    taken.close()
    batch = next(host_train_batches(request("tfrecords"), 0, 0, HostShard()))
    assert [example["image_id"] for example in batch.examples] == [""] * 8
    with train_batches(
        "indexed",
        "train",
        feature_lengths=LENGTHS,
        converter_cls=ImageTextFeatureConverter,
        batch_size=8,
        seed=0,
        partitioning=mesh,
    ) as batches:
        for features in itertools.islice(batches, 3):
            expected = [f"image{n}" for n in numbers([jax.device_get(features)])]
            assert batches.image_ids == expected


def test_every_example_comes_exactly_once_per_epoch():
    order = numbers(train("indexed", 11))
    assert len(order) == 4 * RECORDS
    for epoch in range(4):
        part = order[epoch * RECORDS : (epoch + 1) * RECORDS]
        assert sorted(part) == list(range(RECORDS))


def test_a_mixture_gives_each_task_its_share_and_each_of_its_examples_once_per_epoch():
    order = numbers(train("mixed", 12))
    small = [number for number in order if number >= 100]
    others = [number for number in order if number < 100]
    assert (len(others), len(small)) == (32, 64)
    assert sorted(others[:RECORDS]) == list(range(RECORDS))
    for epoch in range(9):
        assert sorted(small[7 * epoch : 7 * epoch + 7]) == list(range(100, 107))


def test_another_seed_gives_another_order():
    one, other = (numbers(train("indexed", 3, seed=seed)) for seed in (0, 1))
    assert one != other


def test_resuming_asks_the_source_for_no_earlier_record():
    source = seqio.TaskRegistry.get("indexed").source
    source.read.clear()
    resumed = numbers(train("indexed", 1, start_step=1_000_000))
    assert source.read[:8] == resumed
    # No more than what the pipeline reads ahead.
    assert len(source.read) < 200


def test_a_task_that_must_be_read_in_sequence_says_so_in_the_log(tfrecords, caplog):
    caplog.set_level(logging.INFO)
    for name, reason in [
        ("noisy", "draw random numbers"),
        ("odd", "one example per record"),
        ("tfrecords", "has no random access"),
    ]:
        caplog.clear()
        train(name, 1, start_step=2)
        assert reason in caplog.text
        assert "reads and drops 16 examples" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["indexed", "mixed"])
def test_the_rows_of_the_hosts_make_up_the_global_batch(name):
    whole = train(name, 3)
    hosts = [train(name, 3, shard=HostShard(host, 2)) for host in range(2)]
    for step, batch in enumerate(whole):
        rows = [host[step]["encoder_input_images"] for host in hosts]
        np.testing.assert_array_equal(
            np.concatenate(rows), batch["encoder_input_images"]
        )


def test_hosts_share_out_a_source_without_random_access(tfrecords):
    hosts = [train(tfrecords, 20, shard=HostShard(host, 2)) for host in range(2)]
    read = [set(numbers(batches)) for batches in hosts]
    assert not read[0] & read[1]
    assert read[0] | read[1] == set(range(RECORDS))


def test_evaluation_is_one_pass_in_order_and_fills_the_last_batch_with_zeros():
    batches = evaluate("indexed")
    assert [len(batch.examples) for batch in batches] == [8, 8, 6]
    assert [batch.start_index for batch in batches] == [0, 8, 16]
    assert numbers([b.features for b in batches]) == [*range(RECORDS), 0, 0]
    last = batches[-1].features
    for value in last.values():
        assert len(value) == 8
        assert not value[6:].any()
    assert last["decoder_loss_weights"][:6].any(axis=1).all()


def test_evaluation_hands_out_metadata_as_text_and_never_pixels():
    example = evaluate("indexed")[1].examples[2]
    assert example == {
        "image_id": "image10",
        "question_id": "question10",
        "inputs_pretokenized": "say 10",
        "targets_pretokenized": "10",
        "references": ["10", "10é"],
        "image_error": "",
    }


def test_numbers_and_vectors_are_metadata_too():
    def with_labels(dataset):
        return dataset.map(
            lambda ex: {**ex, "label": 7, "boxes": [0.5, 1.5], "pair": ["a", "b"]}
        )

    array_tasks.add_task("with_labels", array_tasks.ArraySource(1), [with_labels])
    example = evaluate("with_labels")[0].examples[0]
    assert (example["label"], example["boxes"]) == (7, [0.5, 1.5])
    assert example["pair"] == ["a", "b"]


def test_metadata_that_is_no_text_is_an_error():
    def with_jpeg(dataset):
        return dataset.map(lambda ex: {**ex, "jpeg": tf.constant(b"\xff\xd8\xff")})

    array_tasks.add_task("bytes", array_tasks.ArraySource(3), [with_jpeg])
    with pytest.raises(ValueError, match="'jpeg' .* not UTF-8"):
        evaluate("bytes")


def test_evaluation_resumes_at_any_example():
    examples = [e for b in evaluate("indexed") for e in b.examples]
    resumed = evaluate("indexed", start_index=13)
    assert [e for batch in resumed for e in batch.examples] == examples[13:]
    assert [batch.start_index for batch in resumed] == [13, 21]
    assert evaluate("indexed", start_index=RECORDS) == []
    with pytest.raises(ValueError, match="start_index 23 .* 22 examples"):
        evaluate("indexed", start_index=RECORDS + 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["indexed", "odd"])
def test_a_limit_makes_a_split_of_its_first_examples(name):
    whole = [e for b in evaluate(name) for e in b.examples]
    cut = evaluate(name, max_examples=9)
    assert [e for b in cut for e in b.examples] == whole[:9]
    assert sum(len(b.flags) for b in cut) == 9
    # The second host has no row of the last batch.
    other = evaluate(name, max_examples=9, shard=HostShard(1, 2))
    assert [len(b.flags) for b in other] == [4, 0]
    resumed = evaluate(name, max_examples=9, start_index=8)
    assert_same([b.features for b in resumed], [cut[1].features])
    with pytest.raises(ValueError, match="max_examples is 0; it must be a positive"):
        evaluate(name, max_examples=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["indexed", "odd", "tfrecords"])
def test_hosts_evaluate_each_example_exactly_once_in_equally_many_batches(
    name, tfrecords
):
    whole = evaluate(name, start_index=3, split="train", batch_size=12)
    hosts = [
        evaluate(
            name, start_index=3, split="train", batch_size=12, shard=HostShard(host, 2)
        )
        for host in range(2)
    ]
    for step, batch in enumerate(whole):
        parts = [host[step] for host in hosts]
        features = [part.features["decoder_target_tokens"] for part in parts]
        np.testing.assert_array_equal(
            np.concatenate(features), batch.features["decoder_target_tokens"]
        )
        assert [e for part in parts for e in part.examples] == batch.examples
        starts = [part.start_index - batch.start_index for part in parts]
        assert starts == [0, 6]
    assert {len(host) for host in hosts} == {len(whole)}


def test_a_split_without_targets_is_evaluated_with_zero_weights():
    features = {k: v for k, v in array_tasks.FEATURES.items() if k != "targets"}
    source = array_tasks.ArraySource(3)
    array_tasks.add_task("held_out", source, [without_targets], features)
    batch = evaluate("held_out")[0]
    assert not batch.features["decoder_loss_weights"].any()
    assert [e["image_id"] for e in batch.examples] == ["image0", "image1", "image2"]
    with pytest.raises(ValueError, match="no targets to train on"):
        train("held_out", 1)


def test_train_batches_are_global_arrays_sharded_over_the_data_axis(mesh):
    with train_batches(
        "indexed",
        "train",
        feature_lengths=LENGTHS,
        converter_cls=ImageTextFeatureConverter,
        batch_size=8,
        seed=0,
        partitioning=mesh,
        start_step=2,
    ) as batches:
        first = [next(batches) for _ in range(3)]
        assert batches.counters.examples == 24
    assert_same(jax.device_get(first), train("indexed", 3, start_step=2))
    images = first[0]["encoder_input_images"]
    assert images.sharding.is_equivalent_to(mesh.batch_sharding(4), 4)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def device_eval(name, mesh, batch_size=8, **lengths):
    return eval_batches(
        name,
        "test",
        feature_lengths=LENGTHS | lengths,
        converter_cls=ImageTextFeatureConverter,
        batch_size=batch_size,
        partitioning=mesh,
    )


def test_eval_batches_are_sharded_and_padded(mesh):
    batches = list(device_eval("indexed", mesh))
    assert [batch.start_index for batch in batches] == [0, 8, 16]
    assert [len(batch.examples) for batch in batches] == [8, 8, 6]
    weights = batches[-1].features["decoder_loss_weights"]
    assert weights.sharding.is_equivalent_to(mesh.batch_sharding(2), 2)
    assert not np.asarray(weights)[6:].any()


def test_lost_text_and_images_are_counted_and_first_losses_are_logged(mesh, caplog):
    batches = device_eval("spoilt", mesh, inputs=6, targets=2)
    weights = np.concatenate(
        [jax.device_get(b.features["decoder_loss_weights"]) for b in batches]
    )
    counters = batches.counters
    assert counters.examples == RECORDS
    assert counters.lost["skipped_images"] == 5  # 0, 5, 10, 15, 20
    # "say 10" and its EOS are 7 tokens, "10" and its EOS are 3.
    assert counters.lost["truncated_inputs"] == 12
    assert counters.lost["truncated_targets"] == 9  # those of 10, 15 and 20 are empty
    assert not weights[[0, 5, 10, 15, 20]].any()
    assert "skipped_images: 2 of the 8 examples" in caplog.text
    assert caplog.text.count("truncated_targets") == 1
    # Read again, as `vit22b eval` does for the token loss, it is not told anew.
    list(device_eval("spoilt", mesh, inputs=6, targets=2))
    assert caplog.text.count("examples read: 5 skipped") == 1
    lost = "12 truncated inputs, 9 truncated targets"
    assert f"spoilt test, {RECORDS} examples read: 5 skipped images, {lost}" in (
        caplog.text
    )


def test_an_error_while_reading_names_the_image_and_ends_the_thread(mesh):
    array_tasks.add_task("wide", array_tasks.ArraySource(9), [widen_sixth])
    batches = device_eval("wide", mesh, batch_size=4)
    assert next(batches).start_index == 0
    with pytest.raises(ValueError, match="expected, but the task .* image6") as error:
        next(batches)
    assert "node" not in str(error.value), "TensorFlow's words around ours"
    assert list(batches) == []
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def widen_sixth(dataset):
    def widen(example):
        images = example["images"]
        if images[0, 0, 0] == 6:
            images = tf.concat([images, images], axis=1)
        return {**example, "images": tf.ensure_shape(images, [SIZE, None, 3])}

    return dataset.map(widen)


def test_a_batch_that_does_not_divide_by_the_mesh_is_an_error(mesh):
    with pytest.raises(ValueError, match="batch_size 10 does not divide by 4.* use 8 "):
        device_eval("indexed", mesh, batch_size=10)


def test_unknown_names_and_splits_are_errors_that_name_what_there_is(mesh):
    with pytest.raises(ValueError, match="no task or mixture 'indexd'.*indexed"):
        device_eval("indexd", mesh)
    with pytest.raises(ValueError, match="no split 'validation'; it has test, train"):
        evaluate("indexed", split="validation")
    with pytest.raises(ValueError, match="mixture; .* one by one: indexed, small"):
        device_eval("mixed", mesh)


def test_a_split_without_examples_is_an_error(mesh):
    array_tasks.add_task("empty", array_tasks.ArraySource(0))
    with pytest.raises(ValueError, match="split 'test' of task 'empty' is empty"):
        device_eval("empty", mesh)
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.range(0).map(
            array_tasks.example
        ),
        splits=["train"],
    )
    array_tasks.add_task("nothing", source)
    with pytest.raises(ValueError, match="ended, but training repeats it"):
        train("nothing", 1)
    with pytest.raises(ValueError, match="split 'train' of 'nothing' is empty"):
        evaluate("nothing", split="train")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"inputs": 0}, "length of inputs must be a positive number"),
        ({"patches": 3}, "feature_lengths must name"),
        ({"images": "4"}, "height"),
    ],
)
def test_requests_that_make_no_sense_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        request("indexed", **wrong)


def test_a_mixture_of_unlike_features_is_an_error():
    features = array_tasks.FEATURES | {
        "targets": seqio.Feature(seqio.ByteVocabulary(extra_ids=3))
    }
    array_tasks.add_task("alien", array_tasks.ArraySource(3), features=features)
    seqio.MixtureRegistry.remove("unlike")
    seqio.MixtureRegistry.add("unlike", [("indexed", 1.0), ("alien", 1.0)])
    with pytest.raises(ValueError, match="'alien' and 'indexed' .* feature 'targets'"):
        train("unlike", 1)


def test_shapes_are_known_without_reading():
    shapes, types = batch_shapes(ImageTextFeatureConverter, LENGTHS, 8)
    batch = train("indexed", 1)[0]
    assert shapes == {name: value.shape for name, value in batch.items()}
    assert types == {name: value.dtype for name, value in batch.items()}
    lengths = LENGTHS | {"images": (2, 8, 6)}
    shapes, _ = batch_shapes(MultiImageTextFeatureConverter, lengths, 4)
    assert shapes["encoder_input_images"] == (4, 2, 8, 6, 3)


_ENDS = """
import tensorflow as tf
from vit22b_transfer.data import streams

def read(x):
    time.sleep(0.02)
    if x == 3:
        raise ValueError("broken")
    return x

def example(x):
    return {"x": tf.numpy_function(read, [x], tf.int64)}

numbers = tf.data.Dataset.range(10**6).map(example, num_parallel_calls=8)
try:
    list(streams.as_numpy(numbers.batch(4).prefetch(2)))
except ValueError as error:
    kept = error  # to the end of the program
    assert str(error) == "broken"
"""


@pytest.mark.slow
def test_a_program_ends_after_an_error_of_reading():
    """TensorFlow's iterator must not live to its end, where it waits for ever."""
    subprocess.run([sys.executable, "-c", f"import time{_ENDS}"], check=True)
