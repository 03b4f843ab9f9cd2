"""SeqIO feature converters: task features to the batch of an image-and-text model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import seqio
import tensorflow as tf

from vit22b_transfer import UserError

Spec = seqio.FeatureConverter.FeatureSpec
# Task feature lengths: int, or of images a sequence of them (SeqIO says int only).
Lengths = Mapping[str, Any]
Example = dict[str, tf.Tensor]

TEXT_FEATURES = ("inputs", "targets")
# Counted features of each example: see `streams.fitted`.
FLAGS = ("truncated_inputs", "truncated_targets", "skipped_images")


class ImageTextFeatureConverter(seqio.FeatureConverter):
    """Converter for one image, a prompt and a target text per example.

    Task feature lengths: `images` is the height of a square image or (height, width);
    `inputs` and `targets` count tokens, EOS included.

    An image of another size is an error, when the dataset is made if its size is known
    by then, else while iterating. Texts are padded with 0; a longer one is an error.
    But SeqIO's `get_dataset` trims beforehand, silently, unless `trim_output_features`
    is False: see `require_image_size`. `data.batches` trims texts and counts. A trimmed
    target has lost its EOS: the model learns that the text goes on. Features other than
    the three are dropped.

    The constructor takes SeqIO's arguments, as T5X passes them. Lengths are checked
    whatever `apply_length_check` says.
    """

    TASK_FEATURES = {
        "images": Spec(dtype=tf.uint8, rank=3),
        "inputs": Spec(dtype=tf.int32),
        "targets": Spec(dtype=tf.int32),
    }
    MODEL_FEATURES = {
        "encoder_input_images": Spec(dtype=tf.uint8, rank=3),
        "encoder_input_tokens": Spec(dtype=tf.int32),
        "decoder_target_tokens": Spec(dtype=tf.int32),
        "decoder_input_tokens": Spec(dtype=tf.int32),
        "decoder_loss_weights": Spec(dtype=tf.int32),
    }
    PACKING_FEATURE_DTYPES = {}
    # The model's name of `images`.
    IMAGES = "encoder_input_images"

    def __init__(
        self,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        apply_length_check: bool = True,
        bos_id: int = 0,
        passthrough_features: Mapping[str, Spec] | None = None,
    ):
        if pack:
            raise UserError(
                f"{type(self).__name__} got pack=True, but images cannot be packed: "
                "each row holds one example. Set pack=False (T5X's run files for "
                "training set utils.DatasetConfig.pack = True)."
            )
        super().__init__(
            pack=False,
            use_custom_packing_ops=use_custom_packing_ops,
            apply_length_check=False,  # _convert_features has its own checks
            bos_id=bos_id,
            passthrough_features=passthrough_features,
        )

    def image_shape(self, length: Any) -> tuple[int, ...]:
        """Shape of `images` in one example, from its task feature length."""
        sizes = _sizes([length, length] if isinstance(length, int) else length)
        if len(sizes) == 3 and sizes[-1] == 3:
            sizes = sizes[:2]
        if len(sizes) != 2:
            raise UserError(
                "the feature length of images must be a height (square images) or "
                f"(height, width), got {length!r}."
            )
        return (*sizes, 3)

    def get_model_feature_lengths(
        self, task_feature_lengths: Lengths
    ) -> dict[str, int]:
        """Length of each model feature; of images the height."""
        images = self.image_shape(task_feature_lengths["images"])
        inputs = task_feature_lengths["inputs"]
        targets = task_feature_lengths["targets"]
        return {
            self.IMAGES: images[self.TASK_FEATURES["images"].sequence_dim],
            "encoder_input_tokens": inputs,
            "decoder_target_tokens": targets,
            "decoder_input_tokens": targets,
            "decoder_loss_weights": targets,
        } | {name: task_feature_lengths[name] for name in self._passthrough_features}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Lengths
    ) -> tf.data.Dataset:
        lengths = task_feature_lengths
        shape = self.image_shape(lengths["images"])
        _check_known_shape(feature_specs(ds)["images"].shape, shape)

        def convert(example: Example) -> Example:
            targets = _padded(example, "targets", lengths["targets"])
            return {
                self.IMAGES: _checked_images(example, shape),
                "encoder_input_tokens": _padded(example, "inputs", lengths["inputs"]),
                "decoder_target_tokens": targets,
                "decoder_input_tokens": seqio.autoregressive_inputs(
                    targets, bos_id=self.bos_id
                ),
                "decoder_loss_weights": seqio.non_padding_position(targets),
            } | {name: example[name] for name in self._passthrough_features}

        return map_examples(ds, convert)


class MultiImageTextFeatureConverter(ImageTextFeatureConverter):
    """Converter for several images, a prompt and a target text per example.

    The task feature length of `images` is (number, height, width), the same for every
    example.
    """

    TASK_FEATURES = {
        **ImageTextFeatureConverter.TASK_FEATURES,
        "images": Spec(dtype=tf.uint8, rank=4, sequence_dim=1),
    }
    MODEL_FEATURES = {
        **ImageTextFeatureConverter.MODEL_FEATURES,
        "encoder_input_images": Spec(dtype=tf.uint8, rank=4, sequence_dim=1),
    }

    def image_shape(self, length: Any) -> tuple[int, ...]:
        """Shape of `images` in one example, from its task feature length."""
        sizes = _sizes(length)
        if len(sizes) == 4 and sizes[-1] == 3:
            sizes = sizes[:3]
        if len(sizes) != 3:
            raise UserError(
                "with several images per example the feature length of images must be "
                f"(number, height, width), got {length!r}."
            )
        return (*sizes, 3)


def require_image_size(
    dataset: tf.data.Dataset,
    sequence_length: Lengths | None,
    converter_cls: type[ImageTextFeatureConverter] = ImageTextFeatureConverter,
) -> tf.data.Dataset:
    """The same dataset, iterating which fails at an image of another size.

    A preprocessor, to be the last of a task that does not itself resize images to
    `sequence_length`. SeqIO's `get_dataset` crops `images` to the feature length after
    the preprocessors; where it leaves exactly the size asked for, no converter can tell
    that rows or columns are gone. `data.batches` reads tasks without that crop.
    """
    if sequence_length is None or "images" not in sequence_length:
        return dataset
    shape = converter_cls(pack=False).image_shape(sequence_length["images"])
    _check_known_shape(feature_specs(dataset)["images"].shape, shape)

    def checked(example: Example) -> Example:
        return example | {"images": _checked_images(example, shape)}

    return map_examples(dataset, checked)


def map_examples(
    dataset: tf.data.Dataset, function: Callable[[Example], Example]
) -> tf.data.Dataset:
    """The dataset with `function`, plain TensorFlow, applied to each example."""
    # AutoGraph has nothing to convert in ours, and takes longer than the tracing.
    graph_function = tf.autograph.experimental.do_not_convert(function)
    return dataset.map(graph_function, num_parallel_calls=tf.data.AUTOTUNE)


def feature_specs(dataset: tf.data.Dataset) -> dict[str, tf.TensorSpec]:
    """Shape and dtype of each feature in the dataset."""
    return dict(cast(Mapping[str, tf.TensorSpec], dataset.element_spec))


def known_shape(spec: tf.TensorSpec) -> tuple[int, ...]:
    """The sizes of a feature, 0 where a batch dimension is open."""
    return tuple(size or 0 for size in spec.shape.as_list())


def _sizes(length: Any) -> tuple[int, ...]:
    """The positive sizes in a feature length; empty if it is something else."""
    if not isinstance(length, Sequence):
        return ()
    if not all(isinstance(size, int) and size > 0 for size in length):
        return ()
    return tuple(length)


_RESIZE = (
    "Resize in the task, or change the feature length of images to the task's size "
    "(SeqIO itself would crop or pad here in silence)."
)


def _check_known_shape(known: tf.TensorShape, shape: tuple[int, ...]) -> None:
    if known.rank is not None and not known.is_compatible_with(shape):
        raise UserError(
            f"images of shape {_size(shape)} are expected, but the task gives "
            f"{_size(known.as_list())}. {_RESIZE}"
        )


def _size(shape: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def _checked_images(example: Example, shape: tuple[int, ...]) -> tf.Tensor:
    images = example["images"]
    fits = tf.reduce_all(tf.equal(tf.shape(images), tf.constant(shape)))
    message = [f"images of shape {_size(shape)} are expected, but the task gives"]
    message += [tf.shape(images)]
    if "image_id" in example:
        message += ["for image_id", example["image_id"]]
    with tf.control_dependencies([tf.debugging.Assert(fits, [*message, _RESIZE])]):
        return tf.ensure_shape(tf.identity(images), shape)


def _padded(example: Example, name: str, length: int) -> tf.Tensor:
    tokens = example[name]
    size = tf.shape(tokens)[0]
    message = [f"{name} of at most {length} tokens expected, but got", size]
    with tf.control_dependencies([tf.debugging.Assert(size <= length, message)]):
        paddings = tf.reshape(tf.stack([0, length - size]), [1, 2])
    return tf.ensure_shape(tf.pad(tokens, paddings), [length])
