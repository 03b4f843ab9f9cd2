"""The feature converter of a classifier: an image and the ids of its classes."""

from collections.abc import Callable, Mapping

import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data.converters import (
    Example,
    ImageFeatureConverter,
    Lengths,
    Spec,
)
from vit22b_transfer.models.preparation import Preparation


class ImageLabelFeatureConverter(ImageFeatureConverter):
    """Converter for one image and any number of labels per example.

    `labels` are class ids from 0 to `num_classes` - 1; an id that stands twice counts
    once. The feature length of `labels` is the most that an example may have. The batch
    has them with 0 behind, `label_weights` (float32) being 1 for a label and 0 for
    padding: an example without labels weighs nothing, and is counted
    (`without_labels`) if its image can be read, but not of a task without any.

    Raises:
      UserError: while iterating, naming the example, for an id out of range or more
        labels than the feature length.
    """

    TASK_FEATURES = {
        "images": Spec(dtype=tf.uint8, rank=3),
        "labels": Spec(dtype=tf.int32),
    }
    MODEL_FEATURES = {
        "encoder_input_images": Spec(dtype=tf.uint8, rank=3),
        "labels": Spec(dtype=tf.int32),
        "label_weights": Spec(dtype=tf.float32),
    }
    TARGETS = ("labels",)
    COUNTED_EMPTY = ("labels",)

    def __init__(
        self,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        apply_length_check: bool = True,
        bos_id: int = 0,
        passthrough_features: Mapping[str, Spec] | None = None,
        preparation: Preparation | None = None,
        *,
        num_classes: int,
    ):
        if num_classes < 2:
            raise UserError(f"num_classes is {num_classes}; it must be at least 2.")
        self.num_classes = num_classes
        super().__init__(
            pack,
            use_custom_packing_ops,
            apply_length_check,
            bos_id,
            passthrough_features,
            preparation,
        )

    def get_model_feature_lengths(
        self, task_feature_lengths: Lengths
    ) -> dict[str, int]:
        """Length of each model feature; of images the height."""
        labels = task_feature_lengths["labels"]
        return {
            self.IMAGES: self.image_shape(task_feature_lengths["images"])[0],
            "labels": labels,
            "label_weights": labels,
        } | self.passed_through(task_feature_lengths)

    def features_of(
        self, ds: tf.data.Dataset, lengths: Lengths
    ) -> Callable[[Example], Example]:
        """As of the class above; labels out of range or too many are an error."""
        images = self.converted_images(ds, lengths["images"])
        length = lengths["labels"]

        def convert(example: Example) -> Example:
            labels = self._checked(example, length)
            count = tf.shape(labels)[0]
            given = tf.range(length) < count
            labels = tf.pad(labels, tf.reshape(tf.stack([0, length - count]), [1, 2]))
            return {
                self.IMAGES: images(example),
                "labels": tf.ensure_shape(labels, [length]),
                "label_weights": tf.cast(given, tf.float32),
            }

        return convert

    def _checked(self, example: Example, length: int) -> tf.Tensor:
        """The different labels of an example, all of them ids of classes."""
        labels = example["labels"]
        labels, _ = tf.unique(labels)
        of = ["of image", example["image_id"]] if "image_id" in example else []
        wrong = tf.boolean_mask(labels, (labels < 0) | (labels >= self.num_classes))
        in_range = tf.debugging.Assert(
            tf.equal(tf.size(wrong), 0),
            [
                "label",
                wrong[:1],
                *of,
                f"is out of range: the model's {self.num_classes} classes have the ids "
                f"0 to {self.num_classes - 1}. Set NUM_CLASSES to the number of "
                "classes of the task, or correct the labels.",
            ],
        )
        few = tf.debugging.Assert(
            tf.size(labels) <= length,
            [
                "labels",
                *of,
                "are at most",
                length,
                "by their feature length, but got",
                tf.size(labels),
                "(raise the feature length of labels).",
            ],
        )
        with tf.control_dependencies([in_range, few]):
            return tf.identity(labels)
