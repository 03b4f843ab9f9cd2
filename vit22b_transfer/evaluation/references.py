"""What every metric of texts accepts and returns.

Metric functions are given a list of references for each example, and a prediction each.
Nothing is left out or made up, so they raise:
  UserError: if there are no examples, not as many predictions as targets, or an
    example without references, which includes blank ones only.
  UserError: if a text is not a string, or an example's references are not a list.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vit22b_transfer import UserError
from vit22b_transfer.data.records import quoted


class Scored(NamedTuple):
    """The mean score, and the score of each example in order."""

    mean: float
    scores: list[float]


def checked_references(targets: Sequence[Iterable[str]]) -> list[list[str]]:
    """The references of each example as lists; raises as above."""
    if not len(targets):
        raise UserError("there are no examples to score.")
    checked = []
    for index, references in enumerate(targets):
        if isinstance(references, str | bytes):
            raise UserError(
                f"targets[{index}] is a single text, {quoted(str(references))}; put "
                "the references of each example into a list, even if it is one."
            )
        references = list(references)
        for reference in references:
            _check_text(reference, f"a reference of example {index}")
        if not any(reference.strip() for reference in references):
            what = "only blank" if references else "no"
            raise UserError(
                f"example {index} has {what} references; leave it out of the "
                "evaluation, or add its references."
            )
        checked.append(references)
    return checked


def checked_predictions(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> None:
    """Raises, as above, if the predictions do not fit the targets."""
    if len(targets) != len(predictions):
        raise UserError(
            f"{len(targets)} targets but {len(predictions)} predictions; they must be "
            "of the same examples, in the same order."
        )
    for index, prediction in enumerate(predictions):
        _check_text(prediction, f"prediction {index}")


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise UserError(
            f"{what} is {quoted(str(value))} of type {type(value).__name__}; it must "
            "be a str."
        )
