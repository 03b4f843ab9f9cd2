"""Fairness of a linear probe for an attribute: the ViT-22B paper's three figures.

A head is learned on frozen features (logistic regression, strength chosen on a part
that is held out), judged on each subgroup, and debiased at every limit of demographic
parity (`evaluation.fairness`): thresholds are fitted on the validation part, and
everything is measured on the test part.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import (
    calibration,
    class_probabilities,
    fairness,
    intervals,
)
from vit22b_transfer.experiments import (
    attributes,
    labelled,
    measure_pictures,
    measured,
    outcomes,
)
from vit22b_transfer.experiments.features import FeatureSource, Split
from vit22b_transfer.experiments.logistic import LogisticProbe
from vit22b_transfer.host import whole_files

_MOST_GROUPS = 64
_SCORE = "Newcombe's hybrid score, 95 %, over {} images"


def parity(
    probe: LogisticProbe,
    *,
    source: FeatureSource,
    images: Split,
    table: str,
    target: str,
    groups: Sequence[str],
    output_dir: str,
    shares: Sequence[float] = (0.6, 0.2),
    levels: int = fairness.LEVELS,
    bins: int = calibration.BINS,
    resamples: int = 1_000,
    seed: int = 0,
) -> list[dict]:
    """Accuracy of subgroups, their gap and calibration, and accuracy by parity.

    Told of each subgroup: `accuracy`, `ece`, `positive_rate`, all before debiasing, and
    `ece_by_chance`, that of a head with the same confidences and no calibration error:
    in a small group it is far from 0. Of all: `accuracy`, `accuracy_gap` (best less
    worst), `parity_difference`, `parity_ratio`; of each limit of the sweep
    `accuracy_at_limit` and `parity_at_limit`, with the thresholds. A picture has
    accuracy by parity.

    images: an unlabelled split. table: a CSV file as `attributes` reads it; images
      without a row are left out, and counted. target: the attribute that is predicted.
    groups: attributes whose combinations are the subgroups.
    shares: of train and validation, if the table has no column `partition`; by seed.

    Raises:
      UserError: for an unknown attribute; if a subgroup has no image in the validation
        or the test part, naming it; if the target is the same for all.
    """
    told = attributes.read(table)
    columns = [told.known(name) for name in groups]
    if target in columns or not columns or 2 ** len(columns) > _MOST_GROUPS:
        raise UserError(
            f"groups={tuple(groups)} with target={target!r}: name one attribute or "
            "more, up to six, and not the target."
        )
    told.known(target)
    # Before the tower is run on anything; then without what cannot be read.
    if names := source.names(images.task, images.split):
        _members(told, names, target, columns, shares, seed, images.task)
    sets = [tuple(names) for names in probe.features]
    vectors = list(dict.fromkeys(name for names in sets for name in names))
    split = source.read(images.task, images.split, vectors, labelled=False)
    kept, labels, number, names, parts = _members(
        told, split.ids, target, columns, shares, seed, split.what
    )
    train = parts == 0
    head = probe.learned(
        {
            some: labelled.Labelled(
                split.flat(some)[kept[train]],
                labels[train].astype(np.int64),
                2,
                f"{split.what} with {target}",
            )
            for some in sets
        }
    )
    logits = head.logits(split.flat(head.features)[kept], split.what)
    shares_of_yes = class_probabilities.softmax(logits)
    fit, test = parts == 1, parts == 2
    sweep = fairness.parity_sweep(
        (shares_of_yes[fit, 1], number[fit]),
        shares_of_yes[test, 1],
        number[test],
        labels[test],
        levels=levels,
    )
    findings = _findings(
        shares_of_yes[test], labels[test], number[test], names, bins, resamples
    )
    findings += _swept(sweep, shares_of_yes[test, 1], number[test], labels[test], names)
    folder = whole_files.writable_directory(output_dir, "output directory")
    stem = "-".join(("parity", images.task, target, *columns))
    stem = "".join(char if char.isalnum() or char in "-_" else "_" for char in stem)
    picture = os.path.join(folder, f"{stem}.png")
    title = (f"accuracy by parity difference: {target}", f"by {', '.join(columns)}")
    line = (sweep.difference, sweep.accuracy.tolist())
    measure_pictures.curve(picture, title, {"all": line})
    counts: dict[str, Any] = {
        f"images_of_{part}": int(np.sum(parts == n)) for n, part in _PARTS
    }
    sizes = dict(zip(names, np.bincount(number[test]).tolist(), strict=True))
    if small := {name: size for name, size in sizes.items() if size < outcomes.FEW}:
        counts[f"subgroups_of_fewer_than_{outcomes.FEW}_test_images"] = small
    return measured.report(
        "fairness",
        findings,
        protocol=_protocol(probe)
        | {
            "target": target,
            "groups": columns,
            "table": table,
            "partition": "by column" if told.parts is not None else list(shares),
            "levels": levels,
            "bins": bins,
            "ramp": fairness.RAMP,
            "resamples": resamples,
            "seed": seed,
        },
        facts={
            "classes": 2,
            "features": source.facts(),
            "images": {"task": images.task, "split": images.split},
            "head": dict(head.facts["settings"]),
        },
        notes={
            **counts,
            "images_without_a_row": len(split.ids) - len(kept),
            **head.facts["notes"],
            **split.notes,
        },
        output_dir=output_dir,
        pictures=[picture],
    )


_PARTS = tuple(enumerate(attributes.PARTS))


def _protocol(probe: LogisticProbe) -> dict[str, Any]:
    return {
        "probe": "LogisticProbe",
        "features": [list(names) for names in probe.features],
        "strengths": list(probe.strengths),
        "held_out": probe.held_out,
        "max_iterations": probe.max_iterations,
    }


class _Members(NamedTuple):
    """Which images have a row; of these the label, the subgroup, the part.

    names: of all subgroups.
    """

    kept: Int[np.ndarray, " images"]
    labels: Bool[np.ndarray, " images"]
    number: Int[np.ndarray, " images"]
    names: list[str]
    parts: Int[np.ndarray, " images"]


def _members(
    told: attributes.Attributes,
    ids: Sequence[str],
    target: str,
    columns: Sequence[str],
    shares: Sequence[float],
    seed: int,
    what: str,
) -> _Members:
    """What the table says of images; UserError where it says too little."""
    rows = told.rows_of(ids)
    kept = np.flatnonzero(rows >= 0)
    if not len(kept):
        raise UserError(
            f"{told.path} has no row for any of the {len(rows)} images of {what}, "
            f"such as {ids[0][:200]!r}. Names are paths below the folder."
        )
    rows = rows[kept]
    labels = told.of(target, rows)
    number, names = _groups(told, columns, rows)
    parts = (
        attributes.shared_out(len(rows), shares, seed)
        if told.parts is None
        else told.parts[rows]
    )
    _check_parts(parts, number, names, labels, target)
    return _Members(kept, labels, number, names, parts)


def _groups(
    told: attributes.Attributes,
    columns: Sequence[str],
    rows: Int[np.ndarray, " images"],
) -> tuple[Int[np.ndarray, " images"], list[str]]:
    """The number of each image's subgroup, and the names of all subgroups."""
    number = np.zeros(len(rows), np.int64)
    names = [""]
    for column in columns:
        number = 2 * number + told.of(column, rows)
        names = [f"{name} {part}{column}" for name in names for part in ("not ", "")]
    return number, [name.strip() for name in names]


