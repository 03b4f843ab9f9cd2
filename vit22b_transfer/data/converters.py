"""SeqIO feature converters: task features to the batch of a model with images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import seqio
import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import image_lengths
from vit22b_transfer.models.preparation import Preparation

Spec = seqio.FeatureConverter.FeatureSpec
# Task feature lengths: int, or of images a sequence of them (SeqIO says int only).
Lengths = Mapping[str, Any]
Example = dict[str, tf.Tensor]


class ImageFeatureConverter(seqio.FeatureConverter):
    """What all our converters are: `images` of one size, and no packing.

    A subclass names its `TASK_FEATURES` and `MODEL_FEATURES` as SeqIO asks, says in
    `features_of` how one makes the other, and names:
      TEXTS: task features whose tokens may be cut to their length when they are read;
        what is cut is counted.
      TARGETS: task features that are learned, without which there is no training. In
        evaluation a vector that a task lacks is an empty one.
      COUNTED_EMPTY: vectors that are counted where they are empty though the image can
        be read, of tasks that have them.
      IMAGES: the model's name of `images`.

    Task feature lengths: of `images` as `image_shape` says, of the others how many
    values. SeqIO's `get_dataset` crops and trims to them beforehand, silently, unless
    `trim_output_features` is False; `data.batches` sets it so. The constructor takes
    SeqIO's arguments, as T5X passes them, and `preparation`, how the images of a tower
    are made (`image_lengths.converter_of`): lengths that say otherwise are an error.
    Lengths are checked whatever `apply_length_check` says.
    """

    TEXTS: tuple[str, ...] = ()
    TARGETS: tuple[str, ...] = ()
    COUNTED_EMPTY: tuple[str, ...] = ()
    IMAGES = "encoder_input_images"
    PACKING_FEATURE_DTYPES = {}

    def __init__(
        self,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        apply_length_check: bool = True,
        bos_id: int = 0,
        passthrough_features: Mapping[str, Spec] | None = None,
        preparation: Preparation | None = None,
    ):
        self.preparation = preparation
        if pack:
            raise UserError(
                f"{type(self).__name__} got pack=True, but images cannot be packed: "
                "each row holds one example. Set pack=False (T5X's run files for "
                "training set utils.DatasetConfig.pack = True)."
            )
        super().__init__(
            pack=False,
            use_custom_packing_ops=use_custom_packing_ops,
            apply_length_check=False,  # subclasses have their own checks
            bos_id=bos_id,
            passthrough_features=passthrough_features,
        )

    def features_of(
        self, ds: tf.data.Dataset, lengths: Lengths
    ) -> Callable[[Example], Example]:
        """The function that makes an example's model features of its task features.

        lengths: of the task features. ds: what the examples are of.
        """
        raise NotImplementedError

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Lengths
    ) -> tf.data.Dataset:
        made = self.features_of(ds, task_feature_lengths)
        return map_examples(ds, lambda x: made(x) | self.passed_through(x))

    def without_target(self, features: Iterable[str]) -> str:
        """What training lacks in a task with these features; "" if it lacks nothing."""
        missing = [name for name in self.TARGETS if name not in set(features)]
        return f"no {missing[0]}" if missing else ""

    def passed_through(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of an example, or of lengths, what is asked for beside the model's."""
        return {name: given[name] for name in self._passthrough_features}

    @property
    def flags(self) -> tuple[str, ...]:
        """What is counted of each example that is read."""
        return (
            "skipped_images",
            *(f"truncated_{name}" for name in self.TEXTS),
            *(f"without_{name}" for name in self.COUNTED_EMPTY),
        )

    def shapes(self, lengths: Lengths) -> dict[str, tuple[int, ...]]:
        """Shape of each task feature in one example.

        Raises:
          UserError: unless there is a length of the right form for each, and no other.
        """
        if set(lengths) != set(self.TASK_FEATURES):
            raise UserError(
                f"feature_lengths must name {sorted(self.TASK_FEATURES)}, got "
                f"{dict(lengths)}."
            )
        return {name: self._shape(name, lengths[name]) for name in self.TASK_FEATURES}

    def _shape(self, name: str, length: Any) -> tuple[int, ...]:
        if name == "images":
            return self.image_shape(length)
        if not isinstance(length, int) or length < 1:
            what = "tokens" if name in self.TEXTS else "values"
            raise UserError(
                f"the feature length of {name} must be a positive number of {what}, "
                f"got {length!r}."
            )
        return (length,)

    def image_shape(self, length: Any) -> tuple[int, ...]:
        """Shape of `images` in one example, from its task feature length.

        That is the height of a square image or (height, width); with several images per
        example (number, height, width). The 3 channels may follow.
        """
        rank = self.TASK_FEATURES["images"].rank
        one = rank == 3
        sizes = _sizes([length, length] if one and isinstance(length, int) else length)
        if len(sizes) == rank and sizes[-1] == 3:
            sizes = sizes[:-1]
        if len(sizes) != rank - 1:
            raise UserError(
                "the feature length of images must be a height (square images) or "
                f"(height, width), got {length!r}."
                if one
                else "with several images per example the feature length of images "
                f"must be (number, height, width), got {length!r}."
            )
        return (*sizes, 3)

    def prepared(self, lengths: Lengths) -> Lengths:
        """The lengths with which a task makes images as the tower takes them."""
        return image_lengths.prepared(lengths, self.preparation)

    def _check_preparation(self, length: Any) -> None:
        """Raises UserError if the tasks do not know of the tower's preparation."""
        if self.preparation not in (None, image_lengths.preparation_of(length)):
            raise UserError(
                f"the tower was trained on images that are {self.preparation}, but the "
                f"feature length of images is {length!r}, and tasks see no more than "
                "that. Under T5X, bind TASK_FEATURE_LENGTHS as "
                "gin_configs/runs/t5x_train.gin does."
            )

    def converted_images(
        self, ds: tf.data.Dataset, length: Any
    ) -> Callable[[Example], tf.Tensor]:
        """The function that gives the images of an example, of the size asked for.

        An image of another size is an error, now if its size is known, else while
        iterating.
        """
        shape = self.image_shape(length)
        self._check_preparation(length)
        known = feature_specs(ds)["images"].shape
        if known.rank is not None and not known.is_compatible_with(shape):
            raise UserError(
                f"images of shape {_size(shape)} are expected, but the task gives "
                f"{_size(known.as_list())}. {_RESIZE}"
            )
        return lambda example: _checked_images(example, shape)


