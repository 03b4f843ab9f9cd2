"""Metrics of classification: hits among the best classes, mean average precision.

Metric functions have SeqIO's form `f(targets, predictions, aux_values) -> {name:
value}`: `targets` holds the label ids of each image, `predictions` the best class,
`aux_values` what `ClassificationModel.predict_batch_with_aux` tells, a row per image.
Images without labels cannot be scored, and are counted in `unlabelled`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vit22b_transfer import UserError
from vit22b_transfer.evaluation.example_numbers import ExampleNumbers, mean_of
from vit22b_transfer.models.classifier import TOP


def single_label(
    targets: Sequence[Sequence[int]],
    predictions: Sequence[int],
    aux_values: Mapping[str, Any],
) -> dict[str, float]:
    """`accuracy` and `accuracy_top_5` in [0, 1]: a label is the best class, or near."""
    return {**_hits(targets, predictions, aux_values), **_unlabelled(targets)}


def multi_label(
    targets: Sequence[Sequence[int]],
    predictions: Sequence[int],
    aux_values: Mapping[str, Any],
) -> dict[str, float]:
    """As `single_label`, and `mean_average_precision` in [0, 1].

    That is the mean over all classes that an image has; how many these are is told.

    Raises:
      UserError: if the model does not tell the scores of all classes.
    """
    if "all_scores" not in aux_values:
        raise UserError(
            "mean average precision needs the scores of all classes, but the "
            f"predictions have {', '.join(sorted(aux_values))} alone. Set "
            "ClassificationModel.all_scores = True and predict again, or take the "
            "metric single_label."
        )
    kept = [n for n, labels in enumerate(targets) if len(labels)]
    scores = np.asarray(aux_values["all_scores"])
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating):
        raise UserError(
            "the predictions' `all_scores` are not as many numbers for every image."
        )
    scores = scores.astype(np.float64)[kept]
    relevant = np.zeros(scores.shape, bool)
    for row, number in enumerate(kept):
        labels = np.asarray(targets[number], int)
        if labels.min() < 0 or labels.max() >= scores.shape[1]:
            raise UserError(
                f"image {number} has the label ids {labels.tolist()[:8]}, but there "
                f"are scores of {scores.shape[1]} classes."
            )
        relevant[row, labels] = True
    precisions = average_precisions(scores, relevant)
    present = ~np.isnan(precisions)
    return {
        **_hits(targets, predictions, aux_values),
        "mean_average_precision": float(np.mean(precisions[present])),
        "classes_with_images": float(np.sum(present)),
        **_unlabelled(targets),
    }


def average_precisions(
    scores: Float[np.ndarray, "images classes"],
    relevant: Bool[np.ndarray, "images classes"],
) -> Float[np.ndarray, " classes"]:
    """Average precision of each class, NaN for one that no image has.

    The sum over thresholds of (recall - recall before) * precision, without any
    interpolation; equal scores are one threshold, so that the order of images does not
    matter. It is scikit-learn's `average_precision_score`.

    scores: higher is more likely; finite.
    """
    if scores.shape != relevant.shape:
        raise UserError(
            f"scores have the shape {scores.shape}, labels {relevant.shape}; they must "
            "be equal."
        )
    if not np.all(np.isfinite(scores)):
        raise UserError("a score is not finite, so that nothing can be ranked by it.")
    result = np.full(scores.shape[1], np.nan)
    for number in range(scores.shape[1]):
        total = np.sum(relevant[:, number])
        if not total:
            continue
        order = np.argsort(-scores[:, number], kind="stable")
        ranked = scores[order, number]
        # The last image of each threshold: all with that score are taken.
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        found = np.cumsum(relevant[order, number])[ends]
        recall = found / total
        result[number] = np.sum(np.diff(recall, prepend=0.0) * found / (ends + 1))
    return result


def hit_numbers(
    targets: Sequence[Sequence[int]],
    predictions: Sequence[int],
    aux_values: Mapping[str, Any],
) -> dict[str, ExampleNumbers]:
    """The hits of each image behind `accuracy` and `accuracy_top_5`.

    Raises:
      UserError: without classes in the predictions, or a label of any image.
    """
    top = np.asarray(aux_values.get("top_classes", ()))
    if top.ndim != 2 or not np.issubdtype(top.dtype, np.integer):
        raise UserError(
            "the predictions have no `top_classes`, class ids of which there are as "
            "many for every image; they are not those of a ClassificationModel."
        )
    if not any(map(len, targets)):
        raise UserError(
            "no image has a label, so that there is nothing to score against. Choose a "
            "split with labels."
        )
    first, among = [], []
    for labels, predicted, row in zip(targets, predictions, top.tolist(), strict=True):
        unlabelled = not len(labels)
        first.append(np.nan if unlabelled else float(int(predicted) in labels))
        hit = float(not set(row).isdisjoint(labels))
        among.append(np.nan if unlabelled else hit)
    numbers = {"accuracy": mean_of(first)}
    if len(set(top[0].tolist())) == TOP:  # of fewer classes all are among them
        numbers["accuracy_top_5"] = mean_of(among)
    return numbers


def _hits(targets, predictions, aux_values):
    numbers = hit_numbers(targets, predictions, aux_values)
    return {name: metric.value() for name, metric in numbers.items()}


def _unlabelled(targets):
    missing = sum(not len(labels) for labels in targets)
    return {"unlabelled": float(missing)} if missing else {}
