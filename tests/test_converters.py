"""Feature converters, driven by SeqIO as T5X drives them."""

import array_tasks
import numpy as np
import pytest
import seqio
import tensorflow as tf
from array_tasks import LENGTHS, SIZE

from vit22b_transfer.data.converters import (
    ImageTextFeatureConverter,
    MultiImageTextFeatureConverter,
)


def tall(dataset):
    """Images of SIZE columns and twice as many rows."""
    return dataset.map(
        lambda ex: {**ex, "images": tf.concat([ex["images"]] * 2, axis=0)}
    )


def large(dataset):
    """Images of twice SIZE, whose size is known only when they are read."""

    def enlarge(example):
        shape = tf.numpy_function(lambda: np.array([8, 8, 3], np.int32), [], tf.int32)
        images = tf.zeros(tf.ensure_shape(shape, [3]), tf.uint8)
        return {**example, "images": images}

    return dataset.map(enlarge)


@pytest.fixture(scope="module")
def task():
    return array_tasks.add_task("converted", array_tasks.ArraySource(3))


def converted(name, lengths=LENGTHS, converter=None, **options):
    converter = converter or ImageTextFeatureConverter(pack=False)
    dataset = seqio.get_dataset(
        name,
        task_feature_lengths=lengths,
        feature_converter=converter,
        dataset_split="train",
        shuffle=False,
        **options,
    )
    return list(dataset.as_numpy_iterator())


def test_seqio_get_dataset_gives_model_features_of_fixed_shape(task):
    examples = converted(task.name)
    assert len(examples) == 3
    second = examples[1]
    assert {name: value.shape for name, value in second.items()} == {
        "encoder_input_images": (SIZE, SIZE, 3),
        "encoder_input_tokens": (8,),
        "decoder_target_tokens": (6,),
        "decoder_input_tokens": (6,),
        "decoder_loss_weights": (6,),
    }
    assert second["encoder_input_images"].dtype == np.uint8
    assert (second["encoder_input_images"] == 1).all()
    one = ord("1") + 3
    np.testing.assert_array_equal(second["decoder_target_tokens"], [one, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(second["decoder_input_tokens"], [0, one, 1, 0, 0, 0])
    np.testing.assert_array_equal(second["decoder_loss_weights"], [1, 1, 0, 0, 0, 0])
    assert second["encoder_input_tokens"][6:].tolist() == [0, 0]


@pytest.mark.parametrize("size", [(SIZE, SIZE), [SIZE, SIZE], (SIZE, SIZE, 3)])
def test_an_image_length_may_be_a_height_or_a_shape(task, size):
    examples = converted(task.name, {**LENGTHS, "images": size})
    assert examples[0]["encoder_input_images"].shape == (SIZE, SIZE, 3)
    lengths = ImageTextFeatureConverter().get_model_feature_lengths(
        {**LENGTHS, "images": size}
    )
    assert lengths["encoder_input_images"] == SIZE


@pytest.mark.parametrize("size", [0, (4,), (4, 4, 4), (4, 0)])
def test_an_image_length_of_another_form_is_an_error(task, size):
    with pytest.raises(ValueError, match="height"):
        converted(task.name, {**LENGTHS, "images": size})


@pytest.mark.parametrize("size", [SIZE // 2, SIZE * 2, (SIZE * 2, SIZE)])
def test_an_image_of_another_size_known_in_advance_is_an_error(task, size):
    with pytest.raises(ValueError, match="shape .* are expected, but the task gives"):
        converted(task.name, {**LENGTHS, "images": size})


@pytest.mark.parametrize("size", [SIZE, SIZE * 4])
def test_an_image_of_another_size_is_an_error_that_names_both_sizes(size):
    task = array_tasks.add_task("large", array_tasks.ArraySource(3), [large])
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        converted(task.name, {**LENGTHS, "images": size})
    assert f"{size}x{size}x3 are expected" in str(error.value)
    assert f"[{min(size, 8)} 8 3]" in str(error.value)
    assert "image0" in str(error.value)


def test_packing_is_refused_and_t5x_arguments_are_accepted():
    with pytest.raises(ValueError, match="images cannot be packed"):
        ImageTextFeatureConverter(pack=True, use_custom_packing_ops=False)
    converter = ImageTextFeatureConverter(pack=False, use_custom_packing_ops=True)
    assert not converter.pack


def test_a_text_beyond_its_length_is_an_error_unless_seqio_trims_it(task):
    short = {**LENGTHS, "inputs": 3}
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most 3 tokens"):
        converted(task.name, short, trim_output_features=False)
    trimmed = converted(task.name, short)[0]["encoder_input_tokens"]
    assert 1 not in trimmed  # the EOS is lost


def test_a_missing_feature_length_is_an_error(task):
    with pytest.raises(ValueError, match="images"):
        converted(task.name, {"inputs": 8, "targets": 6})


def test_several_images_per_example_keep_their_axis():
    def double(dataset):
        return dataset.map(lambda ex: {**ex, "images": tf.stack([ex["images"]] * 2)})

    features = {
        **array_tasks.FEATURES,
        "images": seqio.ContinuousFeature(dtype=tf.uint8, rank=4),
    }
    source = array_tasks.ArraySource(3)
    task = array_tasks.add_task("pairs", source, [double], features)
    converter = MultiImageTextFeatureConverter(pack=False)
    lengths = {**LENGTHS, "images": (2, SIZE, SIZE)}
    examples = converted(task.name, lengths, converter)
    assert examples[2]["encoder_input_images"].shape == (2, SIZE, SIZE, 3)
    with pytest.raises(ValueError, match="3x4x4x3 are expected"):
        converted(task.name, {**lengths, "images": (3, SIZE, SIZE)}, converter)
    with pytest.raises(ValueError, match="number, height, width"):
        converted(task.name, LENGTHS, converter)
