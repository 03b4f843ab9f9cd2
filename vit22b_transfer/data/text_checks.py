"""What is odd about the texts of a data set, before a model learns them."""

import collections
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from seqio.vocabularies import Vocabulary

# What tokenisers write for themselves: as text of data it may be read as such.
_SPECIAL = re.compile(
    r"</?s>|<pad>|<unk>|<[be]os>|<image>|<extra_id_\d+>|<(?:loc|seg)\d+>"
)
# Joins the parts of an emoji: the one format character that ordinary texts have.
_JOINER = "\u200d"
_REPLACEMENT = "\ufffd"
_SHOWN, _LONGEST = 5, 200
QUANTILES = {"median": 0.5, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}


class TextFacts(NamedTuple):
    """Counts of texts. lengths: quantiles of the number of tokens, EOS included.

    past: texts longer than `limit` tokens, which would be cut; None without a limit.
    unknown: texts with a piece that the vocabulary lacks, and by which characters.
    changed: texts that do not come back from their tokens, white space aside.
    control: texts with control or formatting characters, or U+FFFD.
    special: texts with what looks like a token, such as `</s>`.
    pieces: different pieces that occur, of `vocabulary_size`.
    samples: the first few texts of each kind.
    """

    count: int
    empty: int
    lengths: dict[str, int]
    limit: int | None
    past: int | None
    unknown: int
    unknown_characters: dict[str, int]
    changed: int
    control: int
    special: int
    pieces: int
    vocabulary_size: int
    samples: dict[str, list[str]]


def check(
    texts: Iterable[str], vocabulary: Vocabulary, *, limit: int | None, eos: bool
) -> TextFacts:
    """Looks at all texts; equal ones are tokenised once and counted each time.

    limit: the most tokens that a model takes, EOS included.
    """
    times = collections.Counter(texts)
    counts: collections.Counter[str] = collections.Counter()
    samples: dict[str, list[str]] = {}
    missing: collections.Counter[str] = collections.Counter()
    lengths, weights = [], []
    pieces: set[int] = set()
    unknown_id = vocabulary.unk_id
    known: dict[str, bool] = {}
    for text, number in times.items():
        odd = set()
        if not text.strip():
            odd.add("empty")
        tokens = list(vocabulary.encode(text))
        pieces.update(tokens)
        lengths.append(len(tokens) + eos)
        weights.append(number)
        if limit is not None and lengths[-1] > limit:
            odd.add("past")
        if unknown_id is not None and unknown_id in tokens:
            odd.add("unknown")
            for character in set(text):
                if character not in known:
                    known[character] = unknown_id not in vocabulary.encode(character)
                if not known[character]:
                    missing[character] += number
        elif "".join(vocabulary.decode(tokens).split()) != "".join(text.split()):
            odd.add("changed")
        if any(map(_is_control, text)):
            odd.add("control")
        if _SPECIAL.search(text):
            odd.add("special")
        for kind in odd:
            counts[kind] += number
            if len(samples.setdefault(kind, [])) < _SHOWN:
                samples[kind].append(text[:_LONGEST])
    return TextFacts(
        count=sum(times.values()),
        empty=counts["empty"],
        lengths=_quantiles(lengths, weights),
        limit=limit,
        past=None if limit is None else counts["past"],
        unknown=counts["unknown"],
        unknown_characters=dict(missing.most_common(20)),
        changed=counts["changed"],
        control=counts["control"],
        special=counts["special"],
        pieces=len(pieces),
        vocabulary_size=vocabulary.vocab_size,
        samples=samples,
    )


def _is_control(character: str) -> bool:
    if character.isascii():
        return not character.isprintable()
    kind = unicodedata.category(character)
    is_odd = kind in ("Cc", "Cf", "Co", "Cs", "Cn") and character != _JOINER
    return is_odd or character == _REPLACEMENT


def _quantiles(lengths: list[int], weights: list[int]) -> dict[str, int]:
    """The least length that so many of the texts do not exceed."""
    if not lengths:
        return {}
    order = np.argsort(lengths)
    reached = np.cumsum(np.array(weights)[order])
    places = {
        name: np.searchsorted(reached, share * reached[-1])
        for name, share in QUANTILES.items()
    }
    return {name: int(lengths[order[place]]) for name, place in places.items()}
