"""Short answers as VQAv2's evaluation compares them (Goyal et al. 2017)."""

import collections
import functools
import re
from collections.abc import Sequence

# VQAv2's evaluation: an answer is right if this many of the other annotators gave it.
NUM_AGREEING = 3

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten".split()
    )
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile("[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
# The official code gives Python's flag re.UNICODE where the count belongs.
_MOST_PERIODS = int(re.UNICODE)

# Written with all but one of their apostrophes, these get it back.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've he'd
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [
        word[:i] + word[i + 1 :] for i, character in enumerate(word) if character == "'"
    ]


# The last entry is the wrong way round in the official table, too.
_CONTRACTION_OF = {
    short: word
    for word in _CONTRACTIONS.split()
    for short in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}


def clean(answer: str) -> str:
    """The answer on one line, without white space around it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """The answer as VQAv2's evaluation compares it.

    Lower case; no articles; digits for number words up to ten; apostrophes put back
    into contractions; no periods but decimal points. Other punctuation becomes a space,
    or nothing if it stands beside a space somewhere, and all of it nothing in an answer
    with a comma between digits ("1,000").
    """
    answer = clean(answer)
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        nothing = beside_space or _COMMA_IN_NUMBER.search(answer) is not None
        text = text.replace(mark, "" if nothing else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(
        _CONTRACTION_OF.get(word, word) for word in words if word not in _ARTICLES
    )


def accuracy(answers: Sequence[str], prediction: str) -> float:
    """VQA accuracy of a prediction, in [0, 1]; all texts are `clean`.

    Each of the annotators is left out once; the prediction then counts
    min(1, others who gave it / 3), and the mean is taken. Answers are normalised only
    if the annotators do not all agree. An empty prediction is wrong.
    """
    if not prediction:
        return 0.0
    if len(set(answers)) > 1:
        answers = [_forms(answer)[1] for answer in answers]
        prediction = _forms(prediction)[1]
    return _left_out(answers.count(prediction), len(answers))


@functools.lru_cache(maxsize=4096)
def _left_out(agreeing: int, total: int) -> float:
    """The mean over all annotators, of whom `agreeing` gave the predicted answer."""
    by_them = min(1.0, (agreeing - 1) / NUM_AGREEING)
    by_others = min(1.0, agreeing / NUM_AGREEING)
    return (agreeing * by_them + (total - agreeing) * by_others) / total


def most_rewarded(answers: Sequence[str], preferred: str = "") -> str:
    """The answer with the highest `accuracy`, without white space around it.

    Of equals the one that is `preferred`, else one that is normalised to the same, else
    the first. "" if all answers are blank.
    """
    forms = [_forms(answer) for answer in answers]
    choices = {answer: normal for answer, normal in forms if answer}
    if len(choices) < 2:
        return "".join(choices)
    counts = collections.Counter(normal for _, normal in forms)
    scores = {n: _left_out(counts[n], len(forms)) for n in set(choices.values())}
    highest = max(scores.values())
    best = [answer for answer, normal in choices.items() if scores[normal] == highest]
    preferred, wanted = _forms(preferred)
    if preferred in best:
        return preferred
    return next((answer for answer in best if choices[answer] == wanted), best[0])


@functools.lru_cache(maxsize=1 << 16)
def _forms(answer: str) -> tuple[str, str]:
    """An answer clean and normalised: annotators give the same again and again."""
    return clean(answer), normalize_answer(answer)
