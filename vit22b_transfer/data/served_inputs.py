"""From what a served model is asked to a batch of the model, in TensorFlow alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data.converters import ImageTextFeatureConverter, padded

Batch = dict[str, tf.Tensor]


def image_shape(feature_lengths: Mapping[str, Any]) -> tuple[int, ...]:
    """(height, width, 3) of the images that a served model takes.

    Raises:
      UserError: for several images per example, or a model that takes no prompt.
    """
    if "inputs" not in feature_lengths:
        raise UserError(
            f"the feature lengths are {dict(feature_lengths)}, without inputs: only "
            "models that take a prompt can be served. Use `vit22b infer`."
        )
    length = feature_lengths["images"]
    if not isinstance(length, int) and len(length) > 2 and length[-1] != 3:
        raise UserError(
            f"the feature length of images is {length}, several per example: only "
            "models of one image can be served. Use `vit22b infer`."
        )
    return ImageTextFeatureConverter().image_shape(length)


def trailing_shapes(feature_lengths: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What T5X's export does not know of the model's images: (width, 3)."""
    return {ImageTextFeatureConverter.IMAGES: image_shape(feature_lengths)[1:]}


def preprocessor(
    batch_size: int | None,
    output_features: Mapping[str, Any],
    task_feature_lengths: Mapping[str, Any],
    tokenized_inputs: bool,
) -> tuple[Callable[[tf.Tensor, tf.Tensor], Batch], Sequence[tf.TensorSpec]]:
    """(pixels and prompts to a batch of the model, their specifications).

    Pixels are uint8 [batch, height, width, 3], of the size of the task's images and
    resized as the task does it. Prompts are texts [batch], whole as the task makes them
    (with its own words around a question), or with `tokenized_inputs` token ids
    [batch, length] with EOS, 0 behind it. A prompt longer than the feature length
    `inputs` is an error of TensorFlow's: nothing is cut.

    output_features: those of the task. The arguments are T5X's.
    """
    shape = image_shape(task_feature_lengths)
    length, targets = task_feature_lengths["inputs"], task_feature_lengths["targets"]
    feature = output_features["inputs"]
    prompts = tf.TensorSpec([batch_size], tf.string, name="inputs")
    if tokenized_inputs:
        prompts = tf.TensorSpec([batch_size, length], tf.int32, name="inputs")
    pixels = tf.TensorSpec([batch_size, *shape], tf.uint8, name="images")

    def tokens_of(text: tf.Tensor) -> tf.Tensor:
        tokens = tf.cast(feature.vocabulary.encode_tf(text), tf.int32)
        if feature.add_eos:
            tokens = tf.concat([tokens, [feature.vocabulary.eos_id]], axis=0)
        return padded({"inputs": tokens}, "inputs", length)

    def batch_of(images: tf.Tensor, inputs: tf.Tensor) -> Batch:
        if not tokenized_inputs:
            row = tf.TensorSpec([length], tf.int32)
            inputs = tf.map_fn(tokens_of, inputs, fn_output_signature=row)
        empty = tf.zeros([tf.shape(images)[0], targets], tf.int32)
        empty = tf.ensure_shape(empty, [batch_size, targets])
        return {
            "encoder_input_images": images,
            "encoder_input_tokens": inputs,
            "decoder_target_tokens": empty,
            "decoder_input_tokens": empty,
            "decoder_loss_weights": empty,
        }

    return batch_of, (pixels, prompts)
