"""The kinds of a question that VQAv2's annotations name: read, and told to metrics."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.data import preprocessors
from vit22b_transfer.data.records import half_character

# Fields of an annotation, features of an example; both may be missing.
KINDS = ("answer_type", "question_type")
# VQAv2's longest has 24 characters.
_LONGEST = 200


class Answers(list[str]):
    """The answers of all annotators to a question, and the kinds that it is of.

    kinds: field of the annotation -> its text, such as {"answer_type": "yes/no"}; those
      alone that the annotation has. A metric that knows of none sees a plain list.
    """

    def __init__(self, answers: Iterable[str], kinds: Mapping[str, str]):
        super().__init__(answers)
        self.kinds = dict(kinds)


def read_kinds(annotation: Mapping[str, Any]) -> dict[str, str]:
    """The kinds that an annotation names; none that is missing, null or blank.

    Raises:
      ValueError: if one is no text, or a text that no file of VQAv2 could hold.
    """
    kinds = {}
    for name in KINDS:
        value = annotation.get(name)
        if value is None:
            continue
        if not isinstance(value, str) or half_character(value):
            raise ValueError(f"{name} is no text")
        if len(value) > _LONGEST:
            raise ValueError(
                f"{name} has {len(value)} characters, {_LONGEST} are the most"
            )
        if value.strip():
            kinds[name] = value.strip()
    return kinds


def answers_and_predictions(
    decoded_model_output: Any,
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
) -> str | list[str]:
    """As `preprocessors.references_and_predictions`; a target is an `Answers`.

    Raises:
      UserError: as there; or if a kind in the example is no text.
    """
    text = preprocessors.references_and_predictions(
        decoded_model_output, example, is_target
    )
    if not is_target or isinstance(text, str):
        return text
    kinds = {}
    for name in KINDS:
        value = (example or {}).get(name, b"")
        if isinstance(value, np.ndarray) and not value.ndim:
            value = value.item()
        if not isinstance(value, str | bytes):
            raise UserError(f"feature {name!r} of an example is no text.")
        if isinstance(value, bytes):
            value = value.decode(errors="backslashreplace")
        if value:
            kinds[name] = value
    return Answers(text, kinds)
