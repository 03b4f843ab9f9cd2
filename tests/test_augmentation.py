"""Random crops and flips: what they are, and that a run that goes on repeats them."""

import io
import itertools
import json
import logging
import pickle
import types

import array_tasks
import numpy as np
import pytest
import seqio
import tensorflow as tf
from PIL import Image
from tiny_captions import ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.data import augmentation, image_lengths, image_sets
from vit22b_transfer.data import preprocessors as pp
from vit22b_transfer.data.augmentation import Augmentation
from vit22b_transfer.data.converters import (
    ImageTextFeatureConverter,
    MultiImageTextFeatureConverter,
)
from vit22b_transfer.data.host_batches import (
    Request,
    host_eval_batches,
    host_train_batches,
)
from vit22b_transfer.data.order import HostShard, example_keys, stream_key
from vit22b_transfer.data.sources import CaptionFiles
from vit22b_transfer.models.preparation import Preparation
from vit22b_transfer.training.inputs import EvalData, TrainData

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

RECORDS, BROKEN, SIDE = 22, 7, 8
HOW = Preparation(filter="bicubic", fit="shorter_side", resized=10, cropped=9, kept=8)
LENGTHS = image_lengths.prepared({"images": SIDE, "inputs": 12, "targets": 6}, HOW)
INCEPTION = Augmentation(crop_area=(0.05, 1.0), flip=True)
VOCABULARY = array_tasks.VOCABULARY


def picture(number):
    """A picture of its own shape, whose pixels tell row and column."""
    height, width = 60 + 5 * (number % 4), 100 - 9 * (number % 3)
    rows, columns = np.mgrid[:height, :width]
    number = np.full_like(rows, 10 * number)
    return np.stack([2 * rows, 2 * columns, number], axis=-1).astype(np.uint8)


def encoded(number):
    if number == BROKEN:
        return b"no picture"
    file = io.BytesIO()
    Image.fromarray(picture(int(number))).save(file, "png")
    return file.getvalue()


def example(number):
    image = tf.numpy_function(encoded, [number], tf.string, stateful=False)
    digits = tf.strings.as_string(number)
    return {"image": tf.ensure_shape(image, []), "target": digits, "image_id": digits}


@augmentation.map_with_key
def with_noise(example, key):
    noise = tf.random.stateless_uniform([SIDE, SIDE, 3], key, 0, 256, tf.int32)
    return {**example, "images": tf.cast(noise, tf.uint8)}


@seqio.map_over_dataset(num_seeds=1)
def with_sequence(example, seed):
    top = tf.random.stateless_uniform([1, SIDE, 3], seed, 0, 256, tf.int32)
    images = tf.concat([tf.cast(top, tf.uint8), example["images"][1:]], axis=0)
    return {**example, "images": images}


def add_task(name, *behind, source=None, **options):
    seqio.TaskRegistry.remove(name)
    options = pp.ReadingOptions(on_bad_image="skip", **options)
    steps = [*pp.image_text_preprocessors("say", options), *behind]
    return seqio.TaskRegistry.add(
        name,
        source=source or array_tasks.ArraySource(RECORDS, example),
        preprocessors=steps,
        output_features=pp.image_text_features(VOCABULARY),
    )


@pytest.fixture(scope="module", autouse=True)
def tasks():
    add_task("drawn")
    add_task("drawn_too")
    add_task("keyed", with_noise)
    add_task("in_sequence", with_sequence)
    array_tasks.add_task("own_images", array_tasks.ArraySource(RECORDS))
    seqio.MixtureRegistry.remove("drawn_mixture")
    seqio.MixtureRegistry.add("drawn_mixture", [("drawn", 1.0), ("drawn_too", 2.0)])


