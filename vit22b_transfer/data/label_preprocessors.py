"""SeqIO preprocessors for labelled images, each a 1:1 map, and the postprocessor.

From a source's example to the features of a task:

    image_path or image, labels (ids), references (their names), image_id
      -> load_images -> keep_labels ->
    images uint8 [H, W, 3], labels int32 [any number], and for evaluation label_ids (the
    same), label_names, image_id, image_error

No example is ever dropped: a bad image under the policy 'skip' becomes a zero image
without labels, so that it weighs nothing and keeps its place.
"""

import functools
import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image
import seqio
import tensorflow as tf
from seqio.utils import Feature

from vit22b_transfer import UserError
from vit22b_transfer.data import images
from vit22b_transfer.data.class_lists import ClassIds
from vit22b_transfer.data.converters import feature_specs, map_examples
from vit22b_transfer.data.preprocessors import ReadingOptions, load_images
from vit22b_transfer.data.records import Tally, printable


def label_features() -> dict[str, Feature]:
    """The output features of every classification task."""
    return {
        "images": seqio.ContinuousFeature(dtype=tf.uint8, rank=3),
        "labels": seqio.Feature(ClassIds(), add_eos=False),
    }


def label_preprocessors(options: ReadingOptions | None = None) -> list[Callable]:
    """The preprocessors of a classification task.

    Raises:
      UserError: for an option of texts, of which there are none.
    """
    options = options or ReadingOptions()
    if options.on_long_text != ReadingOptions.on_long_text:
        raise UserError(
            f"on_long_text={options.on_long_text!r} has no effect: a classification "
            "task has no texts, and too many labels are always an error. Leave it out."
        )
    return [
        functools.partial(load_images, options=options, tally=Tally()),
        keep_labels,
    ]


def keep_labels(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, Any] | None = None
) -> tf.data.Dataset:
    """Gives `labels`, empty where the image is bad, and what evaluation needs of them.

    An example without labels has empty ones. More of them than the feature length are
    an error that names the image: SeqIO would cut them off in silence.
    A source that gives no labels has no `label_ids` either, and says that its examples
    are not such that lack theirs (`without_labels`: False).
    """
    has_labels = "labels" in feature_specs(dataset)
    limit = (sequence_length or {}).get("labels")

    def refuse(labels, image_id):
        name = printable(image_id.decode(errors="backslashreplace"))[:200]
        raise UserError(
            f"image {name!r} has {len(labels)} labels, the feature length is "
            f"{limit}. Raise the feature length of labels."
        )

    def keep(example):
        labels = tf.cast(example.get("labels", tf.zeros([0], tf.int32)), tf.int32)
        image_id = _as_string(example.get("image_id", tf.constant("")))
        if limit is not None:
            labels = tf.cond(
                tf.size(labels) > limit,
                lambda: tf.numpy_function(refuse, [labels, image_id], tf.int32),
                lambda: labels,
            )
        labels = tf.ensure_shape(labels, [None])
        bad = tf.not_equal(example["image_error"], "")
        kept = {
            "images": example["images"],
            "labels": labels[: tf.where(bad, 0, tf.int32.max)],
            "image_id": image_id,
            "image_error": example["image_error"],
        }
        if not has_labels:
            return kept | {"without_labels": tf.constant(False)}
        names = example.get("references", tf.zeros([0], tf.string))
        return kept | {"label_ids": labels, "label_names": names}

    return map_examples(dataset, keep)


def without_border(dataset: tf.data.Dataset, *, pixels: int) -> tf.data.Dataset:
    """Cuts so many pixels off each side of the files `image_path`, at their own size.

    For ObjectNet, whose pictures have a frame of 2 red pixels. It stands before all
    other steps (`before` of tasks/classification.py). A file that cannot be read, or
    has nothing within the frame, stays as it is: `load_images` says what is wrong.
    """

    def cut(path):
        try:
            with open(path, "rb") as file:
                data = file.read()
            image = images.decode(data)
        except OSError as error:
            logging.getLogger(__name__).warning("%s: %s", path, error.strerror)
            return b""
        except UserError:
            return data
        if min(image.shape[:2]) <= 2 * pixels:
            return data
        inner = image[pixels:-pixels, pixels:-pixels]
        # Not compressed: a PNG of a large picture takes a second.
        written = io.BytesIO()
        PIL.Image.fromarray(inner).save(written, "BMP")
        return written.getvalue()

    def map_example(example):
        example = dict(example)
        path = example.pop("image_path")
        image = tf.numpy_function(cut, [path], tf.string, stateful=False)
        return {**example, "image": tf.ensure_shape(image, [])}

    return map_examples(dataset, map_example)


def rekey_tfds(
    dataset: tf.data.Dataset, *, image: str, label: str, id_feature: str | None
) -> tf.data.Dataset:
    """The features `image`, `labels` and `image_id` of a TFDS data set.

    label: of one id or of several; -1, which stands for none in test splits, is none.
    id_feature: what names an example; None for TFDS's own `tfds_id` or, without one,
      its place in the split.

    Raises:
      UserError: if the data set has no such feature.
    """
    specs = feature_specs(dataset)
    for name in filter(None, (image, label, id_feature)):
        if name not in specs:
            raise UserError(
                f"the data set has no feature {name!r}; it has "
                f"{', '.join(sorted(specs))}."
            )
    named = id_feature or ("tfds_id" if "tfds_id" in specs else None)

    def rekey(number, example):
        labels = tf.reshape(tf.cast(example[label], tf.int32), [-1])
        own = number if named is None else example[named]
        return {
            "image": example[image],
            "labels": tf.boolean_mask(labels, labels != -1),
            "image_id": _as_string(own),
        }

    rekey = tf.autograph.experimental.do_not_convert(rekey)
    return dataset.enumerate().map(rekey, num_parallel_calls=tf.data.AUTOTUNE)


def labels_and_classes(
    predicted: Any,
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
) -> int | list[int]:
    """The example's label ids for a target, the predicted class otherwise.

    The `postprocess_fn` of every classification task; `example` holds numpy values.

    Raises:
      UserError: if the example has no labels, or one of these is no id.
    """
    if not is_target:
        return _as_id(predicted)
    if example is None or np.ndim(example.get("label_ids", 0)) != 1:
        raise UserError("the labels of a target are in its example; got none.")
    return [_as_id(label) for label in example["label_ids"]]


def _as_id(value):
    array = np.asarray(value)
    if array.ndim or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{printable(str(value))[:60]} is no class id (an integer).")
    return int(array)


def _as_string(value):
    return value if value.dtype == tf.string else tf.strings.as_string(value)
