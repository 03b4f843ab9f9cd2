"""Frozen features of labelled splits, and the command that probes them."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_classifier
import tiny_models
from frozen_towers import GIN, SIZE, TOWER, pairs_model, write_tower
from shell_commands import no_tasks, use_one_device
from tiny_runs import ONE_DEVICE

from vit22b_transfer import UserError, cli
from vit22b_transfer.data.labelled_sources import (
    LabelFiles,
    LabelFileSource,
)
from vit22b_transfer.experiments import (
    attentive,
    features,
    heads,
    probe,
    zero_shot,
)
from vit22b_transfer.experiments import vectors as named
from vit22b_transfer.inference import cache_features
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.recipes import shipped

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

VECTORS = ("pooled", "mean", "block_0_mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of pictures, one of which is broken, a class list, and a tower."""
    root = tmp_path_factory.mktemp("probes")
    tiny_classifier.draw_folders(root, train=5, validation=3)
    broken = root / "train" / "rising" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return root


@pytest.fixture(scope="module")
def params(folder):
    return write_tower(folder / "tower")


@pytest.fixture(scope="module", autouse=True)
def tasks(folder):
    with no_tasks():
        shipped.offer_tasks()
        yield tiny_classifier.register_folders("stripes", folder)


@pytest.fixture(scope="module")
def shared(folder, params, tmp_path_factory):
    """A source whose features are made by the first test that asks for them."""
    path = str(tmp_path_factory.mktemp("features"))
    checkpoint = str(folder / "tower")
    return features.FeatureSource(TOWER, checkpoint, path, ONE_DEVICE, SIZE, 8, None, 4)


@pytest.fixture
def source(shared, tmp_path):
    return dataclasses.replace(shared, directory=str(tmp_path))


@pytest.fixture(scope="module")
def pixels(folder):
    """Images of the training split that can be read, in order, and their classes."""
    from PIL import Image

    paths = sorted((folder / "train").rglob("*.png"))
    paths = [path for path in paths if path.parts[-2:] != ("rising", "000.png")]
    names = (folder / "classes.txt").read_text().split()
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    return images, [names.index(path.parent.name) for path in paths]


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*.array_r*")}


def test_features_are_what_the_tower_says_of_each_image(shared, params, pixels):
    found = shared.read("stripes", "train", VECTORS)
    images, labels = pixels
    output = tiny_models.jit(
        functools.partial(TOWER.build().apply, intermediates=("block_0",))
    )({"params": params}, images)
    expected = [output.pooled, output.tokens.mean(1), output.intermediates["block_0"]]
    expected[2] = expected[2].mean(1)
    np.testing.assert_allclose(found.vectors, np.stack(expected, axis=1), atol=1e-5)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.num_classes == 4
    assert found.notes == {"stripes train: unreadable_images": 1}
    joined = found.joined(("mean", "pooled"))
    np.testing.assert_array_equal(joined.features[:, 32:], found.vectors[:, 0])


def test_all_tokens_stay_on_disk_and_are_read_when_asked_for(shared, params, pixels):
    found = shared.read("stripes", "train", None)
    output = tiny_models.jit(TOWER.build().apply)({"params": params}, pixels[0])
    some = np.array([7, 2])
    np.testing.assert_allclose(found.vectors[some], output.tokens[some], atol=1e-5)
    assert found.vectors.shape == (4, 32)


def test_the_tower_runs_once_and_what_was_stopped_ends_with_the_same_bytes(
    shared, source, monkeypatch, capsys
):
    first = shared.read("stripes", "train", VECTORS)
    made = shared._key("stripes", "train", VECTORS, 4).directory
    whole = files(made)
    assert len(whole) == 5
    with monkeypatch.context() as patch:
        patch.delattr(cache_features, "write_split")
        again = shared.read("stripes", "train", VECTORS)
        # Of vectors that another probe asked for, these are some.
        less = shared.read("stripes", "train", ("mean", "pooled"))
    assert first.vectors.tobytes() == again.vectors.tobytes()
    np.testing.assert_array_equal(less.vectors, first.vectors[:, [1, 0]])
    shutil.copytree(made, Path(source.directory) / Path(made).name)
    lost, cut = sorted(Path(source.directory).rglob("*.array_record"))[1:3]
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-50])
    capsys.readouterr()
    source.read("stripes", "train", VECTORS)
    assert files(source.directory) == whole
    assert "3 of 5 shards are there" in capsys.readouterr().out


