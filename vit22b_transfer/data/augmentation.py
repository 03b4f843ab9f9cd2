"""Random crops and flips in training, drawn from the key of each example.

The key is a hash of the run's seed, the epoch and the record, not the next number of a
sequence: a run that goes on at a step draws what it would have drawn, without reading
what came before, on any number of hosts and in batches of any size.

A run has an `Augmentation`; it travels in the feature length of `images`
(`image_lengths`), which evaluation has without it. So `preprocessors.load_images` draws
in training alone, and so does a preprocessor of your own:

    @augmentation.map_with_key
    def brighter(example, key):
        images = tf.image.stateless_random_brightness(example["images"], 0.2, key)
        return {**example, "images": images}
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import image_lengths
from vit22b_transfer.data.converters import Example, feature_specs, map_examples
from vit22b_transfer.data.images import prepare
from vit22b_transfer.models.preparation import Preparation

# The feature of an example that random numbers are drawn from: int32 [2], what
# TensorFlow's stateless operations take as a seed.
EXAMPLE_KEY = "example_key"
# Width / height of a crop.
ASPECTS = (3 / 4, 4 / 3)
_MARK = "augments_images"
# What is drawn of one key: a number for each, so that draws are not alike.
_CROP, _FLIP = 1, 2
Preprocessor = TypeVar("Preprocessor", bound=Callable[..., tf.data.Dataset])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is drawn at random of each training image; nothing, unless it is asked for.

    crop_area: (least, most) of the image's area, above 0 and at most 1, that is cut out
      and resized by the tower's filter, whatever its shape: width / height is drawn
      from 3/4 to 4/3, a height from those that then fit, and a place. (0.05, 1.0) is
      the inception crop. None prepares images as in evaluation.
    flip: half of the images are mirrored, left to right. Texts that say left and right,
      or are read in the image, become wrong.

    All images of an example of several are drawn alike: if they have one size, the same
    part of each is cut out.

    Raises:
      UserError: for areas that are none.
    """

    crop_area: tuple[float, float] | None = None
    flip: bool = False

    def __post_init__(self):
        area = self.crop_area
        if area is None:
            return
        numbers = all(isinstance(part, int | float) for part in area)
        if not numbers or len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise UserError(
                f"crop_area is {area}; it must be (least, most) of an image's area, "
                "both above 0 and at most 1, such as (0.05, 1.0); None crops nothing."
            )
        object.__setattr__(self, "crop_area", tuple(map(float, area)))

    def __bool__(self) -> bool:
        """Whether images are drawn; if not, a user's own preprocessors still may."""
        return self.crop_area is not None or self.flip

    def __str__(self) -> str:
        said = []
        if self.crop_area is not None:
            said.append(f"{self.crop_area[0]:g} to {self.crop_area[1]:g} of it cut out")
        if self.flip:
            said.append("half of them mirrored")
        return ", ".join(said) or "drawn by the task's own preprocessors"

    def draw(
        self,
        image: tf.Tensor,
        key: tf.Tensor,
        size: tuple[int, int],
        how: Preparation,
    ) -> tf.Tensor:
        """An image as it was read, drawn from a key and made into one of `size`.

        image: uint8 [rows, columns, 3], the result [*size, 3]. key: int32 [2].

        With a crop only the filter of `how` is used: the rest of it chooses a part.
        """
        image = tf.ensure_shape(image, [None, None, 3])
        if self.crop_area is not None:
            image = _crop(image, tf.random.fold_in(key, _CROP), self.crop_area)
            how = Preparation(filter=how.filter)

        def resized(pixels: np.ndarray) -> np.ndarray:
            return prepare(pixels, size, how)

        image = tf.numpy_function(resized, [image], tf.uint8, stateful=False)
        image.set_shape([*size, 3])
        if self.flip:
            seed = tf.random.fold_in(key, _FLIP)
            image = tf.image.stateless_random_flip_left_right(image, seed)
        return image


