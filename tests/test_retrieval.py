"""Retrieval and zero-shot classification: equal to brute force; names are cleaned."""

import numpy as np
import pytest
import tiny_models

from vit22b_transfer import UserError
from vit22b_transfer.data import class_prompts
from vit22b_transfer.evaluation import retrieval, zero_shot


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def brute_force(images, texts, ids):
    """Recall in %, one query and one candidate at a time."""
    distinct = list(dict.fromkeys(ids))
    own = {name: images[ids.index(name)] for name in distinct}
    found = {}
    for k in (1, 5, 10):
        hits = [
            any(ids[j] == name for j in np.argsort(-(texts @ own[name]))[:k])
            for name in distinct
        ]
        found[f"image_to_text_recall@{k}"] = 100 * np.mean(hits)
        table = np.stack([own[name] for name in distinct])
        hits = [
            any(distinct[j] == name for j in np.argsort(-(table @ text))[:k])
            for text, name in zip(texts, ids, strict=True)
        ]
        found[f"text_to_image_recall@{k}"] = 100 * np.mean(hits)
    return found


def test_retrieval_equals_brute_force_with_several_texts_an_image(monkeypatch):
    rng = np.random.default_rng(0)
    ids = [str(i // 3) for i in range(60)]
    shown = unit(rng, 20, 8)
    images = shown[np.arange(60) // 3]
    texts = unit(rng, 60, 8) + images
    monkeypatch.setattr(retrieval, "_AT_A_TIME", 7)
    found = retrieval.recall(images, texts, ids)
    expected = brute_force(images, texts, ids)
    assert found == pytest.approx(expected)
    assert 5 < found["text_to_image_recall@1"] < 95


def test_equal_distances_are_taken_in_order_and_small_sets_have_no_recall_at_ten():
    same = np.ones((4, 2), np.float32)
    found = retrieval.recall(same, same, list("abcd"))
    assert found == {"image_to_text_recall@1": 25, "text_to_image_recall@1": 25}


def test_unequal_pairs_and_empty_texts_are_errors():
    x = np.ones((3, 2), np.float32)
    unequal = pytest.raises(UserError, match="got 3 images, 2 texts and 3 ids")
    with tiny_models.without_type_checks(), unequal:
        retrieval.recall(x, x[:2], list("abc"))
    with pytest.raises(UserError, match="at least one pair"):
        retrieval.recall(x[:0], x[:0], [])
    with pytest.raises(UserError, match="2 of 3 examples have no text to find"):
        retrieval.metrics(["a", "", ""], [*x], {"text_embeddings": x})


def test_zero_shot_equals_brute_force():
    rng = np.random.default_rng(1)
    classes, prompts, count = np.repeat(np.arange(7), 3), unit(rng, 21, 8), 7
    images, labels = unit(rng, 50, 8), rng.integers(0, 7, 50)
    table = zero_shot.class_embeddings(prompts, classes, count)
    for c in range(7):
        mean = prompts[3 * c : 3 * c + 3].mean(axis=0)
        np.testing.assert_allclose(table[c], mean / np.linalg.norm(mean), rtol=1e-5)
    found = zero_shot.accuracy(images, labels, table)
    for k in (1, 5):
        nearest = [np.argsort(-(table @ image))[:k] for image in images]
        hits = [label in near for label, near in zip(labels, nearest, strict=True)]
        assert found[f"top{k}"] == pytest.approx(100 * np.mean(hits))
    assert zero_shot.accuracy(images, labels % 5, table[:5]).keys() == {"top1"}


def test_a_split_without_prompts_is_an_error():
    x = np.ones((2, 2), np.float32)
    with pytest.raises(UserError, match="0 classes with prompts and 2 images"):
        zero_shot.metrics([("a", False), ("b", False)], [*x], {"text_embeddings": x})


def test_names_are_cleaned_as_the_public_evaluations_do():
    assert class_prompts.cleaned("  Golden_Retriever's  (Dog)! ") == (
        "golden retrievers dog"
    )
    assert class_prompts.cleaned("A photo of a {}.", keep="{}") == "a photo of a {}"
    assert class_prompts.prompts(["T-Rex", "B {0}"], ["A {}!", "{}"]) == [
        ["a trex", "trex"],
        ["a b 0", "b 0"],
    ]


@pytest.mark.parametrize(
    "names, templates, message",
    [
        (["a", "b"], [], "no template"),
        (["a", "b"], ["a photo"], r"'a photo' must hold \{\} once"),
        (["a"], ["{}"], "1 class names: there must be two or more"),
        (["a", "?!"], ["{}"], r"'\?!' has no letters or digits"),
        (["hot_dog", "Hot dog"], ["{}"], "are one text, 'hot dog', when cleaned"),
    ],
)
def test_class_names_that_cannot_be_told_apart_are_errors(names, templates, message):
    with pytest.raises(UserError, match=message):
        class_prompts.prompts(names, templates)