def train(
    name,
    steps,
    drawn=INCEPTION,
    *,
    start=0,
    batch_size=8,
    seed=0,
    shard=None,
    lengths=LENGTHS,
):
    """(number of the record, image) of each row of the batches of some steps."""
    lengths = augmentation.train_lengths(name, lengths, drawn)
    request = Request(name, "train", lengths, ImageTextFeatureConverter, batch_size)
    batches = host_train_batches(request, seed, start, shard or HostShard())
    rows = []
    for batch in itertools.islice(batches, steps):
        images = batch.features["encoder_input_images"]
        texts = batch.features["decoder_target_tokens"]
        numbers = [VOCABULARY.decode(text.tolist()) for text in texts]
        rows += zip(numbers, images, strict=True)
    batches.close()
    return rows


def assert_same(first, second):
    assert [number for number, _ in first] == [number for number, _ in second]
    np.testing.assert_array_equal([x for _, x in first], [x for _, x in second])


def epochs(rows):
    """The image of each record in each epoch, the broken one left out."""
    found = [dict(rows[i : i + RECORDS]) for i in range(0, len(rows), RECORDS)]
    return [{n: image for n, image in epoch.items() if n} for epoch in found]


@pytest.fixture(scope="module")
def straight():
    """Seven batches of `drawn`: two epochs and a half."""
    return train("drawn", 7)


# --- What is drawn ---


@pytest.mark.parametrize("drawn", [INCEPTION, Augmentation(flip=True)])
def test_an_image_is_cropped_then_resized_by_the_towers_filter_then_flipped(
    drawn, straight
):
    key = stream_key(0, "drawn")
    rows = straight if drawn == INCEPTION else train("drawn", 3, drawn)
    for number, found in rows[:RECORDS]:
        if not number:
            assert not found.any()
            continue
        whole = picture(int(number))
        record = np.array([int(number)])
        seed = example_keys(np.array([0]), record, key).view(np.int32)
        if drawn.crop_area is None:
            short = min(whole.shape[:2])
            size = [int(side * 10 / short) for side in whole.shape[1::-1]]
            image = Image.fromarray(whole).resize(size, Image.Resampling.BICUBIC)
            left, top = (int((side - 9) / 2) for side in size)
            want = np.asarray(image)[top : top + SIDE, left : left + SIDE]
        else:
            (top, left, _), (rows, columns, _), _ = (
                tf.image.stateless_sample_distorted_bounding_box(
                    whole.shape,
                    tf.zeros([0, 0, 4]),
                    tf.random.fold_in(seed, 1),
                    min_object_covered=0.0,
                    aspect_ratio_range=(3 / 4, 4 / 3),
                    area_range=drawn.crop_area,
                    use_image_if_no_bounding_boxes=True,
                )
            )
            part = whole[top : top + rows, left : left + columns]
            image = Image.fromarray(part).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            want = np.asarray(image)
        flipped = (np.diff(found[..., 1].astype(int)) < 0).any()
        np.testing.assert_array_equal(found, want[:, ::-1] if flipped else want)


@pytest.mark.parametrize("area", [(0.05, 1.0), (0.3, 0.5)])
def test_crops_have_the_areas_and_shapes_asked_for_and_half_are_flipped(area):
    """On a large square, the colours of the corners tell what was cut out."""
    side, rows = 128, np.mgrid[:128, :128] * 2
    square = tf.constant(np.stack([*rows, rows[0]], axis=-1).astype(np.uint8))
    drawn = Augmentation(crop_area=area, flip=True)
    keys = tf.random.stateless_uniform([400, 2], [1, 2], None, None, tf.int32)

    def draw(key):
        return drawn.draw(square, key, (16, 16), Preparation(filter="bilinear"))

    images = np.stack(list(tf.data.Dataset.from_tensor_slices(keys).map(draw)))
    across = images[:, 8, [0, -1], 1].astype(float) @ [-1, 1] / 2 * 16 / 15
    down = images[:, [0, -1], 8, 0].astype(float) @ [-1, 1] / 2 * 16 / 15
    flipped, across = across < 0, np.abs(across)
    assert abs(flipped.mean() - 0.5) < 0.1
    areas, aspects = across * down / side**2, across / down
    # Corners are told to a pixel or two.
    assert area[0] * 0.8 < areas.min() < area[0] * 1.3
    assert area[1] * 0.8 < areas.max() < area[1] * 1.1
    assert 0.65 < aspects.min() < 0.85 and 1.2 < aspects.max() < 1.5
    middles = images[:, 8, 8, :2].astype(float) / 2 / side
    assert np.ptp(middles, axis=0).min() > 0.3


