"""SeqIO preprocessors for image and text, each a 1:1 map, and the postprocessor.

From a source's example to the features of a task:

    image_path or image, question, target, references, image_id, question_id
      -> load_images -> format_text -> encode_text ->
    images uint8 [H, W, 3], inputs and targets int32 [length] ending in EOS, and for
    evaluation inputs_pretokenized, targets_pretokenized, references, image_id,
    question_id, image_error

No example is ever dropped: a bad one under the policy 'skip' becomes a zero image with
empty targets, so that it weighs nothing and keeps its place.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from seqio.utils import Feature
from seqio.vocabularies import Vocabulary

from vit22b_transfer import UserError
from vit22b_transfer.data import augmentation, chunks, image_lengths
from vit22b_transfer.data.converters import feature_specs, map_examples
from vit22b_transfer.data.image_reading import FORMS, ImageReader, shown
from vit22b_transfer.data.images import RESIZE_METHODS
from vit22b_transfer.data.records import (
    Tally,
    check_choice,
)
from vit22b_transfer.models.preparation import OWN, Preparation

BAD_IMAGE_POLICIES = ("error", "skip")
LONG_TEXT_POLICIES = ("error", "truncate")
QUESTION_FIELD = "{question}"

_METADATA = ("image_id", "question_id", "question", "target")


@dataclasses.dataclass(frozen=True)
class ReadingOptions:
    """How the examples of a task are read.

    Attributes:
      image_size: side, or (height, width); None takes the feature length `images`.
      resize_method: the filter of resizing, such as 'bicubic'; None, the default, takes
        what the run's tower was trained with, and 'bilinear' where nothing says it.
        A run that asks for another filter is an error.
      on_bad_image: 'error' stops and names the image; 'skip' leaves its slot empty,
        and counts it (`batches.BatchCounters`).
      on_long_text: 'error' stops; 'truncate' cuts to the run's feature length (EOS is
        kept), warns at the first one, and counts.
    """

    image_size: int | tuple[int, int] | None = None
    resize_method: str | None = None
    on_bad_image: str = "error"
    on_long_text: str = "truncate"

    def __post_init__(self):
        if self.resize_method is not None:
            check_choice("resize_method", self.resize_method, list(RESIZE_METHODS))
        check_choice("on_bad_image", self.on_bad_image, BAD_IMAGE_POLICIES)
        check_choice("on_long_text", self.on_long_text, LONG_TEXT_POLICIES)
        if self.image_size is not None and min(_height_width(self.image_size)) < 1:
            raise UserError(f"image_size is {self.image_size}; it must be positive.")


def image_text_features(
    vocabulary: Vocabulary, *, several_images: bool = False
) -> dict[str, Feature]:
    """The output features of every image-text task.

    several_images: each example has a number of images, on an axis of their own.
    """
    rank = 4 if several_images else 3
    return {
        "images": seqio.ContinuousFeature(dtype=tf.uint8, rank=rank),
        "inputs": seqio.Feature(vocabulary, add_eos=True),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }


def shuffle_buffer_size(source: seqio.DataSource) -> int | None:
    """The buffer to shuffle examples in; None where the source shuffles its records.

    A buffer holds decoded images: 1000 of 224 pixels a side are 150 MB.
    """
    return None if source.performs_internal_shuffling else seqio.SHUFFLE_BUFFER_SIZE


def image_text_preprocessors(
    prompt: str, options: ReadingOptions | None = None
) -> list[Callable]:
    """The preprocessors of an image-text task.

    `prompt` is the text before the answer, in which "{question}", if it occurs, stands
    for the example's question.
    """
    options = options or ReadingOptions()
    check_prompt(prompt)
    tally = Tally()
    return [
        functools.partial(load_images, options=options, tally=tally),
        functools.partial(format_text, prompt=prompt),
        functools.partial(encode_text, on_long_text=options.on_long_text, tally=tally),
    ]


def check_prompt(prompt: str) -> None:
    """Raises UserError if a prompt has another place than that of one question."""
    if prompt.replace(QUESTION_FIELD, "", 1).count("{") or prompt.count("}") > 1:
        raise UserError(
            f"prompt {prompt!r} may contain {QUESTION_FIELD} once and no other braces."
        )


def _height_width(size) -> tuple[int, int]:
    if isinstance(size, int | np.integer):
        return int(size), int(size)
    if len(size) not in (2, 3) or (len(size) == 3 and size[2] != 3):
        raise UserError(f"image size {size} is neither a side nor (height, width).")
    return int(size[0]), int(size[1])


def _target_size(options, sequence_length) -> tuple[int, int]:
    """The size to resize to; UserError if the task and the run disagree."""
    asked = (sequence_length or {}).get("images")
    if options.image_size is None:
        if asked is None:
            raise UserError(
                "the size of the images is open: give the feature length 'images' (for "
                "example {'images': 224}) or register the task with an image_size."
            )
        return _height_width(asked)
    size = _height_width(options.image_size)
    # Otherwise SeqIO would silently cut off rows, or pad with black ones.
    agrees = asked is None or (
        asked == size[0] if isinstance(asked, int) else _height_width(asked) == size
    )
    if not agrees:
        raise UserError(
            f"the task makes images of {size[0]}x{size[1]} (height x width), but the "
            f"feature length 'images' is {asked}; make them equal."
        )
    return size


def _preparation(options, sequence_length) -> Preparation:
    """How images are made; UserError if the task and the run disagree."""
    run = image_lengths.preparation_of((sequence_length or {}).get("images"))
    task = options.resize_method
    if run is None:
        return Preparation(filter=task or "bilinear")
    if task is not None and task != run.filter:
        raise UserError(
            f"the task resizes images with resize_method {task!r}, but the tower of "
            f"the run was trained on images that are {run}. Register the task without "
            "resize_method, and it takes the tower's."
        )
    return run


@augmentation.augments
def load_images(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, Any] | None = None,
    *,
    options: ReadingOptions,
    tally: Tally,
) -> tf.data.Dataset:
    """Replaces `image` (encoded bytes or uint8 pixels) or `image_path` by `images`.

    An empty path is no image, and gives zeros.
    `image_paths`, the files of an example with several images, become `images` of rank
    4; how many there must be is the first size in the feature length `images`. Where
    that carries an `augmentation.Augmentation`, they are drawn by it.
    Adds `image_error`: why an image could not be read, "" if all could; a source that
    knows it of some gives `image_problem`, "" of the others.
    """
    several = "image_paths" in feature_specs(dataset)
    count, sequence_length = _number_of_images(sequence_length, several)
    height, width = _target_size(options, sequence_length)
    shape = (*([count] if several else []), height, width, 3)
    how = _preparation(options, sequence_length)
    drawn = image_lengths.augmentation_of((sequence_length or {}).get("images"))
    varied = how.fit in OWN  # in size
    if varied and (drawn or several):
        raise UserError(
            f"images of their own shapes (fit={how.fit!r}) come one to an example and "
            "without augmentation (runs/augment.gin); take fit='squash' with those."
        )
    if drawn:
        if how.jpegs == "scaled":
            raise UserError(
                "augmentation (runs/augment.gin) cuts crops from whole images, which "
                "rules out JPEGs decoded at a scale; leave out runs/scaled_jpegs.gin."
            )
        dataset = augmentation.with_keys(dataset)

    specs = feature_specs(dataset)
    given = [name for name in FORMS if name in specs]
    if len(given) != 1:
        raise UserError(
            "an example needs either 'image_path' ('image_paths' for several) or "
            "'image' (encoded bytes or uint8 pixels); its features are "
            f"{sorted(specs)}."
        )
    form = given[0]
    made = None if drawn else (height, width)
    fixed = made if made and not varied else (None, None)
    reader = ImageReader(form, count, made, how, options.on_bad_image, tally)
    numbered = [f"image {number}" for number in range(count)]

    def load(examples):
        examples = dict(examples)
        values = examples.pop(form)
        missing = tf.fill(tf.shape(values)[:1], "")
        image_ids = _as_string(examples.get("image_id", missing))
        problems = examples.pop("image_problem", missing)
        types = [tf.uint8] * count + [tf.string] * 2
        *images, errors, stops = tf.numpy_function(
            reader.read, [values, image_ids, problems], types, stateful=False
        )
        for one in images:
            one.set_shape((None, *fixed, 3))
        for text in (errors, stops):
            text.set_shape([None])
        examples |= dict(zip(numbered, images, strict=True))
        return {**examples, "image_error": errors, "image_stop": stops}

    def stop(message):
        raise UserError(message.decode())

    def finish(example):
        example = dict(example)
        images = [example.pop(name) for name in numbered]
        message, read_error = example.pop("image_stop"), example.pop("image_error")
        # Not before its turn: the examples before it are good.
        error = tf.cond(
            tf.equal(message, ""),
            lambda: read_error,
            lambda: tf.numpy_function(stop, [message], tf.string, stateful=False),
        )
        example["image_error"] = tf.ensure_shape(error, [])
        if drawn:
            key = example[augmentation.EXAMPLE_KEY]
            images = [drawn.draw(image, key, (height, width), how) for image in images]
        images = tf.stack(images) if several else images[0]
        return {
            **example,
            "images": tf.ensure_shape(images, (None, None, 3) if varied else shape),
        }

    # Images that have their own size cannot be stacked.
    size = 1
    if specs[form].shape.rank == 0 and not (drawn or varied):
        size = chunks.size_for(height * width * 3)
    needs = (form, "image_id", "image_problem")
    return chunks.map_in_chunks(dataset, load, finish, size, needs=needs)


def _number_of_images(sequence_length, several):
    """How many images an example has, and the feature lengths of one of them."""
    asked = (sequence_length or {}).get("images")
    if not several:
        return 1, sequence_length
    if not isinstance(asked, Sequence) or len(asked) not in (3, 4):
        raise UserError(
            "with several images per example the feature length 'images' must be "
            f"(number, height, width), got {asked!r}."
        )
    one = image_lengths.of_one_image(asked)
    return asked[0], {**(sequence_length or {}), "images": one}


def _as_string(value):
    return value if value.dtype == tf.string else tf.strings.as_string(value)


def format_text(dataset: tf.data.Dataset, *, prompt: str) -> tf.data.Dataset:
    """Makes the texts `inputs` and `targets` and fills in missing metadata.

    Without `references` the only reference is `target`; a missing id or text is "".
    """
    before, field, after = prompt.partition(QUESTION_FIELD)

    def form(example):
        example = dict(example)
        for name in _METADATA:
            example[name] = _as_string(example.get(name, tf.constant("")))
        target, question = example.pop("target"), example.pop("question")
        example.setdefault("references", tf.reshape(target, [1]))
        inputs = tf.strings.join([before, question, after]) if field else before
        example["inputs"] = tf.convert_to_tensor(inputs)
        example["targets"] = target
        example["inputs_pretokenized"] = example["inputs"]
        example["targets_pretokenized"] = target
        return example

    return map_examples(dataset, form)


def encode_text(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, Feature],
    sequence_length: Mapping[str, Any] | None = None,
    *,
    on_long_text: str,
    tally: Tally,
) -> tf.data.Dataset:
    """Replaces the texts `inputs` and `targets` by token ids ending in EOS.

    Never encodes `images`. The targets of an example with an `image_error` are empty.
    Adds `truncated_inputs` and `truncated_targets`: whether tokens were cut off.
    """

    def note(name, length, limit, image_id, text):
        what = (
            f"{name.decode()} of image {shown(image_id)} have {length} tokens with "
            f"EOS, the feature length is {limit}: {shown(text)}"
        )
        if on_long_text == "error":
            raise UserError(
                f"{what}. Raise the feature length, or register the task with "
                "on_long_text='truncate'."
            )
        if tally.add(f"truncated {name.decode()}", what):
            logging.getLogger(__name__).warning(
                "truncated %s (later ones are only counted)", what
            )
        return np.int32(limit)

    def encode_one(example, name):
        feature = output_features[name]
        limit = (sequence_length or {}).get(name)
        tokens = tf.cast(feature.vocabulary.encode_tf(example[name]), tf.int32)
        end_id = feature.vocabulary.eos_id
        end = [end_id] if feature.add_eos and end_id is not None else []
        too_long = tf.constant(False)
        if limit is not None:
            length = tf.size(tokens) + len(end)
            arguments = [name, length, limit, example["image_id"], example[name]]
            too_long = length > limit
            keep = tf.cond(
                too_long,
                lambda: tf.numpy_function(note, arguments, tf.int32, stateful=False),
                lambda: tf.constant(limit),
            )
            tokens = tokens[: keep - len(end)]
        return tf.concat([tokens, tf.constant(end, tf.int32)], axis=0), too_long

    def encode(example):
        encoded = {}
        for name in ("inputs", "targets"):
            encoded[name], encoded[f"truncated_{name}"] = encode_one(example, name)
        readable = tf.equal(example["image_error"], "")
        encoded["targets"] = encoded["targets"][: tf.where(readable, tf.int32.max, 0)]
        encoded["truncated_targets"] &= readable
        return {**example, **encoded}

    return map_examples(dataset, encode)


def references_and_predictions(
    decoded_model_output: Any,
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
) -> str | list[str]:
    """The example's references as strings for a target, the stripped text otherwise.

    The `postprocess_fn` of every image-text task; `example` holds numpy values.
    """
    if is_target:
        if example is None or np.ndim(example.get("references", "")) != 1:
            raise UserError("the references of a target are in its example; got none.")
        return [_text(reference) for reference in example["references"]]
    return _text(decoded_model_output).strip()


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
