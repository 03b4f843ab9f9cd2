"""Caption metrics against pycocoevalcap, its Java tokenizer, and formulas."""

import collections
import functools
import inspect
import json
import math

import numpy as np
import pytest
from caption_oracles import (
    CAPTION_SCORES,
    corpus,
    frozen_corpus,
    generated_captions,
    hard_captions,
    java_jar,
    java_tokens,
    joined_tokens,
    pycocoevalcap_scores,
    without_punctuation,
)

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import text_metrics
from vit22b_transfer.evaluation.ptb_tokenizer import ptb_tokenize


@functools.cache
def ngrams(caption, order):
    words = joined_tokens(caption).split()
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def direct_cider(targets, predictions, *, clipped, idf_targets=None):
    """CIDEr and CIDEr-D straight from the paper, on dense vectors."""
    corpus = idf_targets or targets
    scores = np.zeros(len(targets))
    for order in (1, 2, 3, 4):
        images = [
            {g for text in image for g in ngrams(text, order)} for image in corpus
        ]
        frequency = collections.Counter(g for image in images for g in image)
        for index, references in enumerate(targets):
            candidate = ngrams(predictions[index], order)
            for reference in references:
                other = ngrams(reference, order)
                vocabulary = sorted({*candidate, *other})
                idf = [math.log(len(corpus) / max(1, frequency[g])) for g in vocabulary]
                a, b = (
                    np.array([grams.count(g) for g in vocabulary]) * idf
                    for grams in (candidate, other)
                )
                norm = np.linalg.norm(a) * np.linalg.norm(b)
                if not norm:
                    continue
                score = (np.minimum(a, b) if clipped else a) @ b / norm
                if clipped:
                    sizes = [len(ngrams(t, 2)) for t in (predictions[index], reference)]
                    score *= math.exp(-((sizes[0] - sizes[1]) ** 2) / (2 * 6.0**2))
                scores[index] += 10 * score / 4 / len(references)
    return list(scores)


@pytest.fixture(scope="module")
def scene_targets():
    captions = generated_captions(5, 60)
    return [captions[i : i + 5] for i in range(0, 60, 5)]


def test_tokens_equal_the_frozen_output_of_the_java_tokenizer():
    lines = hard_captions()
    assert len(lines) >= 300
    for line in lines:
        expected = without_punctuation(line["java"])
        assert ptb_tokenize(line["caption"]) == expected, line["caption"]