def test_eight_devices_give_the_same_features_but_for_rounding(shared, source):
    one = shared.read("stripes", "train", VECTORS)
    mesh = Partitioning(data=4, model=2)
    many = dataclasses.replace(source, partitioning=mesh)
    many = many.read("stripes", "train", VECTORS)
    np.testing.assert_allclose(one.vectors, many.vectors, atol=1e-5)
    np.testing.assert_array_equal(one.labels, many.labels)


def test_another_tower_or_pooling_or_vector_has_features_of_its_own(source, tmp_path):
    write_tower(tmp_path / "other", seed=1)

    def directory(vectors=("pooled",), num_classes=4, **fields):
        changed = dataclasses.replace(source, **fields)
        return changed._key("stripes", "train", vectors, num_classes).directory

    found = [
        directory(),
        directory(checkpoint=str(tmp_path / "other")),
        directory(tower=dataclasses.replace(TOWER, pooling="gap")),
        directory(image_size=(24, 24)),
        directory(vectors=("mean",)),
        directory(vectors=None),
    ]
    assert len({*found}) == len(found)
    assert directory(num_classes=5, batch_size=16) == found[0]


def test_the_class_token_is_the_first_token_where_there_is_one():
    config = tiny_models.tower_config(depth=1, pooling="cls", num_registers=1)
    images = tiny_models.images(2, *SIZE, 3)
    params = tiny_models.random_params(config.build(), images)
    apply = functools.partial(config.build().apply, intermediates=("block_0",))
    output = tiny_models.jit(apply)({"params": params}, images)
    found = named.stacked(output, names=("block_0_first", "block_0_mean"), patches=4)
    block = output.intermediates["block_0"]
    assert block.shape[1] == 6
    np.testing.assert_array_equal(found[:, 0], block[:, 0])
    np.testing.assert_allclose(found[:, 1], block[:, 2:].mean(1), atol=1e-6)


@pytest.mark.parametrize(
    "fields, vectors, message",
    [
        ({}, ("block_0_maen",), "no vector 'block_0_maen'; nearest: block_0_mean"),
        ({}, ("block_1_mean",), "no vector 'block_1_mean'"),
        ({}, ("mean", "mean"), "each once"),
        ({}, ("block_0_first",), "the tower has none: .* Take block_0_mean"),
        ({"num_classes": 5}, VECTORS, "has 4 names, but NUM_CLASSES is 5"),
        ({"image_size": (20, 16)}, VECTORS, "20x16 but patch_size 8 needs"),
        ({"batch_size": 7, "partitioning": Partitioning()}, VECTORS, "multiple of 8"),
        ({"checkpoint": "/nowhere"}, VECTORS, "nowhere"),
        ({"tower": dataclasses.replace(TOWER, pooling="none")}, VECTORS, "no pooled"),
        ({"tower": tiny_models.tower_config(depth=2)}, VECTORS, "layers_1"),
    ],
)
def test_what_does_not_fit_is_said_before_or_without_a_file(
    source, fields, vectors, message
):
    wrong = dataclasses.replace(source, **fields)
    with pytest.raises(UserError, match=message):
        wrong.read("stripes", "validation", vectors)
    assert not files(source.directory)


def test_several_labels_of_an_image_are_refused_and_none_are_counted(
    source, folder, tasks
):
    names = ["flat/000.png", "flat/001.png", "rising/002.png"]

    def register(name, labels):
        lines = [
            json.dumps({"file_name": file, "labels": some})
            for file, some in zip(names, labels, strict=True)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines))
        files = {"train": LabelFiles(path, folder / "train")}
        tasks(
            name,
            LabelFileSource(
                files, classes=folder / "classes.txt", on_bad_record="skip"
            ),
        )

    register("two", [["flat"], ["flat", "rising"], ["rising"]])
    with pytest.raises(UserError, match="'flat/001.png' of two train has 2 labels"):
        source.read("two", "train", ("mean",))
    register("none", [["flat"], [], ["rising"]])
    found = source.read("none", "train", ("mean",))
    assert len(found.labels) == 2
    assert found.notes == {"left_out_of_the_split": "1 x image without labels"}


def test_a_task_without_a_class_list_needs_the_number_of_classes(source):
    tiny_classifier.register("listless", 6)
    with pytest.raises(UserError, match="'listless' has no class list.*NUM_CLASSES"):
        source.read("listless", "test", ("mean",))
    known = dataclasses.replace(source, num_classes=4)
    found = known.read("listless", "test", ("mean",))
    np.testing.assert_array_equal(found.labels, [0, 1, 2, 3, 0, 1])
    too_few = dataclasses.replace(source, num_classes=3)
    with pytest.raises(UserError, match="image 3: 3; 3 classes have the ids 0 to 2"):
        too_few.read("listless", "test", ("mean",)).joined(("mean",))


