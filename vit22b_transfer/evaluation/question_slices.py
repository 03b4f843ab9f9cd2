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
        kinds = [t.kinds if isinstance(t, Answers) else {} for t in targets]
        groups = grouped([of.get(kind, "") for of in kinds])
        for value, places in groups.items():
            mean = float(np.mean([scores[place] for place in places]))
            slices[f"{metric}/{kind}={value}"] = mean
            slices[f"{metric}_count/{kind}={value}"] = float(len(places))
    return slices


def grouped(values: Sequence[str]) -> dict[str, list[int]]:
    """The places of equal values, as a page or a table may show them; commonest first.

    A place without a value ("") is in `[not said]`; without any there is no group.
    """
    groups = collections.defaultdict(list)
    for place, value in enumerate(values):
        groups[_shown(value)].append(place)
    if set(groups) <= {_NOT_SAID}:
        return {}
    ordered = sorted(groups, key=lambda value: (-len(groups[value]), value))
    rare = ordered[MAX_SLICES:]
    found = {value: groups[value] for value in ordered[:MAX_SLICES]}
    if rare:
        together = [place for value in rare for place in groups[value]]
        found[f"[{len(rare)} rarer ones]"] = sorted(together)
    return found


def _shown(value: str) -> str:
    if not value:
        return _NOT_SAID
    # One that begins as our own names do is told from them.
    value = printable(value).replace("[", "\\[", value.startswith("["))
    return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 3]}..."
