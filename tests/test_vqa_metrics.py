"""VQA accuracy against the official rules, exact match and ANLS.

The expected values were written down from the rules of VQAv2's evaluation code.
"""

import inspect
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit22b_transfer import UserError
from vit22b_transfer.data import answers
from vit22b_transfer.evaluation import vqa_metrics

NORMAL_FORMS = {
    # case and white space
    "Yes": "yes",
    "  a  Dog \t here\n": "dog here",
    "NEW YORK": "new york",
    # articles, only as whole words
    "the cat": "cat",
    "A an the": "",
    "an apple a day": "apple day",
    "theater": "theater",
    "a-frame": "frame",
    # number words up to ten
    "two": "2",
    "Ten": "10",
    "none": "0",
    "zero": "0",
    "eleven": "eleven",
    "twenty two": "twenty 2",
    "twenty-two": "twenty 2",
    "one's": "one's",
    "no one": "no 1",
    "someone": "someone",
    # a comma between digits removes all other punctuation without a trace
    "1,000": "1000",
    "1,000,000": "1000000",
    "1,000-2,000": "10002000",
    "$1,000 (cash)": "$1000 cash",
    # a comma elsewhere is punctuation as any other
    "red,blue": "red blue",
    "red, blue": "red blue",
    "red ,blue": "red blue",
    "1, 2": "1 2",
    "yes,": "yes",
    # punctuation becomes a space, beside a space nothing, wherever it stands
    "black/white": "black white",
    "black / white": "black white",
    "black/ white/red": "black whitered",
    "black-and-white": "black and white",
    "t-shirt": "t shirt",
    "black - t-shirt": "black tshirt",
    "yes!": "yes",
    "yes!no": "yes no",
    "is it? yes": "is it yes",
    "[left]": "left",
    '"stop"': "stop",
    "says 'stop'": "says 'stop'",
    "a_b": "b",
    "x+y=z": "x y z",
    "me@home": "me home",
    "<unk>": "unk",
    "back\\slash": "back slash",
    "`tick`": "tick",
    "{1; 2}": "1 2",
    # what is not on the list of punctuation
    "50%": "50%",
    "$5": "$5",
    "#1": "#1",
    "salt & pepper": "salt & pepper",
    "5*": "5*",
    "12:30": "12:30",
    "~5": "~5",
    "café": "café",
    "“stop”": "“stop”",
    "…": "…",
    # periods, but not before a digit
    "yes.": "yes",
    "u.s.a.": "usa",
    "3.5": "3.5",
    "3. 5": "3 5",
    ".5": ".5",
    "st. louis": "st louis",
    "v1.a": "v1a",
    "...": "",
    "7.": "7",
    # contractions
    "dont": "don't",
    "don't": "don't",
    "Dont know": "don't know",
    "isnt": "isn't",
    "couldntve": "couldntve",
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "oclock": "o'clock",
    "5 oclock": "5 o'clock",
    "ow's'at": "'ow's'at",
    "twas": "'twas",
    "yall": "y'all",
    "y'allll": "y'all'll",
    "somebody'd": "somebodyd",
    "hes": "he's",
    "shes": "shes",
    "lets": "lets",
    "im": "im",
    "ive": "ive",
    "its": "its",
    "well": "well",
    "shell": "shell",
    "cant.": "can't",
    "(wont)": "won't",
}


@pytest.mark.parametrize(("answer", "expected"), NORMAL_FORMS.items())
def test_answers_are_normalised_by_the_official_rules(answer, expected):
    assert vqa_metrics.normalize_answer(answer) == expected


def test_no_more_than_32_periods_are_removed_as_in_the_official_code():
    assert vqa_metrics.normalize_answer("." * 40) == "." * 8


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1)]
)
def test_accuracy_leaves_each_annotator_out_once(matches, expected):
    # With 3 matches, 3 annotators see 2 others: (3 * 2/3 + 7 * 1) / 10.
    answers = ["yes"] * matches + [f"no {i}" for i in range(10 - matches)]
    accuracy = vqa_metrics.vqa_accuracy([answers], ["yes"])
    assert accuracy == pytest.approx({"vqa_accuracy": expected}, abs=1e-12)


