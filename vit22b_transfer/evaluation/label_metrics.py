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


def _hits(targets, predictions, aux_values):
    top = np.asarray(aux_values.get("top_classes", ()))
    if top.ndim != 2 or not np.issubdtype(top.dtype, np.integer):
        raise UserError(
            "the predictions have no `top_classes`, class ids of which there are as "
            "many for every image; they are not those of a ClassificationModel."
        )
    best = [set(row) for row in top.tolist()]
    rows = list(zip(targets, predictions, best, strict=True))
    rows = [row for row in rows if len(row[0])]
    if not rows:
        raise UserError(
            "no image has a label, so that there is nothing to score against. Choose a "
            "split with labels."
        )
    first = np.mean([int(predicted) in labels for labels, predicted, _ in rows])
    hits = {"accuracy": float(first)}
    if len(rows[0][2]) == TOP:  # of fewer classes all are among them
        among = np.mean([bool(top.intersection(labels)) for labels, _, top in rows])
        hits["accuracy_top_5"] = float(among)
    return hits


def _unlabelled(targets):
    missing = sum(not len(labels) for labels in targets)
    return {"unlabelled": float(missing)} if missing else {}
