"""Trust measures of a head whose logits are given: their lines, files and refusals."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from handwritten_digits import logits_and_labels
from tiny_runs import ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import (
    calibration,
    class_probabilities,
    class_subsets,
    corruption_errors,
    corruptions,
    fairness,
    human_alignment,
    intervals,
    out_of_distribution,
    selective,
    sixteen_classes,
)
from vit22b_transfer.experiments import (
    attributes,
    corrupted,
    fair,
    features,
    heads,
    humans,
    judged,
    logistic,
    measure_pictures,
    measured,
    perceptual,
    reliability,
    reliability_score,
    split_features,
    variants,
)

FACTS = {"probe": "LogisticProbe", "features": {"weights": "w", "tower": {}}}
SPLIT = features.Split("digits", "test")
RESAMPLES = 40


class Given(judged.Judge):
    """A judge whose logits are given, by split."""

    def of(self, split, *, labelled=True, change=None, towers=None):
        key = split.split if change is None else change.name
        return self.__dict__["logits"][key]

    def before(self, split):
        found = self.of(split)
        return found.head, found.every_id

    def facts(self, **splits):
        told = {name: dataclasses.asdict(split) for name, split in splits.items()}
        return {"features": FACTS["features"], **told}


class Arrays(features.FeatureSource):
    """A source whose vectors are given."""

    def read(self, task, split, vectors, *, labelled=True, change=None, towers=None):
        return self.__dict__["given"]

    def names(self, task, split):
        return self.__dict__["given"].every_id

    def facts(self):
        return {"weights": "w"}


def source(vectors=None, ids=(), labels=None, classes=2):
    found = Arrays(None, "", "", ONE_DEVICE, (2, 2), 1)
    if vectors is not None:
        labels = np.full(len(vectors), -1) if labels is None else labels
        told = (("pooled",), labels, classes, "some images", {})
        names = np.arange(len(vectors)), tuple(ids), tuple(ids)
        object.__setattr__(
            found, "given", split_features.SplitFeatures(vectors, *told, *names)
        )
    return found


def given(logits, labels=None, *, ids=None, every_id=None, names=None, head=None):
    """What a judge says; `names` are the split's classes, `head` those of the head."""
    classes, count = logits.shape[1], len(logits)
    arrays = {"kernel": np.ones((1, classes)), "bias": np.zeros(classes)}
    ids = tuple(f"{n:03}.png" for n in range(count)) if ids is None else tuple(ids)
    labels = np.full(count, -1) if labels is None else np.asarray(labels)
    return judged.Judged(
        heads.Head("linear", arrays, classes, ("pooled",), head, FACTS),
        np.asarray(logits, np.float32),
        labels,
        ids,
        ids if every_id is None else tuple(every_id),
        classes if names is None else len(names),
        names,
        "some images",
        {"unreadable": 1},
        "/kept/logits/some-0123.npz",
    )


def judge(folder, **splits):
    found = Given("head.npz", source(), str(folder))
    object.__setattr__(found, "logits", splits)
    return found


def values(lines):
    return {
        (line["metric"], *(x for x in line["settings"].values() if type(x) is str)): (
            line["value"]
        )
        for line in lines
    }


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- Labels that are not those of training ---


@pytest.fixture(scope="module")
def thousand():
    """Logits of ILSVRC's classes, for 60 images."""
    return np.random.default_rng(0).normal(size=(60, 1000)).astype(np.float32)


def test_200_classes_are_judged_in_both_lists(thousand, tmp_path):
    places = np.arange(60) * 3
    own = tuple(f"n{n:03}" for n in range(200))
    every = np.array(class_subsets.IMAGENET_A)[places]
    expected = class_subsets.accuracies(thousand, every, class_subsets.IMAGENET_A)
    for labels, names in ((places, own), (every, None)):
        found = judge(tmp_path, test=given(thousand, labels, names=names))
        lines = variants.accuracy(found, SPLIT, labels="imagenet_a")
        assert values(lines) == {(name,): value for name, value in expected.items()}
    renamed = tuple(f"n{n:03}" for n in range(1000))
    some = given(thousand, np.arange(60) % 3, names=("n005", "n999", "n000"))
    some = dataclasses.replace(
        some, head=dataclasses.replace(some.head, class_names=renamed)
    )
    lines = variants.accuracy(judge(tmp_path, test=some), SPLIT, labels="named")
    best = thousand[:, [5, 999, 0]].argmax(axis=1)
    assert values(lines)["accuracy_of_subset",] == np.mean(best == np.arange(60) % 3)
    with pytest.raises(UserError, match="1 of 2 classes .* such as 'zebra'"):
        zebra = dataclasses.replace(some, class_names=("n005", "zebra"))
        variants.accuracy(judge(tmp_path, test=zebra), SPLIT, labels="named")