def _check_parts(
    parts: Int[np.ndarray, " images"],
    number: Int[np.ndarray, " images"],
    names: Sequence[str],
    labels: Bool[np.ndarray, " images"],
    target: str,
) -> None:
    """Raises UserError for a missing part, subgroup, or answer to learn."""
    for part, what in _PARTS:
        own = number[parts == part]
        if not len(own):
            raise UserError(f"the part {what} has no image with a row in the table.")
        missing = np.flatnonzero(np.bincount(own, minlength=len(names)) == 0)
        if part and len(missing):
            raise UserError(
                f"the subgroup {names[missing[0]]!r} has no image in the part {what}, "
                "and nothing can be said of it. Take other groups, or more images."
            )
    if len({*labels[parts == 0].tolist()}) < 2:
        raise UserError(
            f"{target} is the same for all images of the part train: there is nothing "
            "to learn."
        )


def _findings(
    shares: Float[np.ndarray, "images 2"],
    labels: Bool[np.ndarray, " images"],
    number: Int[np.ndarray, " images"],
    names: Sequence[str],
    bins: int,
    resamples: int,
) -> list[measured.Finding]:
    """What is measured before debiasing."""
    ids = labels.astype(np.int64)
    confidence, correct = class_probabilities.answers(shares, ids)
    answers = shares[:, 1] > 0.5
    found = [measured.share("accuracy", correct)]
    for group, name in enumerate(names):
        own, settings = number == group, {"subgroup": name}
        found.append(measured.share("accuracy", correct[own], settings))
        found.append(measured.share("positive_rate", answers[own], settings))
        found.append(_error(confidence[own], correct[own], bins, resamples, settings))
        drawn = calibration.chance_errors(confidence[own], bins, resamples)
        span = tuple(np.percentile(drawn, (2.5, 97.5)).tolist())
        kind = f"of {resamples} draws, 95 %"
        chance = float(np.mean(drawn))
        found.append(
            measured.Finding(
                "ece_by_chance", chance, span, kind, settings, int(own.sum())
            )
        )

    counts = np.bincount(number, minlength=len(names))
    for metric, hits in (("accuracy_gap", correct), ("parity_difference", answers)):
        of_group = np.bincount(number, hits, len(names)).astype(np.int64)
        rates = of_group / counts
        span = fairness.gap_interval(of_group, counts)
        kind = _SCORE.format(len(number))
        value = fairness.accuracy_gap(rates)
        found.append(measured.Finding(metric, value, span, kind, count=len(number)))

    def ratio(*rows):
        rates = [
            answers[own][row].mean() for own, row in zip(members, rows, strict=True)
        ]
        return {"parity_ratio": fairness.demographic_parity_ratio(np.array(rates))}

    members = [np.flatnonzero(number == group) for group in range(len(names))]
    if counts.min() > 1:
        told = intervals.resampled(ratio, counts.tolist(), resamples=resamples)
        found.append(
            measured.resampled("parity_ratio", told["parity_ratio"], len(number))
        )
    else:
        value = ratio(*map(np.arange, counts))["parity_ratio"]
        found.append(measured.Finding("parity_ratio", value, count=len(number)))
    return found