# --- The command ---


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_the_command_writes_each_number_with_its_protocol_and_data(
    folder, params, tmp_path, capsys
):
    gin = tmp_path / "tower.gin"
    gin.write_text(GIN.format(folder=folder))
    use_one_device(tmp_path)
    settings = ["--gin_file=tower.gin", "--gin.OUTPUT_DIR='out'"]
    settings += ["--gin.FEATURES=(('pooled',), ('mean', 'block_0_mean'))"]
    with no_tasks():
        os.chdir(tmp_path)
        os.environ["MY_TRAIN_FOLDER"] = str(folder / "train")
        os.environ["MY_VALIDATION_FOLDER"] = str(folder / "validation")
        os.environ["MY_CLASSES"] = str(folder / "classes.txt")
        assert cli.main(["probe", "knn", *settings]) == 0
        shown = capsys.readouterr().out
        assert cli.main(["probe", "linear", *settings, "--gin.Sgd.epochs=2"]) == 0
        again = capsys.readouterr().out
    assert "pooled, neighbours 10" in shown and "temperature: 0.07" in shown
    assert "the tower was run on 12 images" in shown and "was run" not in again
    assert "my_image_folder train: unreadable_images: 1" in shown
    nearest, _, linear = lines(tmp_path / "out" / "probes.jsonl")
    assert nearest["probe"] == "NearestNeighbours"
    assert nearest["notes"]["left_out_neighbours"] == [20, 100, 200]
    assert nearest["train"] == {
        "task": "my_image_folder",
        "split": "train",
        "images": 19,
    }
    low, high = nearest["interval"]
    assert low < nearest["value"] < high or nearest["value"] in (low, high)
    assert linear["protocol"]["sgd"]["epochs"] == 2
    assert len(linear["settings"]["tried"]["pooled"]) == 13
    facts = linear["features"]
    assert facts["checkpoint"] == f"{folder}/tower/checkpoint_0"
    assert facts["image_size"] == [16, 16] and facts["tower"]["pooling"] == "map"


def test_names_of_classes_are_probed_on_the_same_features(shared, folder, tmp_path):
    names = zero_shot.ZeroShot(pairs_model(), ("a {}", "{}"))
    where = {"source": shared, "test": features.Split("stripes", "train")}
    where["output_dir"] = str(tmp_path)
    with pytest.raises(UserError, match="ZeroShot learns nothing"):
        probe.run_probe(names, train=where["test"], **where)
    probe.run_probe(names, train=None, **where)
    (line,) = lines(tmp_path / "probes.jsonl")
    assert line["probe"] == "ZeroShot" and "train" not in line
    assert line["protocol"]["templates"] == ["a {}", "{}"]
    assert "width=24" in line["protocol"]["text_tower"]
    assert line["settings"]["prompts"] == 8 and line["test"]["images"] == 19
    # Other texts for the same classes: another head, of the task's own list.
    texts = folder / "texts.txt"
    texts.write_text("a\nb\nc\nd\n")
    named = dataclasses.replace(names, class_list=str(texts))
    probe.run_probe(named, train=None, **where)
    other = lines(tmp_path / "probes.jsonl")[-1]
    assert other["head"] != line["head"] and other["protocol"]["class_list"]
    head = heads.read(other["head"])
    assert head.class_names == tuple((folder / "classes.txt").read_text().split())
    assert head.facts["texts_of"] == ["a", "b", "c", "d"]


def test_an_attentive_probe_is_given_the_tokens_on_disk(shared, tmp_path):
    train = features.Split("stripes", "train")
    attention = attentive.AttentiveProbe((1e-3,), 0.0, 1, 8, held_out=0.01)
    with pytest.raises(UserError, match="held_out=0.01 of the 19 images of stripes"):
        probe.run_probe(
            attention,
            source=shared,
            train=train,
            test=train,
            output_dir=str(tmp_path),
        )


def test_lines_are_added_to_a_file_of_results_and_to_no_other(tmp_path):
    path = tmp_path / "probes.jsonl"
    for value in (1, 2):
        probe.append_lines(str(path), [{"value": value}])
    assert lines(path) == [{"value": 1}, {"value": 2}]
    path.write_text("some notes")
    with pytest.raises(UserError, match="probes.jsonl, line 1.* malformed JSON"):
        probe.append_lines(str(path), [{"value": 3}])
    assert path.read_text() == "some notes"


def test_an_unknown_kind_of_probe_is_wrong_usage(capsys):
    with pytest.raises(SystemExit):
        cli.main(["probe", "lineal"])
    assert "invalid choice: 'lineal'" in capsys.readouterr().err
