"""SeqIO feature converter of image-text pairs."""

from collections.abc import Callable

import tensorflow as tf

from vit22b_transfer.data.converters import (
    Example,
    ImageFeatureConverter,
    Lengths,
    Spec,
    padded,
)
from vit22b_transfer.models import contrastive


class PairFeatureConverter(ImageFeatureConverter):
    """Converter for one image and one text per example.

    Any task with `images` and `targets` can be read, such as those of captioning;
    `inputs`, if there are any, are dropped. `targets` counts tokens, EOS included; they
    are padded with 0 and a longer one is an error.

    `pair_weights` is 0, and image and text are nobody's, for a text without tokens but
    EOS and for an image of nothing but zeros: one that could not be read (the task's
    policy 'skip', which counts it), or none at all (the texts of classes). The metric
    `pair_share` tells how much of the batches was left.
    """

    TASK_FEATURES = {
        "images": Spec(dtype=tf.uint8, rank=3),
        "targets": Spec(dtype=tf.int32),
    }
    MODEL_FEATURES = {
        contrastive.IMAGES: Spec(dtype=tf.uint8, rank=3),
        contrastive.TEXTS: Spec(dtype=tf.int32),
        contrastive.WEIGHTS: Spec(dtype=tf.float32),
    }
    TEXTS = ("targets",)
    TARGETS = ("targets",)

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Lengths
    ) -> tf.data.Dataset:
        """The converted dataset.

        SeqIO's own evaluator adds to the lengths those of all features of a task:
        that of `inputs` says nothing here.
        """
        known = {*self.TASK_FEATURES, *self._passthrough_features}
        lengths = {n: x for n, x in task_feature_lengths.items() if n in known}
        return super().__call__(ds, lengths)

    def get_model_feature_lengths(
        self, task_feature_lengths: Lengths
    ) -> dict[str, int]:
        """Length of each model feature; of images the height."""
        return {
            self.IMAGES: self.image_shape(task_feature_lengths["images"])[0],
            contrastive.TEXTS: task_feature_lengths["targets"],
            contrastive.WEIGHTS: 1,
        } | self.passed_through(task_feature_lengths)

    def features_of(
        self, ds: tf.data.Dataset, lengths: Lengths
    ) -> Callable[[Example], Example]:
        """As of the class above; an image of another size is an error."""
        images = self.converted_images(ds, lengths["images"])

        def convert(example: Example) -> Example:
            pixels = images(example)
            is_pair = (tf.size(example["targets"]) > 1) & tf.reduce_any(pixels > 0)
            return {
                self.IMAGES: pixels,
                contrastive.TEXTS: padded(example, "targets", lengths["targets"]),
                contrastive.WEIGHTS: tf.cast(is_pair, tf.float32)[None],
            }

        return convert