@pytest.mark.skipif(java_jar() is None, reason="needs java and pycocoevalcap's jar")
def test_tokens_equal_the_java_tokenizer():
    captions = [line["caption"] for line in hard_captions()]
    captions += generated_captions(0, 3000)
    for caption, line in zip(captions, java_tokens(captions), strict=True):
        assert ptb_tokenize(caption) == without_punctuation(line), caption


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\v", "\f", "\x85", "\u2028"])
def test_line_ends_separate_words(line_end):
    assert ptb_tokenize(f"a red{line_end}dog.") == ["a", "red", "dog"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_pycocoevalcap(seed):
    targets, predictions = corpus(seed, 300)
    assert sum(map(len, targets)) + len(predictions) > 1000
    means, rouges, ciders = pycocoevalcap_scores(targets, predictions, joined_tokens)
    ours = text_metrics.captioning(targets, predictions)
    assert {name: ours[name] for name in means} == pytest.approx(means, abs=1e-9)
    np.testing.assert_allclose(
        text_metrics.cider_d_scores(targets, predictions).scores, ciders, atol=1e-9
    )
    np.testing.assert_allclose(
        text_metrics.rouge_l_scores(targets, predictions).scores, rouges, atol=1e-9
    )


def test_scores_equal_the_frozen_ones_of_pycocoevalcap_with_java():
    targets, predictions = frozen_corpus(line["caption"] for line in hard_captions())
    expected = json.loads(CAPTION_SCORES.read_text(encoding="utf-8"))
    ours = text_metrics.captioning(targets, predictions)
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_single_metrics_equal_those_computed_together(scene_targets):
    predictions = generated_captions(6, len(scene_targets))
    together = text_metrics.captioning(scene_targets, predictions)
    for name in ("rouge_l", "cider", "cider_d"):
        scores = getattr(text_metrics, f"{name}_scores")
        assert scores(scene_targets, predictions).mean == together[name]


@pytest.mark.parametrize("clipped", [False, True])
def test_both_ciders_equal_their_formulas(clipped):
    targets, predictions = corpus(2, 30)
    scores = text_metrics.cider_d_scores if clipped else text_metrics.cider_scores
    ours = scores(targets, predictions)
    expected = direct_cider(targets, predictions, clipped=clipped)
    np.testing.assert_allclose(ours.scores, expected, atol=1e-9)
    assert ours.mean == pytest.approx(np.mean(expected), abs=1e-9)


def test_cider_and_cider_d_differ_for_repeated_words():
    targets = [["a dog runs on grass"], ["two cats sleep on beds"]]
    predictions = ["dog dog dog dog dog dog", "two cats sleep on beds"]
    plain = text_metrics.cider_scores(targets, predictions).scores
    clipped = text_metrics.cider_d_scores(targets, predictions).scores
    assert clipped[0] < plain[0] / 2
    assert clipped[1] == pytest.approx(plain[1], abs=1e-12)


def test_the_only_reference_itself_scores_best():
    targets = [["A red square is above a dog."], ["Two cats don't sleep there."]]
    scores = text_metrics.captioning(targets, [references[0] for references in targets])
    best = {f"bleu{order}": 1.0 for order in (1, 2, 3, 4)} | {"rouge_l": 1.0}
    best |= {"cider": 10.0, "cider_d": 10.0}
    # pycocoevalcap's guards against division by zero leave BLEU just below 1.
    assert scores == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("empty", ["", "  ", "...", "!", "\n", "😀"])
def test_predictions_without_words_score_nothing_but_count(empty):
    targets = [["a red dog", "..."], ["two blue cats", ""], ["a bird"]]
    with_empty = [empty, "two blue cats", "a bird"]
    for scores in (
        text_metrics.cider_scores,
        text_metrics.cider_d_scores,
        text_metrics.rouge_l_scores,
    ):
        scored = scores(targets, with_empty)
        assert scored.scores[0] == 0.0
        assert scored.scores[1] > 0.0
        assert scored.mean == pytest.approx(sum(scored.scores) / 3)
    complete = text_metrics.captioning(targets, ["a red dog", *with_empty[1:]])
    assert text_metrics.captioning(targets, with_empty)["bleu1"] < complete["bleu1"]
    nothing = text_metrics.captioning(targets, [empty] * 3)
    assert nothing == dict.fromkeys(nothing, 0.0)


def test_an_empty_prediction_does_not_match_a_reference_without_words():
    # pycocoevalcap gives 1 here: the empty string is a token to it.
    targets, predictions = [["...", "a dog"], ["two cats"]], ["", "two cats"]
    _, rouges, _ = pycocoevalcap_scores(targets, predictions, joined_tokens)
    assert list(rouges) == [1.0, 1.0]
    assert text_metrics.rouge_l_scores(targets, predictions).scores == [0.0, 1.0]


def test_cider_of_one_image_warns_that_it_is_always_zero():
    targets, predictions = [["a dog", "the dog"]], ["a dog"]
    with pytest.warns(UserWarning, match="of one image it is always 0"):
        scores = text_metrics.captioning(targets, predictions)
    assert scores["cider"] == scores["cider_d"] == 0.0
    for metric in (text_metrics.cider_scores, text_metrics.cider_d_scores):
        with pytest.warns(UserWarning, match="of one image it is always 0"):
            assert metric(targets, predictions).mean == 0.0
    with pytest.warns(UserWarning, match="of one image it is always 0"):
        assert text_metrics.reference_agreement(targets) == 0.0


def test_reference_agreement_scores_each_reference_against_the_others(scene_targets):
    per_image = []
    for references in scene_targets:
        others = [references[:i] + references[i + 1 :] for i in range(len(references))]
        held_out = direct_cider(
            others, references, clipped=True, idf_targets=scene_targets
        )
        per_image.append(np.mean(held_out))
    agreement = text_metrics.reference_agreement(scene_targets)
    assert agreement == pytest.approx(np.mean(per_image), abs=1e-9)
    assert 0.0 < agreement < 10.0


def test_references_that_are_all_the_same_agree_fully():
    targets = [["a red dog runs fast"] * 3, ["two blue cats sleep here"] * 2]
    assert text_metrics.reference_agreement(targets) == pytest.approx(10.0, abs=1e-9)


def test_agreement_of_a_single_reference_is_refused():
    with pytest.raises(ValueError, match="image 1 has one reference"):
        text_metrics.reference_agreement([["a dog", "the dog"], ["a cat"]])


METRICS = [
    text_metrics.captioning,
    text_metrics.rouge_l_scores,
    text_metrics.cider_scores,
    text_metrics.cider_d_scores,
]


@pytest.mark.parametrize("metric", METRICS)
def test_bad_input_is_refused(metric):
    with pytest.raises(ValueError, match="example 1 has no references"):
        metric([["a dog"], []], ["a dog", "a cat"])
    with pytest.raises(ValueError, match="example 0 has only blank references"):
        metric([["", " "], ["a cat"]], ["a dog", "a cat"])
    with pytest.raises(ValueError, match="2 targets but 1 predictions"):
        metric([["a dog"], ["a cat"]], ["a dog"])
    with pytest.raises(ValueError, match="no examples"):
        metric([], [])
    with pytest.raises(UserError, match=r"targets\[1\] is a single text"):
        metric([["a dog"], "a cat"], ["a dog", "a cat"])
    with pytest.raises((TypeError, UserError)):  # checked annotations come first
        metric([["a dog"], ["a cat"]], ["a dog", None])


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_have_the_arguments_that_seqio_looks_for(metric):
    required = [
        name
        for name, parameter in inspect.signature(metric).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    assert required == ["targets", "predictions"]
