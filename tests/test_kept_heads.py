"""Heads that are learned once: their files, and their logits of any split."""

import dataclasses
import functools
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_classifier
import tiny_models
from frozen_towers import SIZE, TOWER, write_tower
from PIL import Image
from shell_commands import no_tasks
from tiny_runs import ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.data import streams
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.data.sources import ImageFolderSource
from vit22b_transfer.evaluation.class_subsets import OBJECTNET
from vit22b_transfer.experiments import (
    corrupted,
    features,
    heads,
    judged,
    logistic,
    measured,
    probe,
    saliency,
    variants,
)
from vit22b_transfer.recipes import shipped

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

PROBE = logistic.LogisticProbe([["pooled"]], (1e-2, 1.0), 0.25, 50)
SPLITS = ("train", "validation")


def task(split):
    return features.Split("stripes", split)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of four classes, a class list, and a tower."""
    root = tmp_path_factory.mktemp("heads")
    tiny_classifier.draw_folders(root, train=5, validation=3, size=32)
    write_tower(root / "tower")
    return root


@pytest.fixture(scope="module", autouse=True)
def tasks(folder):
    with no_tasks():
        shipped.offer_tasks()
        from tasks.classification import register_classification

        source = ClassFolderSource(
            {name: folder / name for name in SPLITS}, classes=folder / "classes.txt"
        )
        register_classification("stripes", source)
        plain = ImageFolderSource({"test": folder / "validation"})
        register_classification("unlabelled", plain, metric_fns=())
        yield register_classification


@pytest.fixture(scope="module")
def source(folder, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("features"))
    return features.FeatureSource(
        TOWER, str(folder / "tower"), path, ONE_DEVICE, SIZE, 8
    )


@pytest.fixture(scope="module")
def kept(source, tmp_path_factory):
    """A directory, and the file of the head in it."""
    out = str(tmp_path_factory.mktemp("kept"))
    file = probe.kept_head(PROBE, source=source, split=task("train"), directory=out)
    return out, file


@pytest.fixture
def judge(kept, source):
    return judged.Judge(kept[1], source, kept[0])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_head_is_learned_once_and_judged_as_the_probe_judges(
    source, kept, tmp_path, monkeypatch, capsys
):
    def sets(name):
        split = source.read("stripes", name, ["pooled"])
        return {("pooled",): split.joined(["pooled"])}

    expected = {n: PROBE.run(sets("train"), sets(n)) for n in ("validation", "train")}
    monkeypatch.setattr(logistic, "fit_logistic", None)
    for name, (outcome,) in expected.items():
        (found,) = probe.run_probe(
            PROBE,
            source=source,
            train=task("train"),
            test=task(name),
            output_dir=kept[0],
        )
        np.testing.assert_array_equal(found.scores, outcome.scores)
        assert found.settings["strength"] == outcome.settings["strength"]
    assert capsys.readouterr().out.count("is there: nothing is learned") == 2
    with pytest.raises(TypeError):  # another protocol, and tower, is learned
        other = dataclasses.replace(PROBE, max_iterations=49)
        probe.kept_head(
            other, source=source, split=task("train"), directory=str(tmp_path)
        )


def test_the_file_is_the_head_and_logits_are_its_product(source, kept, judge):
    head = heads.read(kept[1])
    assert head.class_names == ("falling", "flat", "rising", "upright")
    assert head.facts["train"]["images"] == 20 and head.facts["settings"]["strength"]
    split = source.read("stripes", "validation", ["pooled"])
    found = judge.of(task("validation"))
    expected = split.flat(["pooled"]) @ head.arrays["kernel"] + head.arrays["bias"]
    np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    np.testing.assert_array_equal(found.labels_of_head(), split.labels)
    assert found.ids == split.ids and found.ids[0] == "falling/000.png"
    again = judge.of(task("validation"))
    np.testing.assert_array_equal(again.logits, found.logits)
    unlabelled = judge.of(features.Split("unlabelled", "test"), labelled=False)
    np.testing.assert_array_equal(unlabelled.logits, found.logits)
    assert set(unlabelled.labels) == {-1}


def test_another_resolution_is_judged_and_another_tower_refused(
    judge, source, folder, tmp_path
):
    larger = dataclasses.replace(source, image_size=(32, 32))
    found = dataclasses.replace(judge, source=larger).of(task("validation"))
    smaller = judge.of(task("validation"))
    assert found.path != smaller.path
    assert np.abs(found.logits - smaller.logits).max() > 1e-3
    write_tower(tmp_path / "other", seed=1)
    other = dataclasses.replace(source, checkpoint=str(tmp_path / "other"))
    with pytest.raises(UserError, match="learned on features of another tower: weig"):
        dataclasses.replace(judge, source=other).of(task("validation"))


def test_logits_that_were_cut_off_are_said(judge, tmp_path):
    mine = dataclasses.replace(judge, output_dir=str(tmp_path))
    path = mine.of(task("validation")).path
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content[:-40])
    with pytest.raises(UserError, match="stripes-validation-.* no npz file, or trunc"):
        mine.of(task("validation"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kernel": np.ones((32, 3))}, "linear of 4 classes with the arrays"),
        ({"kernel": np.full((32, 4), np.nan)}, "kernel holds no finite numbers"),
        ({"kernel": np.array([{}])}, "pickled Python objects"),
        ({"facts": heads.as_bytes({"kind": "linear"})}, "classes is missing"),
        ({"facts": np.frombuffer(b"{", np.uint8)}, "malformed JSON"),
        ({"facts": np.ones(3)}, "says nothing of itself"),
        ({"facts": heads.as_bytes([1])}, "says of itself: "),
        (None, "no npz file, or truncated"),
    ],
    ids=["shape", "NaN", "pickle", "fields", "JSON", "numbers", "list", "no zip"],
)
def test_what_is_no_head_is_refused(kept, tmp_path, changes, message):
    path = tmp_path / "head.npz"
    if changes is None:
        path.write_bytes(b"PK\3\4 no archive")
    else:
        with np.load(kept[1]) as archive:
            np.savez(path, **(dict(archive) | changes))
    with pytest.raises(UserError, match=message):
        heads.read(str(path))


def test_class_lists_must_be_one_or_ids_of_the_heads(judge):
    found = judge.of(task("validation"))

    def labels(names, **fields):
        names = None if names is None else tuple(names)
        changed = dataclasses.replace(found, class_names=names, **fields)
        return changed.labels_of_head()

    ids = np.array([int(n) for n in ("0", "1", "10", "2")])[found.labels]
    with pytest.raises(UserError, match="id 0 is '0' there, 'falling' here"):
        labels(("0", "1", "10", "2"))  # the head has no class 10
    swapped = labels(("3", "1", "2", "0"))
    np.testing.assert_array_equal(swapped, np.array([3, 1, 2, 0])[found.labels])
    assert ids.max() == 10
    with pytest.raises(UserError, match="another class list .*id 1 is 'even' there"):
        labels(("falling", "even", "rising", "upright"))
    with pytest.raises(UserError, match="5 names there, 4 here"):
        labels((*found.class_names, "more"), num_classes=5)
    np.testing.assert_array_equal(labels(None), found.labels)
    with pytest.raises(UserError, match="has 5 classes, the head 4"):
        labels(None, num_classes=5)
    with pytest.raises(UserError, match="labels are no class"):
        labels(None, labels=found.labels + 1)


def test_accuracy_of_another_split_is_a_line_with_its_interval(judge, tmp_path):
    mine = dataclasses.replace(judge, output_dir=str(tmp_path))
    (line,) = variants.accuracy(mine, task("validation"))
    found = mine.of(task("validation"))
    right = found.logits.argmax(axis=1) == found.labels
    assert line["value"] == right.mean()
    low, high = line["interval"]
    assert low < line["value"] < high and "Wilson" in line["interval_kind"]
    assert line["head"]["train"]["split"] == "train"
    assert line["test"] == {"task": "stripes", "split": "validation"}
    assert lines(tmp_path / measured.RESULTS_FILE) == [line]


def test_a_frame_is_cut_off_before_a_picture_is_resized(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    inner = rng.integers(0, 255, (8, 12, 3), np.uint8)
    framed = np.full((12, 16, 3), (255, 0, 0), np.uint8)
    framed[2:-2, 2:-2] = inner
    for name in ("chair", "zebra"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(framed).save(tmp_path / "images" / name / "a.png")
    (tmp_path / "images" / "chair" / "b.png").write_bytes(b"no picture")
    (tmp_path / "classes.txt").write_text("".join(f"{n}\n" for n in OBJECTNET))
    monkeypatch.setenv("OBJECTNET_FOLDER", str(tmp_path / "images"))
    monkeypatch.setenv("OBJECTNET_CLASSES", str(tmp_path / "classes.txt"))
    with no_tasks():
        shipped.offer_tasks()
        importlib.import_module("tasks.objectnet")
        task = registered.task_named("objectnet")
        lengths = {"images": (8, 12), "labels": 1}
        examples = list(streams.as_numpy(streams.task_examples(task, "test", lengths)))
        assert registered.skipped_text("objectnet", "test") == "1 x unknown class"
    first, second = examples  # the zebra is none of the 113 folders
    np.testing.assert_array_equal(first["images"], inner)
    assert first["labels"] == [list(OBJECTNET).index("chair")]
    assert b"" != second["image_error"] and not len(second["labels"])


def test_corruptions_are_made_once_and_each_picture_by_its_own_chance(
    judge, source, monkeypatch, tmp_path
):
    larger = dataclasses.replace(source, image_size=(32, 32))
    mine = dataclasses.replace(judge, source=larger, output_dir=str(tmp_path))
    given = {"names": ("shot_noise",), "severities": (2, 5)}
    reads = []
    original = features.FeatureSource.parameters

    def counted(self, *arguments):
        reads.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(features.FeatureSource, "parameters", counted)
    first = corrupted.robustness(mine, task("validation"), **given)
    assert len(reads) <= 2  # of clean pictures, and of all others
    monkeypatch.setattr(features.FeatureSource, "parameters", None)
    again = corrupted.robustness(mine, task("validation"), **given)
    assert again == first and "mce" not in {line["metric"] for line in first}
    errors = {
        (line["settings"].get("corruption"), line["settings"].get("severity")): line
        for line in first
        if line["metric"] == "error"
    }
    assert len(errors) == 3
    change = corrupted.change("shot_noise", 5)
    found = larger.read("stripes", "validation", ["pooled"], change=change)
    clean = larger.read("stripes", "validation", ["pooled"])
    assert np.abs(found.vectors - clean.vectors).max() > 1e-3
    head = heads.read(mine.head)
    missed = head.logits(found.flat(["pooled"]), "x").argmax(axis=1) != clean.labels
    assert errors["shot_noise", 5]["value"] == missed.mean()
    assert (tmp_path / first[0]["pictures"][0]).read_bytes()[:4] == b"\x89PNG"
    small = dataclasses.replace(mine, source=source)
    with pytest.raises(UserError, match="sides need 32 pixels"):
        corrupted.robustness(small, task("validation"), **given)


# --- Maps over images ---


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def weights_of(params, query, key, norm):
    """Attention of queries [Q, E] to keys [K, E], the mean over four heads."""
    query, key = (
        (
            x @ np.asarray(params[name]["kernel"])
            + np.asarray(params[name].get("bias", 0.0))
        ).reshape(len(x), 4, -1)
        for name, x in (("query", query), ("key", key))
    )
    if norm:
        query, key = (
            x
            / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
            * np.asarray(params[f"{name}_norm"]["scale"])
            for name, x in (("query", query), ("key", key))
        )
    logits = np.einsum("qnh,knh->nqk", query, key) / np.sqrt(query.shape[-1])
    return softmax(logits).mean(axis=0)


@pytest.fixture(scope="module")
def maps(source):
    """Two pictures, the tower over them, and what draws maps."""
    pixels, _ = source.pictures("unlabelled", "test", 2)
    run = saliency._Run(source, pixels.shape[1:])
    apply = functools.partial(TOWER.build().apply, intermediates=("stem",))
    output = tiny_models.jit(apply)({"params": run.params}, jnp.asarray(pixels))
    return pixels, run, output


def test_rollout_and_pooling_weights_are_those_of_numpy(maps):
    pixels, run, output = maps
    pooling, rollout = run.pooling_weights(pixels), run.rollout(pixels)
    for number in range(2):
        block, end = run.params["layers_0"], run.params["map"]["attention"]
        tokens = np.asarray(output.tokens[number])
        probe_vector = np.asarray(run.params["map"]["probe"]["embedding"])
        expected = weights_of(end, probe_vector.reshape(1, -1), tokens, False)[0]
        np.testing.assert_allclose(pooling[number].ravel(), expected, atol=1e-5)
        x = np.asarray(output.intermediates["stem"][number])
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        x = x * np.asarray(block["norm"]["scale"])
        own = weights_of(block["attention"], x, x, True)
        rolled = expected @ (0.5 * own + 0.5 * np.eye(4))
        np.testing.assert_allclose(rollout[number].ravel(), rolled, atol=1e-5)


def test_gradients_are_what_a_pixel_changes(maps):
    pixels, run, _ = maps
    found = run.gradients(pixels, None)[0]
    apply = tiny_models.jit(TOWER.build().apply)

    def score(image):
        pooled = np.asarray(apply({"params": run.params}, image[None]).pooled)
        return float(np.sum(pooled.astype(np.float64) ** 2) / 2)

    image = pixels[0].clip(1, 254)
    for row, column in ((3, 5), (9, 14)):
        slopes = []
        for channel in range(3):
            more, less = image.copy(), image.copy()
            more[row, column, channel] += 1
            less[row, column, channel] -= 1
            # One step of a pixel is 2 / 255 of what is normalised to [-1, 1].
            slopes.append((score(more) - score(less)) / (2 * 2 / 255))
        assert found[row, column] == pytest.approx(np.abs(slopes).max(), rel=0.05)


def test_overlays_are_pictures_and_what_a_tower_has_not_is_said(source, kept, tmp_path):
    where = {"source": source, "images": features.Split("unlabelled", "test")}
    where |= {"count": 2, "output_dir": str(tmp_path)}
    found = saliency.overlays(methods=("gradient", "rollout"), head=kept[1], **where)
    assert [line["settings"]["method"] for line in found] == ["gradient", "rollout"]
    assert all(0 < line["value"] <= 1 for line in found)
    for name in found[0]["pictures"]:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    pooled = dataclasses.replace(TOWER, pooling="gap")
    other = where | {"source": dataclasses.replace(source, tower=pooled)}
    with pytest.raises(UserError, match="no attention pooling but 'gap'"):
        saliency.overlays(methods=("map_attention",), **other)
    with pytest.raises(UserError, match="valid are gradient, map_attention, rollout"):
        saliency.overlays(methods=("roll",), **where)
    with pytest.raises(UserError, match="a head is for the method 'gradient'"):
        saliency.overlays(methods=("rollout",), head=kept[1], **where)
