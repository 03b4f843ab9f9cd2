"""Probabilities of classes as the trust measures take them: checked, in float64.

Nothing is mended: probabilities that do not sum to 1 are an error, not renormalised.
"""

from typing import NamedTuple

import numpy as np
import scipy.special
from jaxtyping import Bool, Float, Int, Num

from vit22b_transfer import UserError

# How far the sum of a row may be from 1. Softmax in float32 keeps within 1e-5 of it;
# one in bfloat16 does not, and its confidences are worth little.
_SUM_TOLERANCE = 1e-3


class Answers(NamedTuple):
    """The best class of each example: how sure it is of it, and whether it is right."""

    confidence: Float[np.ndarray, " examples"]
    correct: Bool[np.ndarray, " examples"]


def checked(
    probabilities: Float[np.ndarray, "examples classes"],
) -> Float[np.ndarray, "examples classes"]:
    """The probabilities in float64, as they are.

    Raises:
      UserError: if there is no example or class, or a row is no distribution: a value
        is not finite or outside [0, 1], or the sum is not 1 within 1e-3.
    """
    if not probabilities.size:
        raise UserError(
            f"probabilities of shape {probabilities.shape} hold no example; choose a "
            "split with examples."
        )
    result = np.asarray(probabilities, np.float64)
    good = np.all((result >= 0) & (result <= 1 + _SUM_TOLERANCE), axis=1)
    good &= np.abs(result.sum(axis=1) - 1) <= _SUM_TOLERANCE
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(
            f"{np.sum(~good)} of {len(good)} rows are no probabilities of classes: "
            f"row {row} runs from {result[row].min():.6g} to {result[row].max():.6g} "
            f"and sums to {result[row].sum():.6g}. Take the softmax of the logits in "
            "float32."
        )
    return result


def checked_labels(
    labels: Int[np.ndarray, " examples"], examples: int, classes: int
) -> Int[np.ndarray, " examples"]:
    """The labels as they are: one per example, from 0 to `classes` - 1.

    Raises:
      UserError: if they are more or fewer, or one is outside.
    """
    if len(labels) != examples:
        raise UserError(
            f"{examples} predictions have {len(labels)} labels; give each one."
        )
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        first = int(np.argmax(outside))
        raise UserError(
            f"{np.sum(outside)} of {examples} labels are no class: example {first} has "
            f"{labels[first]}, but classes are 0 to {classes - 1}. Leave out examples "
            "without a label, and count them."
        )
    return labels


def checked_scores(
    scores: Num[np.ndarray, "..."], what: str
) -> Float[np.ndarray, "..."]:
    """Numbers in float64; `what` they are stands in the error.

    Raises:
      UserError: if there is none, or one is not finite.
    """
    if not scores.size:
        raise UserError(f"there are no {what}; choose a split with examples.")
    result = np.asarray(scores, np.float64)
    if bad := int(np.sum(~np.isfinite(result))):
        raise UserError(
            f"{bad} of {result.size} {what} are not finite. Look for the example "
            "that the model fails on before measuring."
        )
    return result


def checked_unit(
    values: Num[np.ndarray, " examples"], what: str
) -> Float[np.ndarray, " examples"]:
    """Numbers from 0 to 1 in float64; `what` they are stands in the error.

    Raises:
      UserError: as `checked_scores`; or if one is outside, by more than the 1e-6 that a
        sum in float32 may leave above 1.
    """
    result = checked_scores(values, what)
    outside = (result < 0) | (result > 1 + 1e-6)
    if outside.any():
        raise UserError(
            f"{np.sum(outside)} of {len(result)} {what} are outside [0, 1], such as "
            f"{result[outside][0]:.6g}; give probabilities."
        )
    return result


def softmax(
    logits: Float[np.ndarray, "examples classes"],
) -> Float[np.ndarray, "examples classes"]:
    """Probabilities of the classes; UserError if a logit is not finite."""
    return scipy.special.softmax(checked_scores(logits, "logits"), axis=1)


def log_softmax(
    logits: Float[np.ndarray, "examples classes"],
) -> Float[np.ndarray, "examples classes"]:
    """Their natural logarithms, exact where a probability is too small for a number."""
    return scipy.special.log_softmax(checked_scores(logits, "logits"), axis=1)


def entropies(
    probabilities: Float[np.ndarray, "examples classes"],
) -> Float[np.ndarray, " examples"]:
    """Entropy of each example's classes in nats, from 0 to log(classes)."""
    return scipy.special.entr(checked(probabilities)).sum(axis=1)


def answers(
    probabilities: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
) -> Answers:
    """The largest probability of each example, and whether that class is its label.

    Of equally probable classes the first is the answer.
    """
    probabilities = checked(probabilities)
    labels = checked_labels(labels, *probabilities.shape)
    return Answers(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)
