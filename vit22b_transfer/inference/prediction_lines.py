"""What a line of predictions says of an example, and reading it back."""

import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vit22b_transfer import NotFiniteError

# Features of an example that have a place of their own in a line: before the prediction
# and after it.
_BEFORE = {
    "image_id": "image_id",
    "question_id": "question_id",
    "inputs_pretokenized": "prompt",
}
_AFTER = {"targets_pretokenized": "target", "references": "references"}
ERROR_FEATURE = "image_error"
# Features of an example that lines of T5X get beside what T5X writes.
IN_LINES_OF_T5X = {"image_id", ERROR_FEATURE}
# What a line leaves out where there is none: of captions the question, of new images
# what could be scored against, of images without labels those. A target may be
# empty beside references.
_NO_QUESTION: dict[str, Any] = {"question_id": ""}
_NO_TARGET: dict[str, Any] = {"targets_pretokenized": "", "references": []}
_NO_LABELS: dict[str, Any] = {"label_ids": [], "label_names": []}


def of_batch(
    examples: list[dict[str, Any]],
    first_index: int,
    first_row: int,
    outputs: tuple[Any, Any],
    model: Any,
) -> Iterator[dict[str, Any]]:
    """The JSON objects of one host's examples in a batch."""
    for index, row, example in zip(
        itertools.count(first_index), itertools.count(first_row), examples, strict=False
    ):
        example = _without_empty(example)
        line = {"index": index} | _renamed(example, _BEFORE)
        predicted = model.prediction_record(
            *jax.tree.map(operator.itemgetter(row), outputs)
        )
        error = example.get(ERROR_FEATURE)
        if error:
            predicted = {}
        elif not all(
            np.isfinite(x).all() for x in jax.tree.leaves(_numbers(predicted))
        ):
            raise NotFiniteError(
                f"example {index} (image {line.get('image_id')!r}) got the score "
                f"{predicted['score']}: the model overflows, or its parameters are not "
                "finite."
            )
        line |= {name: _as_json(value) for name, value in predicted.items()}
        line |= _renamed(example, _AFTER)
        named = {*_BEFORE, *_AFTER, ERROR_FEATURE}
        metadata = {name: example[name] for name in example if name not in named}
        yield (
            line
            | ({"metadata": metadata} if metadata else {})
            | ({"error": error} if error else {})
        )


def of_t5x(line: Mapping[str, Any], example: Mapping[str, Any]) -> dict[str, Any]:
    """A line of T5X with its example's `image_id`, and `error` if there is one.

    line: `inputs`, and what the model says of them: not in a line with an error.
    example: those of `IN_LINES_OF_T5X` that there are, as bytes or numbers.
    """
    told = {name: _text_or_number(value) for name, value in example.items()}
    error = told.pop(ERROR_FEATURE, "")
    said = {name: value for name, value in line.items() if name != "inputs"}
    inputs = {n: v for n, v in line["inputs"].items() if n != ERROR_FEATURE}
    said = {} if error else said
    return told | {"inputs": inputs} | said | ({"error": error} if error else {})


def _text_or_number(value):
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value.item()


def _numbers(record):
    return [value for value in record.values() if not isinstance(value, str)]


def _as_json(value: Any) -> Any:
    """Arrays as lists; digits enough for float32 and no more."""
    if isinstance(value, np.ndarray) and value.ndim:
        return [_as_json(item) for item in value]
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    if isinstance(value, np.floating | np.ndarray):
        return float(str(value))
    if isinstance(value, Mapping):
        return {name: _as_json(item) for name, item in value.items()}
    return value


def example_features(line: Mapping[str, Any]) -> dict[str, Any]:
    """The task's features of the example that a line was written for.

    What a line leaves out where there is none is there, and empty.
    """
    example = dict(line.get("metadata", {})) | _NO_QUESTION
    if isinstance(line.get("prediction"), int):  # a class
        example = _NO_LABELS | example
    if not line.keys() & set(_AFTER.values()):
        example |= _NO_TARGET
    for feature, name in (_BEFORE | _AFTER).items():
        if name in line:
            example[feature] = line[name]
    return example


def example_aux(line: Mapping[str, Any]) -> dict[str, Any]:
    """What the model says of a prediction beside it: `scores` and its own fields."""
    known = {"index", "prediction", "score", "metadata", "error"}
    known |= {*_BEFORE.values(), *_AFTER.values()}
    others = {name: value for name, value in line.items() if name not in known}
    return {"scores": line["score"]} | others


def _without_empty(example):
    empty = [
        nothing
        for nothing in (_NO_QUESTION, _NO_TARGET, _NO_LABELS)
        if all(example.get(name, value) == value for name, value in nothing.items())
    ]
    names = set().union(*empty)
    return {name: value for name, value in example.items() if name not in names}


def _renamed(example, names):
    return {
        name: example[feature] for feature, name in names.items() if feature in example
    }