class ImageTextFeatureConverter(ImageFeatureConverter):
    """Converter for one image, a prompt and a target text per example.

    `inputs` and `targets` count tokens, EOS included; they are padded with 0 and a
    longer one is an error. A target that was cut has lost its EOS: the model learns
    that the text goes on. Features other than the three are dropped.
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
    TEXTS = ("inputs", "targets")
    TARGETS = ("targets",)

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
        } | self.passed_through(task_feature_lengths)

    def features_of(
        self, ds: tf.data.Dataset, lengths: Lengths
    ) -> Callable[[Example], Example]:
        """As of the class above; an image of another size is an error."""
        images = self.converted_images(ds, lengths["images"])

        def convert(example: Example) -> Example:
            targets = padded(example, "targets", lengths["targets"])
            return {
                self.IMAGES: images(example),
                "encoder_input_tokens": padded(example, "inputs", lengths["inputs"]),
                "decoder_target_tokens": targets,
                "decoder_input_tokens": seqio.autoregressive_inputs(
                    targets, bos_id=self.bos_id
                ),
                "decoder_loss_weights": seqio.non_padding_position(targets),
            }

        return convert


_SEVERAL = Spec(dtype=tf.uint8, rank=4, sequence_dim=1)


class MultiImageTextFeatureConverter(ImageTextFeatureConverter):
    """Converter for several images, the same number in every example, and texts."""

    TASK_FEATURES = {**ImageTextFeatureConverter.TASK_FEATURES, "images": _SEVERAL}
    MODEL_FEATURES = {
        **ImageTextFeatureConverter.MODEL_FEATURES,
        ImageTextFeatureConverter.IMAGES: _SEVERAL,
    }


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


def padded(example: Example, name: str, length: int) -> tf.Tensor:
    """A vector of the example with zeros up to `length`; a longer one is an error."""
    values = example[name]
    size = tf.shape(values)[0]
    message = [f"{name} of at most {length} tokens expected, but got", size]
    with tf.control_dependencies([tf.debugging.Assert(size <= length, message)]):
        paddings = tf.reshape(tf.stack([0, length - size]), [1, 2])
    return tf.ensure_shape(tf.pad(values, paddings), [length])


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