def test_all_images_of_an_example_are_drawn_alike(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for name, pixels in {"a.png": picture, "b.png": 255 - picture}.items():
        Image.fromarray(pixels).save(tmp_path / name)
    line = json.dumps({"file_names": ["a.png", "b.png"], "target": "x"})
    (tmp_path / "sets.jsonl").write_text(line + "\n")
    files = {"train": CaptionFiles(tmp_path / "sets.jsonl", tmp_path)}
    seqio.TaskRegistry.remove("drawn_pairs")
    seqio.TaskRegistry.add(
        "drawn_pairs",
        source=image_sets.ImageSetSource(files, images_per_example=2),
        preprocessors=pp.image_text_preprocessors("say"),
        output_features=pp.image_text_features(VOCABULARY, several_images=True),
    )
    lengths = {**LENGTHS, "images": (2, SIDE, SIDE)}
    lengths = image_lengths.prepared(lengths, Preparation(filter="nearest"))
    lengths = augmentation.train_lengths("drawn_pairs", lengths, INCEPTION)
    request = Request(
        "drawn_pairs", "train", lengths, MultiImageTextFeatureConverter, 4
    )
    batches = host_train_batches(request, 0, 0, HostShard())
    images = next(batches).features["encoder_input_images"]
    batches.close()
    np.testing.assert_array_equal(images[:, 0], 255 - images[:, 1])
    assert len({image.tobytes() for image in images}) == 4


# --- When ---


@pytest.mark.parametrize("name", ["drawn", "keyed", "drawn_mixture", "in_sequence"])
def test_a_run_that_goes_on_draws_what_it_would_have_drawn(name, straight):
    whole = straight if name == "drawn" else train(name, 7)
    assert_same(train(name, 3, start=4), whole[4 * 8 :])


@pytest.mark.parametrize("name", ["drawn", "keyed"])
def test_going_on_reads_no_earlier_record(name, caplog):
    caplog.set_level(logging.INFO)
    source = seqio.TaskRegistry.get(name).source
    source.read.clear()
    rows = train(name, 1, start=500)
    assert {int(number or BROKEN) for number, _ in rows} <= set(source.read)
    assert len(source.read) < 200  # no more than what is read ahead
    assert "in sequence" not in caplog.text
    train("in_sequence", 1, start=2)
    assert "draw random numbers in sequence" in caplog.text
    assert "reads and drops 16 examples" in caplog.text


def test_hosts_and_sizes_of_batches_do_not_matter(straight):
    assert_same(train("drawn", 14, batch_size=4), straight)
    hosts = [train("drawn", 7, shard=HostShard(i, 2)) for i in range(2)]
    joined = [row for i in range(0, 28, 4) for host in hosts for row in host[i : i + 4]]
    assert_same(joined, straight)


def test_every_epoch_seed_and_task_has_draws_of_its_own(straight):
    first, second = epochs(straight)[:2]
    others = [second]
    others += [epochs(train("drawn", 3, seed=1))[0]]
    others += [epochs(train("drawn_too", 3))[0]]
    for other in others:
        assert first.keys() == other.keys() and len(first) == RECORDS - 1
        assert sum((first[n] == other[n]).all() for n in first) < 3


def test_evaluation_and_runs_without_it_see_images_as_they_are():
    tower = types.SimpleNamespace(preparation=HOW)
    model = types.SimpleNamespace(
        FEATURE_CONVERTER_CLS=ImageTextFeatureConverter,
        module=types.SimpleNamespace(tower=tower),
    )
    data = dict(feature_lengths={**LENGTHS, "images": SIDE}, batch_size=RECORDS)

    def first(given, **arguments):
        with given.batches(
            *arguments.pop("of", ()), model, ONE_DEVICE, **arguments
        ) as b:
            batch = next(b)
        features = getattr(batch, "features", batch)
        return np.asarray(features["encoder_input_images"])

    at = dict(seed=0, start_step=0)
    plain = first(TrainData("keyed", "train", **data), **at)
    drawn = first(TrainData("keyed", "train", **data, augmentation=INCEPTION), **at)
    evaluated = first(EvalData(["keyed"], "test", **data), of=["keyed"])
    request = Request("drawn", "test", LENGTHS, ImageTextFeatureConverter, RECORDS)
    (batch,) = host_eval_batches(request, 0, HostShard())
    want = batch.features["encoder_input_images"]
    np.testing.assert_array_equal(evaluated, want)
    assert sorted(x.tobytes() for x in plain) == sorted(x.tobytes() for x in want)
    same = {x.tobytes() for x in drawn} & {x.tobytes() for x in want}
    assert same == {bytes(SIDE * SIDE * 3)}  # of the image that cannot be read


def test_as_t5x_reads_a_task_its_seed_decides_and_epochs_differ():
    def read(seed):
        lengths = augmentation.train_lengths("drawn", LENGTHS, INCEPTION)
        dataset = seqio.get_dataset(
            "drawn",
            lengths,
            dataset_split="train",
            shuffle=False,
            num_epochs=2,
            seed=seed,
            feature_converter=ImageTextFeatureConverter(pack=False, preparation=HOW),
        )
        rows = []
        for row in dataset.as_numpy_iterator():
            text = VOCABULARY.decode(row["decoder_target_tokens"].tolist())
            rows.append((text, row["encoder_input_images"]))
        return rows

    rows = read(3)
    assert_same(read(3), rows)
    one, two = epochs(rows)
    assert sum((one[n] == two[n]).all() for n in one) < 3
    other = epochs(read(4))[0]
    assert sum((one[n] == other[n]).all() for n in one) < 3


# --- What is refused ---


@pytest.mark.parametrize(
    "area", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5), (0.5, float("nan"))]
)
def test_areas_that_are_none_are_an_error(area):
    with pytest.raises(UserError, match="crop_area is .*least, most"):
        Augmentation(crop_area=area)