def _crop(image, seed, area):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros([0, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=ASPECTS,
        area_range=area,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.slice(image, begin, size)


def augments(preprocessor: Preprocessor) -> Preprocessor:
    """Marks a preprocessor that heeds the augmentation in the feature lengths.

    For one that wraps `load_images`. `map_with_key` does it itself.
    """
    setattr(preprocessor, _MARK, True)
    return preprocessor


def map_with_key(
    function: Callable[[Example, tf.Tensor], Example],
) -> Callable[..., tf.data.Dataset]:
    """The SeqIO preprocessor that maps function(example, key) over training examples.

    key: int32 [2], a seed of TensorFlow's stateless operations, a function of seed,
      epoch and record. Where more than one number is drawn of it, fold others in
      (`tf.random.fold_in(key, 1)`), or they are alike.

    Where nothing is drawn (in evaluation, or without an `Augmentation`) examples stay
    as they are.
    """

    @augments
    @functools.wraps(function)
    def preprocessor(
        dataset: tf.data.Dataset, sequence_length: Mapping[str, Any] | None = None
    ) -> tf.data.Dataset:
        length = (sequence_length or {}).get("images")
        if image_lengths.augmentation_of(length) is None:
            return dataset
        return map_examples(
            with_keys(dataset), lambda example: function(example, example[EXAMPLE_KEY])
        )

    # SeqIO looks at the parameters of a preprocessor, not at those that it wraps.
    del preprocessor.__wrapped__
    return preprocessor


def with_keys(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset with `EXAMPLE_KEY`: as it is, or if it has none, SeqIO's seeds.

    The n-th example of a pass has the n-th of these. So it is under T5X, and of sources
    without random access, which are read in sequence anyway.
    """
    if EXAMPLE_KEY in feature_specs(dataset):
        return dataset

    @seqio.map_over_dataset(num_seeds=1)
    @tf.autograph.experimental.do_not_convert
    def add(example: Example, seed: tuple[tf.Tensor, tf.Tensor]) -> Example:
        bits = tf.cast(tf.stack(seed), tf.uint32)
        return {**example, EXAMPLE_KEY: tf.bitcast(bits, tf.int32)}

    return add(dataset)  # pyright: ignore[reportCallIssue]


def train_lengths(
    task: str, lengths: Mapping[str, Any], augmentation: Augmentation | None
) -> Mapping[str, Any]:
    """The feature lengths that a registered task or mixture is trained with.

    Raises:
      UserError: if a task heeds no augmentation, or nothing would be drawn of it.
    """
    if augmentation is None:
        return lengths
    for part in seqio.get_subtasks(seqio.get_mixture_or_task(task)):
        steps = [_inner(step) for step in part.preprocessors]
        marked = [step for step in steps if getattr(step, _MARK, False)]
        if not marked:
            raise UserError(
                f"the augmentation ({augmentation}) has no effect on task "
                f"{part.name!r}: none of its preprocessors heeds one. Let it read "
                "images by preprocessors.load_images, mark a preprocessor of its own "
                "with augmentation.map_with_key or augmentation.augments, or leave "
                "gin_configs/runs/augment.gin out."
            )
        if not augmentation and all(_is_load_images(step) for step in marked):
            raise UserError(
                "the Augmentation has neither crop_area nor flip, and task "
                f"{part.name!r} has no random preprocessor of its own, so that it has "
                "no effect. Set crop_area=(0.05, 1.0) or flip=True, or leave it out."
            )
    return image_lengths.augmented(lengths, augmentation)


def _inner(preprocessor):
    """What a `functools.partial` binds."""
    while isinstance(preprocessor, functools.partial):
        preprocessor = preprocessor.func
    return preprocessor


def _is_load_images(preprocessor):
    return preprocessor.__module__ == "vit22b_transfer.data.preprocessors"
