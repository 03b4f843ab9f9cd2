"""Caption metrics without Java: BLEU-1..4, ROUGE-L, CIDEr and CIDEr-D as COCO has them.

`captioning` has SeqIO's form `f(targets, predictions) -> {name: value}`; `*_scores`
score each image. `targets` holds a list of reference captions for each. Captions go
through `ptb_tokenizer.ptb_tokenize`; on its tokens all values equal those of
`pycocoevalcap`, whose "CIDEr" is CIDEr-D and called `cider_d` here. BLEU and ROUGE-L
are in [0, 1], both CIDErs in [0, 10]; papers print all of them times 100.

An empty prediction scores 0. What the functions raise is in `references.py`.
"""

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vit22b_transfer import UserError
from vit22b_transfer.evaluation.example_numbers import ExampleNumbers, mean_of
from vit22b_transfer.evaluation.ptb_tokenizer import ptb_tokenize
from vit22b_transfer.evaluation.references import (
    Scored,
    checked_predictions,
    checked_references,
)

MAX_ORDER = 4
ROUGE_BETA = 1.2
CIDER_D_SIGMA = 6.0

_Ngram = tuple[str, ...]


class _DocumentFrequency(NamedTuple):
    """In how many images' references each n-gram occurs, of `num_images` images."""

    num_images: int
    counts: Mapping[_Ngram, int]