def _error(confidence, correct, bins, resamples, settings) -> measured.Finding:
    """The calibration error of a slice, with an interval if it has two images."""

    def measure(rows):
        found = calibration.equal_width_bins(confidence[rows], correct[rows], bins)
        return {"ece": calibration.expected_error(found)}

    if len(correct) < 2:
        whole = measure(np.arange(len(correct)))["ece"]
        return measured.Finding("ece", whole, settings=settings, count=len(correct))
    told = intervals.resampled(measure, (len(correct),), resamples=resamples)
    return measured.resampled("ece", told["ece"], len(correct), settings)


def _swept(
    sweep: fairness.Sweep,
    shares: Float[np.ndarray, " images"],
    number: Int[np.ndarray, " images"],
    labels: Bool[np.ndarray, " images"],
    names: Sequence[str],
) -> list[measured.Finding]:
    """Accuracy and parity at each limit."""
    found = []
    for limit, thresholds, difference in zip(
        sweep.limits.tolist(), sweep.thresholds, sweep.difference, strict=True
    ):
        told = dict(zip(names, thresholds.tolist(), strict=True))
        settings = {"limit": limit, "thresholds": told}
        answers = fairness.randomised_answers(shares, number, thresholds)
        correct = fairness.expected_correct(answers, labels)
        found.append(measured.share("accuracy_at_limit", correct, settings))
        found.append(
            measured.Finding(
                "parity_at_limit",
                float(difference),
                settings=settings,
                count=len(labels),
            )
        )
    return found