def test_probabilities_of_some_classes_are_made_to_sum_to_1(thousand):
    labels = np.arange(60) % 2
    for form, names, subset in (
        ("imagenet_r", None, class_subsets.IMAGENET_R),
        ("objectnet", ("chair", "alarm_clock"), None),
    ):
        ids = np.array(class_subsets.IMAGENET_R)[labels] if subset else labels
        found = given(thousand, ids, names=names)
        logits, own = variants.own_logits(found, form)
        shares = class_probabilities.softmax(thousand)
        if subset:
            asked = shares[:, list(subset)]
            np.testing.assert_array_equal(own, labels)
        else:
            groups = class_subsets.OBJECTNET.values()
            asked = np.stack([shares[:, list(g)].sum(axis=1) for g in groups], axis=1)
        expected = asked / asked.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(
            class_probabilities.softmax(logits), expected, rtol=1e-5
        )


def test_objectnet_is_judged_by_folders(thousand, tmp_path):
    names = ("chair", "alarm_clock")
    labels = np.arange(60) % 2
    logits = thousand.copy()
    # Two thirds of the images are right: those of a chair, and some alarm clocks.
    logits[labels == 0, 765] += 20
    logits[3::6, 530] += 20
    lines = variants.accuracy(
        judge(tmp_path, test=given(logits, labels, names=names)),
        SPLIT,
        labels="objectnet",
    )
    assert lines[0]["value"] == pytest.approx(2 / 3)
    for wrong, message in (
        (given(thousand, labels, names=("chair", "alarm clock")), "nearest: 'alarm_cl"),
        (given(thousand[:, :9], labels), "ILSVRC's 1000 classes"),
    ):
        with pytest.raises(UserError, match=message):
            variants.accuracy(judge(tmp_path, test=wrong), SPLIT, labels="objectnet")
    with pytest.raises(UserError, match="the nearest of .* is 'objectnet'"):
        variants.accuracy(judge(tmp_path), SPLIT, labels="object_net")