def test_an_augmentation_without_effect_is_an_error():
    with pytest.raises(UserError, match="no effect on task 'own_images': none of its"):
        train("own_images", 1)
    with pytest.raises(UserError, match="'drawn' has no random .* of its own"):
        train("drawn", 1, Augmentation())
    assert train("keyed", 1, Augmentation())
    with pytest.raises(UserError, match=r"0\.05 to 1 of it cut out, half .*no effect"):
        TrainData("drawn", "train", LENGTHS, 8, object(), INCEPTION)
    scaled = image_lengths.prepared(LENGTHS, Preparation(jpegs="scaled"))
    with pytest.raises(UserError, match="crops from whole images.*scaled_jpegs.gin"):
        train("drawn", 1, INCEPTION, lengths=scaled)


def test_feature_lengths_carry_it_and_are_compared_with_it():
    plain = image_lengths.augmented({"images": SIDE}, INCEPTION)["images"]
    lengths = image_lengths.prepared({"images": plain}, HOW)["images"]
    assert (lengths.how, lengths.augmentation) == (HOW, INCEPTION)
    assert lengths == image_lengths.augmented(LENGTHS, INCEPTION)["images"]
    assert lengths != LENGTHS["images"] and tuple(lengths) == (SIDE, SIDE)
    assert pickle.loads(pickle.dumps(lengths)) == lengths
    assert "mirrored" in repr(lengths) and "bicubic" in repr(lengths)
