"""How far a kept head's answers can be relied on: calibration, refusal, strangers.

Plex's measures (Tran et al. 2022), as row 26 of the ViT-22B paper's experiments has
them. Each function reads the head's logits of a split, prints numbers with intervals,
and adds them to `measures.jsonl`.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import (
    calibration,
    class_probabilities,
    intervals,
    out_of_distribution,
    selective,
)
from vit22b_transfer.experiments import measure_pictures, measured, variants
from vit22b_transfer.experiments.features import Split
from vit22b_transfer.experiments.judged import Judge, Judged
from vit22b_transfer.host import whole_files
from vit22b_transfer.host.file_errors import told


def calibrated(
    judge: Judge,
    test: Split,
    *,
    labels: str = "same",
    fit_share: float = 0.2,
    bins: int = calibration.BINS,
    resamples: int = 1_000,
) -> list[dict]:
    """Calibration before a temperature and after, and a reliability diagram of both.

    The temperature is fitted on the first `fit_share` of the images (in the split's
    order) and everything is measured on the rest, as `calibration.scaled_metrics`. A
    split whose order is that of its classes would be fitted on some classes alone:
    images are first put in an order drawn by seed 0.

    labels: how the split's classes stand to the head's (`variants.LABELS`); of some of
      them the probabilities are made to sum to 1.

    Where no temperature is best, as of logits that say nothing, numbers behind one are
    not told, and why.

    Raises:
      UserError: as `calibration.metrics`; if class lists do not fit together.
    """
    found = judge.of(test)
    order = np.random.default_rng(0).permutation(len(found.labels))
    logits, ids = variants.own_logits(found, labels)
    logits, ids = logits[order].astype(np.float64), ids[order]
    cut = calibration.fitted_on(len(ids), fit_share)
    scales, notes = {"before": 1.0}, {}
    try:
        scales["after"] = calibration.fitted_temperature(logits[:cut], ids[:cut])
    except UserError as error:  # a head that knows nothing has none
        notes["without_a_temperature"] = told(error)
    findings, diagram, names = [], {}, {}
    for name, scale in scales.items():
        settings = {"temperature": scale if name == "after" else None, "when": name}
        settings = {key: value for key, value in settings.items() if value is not None}
        rest, own = logits[cut:] / scale, ids[cut:]
        probabilities = class_probabilities.softmax(rest)
        confidence, correct = class_probabilities.answers(probabilities, own)
        rows = np.arange(len(own))
        losses = -class_probabilities.log_softmax(rest)[rows, own]
        squares = np.sum(probabilities**2, axis=1) - 2 * probabilities[rows, own] + 1
        errors = intervals.resampled(
            _errors_of(confidence, correct, bins), (len(own),), resamples=resamples
        )
        findings += [
            measured.share("accuracy", correct, settings),
            *(
                measured.resampled(metric, interval, len(own), settings)
                for metric, interval in errors.items()
            ),
            measured.mean("nll", losses, settings),
            measured.mean("brier", squares, settings),
        ]
        diagram[name] = calibration.equal_width_bins(confidence, correct, bins)
        error = calibration.expected_error(diagram[name])
        names[name] = f"ECE {error:.4f}, temperature {scale:.3g}"
    picture = _place(judge, f"reliability-{_stem(found)}.png")
    measure_pictures.reliability_diagram(picture, diagram, names)
    return measured.report(
        "calibration",
        findings,
        protocol={
            "labels": labels,
            "fit_share": fit_share,
            "bins": bins,
            "resamples": resamples,
        },
        facts=judge.facts(test=test) | {"classes": logits.shape[1]},
        notes={
            "fitted_on": cut,
            "measured_on": len(ids) - cut,
            **notes,
            **found.notes,
        },
        output_dir=judge.output_dir,
        pictures=[picture],
    )


def selected(
    judge: Judge,
    test: Split,
    *,
    labels: str = "same",
    fractions: Sequence[float] = selective.ORACLE_FRACTIONS,
    resamples: int = 1_000,
) -> list[dict]:
    """What is gained if the least sure answers are refused, or given by an oracle.

    Accuracy by coverage (a picture) and its area, calibration AUC, and for each of the
    `fractions` that an oracle answers the collaborative accuracy and the collaborative
    AUC of being right by confidence. A number that is not defined, as the calibration
    AUC of a head without errors, is an error.

    labels: as `calibrated`.

    Raises:
      UserError: as the functions of `evaluation.selective`.
    """
    found = judge.of(test)
    logits, ids = variants.own_logits(found, labels)
    probabilities = class_probabilities.softmax(logits)
    confidence, correct = class_probabilities.answers(probabilities, ids)
    areas = selective.CollaborativeAreas.of(confidence, correct)

    def measure(rows):
        sure, right = confidence[rows], correct[rows]
        result = {
            "aurra": selective.area_under_response_rate_accuracy(sure, right),
            "calibration_auc": selective.calibration_auc(sure, right),
        }
        for share in fractions:
            accuracy = selective.collaborative_accuracy(sure, right, share)
            result[f"collaborative_accuracy/{share:g}"] = accuracy
        for share, area in areas(rows, fractions).items():
            result[f"collaborative_auc/{share:g}"] = area
        return result

    told = intervals.resampled(measure, (len(correct),), resamples=resamples)
    findings = [measured.share("accuracy", correct)]
    for name, interval in told.items():
        metric, _, share = name.partition("/")
        settings = {"fraction": float(share)} if share else {}
        findings.append(measured.resampled(metric, interval, len(correct), settings))
    covered = selective.accuracy_by_coverage(confidence, correct)
    places = np.unique(np.linspace(0, len(covered) - 1, 400).astype(int))
    lines = {"head": ((places + 1) / len(covered), covered[places].tolist())}
    picture = _place(judge, f"coverage-{_stem(found)}.png")
    measure_pictures.curve(picture, ("accuracy by coverage", found.what), lines)
    return measured.report(
        "selective",
        findings,
        protocol={
            "labels": labels,
            "fractions": list(fractions),
            "resamples": resamples,
        },
        facts=judge.facts(test=test) | {"classes": logits.shape[1]},
        notes={"images": len(correct), **found.notes},
        output_dir=judge.output_dir,
        pictures=[picture],
    )


def strangers(
    judge: Judge,
    test: Split,
    outside: Split,
    *,
    train: Split | None = None,
    ridge: float = 0.0,
    resamples: int = 1_000,
) -> list[dict]:
    """How well scores tell images of no known class from those of a known one.

    Open-set recognition if `outside` has other classes, detection of what is out of
    distribution if it is another data set; its labels are not read. `auroc`,
    `average_precision` and `fpr95` of the scores `msp`, `entropy`, `max_logit`, and,
    with `train`, of `mahalanobis` and `relative_mahalanobis` on the head's features.

    train: the split that the Gaussians of classes are fitted on, with the head's
      classes; those without an image there have none, and are counted.
    ridge: as `out_of_distribution.fitted_gaussians`.

    Raises:
      UserError: as the functions of `evaluation.out_of_distribution`, such as for a
        covariance that is singular; if the head reads tokens and `train` is given.
    """
    inside, other = judge.of(test), judge.of(outside, labelled=False)
    inside.labels_of_head()  # they are to be of known classes
    scores = {name: [] for name in ("msp", "entropy", "max_logit")}
    for split in (inside, other):
        probabilities = class_probabilities.softmax(split.logits)
        scores["msp"].append(out_of_distribution.improbabilities(probabilities))
        scores["entropy"].append(class_probabilities.entropies(probabilities))
        scores["max_logit"].append(
            out_of_distribution.negative_max_logits(split.logits)
        )
    notes: dict[str, Any] = {}
    if train is not None:
        distances, without = _distances(judge, inside, train, (test, outside), ridge)
        scores |= distances
        notes |= {"classes_without_a_gaussian": without} if without else {}
    counts = (len(inside.logits), len(other.logits))
    findings = []
    for name, (known, strange) in scores.items():

        def measure(first, second, known=known, strange=strange):
            return out_of_distribution.detection(known[first], strange[second])

        told = intervals.resampled(measure, counts, resamples=resamples)
        findings += [
            measured.resampled(metric, interval, sum(counts), {"score": name})
            for metric, interval in told.items()
        ]
    splits = {"test": test, "outside": outside}
    splits |= {} if train is None else {"gaussians_of": train}
    return measured.report(
        "open_set",
        findings,
        protocol={"ridge": ridge, "resamples": resamples},
        facts=judge.facts(**splits) | {"classes": inside.head.classes},
        notes={
            "images": counts[0],
            "images_outside": counts[1],
            **notes,
            **inside.notes,
            **other.notes,
        },
        output_dir=judge.output_dir,
    )


def to_label(
    judge: Judge, pool: Split, *, score: str, count: int, seed: int = 0
) -> list[dict]:
    """Which images of a pool to label next: the `count` that score highest.

    Writes their names, one per line, best first, to `OUTPUT_DIR/to_label-POOL.txt`.
    Told are the mean score of the pool and of what was chosen. No image of the pool is
    taken for labelled; to go on, leave the labelled ones out of it.

    score: `entropy`, `margin`, `msp` or `chance` (by seed).

    Raises:
      UserError: for an unknown score, or a pool of fewer images.
    """
    found = judge.of(pool, labelled=False)
    probabilities = class_probabilities.softmax(found.logits)
    scores = {
        "entropy": lambda: class_probabilities.entropies(probabilities),
        "margin": lambda: selective.small_margins(probabilities),
        "msp": lambda: out_of_distribution.improbabilities(probabilities),
        "chance": lambda: selective.chances(len(found.logits), seed),
    }
    if score not in scores:
        raise UserError(f"score={score!r} is none of {', '.join(scores)}.")
    values = scores[score]()
    rows = selective.chosen(values, count, np.zeros(len(values), bool))
    path = _place(judge, f"to_label-{_stem(found)}.txt")
    with whole_files.replacing(path) as file:
        file.writelines(f"{json.dumps(found.ids[row])}\n" for row in rows)
    findings = [
        measured.mean("mean_score", values, {"of": "pool"}),
        measured.mean("mean_score", values[rows], {"of": "chosen"}),
    ]
    return measured.report(
        "active_learning",
        findings,
        protocol={"score": score, "count": count, "seed": seed},
        facts=judge.facts(pool=pool) | {"classes": found.head.classes, "names": path},
        notes={"images": len(values), **found.notes},
        output_dir=judge.output_dir,
    )


def _errors_of(
    confidence: Float[np.ndarray, " images"],
    correct: Bool[np.ndarray, " images"],
    bins: int,
):
    """The calibration errors of some of the images."""

    def measure(rows):
        sure, right = confidence[rows], correct[rows]
        mass = calibration.equal_mass_bins(sure, right, bins)
        width = calibration.equal_width_bins(sure, right, bins)
        return {
            "ece": calibration.expected_error(width),
            "ece_equal_mass": calibration.expected_error(mass),
            "rms_calibration_error": calibration.root_mean_square_error(mass),
        }

    return measure


def _distances(
    judge: Judge, inside: Judged, train: Split, splits: tuple[Split, Split], ridge
) -> tuple[dict[str, list[Float[np.ndarray, " images"]]], int]:
    """Mahalanobis distances of both splits' features; classes without an image."""
    names = list(inside.head.features)
    if not names:
        raise UserError(
            "Mahalanobis distances are of vectors, but this head reads all tokens. "
            "Take a head of another probe, or leave train out."
        )
    data = judge.source.read(train.task, train.split, names).joined(names)
    seen, labels = np.unique(data.labels, return_inverse=True)
    fitted = out_of_distribution.fitted_gaussians(
        data.features.astype(np.float64), labels, len(seen), ridge=ridge
    )
    found: dict[str, list] = {"mahalanobis": [], "relative_mahalanobis": []}
    for number, split in enumerate(splits):
        part = judge.source.read(split.task, split.split, names, labelled=not number)
        vectors = part.flat(names).astype(np.float64)
        found["mahalanobis"].append(
            out_of_distribution.mahalanobis_distances(vectors, fitted)
        )
        found["relative_mahalanobis"].append(
            out_of_distribution.relative_mahalanobis_distances(vectors, fitted)
        )
    return found, data.num_classes - len(seen)


def _stem(found: Judged) -> str:
    return os.path.basename(found.path).removesuffix(".npz")


def _place(judge: Judge, name: str) -> str:
    folder = whole_files.writable_directory(judge.output_dir, "output directory")
    return os.path.join(folder, name)