def test_several_labels_count_as_votes_and_images_without_any_are_left_out(tmp_path):
    shares = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [1, 1, 1]])
    ids, every_id = ("b/2.png", "a/3.png", "4.png", "1.png"), ("a/0.png",)
    found = given(np.log(shares), ids=ids, every_id=(*ids, *every_id))
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[0], [], [0, 1], [2], [0, 1, 1]]))
    lines = variants.several_labels(
        judge(tmp_path, test=found), SPLIT, judgements=str(path)
    )
    told = values(lines)
    # 0.png cannot be read, 1.png is not judged; of 4.png the best is no label.
    assert told["accuracy",] == pytest.approx(1 / 3)
    assert told["accuracy_of_one_label",] == 0
    assert told["accuracy_of_several_label",] == pytest.approx(1 / 2)
    losses = [
        -np.log(0.7 * 0.2) / 2,
        -np.log(0.3),
        -(np.log(0.1) + 2 * np.log(0.1)) / 3,
    ]
    assert told["cross_entropy",] == pytest.approx(np.mean(losses), abs=1e-6)
    entropy = [np.log(2), 0, -(np.log(1 / 3) + 2 * np.log(2 / 3)) / 3]
    expected = np.mean(losses) - np.mean(entropy)
    assert told["divergence",] == pytest.approx(expected, abs=1e-6)
    assert lines[0]["notes"] == {
        "images": 3,
        "images_without_a_label": 1,
        "unreadable": 1,
    }
    for content, message in (
        ([[0]] * 4, "a list of 5 lists, but has 4 entries"),
        ([[0], [3], [], [], []], "entry 1: class ids from 0 to 2"),
        ([[]] * 5, "no label for any image"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            variants.several_labels(
                judge(tmp_path, test=found), SPLIT, judgements=str(path)
            )


# --- Reliability ---


def test_calibration_is_told_before_and_after_with_a_diagram(tmp_path):
    logits, labels = logits_and_labels()
    logits = logits.astype(np.float32)
    found = judge(tmp_path, test=given(logits, labels))
    lines = reliability.calibrated(found, SPLIT, resamples=RESAMPLES)
    order = np.random.default_rng(0).permutation(len(labels))
    expected = calibration.scaled_metrics(
        logits[order].astype(np.float64), labels[order]
    )
    told = values(lines)
    for when, before in (("before", ""), ("after", "scaled/")):
        for name in ("accuracy", "ece", "ece_equal_mass", "nll", "brier"):
            value = told[name, when]
            assert value == pytest.approx(expected[before + name], abs=1e-9), name
    (after,) = [
        x for x in lines if (x["metric"], x["settings"]["when"]) == ("nll", "after")
    ]
    low, high = after["interval"]
    assert low < after["value"] < high and "BCa bootstrap" in after["interval_kind"]
    assert after["settings"]["temperature"] == expected["temperature"]
    assert is_picture(tmp_path / after["pictures"][0])
    # Of logits that say nothing no temperature is best: what is before it is told.
    blind = given(-np.eye(2)[np.arange(20) % 2], np.arange(20) % 2)
    lines = reliability.calibrated(judge(tmp_path, test=blind), SPLIT, resamples=40)
    assert {line["settings"]["when"] for line in lines} == {"before"}
    assert "no temperature is best" in lines[0]["notes"]["without_a_temperature"]


def test_refusing_and_asking_an_oracle_are_the_pure_measures(tmp_path):
    logits, labels = logits_and_labels()
    found = judge(tmp_path, test=given(logits, labels))
    lines = reliability.selected(found, SPLIT, fractions=(0.05,), resamples=RESAMPLES)
    shares = class_probabilities.softmax(logits.astype(np.float32))
    sure, right = class_probabilities.answers(shares, labels)
    told = values(lines)
    assert told["calibration_auc",] == selective.calibration_auc(sure, right)
    accuracy = selective.collaborative_accuracy(sure, right, 0.05)
    assert told["collaborative_accuracy",] == accuracy
    area = selective.area_under_response_rate_accuracy(sure, right)
    assert told["aurra",] == area
    (helped,) = [x for x in lines if x["metric"] == "collaborative_auc"]
    assert helped["value"] == selective.collaborative_auc(sure, right, 0.05)
    low, high = helped["interval"]
    assert low < helped["value"] < high and helped["count"] == len(labels)
    perfect = judge(tmp_path, test=given(9 * np.eye(3), np.arange(3)))
    with pytest.raises(UserError, match="examples of both sides"):
        reliability.selected(perfect, SPLIT, resamples=RESAMPLES)


def test_strangers_have_the_pinned_values_and_intervals(tmp_path):
    logits, labels = logits_and_labels(known=8)
    inside = labels < 8
    found = judge(
        tmp_path,
        test=given(logits[inside], labels[inside]),
        outside=given(logits[~inside]),
    )
    outside = features.Split("digits", "outside")
    lines = reliability.strangers(found, SPLIT, outside, resamples=RESAMPLES)
    pinned = {
        "msp": (0.931260, 0.708934, 0.212500),
        "entropy": (0.934684, 0.707982, 0.190625),
        "max_logit": (0.942446, 0.737719, 0.157812),
    }
    told = values(lines)
    for score, expected in pinned.items():
        got = [told[n, score] for n in ("auroc", "average_precision", "fpr95")]
        assert got == pytest.approx(expected, abs=1e-6)
    low, high = lines[0]["interval"]
    assert (
        low < lines[0]["value"] < high and "BC bootstrap" in lines[0]["interval_kind"]
    )


def test_distances_are_of_the_heads_features_and_need_some_that_vary(tmp_path):
    rng = np.random.default_rng(1)
    labels = np.arange(40) % 2
    vectors = rng.normal(size=(40, 1, 3)) + 4 * labels[:, None, None]
    found = judge(
        tmp_path,
        test=given(vectors[:, 0, :2], labels),
        outside=given(vectors[:, 0, :2] + 9),
    )
    object.__setattr__(found, "source", source(vectors, labels=labels))
    given_splits = (SPLIT, features.Split("digits", "outside"))
    lines = reliability.strangers(
        found, *given_splits, train=SPLIT, resamples=RESAMPLES
    )
    # Both splits have the same vectors here: nothing can be told.
    assert values(lines)["auroc", "mahalanobis"] == 0.5
    flat = np.concatenate([vectors, np.full((40, 1, 1), 7.0)], axis=2)
    object.__setattr__(found, "source", source(flat, labels=labels))
    with pytest.raises(UserError, match="singular"):
        reliability.strangers(found, *given_splits, train=SPLIT, resamples=RESAMPLES)
    # With a ridge it is not; a class that training never shows has no Gaussian.
    object.__setattr__(found, "source", source(flat, labels=labels, classes=3))
    asked = {"train": SPLIT, "ridge": 0.001, "resamples": RESAMPLES}
    lines = reliability.strangers(found, *given_splits, **asked)
    assert values(lines)["auroc", "relative_mahalanobis"] == 0.5
    assert lines[0]["notes"]["classes_without_a_gaussian"] == 1


def test_the_least_sure_images_are_named_to_label(tmp_path):
    shares = np.array([[0.9, 0.1], [0.5, 0.5], [0.6, 0.4], [0.7, 0.3]])
    found = judge(tmp_path, pool=given(np.log(shares), ids=("a", "b", "c/d\n", "e")))
    pool = features.Split("digits", "pool")
    (whole, chosen) = reliability.to_label(found, pool, score="margin", count=2)
    listed = (tmp_path / "to_label-some-0123.txt").read_text().splitlines()
    assert list(map(json.loads, listed)) == ["b", "c/d\n"]
    assert chosen["value"] == pytest.approx(0.9) and whole["value"] < 0.7
    with pytest.raises(UserError, match="5 examples are to be chosen, but 4"):
        reliability.to_label(found, pool, score="chance", count=5)
    with pytest.raises(UserError, match="is none of entropy, margin, msp, chance"):
        reliability.to_label(found, pool, score="density", count=1)


def test_the_score_is_the_mean_of_categories_of_one_tower(tmp_path):
    line = {"classes": 10, "features": {"weights": "w"}, "test": {"split": "a"}}

    def made(measure, metric, value, **settings):
        told = {"metric": metric, "value": value, "settings": settings}
        return line | {"measure": measure} | told

    lines = [
        made("calibration", "accuracy", 0.5, when="before"),
        made("calibration", "accuracy", 0.8, when="before"),  # measured again
        made("calibration", "accuracy", 0.1, when="after"),
        made("calibration", "nll", np.log(10) / 2, when="before"),
        made("calibration", "ece", 0.1, when="before"),
        made("open_set", "auroc", 0.7, score="msp"),
        made("open_set", "auroc", 0.0, score="entropy"),
        line
        | {"probe": "FewShot", "value": 0.4, "metric": "accuracy"}
        | {"settings": {"shots": 5}},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = values(reliability_score.score([str(path)], output_dir=str(tmp_path)))
    assert found == pytest.approx(
        {
            ("prediction",): 0.65,
            ("uncertainty",): 0.8,
            ("adaptation",): 0.4,
            ("score",): (0.65 + 0.8 + 0.4) / 3,
        }
    )
    other = lines[0] | {"features": {"weights": "v"}}
    path.write_text("".join(json.dumps(one) + "\n" for one in (*lines, other)))
    with pytest.raises(UserError, match="lines of 2 towers"):
        reliability_score.score([str(path)], output_dir=str(tmp_path))


def test_resampled_intervals_hold_what_they_say_and_count_what_is_undefined():
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(60):
        x, y = rng.normal(size=40), rng.normal(size=(20))

        def spread(first, second, x=x, y=y):
            return {"spread": float(np.median(x[first]) - np.median(y[second]))}

        interval = intervals.resampled(spread, (40, 20), resamples=200)["spread"]
        assert interval.method == "BC" and interval.low < interval.high
        held += interval.low < 0 < interval.high
    assert 52 <= held <= 60

    def both_sides(rows):
        positive = np.array([1, 0, 0])[rows] > 0
        return {"auroc": out_of_distribution.area_under_roc(rows + 0.0, positive)}

    interval = intervals.resampled(both_sides, (3,), resamples=200)["auroc"]
    assert "of 200 resamples undefined" in interval.method
    with pytest.raises(UserError, match="two images or more"):
        intervals.resampled(both_sides, (1,), resamples=200)


def test_mce_is_of_all_fifteen_and_says_that_it_is_not_published(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50)
    splits = {"test": given(np.eye(2)[labels], labels)}
    errors = {}
    for name in corruptions.NAMES:
        for severity in corruptions.SEVERITIES:
            wrong = rng.random(50) < severity / 6
            answers = np.where(wrong, 1 - labels, labels)
            splits[f"{name} {severity}"] = given(np.eye(2)[answers], labels)
            errors.setdefault(name, []).append(float(wrong.mean()))
    lines = corrupted.robustness(judge(tmp_path, **splits), SPLIT)
    expected = corruption_errors.mean_corruption_error(errors, 0.0)
    told = values(lines)
    for name in ("mce", "relative_mce", "ce/fog"):
        assert told[name,] == pytest.approx(expected[name])
        (one,) = [line for line in lines if line["metric"] == name]
        low, high = one["interval"]
        assert low < one["value"] < high and one["count"] == 50
    assert told["corruption_error", "fog"] == pytest.approx(np.mean(errors["fog"]))
    assert "frost is drawn" in lines[0]["protocol"]["form"]
    with pytest.raises(UserError, match="the nearest is 'fog'"):
        corrupted.robustness(judge(tmp_path, **splits), SPLIT, names=("fogg",))


# --- Fairness ---

LOGISTIC = logistic.LogisticProbe([["pooled"]], (1.0,), 0.25, 100)


def table(path, rows, header="image,Smiling,Male,partition"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]))
    return str(path)


@pytest.fixture(scope="module")
def faces():
    """Vectors of 600 images, whether they smile (which is told) and are male."""
    rng = np.random.default_rng(2)
    male, smiling = rng.random((2, 600)) < 0.5
    vectors = rng.normal(size=(600, 1, 4))
    vectors[:, 0, 0] += 1.5 * smiling + 1.0 * male
    parts = np.arange(600) % 3
    ids = [f"{n:06}.jpg" for n in range(600)]
    return vectors, ids, smiling, male, parts


def measure_faces(faces, path, out, **changes):
    vectors, ids, *_ = faces
    asked = {"target": "Smiling", "groups": ("Male",), "levels": 4}
    asked |= {"resamples": RESAMPLES} | changes
    return fair.parity(
        LOGISTIC,
        source=source(vectors, [f"img/{name}" for name in ids]),
        images=features.Split("faces", "test"),
        table=path,
        output_dir=str(out),
        **asked,
    )


def test_subgroups_and_the_sweep_are_those_of_the_probe_by_hand(faces, tmp_path):
    vectors, ids, smiling, male, parts = faces
    signs = np.where(np.stack([smiling, male], axis=1), 1, -1)
    rows = [(*x[:1], *x[1], x[2]) for x in zip(ids, signs, parts, strict=True)][:-1]
    lines = measure_faces(faces, table(tmp_path / "a.csv", rows), tmp_path)
    assert lines[0]["notes"]["images_without_a_row"] == 1
    kept = np.arange(599)
    train = kept[parts[kept] == 0]
    fit = logistic.fit_logistic(heads_data(vectors[train, 0], smiling[train]), 1.0, 100)
    shares = class_probabilities.softmax(vectors[kept, 0] @ fit.weights + fit.bias)
    test, held = parts[kept] == 2, parts[kept] == 1
    right = (shares.argmax(axis=1) == smiling[kept])[test]
    told = values(lines)
    for name, own in (("Male", male[kept][test]), ("not Male", ~male[kept][test])):
        assert told["accuracy", name] == pytest.approx(right[own].mean())
    sweep = fairness.parity_sweep(
        (shares[held, 1], male[kept][held].astype(int)),
        shares[test, 1],
        male[kept][test].astype(int),
        smiling[kept][test],
        levels=4,
    )
    swept = [x for x in lines if x["metric"] == "accuracy_at_limit"]
    got = [x["value"] for x in swept]
    np.testing.assert_allclose(got, sweep.accuracy, atol=1e-5)
    thresholds = [list(x["settings"]["thresholds"].values()) for x in swept]
    np.testing.assert_allclose(thresholds, sweep.thresholds, atol=1e-5)
    assert sweep.difference[0] < told["parity_difference",] / 2
    assert is_picture(tmp_path / lines[0]["pictures"][0])
    told = (ids, smiling, male)
    # 0 for no, and no column of parts: the images are shared out by the seed.
    rows = [(name, int(a), int(b)) for name, a, b in zip(*told, strict=True)]
    path = table(tmp_path / "b.csv", rows, "file,Smiling,Male")
    (first, *_) = measure_faces(faces, path, tmp_path)
    assert first["notes"]["images_of_train"] == 360


def test_small_subgroups_are_named_and_their_gap_has_a_width(faces, tmp_path):
    _, ids, smiling, male, parts = faces
    rows = [
        (name, int(a), int(b), int(part))
        for name, a, b, part in zip(ids, smiling, male, parts, strict=True)
        if part < 2 or ids.index(name) < 30
    ]
    path = table(tmp_path / "few.csv", rows)
    lines = measure_faces(faces, path, tmp_path)
    own = male[:30][parts[:30] == 2]
    small = {"not Male": int(np.sum(~own)), "Male": int(np.sum(own))}
    assert lines[0]["notes"]["subgroups_of_fewer_than_30_test_images"] == small
    by_name = {
        (x["metric"], x["settings"].get("subgroup", "")): x
        for x in lines
        if "limit" not in x["settings"]
    }
    for name in ("accuracy_gap", "parity_difference"):
        low, high = by_name[name, ""]["interval"]
        assert high - low > 0.3 and low <= by_name[name, ""]["value"] <= high
    for group, count in small.items():
        assert by_name["ece", group]["count"] == count
        # As large as that of a head without any error, which is said beside it.
        assert by_name["ece_by_chance", group]["value"] > 0.1


def heads_data(vectors, labels):
    from vit22b_transfer.experiments.labelled import Labelled

    return Labelled(vectors, labels.astype(np.int64), 2)


@pytest.mark.parametrize(
    "change, asked, message",
    [
        ({}, {"target": "Smile"}, "no attribute 'Smile'; nearest: Smiling"),
        ({}, {"groups": ("Smiling",)}, "and not the target"),
        ({1: 1}, {}, "Smiling is the same for all images of the part train"),
        ({2: -1}, {}, "subgroup 'Male' has no image in the part validation"),
        ({2: 0, (0, 2): -1}, {}, "Male has the values"),
        ({3: 0}, {}, "the part validation has no image"),
        ({(5, 1): "yes"}, {}, "line 7: 'yes' is no attribute"),
        ({(5, 1): 2}, {}, "Smiling has the values"),
        ({(5, 0): "000004.jpg"}, {}, "line 7: 000004.jpg is there twice"),
        ({(5, 3): -1}, {}, "a partition is 0, 1 or 2"),
        ({0: "other.jpg"}, {}, "there twice"),
    ],
)
def test_tables_that_say_too_little_are_refused(
    faces, tmp_path, change, asked, message
):
    _, ids, smiling, male, parts = faces
    rows = [
        [name, int(a) * 2 - 1, int(b) * 2 - 1, p]
        for name, a, b, p in zip(ids, smiling, male, parts, strict=True)
    ]
    for place, value in change.items():
        if isinstance(place, tuple):
            rows[place[0]][place[1]] = value
        else:
            for row in rows:
                row[place] = value
    with pytest.raises(UserError, match=message):
        measure_faces(faces, table(tmp_path / "a.csv", rows), tmp_path, **asked)


def test_shares_must_leave_images_in_each_part():
    parts = attributes.shared_out(10, (0.5, 0.2), 0)
    np.testing.assert_array_equal(np.bincount(parts), [5, 2, 3])
    with pytest.raises(UserError, match="leave a part without any"):
        attributes.shared_out(3, (0.5, 0.5), 0)


# --- Human observers ---


def cues(answers, names=sixteen_classes.NAMES):
    """Logits of the sixteen for these answers."""
    return np.array([[9.0 * (name == answer) for name in names] for answer in answers])


IDS = (
    "cue-conflict/cat/cat1-dog2.png",
    "cue-conflict/cat/cat2-car1.png",
    "cue-conflict/dog/dog1-cat3.png",
    "cue-conflict/dog/dog4-dog1.png",
    "cue-conflict/car/car1-oven1.png",
    "sketch/oven/a.png",
    "sketch/cat/b.png",
)
ANSWERS = ("cat", "car", "cat", "dog", "knife", "oven", "dog")


def humans_folder(folder, answers_of):
    """The benchmark's files, of people who answer so to the pictures of `IDS`."""
    for person, answers in answers_of.items():
        for name in ("cue-conflict", "sketch"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            path = folder / name / f"{name}_subject-{person}_session_1.csv"
            rows = [
                f"subject-{person},1,{n},1.0,{answer},{image.split('/')[1]},0,"
                + image.split("/")[2]
                for n, (image, answer) in enumerate(zip(IDS, answers, strict=True))
                if image.startswith(name)
            ]
            header = "subj,session,trial,rt,object_response,category,condition,"
            path.write_text("\n".join([header + "imagename", *rows]) + "\n")
    return str(folder)


def test_shape_bias_and_consistency_are_those_of_the_responses(tmp_path):
    found = given(cues(ANSWERS), ids=IDS, head=sixteen_classes.NAMES)
    people = {"01": ANSWERS, "02": ("cat", "cat", "dog", "dog", "car", "oven", "cat")}
    folder = humans_folder(tmp_path / "raw", people)
    mine, images = judge(tmp_path, test=found), SPLIT
    lines = humans.alignment(
        mine, images, observer="me", humans=folder, resamples=RESAMPLES
    )
    told = values(lines)
    # One shape, two textures, one neither; dog4-dog1 does not say.
    assert told["shape_bias", "all"] == pytest.approx(1 / 3)
    assert told["shape_bias", "cat"] == pytest.approx(1 / 2)
    assert told["shape_bias", "car"] is None
    assert told["accuracy", "cue-conflict"] == pytest.approx(2 / 5)
    assert told["ood_accuracy",] == pytest.approx((2 / 5 + 1 / 2) / 2)
    # The same answers: 1; with the perfect one chance is expected: 0.
    assert told["error_consistency", "sketch"] == pytest.approx((1 + 0) / 2)
    assert told["accuracy_difference", "sketch"] == pytest.approx((0 + 0.25) / 2)
    assert told["observed_consistency", "cue-conflict"] == pytest.approx((1 + 0.4) / 2)
    written = tmp_path / "sketch_me_session-1.csv"
    rows = list(csv.DictReader(written.open()))
    assert [row["object_response"] for row in rows] == ["oven", "dog"]
    assert is_picture(tmp_path / lines[0]["pictures"][0])
    (tmp_path / "raw" / "sketch").rename(tmp_path / "raw" / "silhouette")
    with pytest.raises(UserError, match="sketch has 0 files"):
        humans.alignment(mine, images, observer="me", humans=folder)


def test_other_pictures_of_people_and_other_classes_are_refused(tmp_path):
    found = given(cues(ANSWERS), ids=IDS, head=sixteen_classes.NAMES)
    folder = humans_folder(tmp_path / "raw", {"01": ANSWERS})
    less = given(cues(ANSWERS[:-1]), ids=IDS[:-1], head=sixteen_classes.NAMES)
    with pytest.raises(UserError, match="1 pictures were seen by one observer alone"):
        humans.alignment(judge(tmp_path, test=less), SPLIT, observer="m", humans=folder)
    plain = given(cues(ANSWERS), ids=IDS)
    with pytest.raises(UserError, match="neither ILSVRC's 1000 nor the sixteen"):
        humans.alignment(judge(tmp_path, test=plain), SPLIT, observer="m")
    path = tmp_path / "map.json"
    path.write_text(json.dumps({n: [i] for i, n in enumerate(sixteen_classes.NAMES)}))
    lines = humans.alignment(
        judge(tmp_path, test=plain), SPLIT, observer="m", sixteen=str(path)
    )
    assert values(lines)["shape_bias", "all"] == pytest.approx(1 / 3)
    path.write_text(json.dumps({"cat": [1]}))
    for ids, message in (
        (("other/cat/a.png",) * 7, "none of the data sets"),
        (("cue-conflict/cats/a.png",) * 7, "does not say condition and class"),
    ):
        wrong = given(cues(ANSWERS), ids=ids, head=sixteen_classes.NAMES)
        with pytest.raises(UserError, match=message):
            humans.alignment(judge(tmp_path, test=wrong), SPLIT, observer="m")
    with pytest.raises(
        UserError,
        match="a list of one or more class ids from 0 to 15; missing: airplane",
    ):
        humans.alignment(
            judge(tmp_path, test=plain), SPLIT, observer="m", sixteen=str(path)
        )
    with pytest.raises(UserError, match="observer='../m' names files"):
        humans.alignment(judge(tmp_path, test=found), SPLIT, observer="../m")


def test_consistencies_are_those_of_the_pure_function():
    rng = np.random.default_rng(0)
    model, people = rng.random(30) < 0.6, rng.random((3, 30)) < 0.7
    people[2] = model
    pairs = [human_alignment.consistency(model, person) for person in people]
    expected = [
        np.mean([(model.mean() - person.mean()) ** 2 for person in people]),
        np.mean([pair.observed for pair in pairs]),
        np.mean([pair.error for pair in pairs]),
    ]
    np.testing.assert_allclose(humans._consistencies(model, people), expected)


# --- Perceptual similarity ---

# Cosines with the reference: p0, p1.
TRIPLETS = {"cnn/{}/1": (0.9, 0.1), "cnn/{}/2": (0.2, 0.6), "color/{}/1": (0.5, 0.5)}
SHARES = (0.2, 1.0, 0.7)


def triplets(folder):
    vectors, ids = [], []
    for (name, cosines), share in zip(TRIPLETS.items(), SHARES, strict=True):
        for side, cosine in zip(("ref", "p0", "p1"), (1.0, *cosines), strict=True):
            vectors.append([[3 * cosine, 3 * np.sqrt(1 - cosine**2)]])
            ids.append(f"{name.format(side)}.png")
        path = folder / f"{name.format('judge')}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.array([share], np.float32))
    return np.array(vectors), ids


def two_afc(folder, vectors, ids, **changes):
    asked = {"judgements": str(folder), "distance": "pooled"} | changes
    return perceptual.similarity(
        source=source(vectors, ids),
        images=features.Split("bapps", "test"),
        output_dir=str(folder),
        **asked,
    )


def test_the_nearer_picture_scores_the_people_who_agree(tmp_path):
    vectors, ids = triplets(tmp_path)
    lines = two_afc(tmp_path, vectors, ids)
    told = values(lines)
    # p0 is nearer: 0.8 agree; p1: all; neither: a half.
    assert told["two_afc",] == pytest.approx((0.8 + 1.0 + 0.5) / 3)
    assert told["two_afc", "cnn"] == pytest.approx(0.9)
    expected = np.mean([0.04 + 0.64, 1.0, 0.49 + 0.09])
    assert told["people",] == pytest.approx(expected)
    assert lines[0]["protocol"]["distance"] == "1 - cosine, pooled"


@pytest.mark.parametrize(
    "content, message",
    [
        (np.array([{}]), "shape .* of object"),
        (np.array([0.2, 0.4]), "one number from 0 to 1"),
        (np.array(1.5), "holds 1.5"),
        (np.array("a"), "one number from 0 to 1"),
        (None, "missing or larger"),
    ],
    ids=["pickle", "two", "large", "text", "none"],
)
def test_judgements_that_are_no_share_are_refused(tmp_path, content, message):
    vectors, ids = triplets(tmp_path)
    path = tmp_path / "cnn" / "judge" / "2.npy"
    path.unlink()
    if content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match=message):
        two_afc(tmp_path, vectors, ids)


def test_pictures_that_make_no_triplet_are_refused(tmp_path):
    vectors, ids = triplets(tmp_path)
    with pytest.raises(UserError, match="'cnn/p0/1.png' has no picture .* in p1/"):
        two_afc(tmp_path, vectors[[0, 1]], ids[:2])
    with pytest.raises(UserError, match="lies in none of the folders ref, p0"):
        two_afc(tmp_path, vectors[:1], ["cnn/reference/1.png"])
    vectors[4] = np.nan
    with pytest.raises(UserError, match="not finite"):
        two_afc(tmp_path, vectors, ids)
    with pytest.raises(UserError, match="none of pooled, mean, tokens"):
        two_afc(tmp_path, vectors, ids, distance="lpips")


# --- Before a tower is run ---


def unread(folder, found):
    """A judge, and a source, whose tower must not be run."""

    def run(*arguments, **options):
        raise AssertionError("the tower is run on everything")

    given_judge = judge(folder, test=found)
    before = given_judge.before(SPLIT)
    object.__setattr__(given_judge, "before", lambda split: before)
    object.__setattr__(given_judge, "of", run)
    given_source = source(np.zeros((len(found.ids), 1, 2)), found.ids)
    object.__setattr__(given_source, "read", run)
    return given_judge, given_source


def test_what_needs_no_tower_is_refused_before_one_is_run(tmp_path):
    found = given(
        np.zeros((3, 4)), ids=("cnn/ref/1.png", "cnn/p0/1.png", "cnn/p1/1.png")
    )
    mine, images = unread(tmp_path, found)
    (tmp_path / "real.json").write_text("[[0]]")
    rows = [(name, n, 0, 2 * n) for n, name in enumerate(found.ids[:2])]
    path = table(tmp_path / "faces.csv", rows)
    asked = {"images": SPLIT, "output_dir": str(tmp_path)}
    for message, call in (
        ("ILSVRC", lambda: variants.accuracy(mine, SPLIT, labels="objectnet")),
        (
            "have the file name of another",
            lambda: variants.several_labels(
                mine, SPLIT, judgements=str(tmp_path / "real.json")
            ),
        ),
        (
            "neither ILSVRC's 1000 nor the sixteen",
            lambda: humans.alignment(mine, SPLIT, observer="me"),
        ),
        (
            "judge/1.npy is missing",
            lambda: perceptual.similarity(
                source=images, judgements=str(tmp_path), distance="mean", **asked
            ),
        ),
        (
            "the part validation has no image",
            lambda: fair.parity(
                LOGISTIC,
                source=images,
                table=path,
                target="Smiling",
                groups=("Male",),
                **asked,
            ),
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()


# --- Lines and pictures ---


def test_numbers_that_are_not_finite_are_null_in_a_line(tmp_path, capsys):
    found = [measured.Finding("bias", float("nan"), settings={"category": "[b]cat"})]
    told = {"protocol": {"by": "me"}, "facts": {"features": {}}, "notes": {"left": 2}}
    lines = measured.report("some", found, output_dir=str(tmp_path), **told)
    assert lines[0]["value"] is None and lines[0]["interval"] is None
    shown = capsys.readouterr().out
    assert "category [b]cat" in shown and "left: 2" in shown


def test_an_overlay_is_hot_where_weights_are_large():
    image = np.full((8, 8, 3), 100, np.uint8)
    weights = np.zeros((2, 2))
    weights[0, 0] = 3.0
    found = measure_pictures.overlay(image, weights)
    assert found.shape == (8, 24, 3)
    np.testing.assert_array_equal(found[:, :8], image)
    assert found[0, 8].min() == 255 and found[7, 15].max() == 0
    assert found[0, 16].min() == 178 and found[7, 23].max() == 50
