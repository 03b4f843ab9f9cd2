"""A task's pictures changed by a function of pixels, as a task of its own."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data.converters import map_examples
from vit22b_transfer.data.image_reading import shown

# What a change and its errors go by; a task may lack both.
_TOLD = ("image_id", "image_error")


@dataclasses.dataclass(frozen=True)
class Change:
    """What is done to each picture.

    function: of uint8 pixels [height, width, 3] and the picture's `image_id`; the same
      each time, of any picture of the size that the run asks for. name: what messages
      call it. version: tells one form of the function from another, for caches.
    """

    name: str
    function: Callable[[np.ndarray, str], np.ndarray]
    version: str


def changed(task: seqio.Task, change: Change | None) -> seqio.Task:
    """The task with all its preprocessors, and the change behind them.

    Its pictures are those that a tower sees, resized already. One that cannot be read
    (`image_error`) stays as it is.
    """
    if change is None:
        return task
    step = functools.partial(_map_pictures, change=change)
    return task.replace(preprocessors=[*task.preprocessors, step])


def _map_pictures(dataset: tf.data.Dataset, *, change: Change) -> tf.data.Dataset:
    def new(pixels, image_id, error):
        if error:
            return pixels
        try:
            found = change.function(pixels, image_id.decode(errors="backslashreplace"))
        except UserError as e:
            raise UserError(f"image {shown(image_id)}, {change.name}: {e}") from None
        if found.shape != pixels.shape or found.dtype != pixels.dtype:
            raise UserError(
                f"{change.name} makes {found.dtype} pixels of shape {found.shape} of "
                f"uint8 ones of {pixels.shape}; both are to stay."
            )
        return found

    def map_example(example):
        shape = example["images"].shape
        told = [example.get(name, tf.constant("")) for name in _TOLD]
        pixels = tf.numpy_function(
            new, [example["images"], *told], tf.uint8, stateful=False
        )
        return {**example, "images": tf.ensure_shape(pixels, shape)}

    return map_examples(dataset, map_example)
