"""Scores of questions by the kinds that VQAv2's annotations name.

A slice is all questions with one `answer_type` ("yes/no", "number", "other") or one
`question_type` (65 of them in VQAv2: "what color is the"). The slices of a kind hold
every question once, so that their means, weighted with their counts, make the whole's.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit22b_transfer.data.question_kinds import KINDS, Answers
from vit22b_transfer.data.records import printable

MAX_SLICES = 100
_LONGEST = 40
_NOT_SAID = "[not said]"


def by_kind(
    metric: str, targets: Sequence[Any], scores: Sequence[float]
) -> dict[str, float]:
    """`METRIC/KIND=VALUE` and `METRIC_count/KIND=VALUE`, the commonest value first.

    targets: of each question; a kind that none of them has makes no slice, and the
      questions that lack it beside others are the slice `[not said]`.
    scores: of each question, in [0, 1].

    Values are texts of strangers: they are escaped and cut, those that are then equal
    are one slice, and all but the `MAX_SLICES` commonest are one together.
    """
    slices = {}
    for kind in KINDS:
        groups = collections.defaultdict(list)
        for target, score in zip(targets, scores, strict=True):
            kinds = target.kinds if isinstance(target, Answers) else {}
            groups[_shown(kinds.get(kind, ""))].append(score)
        if set(groups) <= {_NOT_SAID}:
            continue
        ordered = sorted(groups, key=lambda value: (-len(groups[value]), value))
        rare = ordered[MAX_SLICES:]
        if rare:
            groups[f"[{len(rare)} rarer ones]"] = [
                score for value in rare for score in groups[value]
            ]
            ordered = [*ordered[:MAX_SLICES], f"[{len(rare)} rarer ones]"]
        for value in ordered:
            slices[f"{metric}/{kind}={value}"] = float(np.mean(groups[value]))
            slices[f"{metric}_count/{kind}={value}"] = float(len(groups[value]))
    return slices


def _shown(value: str) -> str:
    if not value:
        return _NOT_SAID
    # One that begins as our own names do is told from them.
    value = printable(value).replace("[", "\\[", value.startswith("["))
    return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 3]}..."
