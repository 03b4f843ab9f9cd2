"""Metrics of short answers: VQA accuracy, exact match and ANLS, all in [0, 1].

Metric functions have SeqIO's form `f(targets, predictions) -> {name: value}`, where
`targets` holds a list of answers for each question. An empty prediction scores 0. What
the functions raise is in `references.py`. Where the answers say of which kinds their
questions are (`question_kinds.Answers`), the mean over each kind stands beside the
whole, with the number of its questions: `question_slices.by_kind`.
"""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.data.answers import (
    NUM_AGREEING,
    accuracy,
    clean,
)
from vit22b_transfer.data.answers import normalize_answer as normalize_answer
from vit22b_transfer.evaluation.question_slices import by_kind
from vit22b_transfer.evaluation.references import (
    Scored,
    checked_predictions,
    checked_references,
)

ANLS_THRESHOLD = 0.5


def vqa(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> dict[str, float]:
    """VQA accuracy, also by the kinds of questions, and exact match."""
    exact = exact_match_scores(targets, predictions)
    return vqa_accuracy(targets, predictions) | {"exact_match": exact.mean}


def vqa_accuracy(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> dict[str, float]:
    """Mean VQA accuracy, also by kinds of questions; see `vqa_accuracy_scores`."""
    mean, scores = vqa_accuracy_scores(targets, predictions)
    return {"vqa_accuracy": mean} | by_kind("vqa_accuracy", targets, scores)


def vqa_accuracy_scores(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> Scored:
    """Accuracy by VQAv2's official evaluation (Goyal et al. 2017), as a fraction.

    Each of the annotators (10 in VQAv2) is left out once; the answer then counts
    min(1, others who gave it / 3), and the mean is taken. As in the official code,
    answers are normalised (`normalize_answer`) only if the annotators do not all agree;
    else the prediction has to be their answer, letter by letter. One thing is stricter
    than there: an empty prediction is wrong even if someone's answer is normalised to
    nothing, such as "a".

    With less than 4 answers 1 cannot be reached, and a warning says so.

    Raises:
      UserError: if a question has one answer, which makes every prediction wrong; use
        `exact_match`.
    """
    checked_predictions(targets, predictions)
    answers = checked_references(targets)
    _check_annotators(answers)
    scores = [
        accuracy([clean(answer) for answer in given], clean(prediction))
        for given, prediction in zip(answers, predictions, strict=True)
    ]
    return Scored(float(np.mean(scores)), scores)


def exact_match(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> dict[str, float]:
    """Mean of `exact_match_scores`, also by kinds of questions."""
    mean, scores = exact_match_scores(targets, predictions)
    return {"exact_match": mean} | by_kind("exact_match", targets, scores)


def exact_match_scores(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> Scored:
    """1 where the prediction is one of the references, but for white space around."""
    checked_predictions(targets, predictions)
    scores = [
        float(
            bool(prediction.strip())
            and prediction.strip() in {reference.strip() for reference in references}
        )
        for references, prediction in zip(
            checked_references(targets), predictions, strict=True
        )
    ]
    return Scored(float(np.mean(scores)), scores)


def anls(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> dict[str, float]:
    """Mean of `anls_scores`."""
    return {"anls": anls_scores(targets, predictions).mean}


def anls_scores(targets: Sequence[Iterable[str]], predictions: Sequence[str]) -> Scored:
    """Normalised Levenshtein similarity to the nearest reference (Biten et al. 2019).

    1 - distance / length of the longer text, case and repeated white space aside; 0 if
    that is below the threshold 0.5. A similarity of exactly 0.5 counts, as in the
    evaluation script of the DocVQA and ST-VQA challenges (in the paper's formula, and
    in big_vision, it does not).
    """
    checked_predictions(targets, predictions)
    scores = []
    for references, prediction in zip(
        checked_references(targets), predictions, strict=True
    ):
        text = _folded(prediction)
        best = max(_similarity(_folded(reference), text) for reference in references)
        scores.append(best if text and best >= ANLS_THRESHOLD else 0.0)
    return Scored(float(np.mean(scores)), scores)


def _check_annotators(answers: list[list[str]]) -> None:
    fewest = min(range(len(answers)), key=lambda index: len(answers[index]))
    count = len(answers[fewest])
    if count == 1:
        raise UserError(
            f"example {fewest} has one answer. VQA accuracy compares with the answers "
            "of several annotators, 10 in VQAv2; for one answer use exact_match."
        )
    if count <= NUM_AGREEING:
        warnings.warn(
            f"example {fewest} has {count} answers, with which a VQA accuracy of at "
            f"most {(count - 1) / NUM_AGREEING:.2f} can be reached; VQAv2 has 10.",
            stacklevel=3,
        )


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    return 1.0 - _levenshtein(a, b) / longer if longer else 1.0


def _levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
            diagonal, row[j] = row[j], cost
    return row[-1]
