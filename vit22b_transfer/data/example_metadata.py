"""What travels beside the features of an evaluation batch, packed as strings."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import objectives
from vit22b_transfer.data.converters import (
    Example,
    ImageFeatureConverter,
    feature_specs,
)

# What travels with the batches of a training: "" of tasks without one.
TRAINING = {"image_id": tf.TensorSpec((), tf.string)}
# The encoded picture that sources hand to preprocessors. Never part of a result.
_PIXELS = ("image", "images")


def specs(
    task: seqio.Task, converter: ImageFeatureConverter, examples: tf.data.Dataset
) -> dict[str, tf.TensorSpec]:
    """Specs of the features that evaluation needs beside the model's own."""
    return {
        name: spec
        for name, spec in sorted(feature_specs(examples).items())
        if name not in task.output_features
        and name not in (*_PIXELS, objectives.FEATURE, *converter.flags)
        and spec.dtype != tf.uint8
        and spec.shape.rank in (0, 1)
    }


def packed(example: Example, metadata: Mapping[str, tf.TensorSpec]) -> tf.Tensor:
    """The features as one vector of strings; `unpacked` undoes it."""
    values = [
        example[name]
        if is_scalar_string(spec)
        else tf.io.serialize_tensor(example[name])
        for name, spec in metadata.items()
    ]
    return tf.stack(values) if values else tf.zeros([0], tf.string)


def is_scalar_string(spec: tf.TensorSpec) -> bool:
    """Whether the feature travels in `example_metadata` as it is, not serialised."""
    return spec.dtype == tf.string and spec.shape.rank == 0


def unpacked(
    task_name: str,
    metadata: Mapping[str, tf.TensorSpec],
    row: np.ndarray,
) -> dict[str, Any]:
    """The features in a row of `example_metadata`: str, number or list of them."""
    example = {}
    for (name, spec), value in zip(metadata.items(), row, strict=True):
        if not is_scalar_string(spec):
            value = tf.io.parse_tensor(value, spec.dtype).numpy()
            value = value.tolist()
        try:
            example[name] = _text(value)
        except UnicodeDecodeError as error:
            raise UserError(
                f"feature {name!r} of task {task_name!r} is not UTF-8 text. If it "
                "is an encoded image, drop it in a preprocessor: predictions carry no "
                "pixels."
            ) from error
    return example


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value