ACCURACIES = [
    # prediction, answers (times given), accuracy
    ("2", {"two": 4, "3": 6}, 1.0),
    ("two", {"2": 2, "Two.": 1, "3": 7}, 0.9),
    ("The Dog", {"dog": 5, "a dog": 3, "cat": 2}, 1.0),
    ("1000", {"1,000": 3, "1000": 1, "many": 6}, 1.0),
    ("1,000", {"1000": 4, "many": 6}, 1.0),
    ("1, 000", {"1000": 4, "many": 6}, 0.0),
    ("dont know", {"don't know": 2, "no": 8}, 0.6),
    ("t-shirt", {"t shirt": 1, "T-Shirt!": 1, "tshirt": 8}, 0.6),
    ("yes", {"yes": 9, "no": 1}, 1.0),
    ("no", {"yes": 9, "no": 1}, 0.3),
    ("none", {"0": 5, "1": 5}, 1.0),
    ("3.5", {"3.5": 2, "35": 8}, 0.6),
    ("usa", {"U.S.A.": 4, "us": 6}, 1.0),
    # all the same: nothing is normalised
    ("yes", {"yes": 10}, 1.0),
    ("Yes", {"yes": 10}, 0.0),
    (" yes\n", {"yes": 10}, 1.0),
    ("yes.", {"yes": 10}, 0.0),
    ("two", {"2": 10}, 0.0),
    ("the dog", {"dog": 10}, 0.0),
    ("The Dog", {"The Dog": 10}, 1.0),
    # all the same but for case: everything is
    ("Yes", {"yes": 9, "YES": 1}, 1.0),
    # a prediction of which nothing is left is one if it was not empty
    ("the", {"a": 4, "b": 6}, 1.0),
    ("", {"a": 4, "b": 6}, 0.0),
    ("  \n", {"a": 4, "b": 6}, 0.0),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), ACCURACIES)
def test_accuracy_follows_the_official_rules(prediction, answers, expected):
    given_answers = list(
        itertools.chain(*([answer] * count for answer, count in answers.items()))
    )
    assert len(given_answers) == 10
    scored = vqa_metrics.vqa_accuracy_scores([given_answers], [prediction])
    assert scored.scores == pytest.approx([expected], abs=1e-12)


def test_the_mean_is_over_questions():
    targets = [["yes"] * 10, ["no"] * 8 + ["yes"] * 2, ["2"] * 10]
    predictions = ["yes", "yes", ""]
    scored = vqa_metrics.vqa_accuracy_scores(targets, predictions)
    assert scored.scores == pytest.approx([1.0, 0.6, 0.0])
    assert scored.mean == pytest.approx(1.6 / 3)
    assert vqa_metrics.vqa(targets, predictions) == pytest.approx(
        {"vqa_accuracy": 1.6 / 3, "exact_match": 2 / 3}
    )


def test_accuracy_of_few_answers_warns_what_can_be_reached():
    with pytest.warns(UserWarning, match="example 1 has 2 answers.*at most 0.33"):
        accuracy = vqa_metrics.vqa_accuracy([["yes"] * 10, ["no"] * 2], ["yes", "no"])
    assert accuracy == pytest.approx({"vqa_accuracy": (1 + 1 / 3) / 2})


def test_accuracy_of_a_single_answer_is_refused():
    with pytest.raises(ValueError, match="example 1 has one answer.*use exact_match"):
        vqa_metrics.vqa_accuracy([["yes"] * 10, ["no"]], ["yes", "no"])


@given(st.text(alphabet="aT the,.1 0-'/?dont", max_size=20))
def test_normal_forms_have_no_articles_capitals_or_stray_spaces(answer):
    normal = vqa_metrics.normalize_answer(answer)
    assert normal == " ".join(normal.lower().split())
    assert not {"a", "an", "the"} & set(normal.split())


