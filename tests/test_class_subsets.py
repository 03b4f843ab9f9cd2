"""Variants of ImageNet: lists against the published ones, both forms of a subset."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.special

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_subsets


def published(name):
    """A list in timm's package, which need not be imported for it."""
    timm = importlib.util.find_spec("timm")
    return Path(timm.origin).with_name("data").joinpath("_info", name).read_text()


@pytest.mark.parametrize("which", ["a", "r"])
def test_lists_are_the_published_ones(which):
    found = getattr(class_subsets, f"IMAGENET_{which.upper()}")
    listed = published(f"imagenet_{which}_indices.txt").split()
    assert found == tuple(map(int, listed)) and len(found) == 200


def test_folders_of_objectnet_are_the_classes_of_their_names():
    every = [n for own in class_subsets.OBJECTNET.values() for n in own]
    assert len(class_subsets.OBJECTNET) == 113 and len(set(every)) == len(every) == 125
    several = {k: v for k, v in class_subsets.OBJECTNET.items() if len(v) > 1}
    assert several == {
        "alarm_clock": (409, 530),
        "bicycle": (444, 671),
        "chair": (423, 559, 765),
        "helmet": (518, 560),
        "pen": (418, 563, 749),
        "skirt": (601, 655, 689),
        "still_camera": (732, 759),
        "tie": (457, 906),
        "wheel": (479, 694),
    }
    lemmas = dict(
        line.split("\t")
        for line in published("imagenet_synset_to_lemma.txt").splitlines()
    )
    names = [lemmas[synset] for synset in published("imagenet_synsets.txt").split()]
    unlike = {
        folder: names[own[0]]
        for folder, own in class_subsets.OBJECTNET.items()
        if not any(word in names[own[0]].lower() for word in folder.split("_"))
    }
    assert unlike == {
        "butchers_knife": "cleaver, meat cleaver, chopper",
        "dress": "gown",
        "dress_shoe_men": "Loafer",
        "jeans": "jean, blue jean, denim",
        "stuffed_animal": "teddy, teddy bear",
        "sweater": "sweatshirt",
        "tv": "television, television system",
        "weight_exercise": "dumbbell",
        "winter_glove": "mitten",
    }
    assert sum(every) == 85_300


LOGITS = np.array([[5.0, 1.0, 2.0, 0.0], [0.0, 3.0, 1.0, 2.0], [9.0, 0.0, 0.0, 1.0]])


def test_a_subset_has_two_accuracies_and_renormalised_probabilities():
    labels = np.array([2, 1, 3])
    found = class_subsets.accuracies(LOGITS, labels, [3, 2, 1])
    assert found == {
        "accuracy_of_subset": 1.0,
        "accuracy_of_all_classes": pytest.approx(1 / 3),
    }
    some = class_subsets.restricted(LOGITS, [3, 2, 1])
    shares = scipy.special.softmax(LOGITS, axis=1)[:, [3, 2, 1]]
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scipy.special.softmax(some, axis=1), shares)
    np.testing.assert_array_equal(class_subsets.positions(labels, [3, 2, 1]), [1, 2, 0])


def test_groups_of_classes_are_scored_by_their_largest_or_all():
    groups = {"one": [0], "two": [1, 3]}
    found = class_subsets.largest_logits(LOGITS, groups)
    np.testing.assert_array_equal(found, [[5, 1], [0, 3], [9, 1]])
    weights = np.exp(LOGITS)
    sums = np.stack([weights[:, 0], weights[:, 1] + weights[:, 3]], axis=1)
    found = class_subsets.summed_probabilities(LOGITS, groups)
    np.testing.assert_allclose(found, sums / sums.sum(axis=1, keepdims=True))


def test_the_frame_is_two_pixels_on_each_side():
    image = np.full((9, 8, 3), 7, np.uint8)
    image[2:-2, 2:-2] = 1
    found = class_subsets.without_frame(image)
    assert found.shape == (5, 4, 3) and np.all(found == 1)
    with pytest.raises(UserError, match="4 x 9 pixels has nothing"):
        class_subsets.without_frame(np.zeros((4, 9, 3), np.uint8))


def test_judgements_are_counted_as_published(tmp_path):
    path = tmp_path / "real.json"
    path.write_text(published("imagenet_real_labels.json"))
    judgements = class_subsets.read_judgements(path)
    predictions = np.array([own[-1] if own else 0 for own in judgements])
    predictions[:20_000] = -1
    found = class_subsets.judged_accuracy(predictions, judgements)
    assert (found["judged"], found["not_judged"]) == (46_837, 3_163)
    late = sum(bool(own) for own in judgements[20_000:])
    assert found["accuracy"] == late / 46_837


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "no list"),
        ([[1]], "a list of 3 lists, but has 1 entries"),
        ([[1], [2], [1000]], "entry 2: class ids from 0 to 999"),
        ([[1], [2], 3], "entry 2"),
        ([[1], [True], []], "entry 1"),
    ],
)
def test_a_file_without_judgements_is_refused(tmp_path, content, message):
    path = tmp_path / "real.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        class_subsets.read_judgements(path, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: class_subsets.restricted(LOGITS, [1, 4]), "the classes 0 to 3"),
        (lambda: class_subsets.restricted(LOGITS, [1, 1]), "there twice"),
        (
            lambda: class_subsets.positions(np.array([1, 2]), [1, 3]),
            r"1 labels are not in the subset of 2 classes, such as \[2\]",
        ),
        (lambda: class_subsets.largest_logits(LOGITS, {"none": []}), "asked for"),
        (
            lambda: class_subsets.summed_probabilities(LOGITS, {"a": [1], "b": [1]}),
            "there twice",
        ),
        (
            lambda: class_subsets.judged_accuracy(np.array([1]), [[]]),
            "none of the 1 images is judged",
        ),
        (lambda: class_subsets.judged_accuracy(np.array([1]), []), "1 predictions"),
    ],
)
def test_what_cannot_be_scored_is_said(call, message):
    with pytest.raises(UserError, match=message):
        call()