def captioning(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> dict[str, float]:
    """BLEU-1..4, ROUGE-L, CIDEr and CIDEr-D; captions are tokenised once.

    BLEU is the corpus's (Papineni et al. 2002): for the brevity penalty, an image's
    reference length is the closest one, the shorter of two. Zero matches count as
    1e-15, as in pycocoevalcap, so that BLEU of a small corpus is tiny and not 0. The
    others are the means of the functions below.

    METEOR and SPICE are left out: they need Java, METEOR's tables are under the GPL,
    and no port of either gives the same numbers. Where a paper's table needs them,
    give the predictions to pycocoevalcap.
    """
    numbers = captioning_numbers(targets, predictions)
    return {name: metric.value() for name, metric in numbers.items()}


def captioning_numbers(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> dict[str, ExampleNumbers]:
    """What each metric of `captioning` is made of, image by image.

    Both CIDErs are scores with the document frequencies of all images, so that a part
    of these, or a resample, is scored with the same ones. BLEU is made of counts.
    """
    captions = _tokenized(targets, predictions)
    frequency = _document_frequency([references for references, _ in captions])
    _warn_if_meaningless(frequency)
    plain, clipped = _score_all(
        (_cosine_similarity, _clipped_similarity), captions, frequency
    )
    counts = _bleu_counts(captions)
    bleu = {
        f"bleu{order}": ExampleNumbers(counts, functools.partial(_bleu, order=order))
        for order in range(1, MAX_ORDER + 1)
    }
    means = {"rouge_l": _rouge_l(captions), "cider": plain, "cider_d": clipped}
    return bleu | {name: mean_of(scored.scores) for name, scored in means.items()}


def rouge_l_scores(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> Scored:
    """F-score (beta 1.2) of the longest common subsequence (Lin 2004).

    COCO's form: precision and recall are each the best one over the references, which
    may be different ones.
    """
    return _rouge_l(_tokenized(targets, predictions))


def cider_scores(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> Scored:
    """CIDEr (Vedantam et al. 2015, eq. 2 and 3), times 10, without stemming.

    This is the plain cosine similarity of tf-idf vectors. It is not what COCO's scripts
    print as "CIDEr": that is CIDEr-D. No reference implementation is in common use.
    """
    captions = _tokenized(targets, predictions)
    frequency = _document_frequency([references for references, _ in captions])
    _warn_if_meaningless(frequency)
    return _score_all((_cosine_similarity,), captions, frequency)[0]


def cider_d_scores(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> Scored:
    """CIDEr-D (Vedantam et al. 2015, eq. 4; sigma 6), times 10, without stemming.

    Equal to the class `Cider` of pycocoevalcap; papers report its mean as CIDEr. Counts
    are clipped, and a difference in length (in bigrams, as there) is punished. Document
    frequencies are those of `targets`: with one image every score is 0, and a warning
    says so.
    """
    captions = _tokenized(targets, predictions)
    frequency = _document_frequency([references for references, _ in captions])
    _warn_if_meaningless(frequency)
    return _score_all((_clipped_similarity,), captions, frequency)[0]


def reference_agreement(targets: Sequence[Iterable[str]]) -> float:
    """Mean CIDEr-D of references against each other: how far people agree.

    Each reference of an image is scored once against the others of that image, and the
    scores are averaged per image, then over images. Document frequencies are those of
    all references, so the value compares with `cider_d_scores(targets, ...)`.

    Raises:
      UserError: if an image has less than two references.
    """
    references = _tokenized_references(targets)
    for index, captions in enumerate(references):
        if len(captions) < 2:
            raise UserError(
                f"image {index} has one reference; agreement needs at least two each."
            )
    frequency = _document_frequency(references)
    _warn_if_meaningless(frequency)
    means = []
    for captions in references:
        vectors = [_tf_idf(caption, frequency) for caption in captions]
        scores = [
            _mean_similarity(
                _clipped_similarity, vector, vectors[:i] + vectors[i + 1 :]
            )
            for i, vector in enumerate(vectors)
        ]
        means.append(np.mean(scores))
    return float(np.mean(means))


class _Caption(NamedTuple):
    # pycocoevalcap splits at spaces for ROUGE-L and at all white space for the others,
    # which differ in tokens such as "1 1/2", whose space is a no-break space.
    tokens: list[str]
    words: list[str]


# References and prediction.
_Example = tuple[list[_Caption], _Caption]


def _tokenize(caption: str) -> _Caption:
    tokens = ptb_tokenize(caption)
    return _Caption(tokens, " ".join(tokens).split())


def _tokenized_references(targets: Sequence[Iterable[str]]) -> list[list[_Caption]]:
    return [
        [_tokenize(reference) for reference in references]
        for references in checked_references(targets)
    ]


def _tokenized(
    targets: Sequence[Iterable[str]], predictions: Sequence[str]
) -> list[_Example]:
    checked_predictions(targets, predictions)
    return list(
        zip(_tokenized_references(targets), map(_tokenize, predictions), strict=True)
    )


def _ngrams(words: list[str]) -> Counter[_Ngram]:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


def _bleu_counts(captions: list[_Example]) -> Float[np.ndarray, "images numbers"]:
    """Matches and n-grams of each order, the length, the nearest reference's."""
    rows = np.zeros((len(captions), 2 * MAX_ORDER + 2))
    for row, (references, prediction) in zip(rows, captions, strict=True):
        best: Counter[_Ngram] = Counter()
        for reference in references:
            best |= _ngrams(reference.words)
        for ngram, count in (_ngrams(prediction.words) & best).items():
            row[len(ngram) - 1] += count
        size = len(prediction.words)
        row[MAX_ORDER:-2] = np.maximum(size - np.arange(MAX_ORDER), 0)
        row[-2] = size
        row[-1] = min(
            (len(reference.words) for reference in references),
            key=lambda candidate, size=size: (abs(candidate - size), candidate),
        )
    return rows


def _bleu(
    sums: Float[np.ndarray, "samples numbers"], order: int
) -> Float[np.ndarray, " samples"]:
    """BLEU of an order, of sums of `_bleu_counts`."""
    matches, totals = sums[:, :order], sums[:, MAX_ORDER : MAX_ORDER + order]
    precision = np.prod((matches + 1e-15) / (totals + 1e-9), axis=1)
    ratio = (sums[:, -2] + 1e-15) / (sums[:, -1] + 1e-9)
    return precision ** (1 / order) * np.exp(np.minimum(1 - 1 / ratio, 0.0))


def _rouge_l(captions: list[_Example]) -> Scored:
    scores = []
    for references, prediction in captions:
        tokens = prediction.tokens
        shared = [_common_length(tokens, reference.tokens) for reference in references]
        if not any(shared):
            scores.append(0.0)
            continue
        precision = max(shared) / len(tokens)
        recall = max(
            common / max(len(reference.tokens), 1)
            for common, reference in zip(shared, references, strict=True)
        )
        beta = ROUGE_BETA**2
        scores.append((1 + beta) * precision * recall / (recall + beta * precision))
    return Scored(float(np.mean(scores)), scores)


def _common_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of the table as bits of an int.

    A zero bit is a step up in the row (Hyyro 2004).
    """
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        steps = row & positions.get(token, 0)
        row = ((row + steps) | (row - steps)) & full
    return len(a) - row.bit_count()


class _Vectors(NamedTuple):
    """tf-idf weights and their norm for each order of n-grams."""

    weights: list[dict[_Ngram, float]]
    norms: list[float]
    num_bigrams: int


def _document_frequency(references: Iterable[list[_Caption]]) -> _DocumentFrequency:
    counts: Counter[_Ngram] = Counter()
    num_images = 0
    for captions in references:
        num_images += 1
        counts.update({ngram for c in captions for ngram in _ngrams(c.words)})
    return _DocumentFrequency(num_images, counts)


def _warn_if_meaningless(frequency: _DocumentFrequency) -> None:
    if frequency.num_images == 1:
        warnings.warn(
            "CIDEr weighs n-grams by how few images they occur in, so with document "
            "frequencies of one image it is always 0; score more images together.",
            stacklevel=3,
        )


def _tf_idf(caption: _Caption, frequency: _DocumentFrequency) -> _Vectors:
    weights: list[dict[_Ngram, float]] = [{} for _ in range(MAX_ORDER)]
    log_images = math.log(frequency.num_images)
    for ngram, count in _ngrams(caption.words).items():
        idf = log_images - math.log(max(1, frequency.counts.get(ngram, 0)))
        weights[len(ngram) - 1][ngram] = count * idf
    norms = [math.sqrt(sum(w * w for w in order.values())) for order in weights]
    return _Vectors(weights, norms, max(len(caption.words) - 1, 0))


def _clipped_similarity(a: _Vectors, b: _Vectors) -> float:
    """CIDEr-D's similarity, summed over the orders."""
    difference = a.num_bigrams - b.num_bigrams
    total = 0.0
    for order in range(MAX_ORDER):
        theirs = b.weights[order]
        product = 0.0
        for ngram, weight in a.weights[order].items():
            other = theirs.get(ngram)
            if other is not None:
                product += min(weight, other) * other
        norm = a.norms[order] * b.norms[order]
        total += product / norm if norm else 0.0
    return total * math.exp(-(difference**2) / (2 * CIDER_D_SIGMA**2))


def _cosine_similarity(a: _Vectors, b: _Vectors) -> float:
    """CIDEr's similarity, summed over the orders."""
    total = 0.0
    for order in range(MAX_ORDER):
        theirs = b.weights[order]
        product = sum(
            w * theirs.get(ngram, 0.0) for ngram, w in a.weights[order].items()
        )
        norm = a.norms[order] * b.norms[order]
        total += product / norm if norm else 0.0
    return total


def _mean_similarity(
    similarity: Callable[[_Vectors, _Vectors], float],
    candidate: _Vectors,
    references: list[_Vectors],
) -> float:
    """Mean over references and orders, times 10."""
    total = sum(similarity(candidate, reference) for reference in references)
    return 10.0 * total / (MAX_ORDER * len(references))


def _score_all(
    similarities: tuple[Callable[[_Vectors, _Vectors], float], ...],
    captions: list[_Example],
    frequency: _DocumentFrequency,
) -> list[Scored]:
    """For each kind of similarity the scores of all images."""
    columns: list[list[float]] = [[] for _ in similarities]
    for references, prediction in captions:
        candidate = _tf_idf(prediction, frequency)
        vectors = [_tf_idf(reference, frequency) for reference in references]
        for column, similarity in zip(columns, similarities, strict=True):
            column.append(_mean_similarity(similarity, candidate, vectors))
    return [Scored(float(np.mean(column)), column) for column in columns]