def test_exact_match_accepts_any_reference_to_the_letter():
    targets = [["yes", "yeah"], ["Two dogs"], ["no"], ["x", ""], [" a b "]]
    predictions = ["yeah", "two dogs", "no\n", "", "a b"]
    scored = vqa_metrics.exact_match_scores(targets, predictions)
    assert scored.scores == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert vqa_metrics.exact_match(targets, predictions) == {"exact_match": 0.6}


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("hello", ["hello"], 1.0),
        ("Hello  World", ["hello world"], 1.0),
        ("helo", ["hello"], 0.8),
        ("hallo", ["world", "hello"], 0.8),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["ac"], 0.5),
        ("abc", ["axy"], 0.0),
        ("abcdefghijklmnopqrst", ["a"], 0.0),
        ("flaw", ["lawn"], 0.5),
        ("", ["a"], 0.0),
        ("  ", ["a", ""], 0.0),
        ("$1,000.00", ["$1,000.0"], 1 - 1 / 9),
    ],
)
def test_anls_is_the_similarity_to_the_nearest_reference(
    prediction, references, expected
):
    anls = vqa_metrics.anls([references], [prediction])
    assert anls == pytest.approx({"anls": expected}, abs=1e-12)


@given(st.text("abc", max_size=8), st.text("abc", min_size=1, max_size=8))
def test_anls_is_symmetric_and_bounded(left, right):
    def score(prediction, reference):
        return vqa_metrics.anls_scores([[reference]], [prediction]).mean

    similarity = score(left, right)
    assert similarity == 0.0 or 0.5 <= similarity <= 1.0
    assert (similarity == 1.0) == (left == right)
    if left:
        assert similarity == score(right, left)


METRICS = [
    vqa_metrics.vqa,
    vqa_metrics.vqa_accuracy,
    vqa_metrics.exact_match,
    vqa_metrics.anls,
]


@pytest.mark.parametrize("metric", METRICS)
def test_bad_input_is_refused(metric):
    ten = ["yes"] * 10
    with pytest.raises(ValueError, match="example 1 has no references"):
        metric([ten, []], ["yes", "no"])
    with pytest.raises(ValueError, match="1 targets but 2 predictions"):
        metric([ten], ["yes", "no"])
    with pytest.raises(ValueError, match="no examples"):
        metric([], [])
    with pytest.raises(UserError, match=r"targets\[0\] is a single text"):
        metric(["yes"], ["yes"])
    with pytest.raises((TypeError, UserError)):  # checked annotations come first
        metric([ten], [b"yes"])


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_have_the_arguments_that_seqio_looks_for(metric):
    assert list(inspect.signature(metric).parameters) == ["targets", "predictions"]


ANSWERS = st.sampled_from(
    ["Two", "two", "2", "two.", " 2", "3", "3 ", "a", "the", "", "yes", "Yes!", "no"]
)


@given(
    given_=st.lists(ANSWERS, min_size=1, max_size=12),
    preferred=st.one_of(st.just(""), ANSWERS),
)
def test_the_answer_to_learn_is_the_one_that_the_metric_rewards_most(given_, preferred):
    target = answers.most_rewarded(given_, preferred)
    choices = [answer.strip() for answer in given_ if answer.strip()]
    if not choices:
        assert target == ""
        return
    assert target in choices
    if len(given_) < 4:
        return  # what cannot reach 1 is warned of
    scores = [
        vqa_metrics.vqa_accuracy([given_], [choice])["vqa_accuracy"]
        for choice in choices
    ]
    score = vqa_metrics.vqa_accuracy([given_], [target])["vqa_accuracy"]
    assert score == max(scores)
    best = [c for c, s in zip(choices, scores, strict=True) if s == max(scores)]
    if preferred.strip() in best:
        assert target == preferred.strip()


@pytest.mark.parametrize(
    "given_, preferred, target",
    [
        (["Two", "two", "2", "two.", "3", "3", "4", "5", "6", "7"], "2", "2"),
        (["Two", "two", "2", "two.", "3", "3", "4", "5", "6", "7"], "", "Two"),
        (["Two", "two", "two.", "3", "3", "4"], "2", "Two"),
        (["yes"] * 5 + ["no"] * 5, "no", "no"),  # both score 1
        (["yes"] * 5 + ["no"] * 5, "perhaps", "yes"),
        (["", " ", "red"], "blue", "red"),
        (["red"], "blue", "red"),
        ([], "blue", ""),
    ],
)
def test_ties_go_to_the_chosen_answer_then_to_the_first(given_, preferred, target):
    assert answers.most_rewarded(given_, preferred) == target
