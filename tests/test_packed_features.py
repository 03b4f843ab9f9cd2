"""Frozen features of images in their own shapes, from files to a probe."""

import dataclasses
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny_classifier
import tiny_models
from frozen_towers import GIN, SIZE, TOWER, write_tower
from shell_commands import no_tasks, use_one_device
from test_probe_features import files
from tiny_runs import ONE_DEVICE

from vit22b_transfer import UserError, cli
from vit22b_transfer.data.images import read_image
from vit22b_transfer.experiments import features
from vit22b_transfer.inference.image_batches import Packing
from vit22b_transfer.models.preparation import Preparation
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.recipes import shipped

# Towers are run, in most of these.
pytestmark = pytest.mark.slow

VECTORS = ("pooled", "mean", "block_0_mean")
SHAPES = [(8, 40), (40, 8), (17, 23), (60, 60), (5, 5), (16, 16)]
SHOWN = (32, 32)  # 16 patches of 8
OWN = Preparation(fit="own_shape", patch=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of pictures of many shapes, one of which is broken, and a tower."""
    root = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                shape = SHAPES[(number + 3 * label) % len(SHAPES)]
                pixels = rng.integers(0, 120, (*shape, 3)) + 130 * label
                picture = PIL.Image.fromarray(pixels.astype(np.uint8))
                picture.save(root / split / name / f"{number:03}.png")
    # Of the same pixels in the same order, but of other shapes.
    for number, shape in enumerate([(8, 32), (16, 16), (32, 8)]):
        white = PIL.Image.new("RGB", shape[::-1], (255,) * 3)
        white.save(root / "train" / "light" / f"1{number:02}.png")
    broken = root / "train" / "dark" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (root / "classes.txt").write_text("dark\nlight\n")
    return root


@pytest.fixture(scope="module")
def params(folder):
    return write_tower(folder / "tower")


@pytest.fixture(scope="module", autouse=True)
def tasks(folder):
    with no_tasks():
        shipped.offer_tasks()
        tiny_classifier.register_folders("shades", folder)
        yield


@pytest.fixture(scope="module")
def shared(folder, params, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("features"))
    return features.FeatureSource(
        TOWER, f"{folder}/tower", path, ONE_DEVICE, SHOWN, 2, None, 5, Packing(24)
    )


@pytest.fixture
def source(shared, tmp_path):
    return dataclasses.replace(shared, directory=str(tmp_path))


def alone(folder, params, how=OWN):
    """The vectors of each image of the training split that can be read, one by one."""
    found = []
    for path in sorted((folder / "train").rglob("*.png")):
        if path.parts[-2:] == ("dark", "000.png"):
            continue
        pixels = read_image(str(path), SHOWN, how)
        output = TOWER.build().apply(
            {"params": params}, jnp.asarray(pixels)[None], intermediates=("block_0",)
        )
        tokens = [output.tokens, output.intermediates["block_0"]]
        means = [x[0].mean(axis=0) for x in tokens]
        found.append(np.stack([output.pooled[0], *means]))
    return np.stack(found)


@pytest.mark.parametrize("enlarge", [True, False])
def test_features_are_those_of_each_image_alone(shared, folder, params, enlarge):
    packing = Packing(24, enlarge=enlarge)
    how = OWN if enlarge else Preparation(fit="own_size", patch=8)
    source = dataclasses.replace(shared, packing=packing)
    found = source.read("shades", "train", VECTORS)
    np.testing.assert_allclose(found.vectors, alone(folder, params, how), atol=1e-5)
    np.testing.assert_array_equal(found.labels, [0] * 5 + [1] * 9)
    assert found.notes == {"shades train: unreadable_images": 1}
    assert source.facts()["preparation"] == str(how)


def test_stopped_work_ends_with_the_same_bytes(shared, source, monkeypatch):
    shared.read("shades", "train", VECTORS)
    source.read("shades", "train", VECTORS)
    whole = files(shared._key("shades", "train", VECTORS, 2).directory)
    assert len(whole) == 3 and files(source.directory) == whole
    lost = sorted(Path(source.directory).rglob("*.array_record"))[1]
    lost.unlink()
    source.read("shades", "train", VECTORS)
    assert files(source.directory) == whole


def test_rows_of_another_length_and_devices_give_the_same_but_for_rounding(
    shared, source, tmp_path
):
    one = shared.read("shades", "train", VECTORS)
    for name, fields in (
        ("rows", dict(packing=Packing(64), batch_size=3)),
        ("mesh", dict(partitioning=Partitioning(data=4, model=2), batch_size=8)),
    ):
        other = dataclasses.replace(source, directory=str(tmp_path / name), **fields)
        found = other.read("shades", "train", VECTORS)
        np.testing.assert_allclose(found.vectors, one.vectors, atol=1e-5)
        assert other.identity("shades", "train", VECTORS) == shared.identity(
            "shades", "train", VECTORS
        )


def test_other_shapes_have_features_of_their_own(source):
    def directory(**fields):
        changed = dataclasses.replace(source, **fields)
        return changed._key("shades", "train", ("mean",), 2).directory

    found = [
        directory(),
        directory(packing=None),
        directory(packing=Packing(24, enlarge=False)),
        directory(image_size=(16, 16)),
        directory(
            tower=dataclasses.replace(TOWER, preparation=Preparation(filter="bicubic"))
        ),
    ]
    assert len({*found}) == len(found)
    assert directory(packing=Packing(64)) == found[0]


@pytest.mark.parametrize(
    "fields, vectors, message",
    [
        ({"packing": Packing(15)}, VECTORS, "row_tokens is 15, but .* has 16 patches"),
        ({}, None, "all tokens of each image cannot be had of images of their own"),
        ({}, ("block_0_first",), "the tower has none: .* Take block_0_mean"),
        ({"image_size": (20, 16)}, VECTORS, "20x16 but patch_size 8 needs"),
        (
            {"tower": tiny_models.tower_config(pooling="cls")},
            VECTORS,
            "a class token or registers",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_or_without_a_file(
    source, fields, vectors, message
):
    wrong = dataclasses.replace(source, **fields)
    with pytest.raises(UserError, match=message):
        wrong.read("shades", "validation", vectors)
    assert not files(source.directory)


def test_a_tower_that_knows_nothing_of_packing_is_refused():
    with pytest.raises(UserError, match="object takes no packed images"):
        Packing(24).preparation(object())


def test_pictures_of_many_shapes_are_no_one_array(source):
    with pytest.raises(UserError, match="one array of pictures cannot be had"):
        source.pictures("shades", "train", 2)


def test_the_command_probes_images_in_their_own_shapes(
    folder, params, tmp_path, capsys
):
    gin = tmp_path / "tower.gin"
    gin.write_text(GIN.format(folder=folder))
    use_one_device(tmp_path)
    settings = [
        "--gin_file=tower.gin",
        "--gin_file=gin_configs/runs/probe_own_shapes.gin",
    ]
    settings += ["--gin.OUTPUT_DIR='out'", f"--gin.SHOWN_SIZE={SHOWN}"]
    settings += ["--gin.BATCH_SIZE=2"]
    with no_tasks():
        os.chdir(tmp_path)
        os.environ["MY_TRAIN_FOLDER"] = str(folder / "train")
        os.environ["MY_VALIDATION_FOLDER"] = str(folder / "validation")
        os.environ["MY_CLASSES"] = str(folder / "classes.txt")
        assert cli.main(["probe", "knn", *settings]) == 0
        assert cli.main(["probe", "knn", *settings, "--gin.ROW_TOKENS=8"]) == 0
        shown = capsys.readouterr()
        settings += ["--gin.ENLARGE=False", "--gin.ROW_TOKENS=8"]
        assert cli.main(["probe", "knn", *settings]) == 1
        refused = capsys.readouterr().err
    assert shown.out.count("the tower was run on 6 images") == 1
    assert "row_tokens is 8, but an image of the run's size has 16" in refused
    lines = (tmp_path / "out" / "probes.jsonl").read_text().splitlines()
    (line, _) = map(json.loads, lines)
    assert line["value"] == 1.0 and line["train"]["images"] == 14
    facts = line["features"]
    assert facts["image_size"] == [*SHOWN] and SIZE != SHOWN
    assert "their own shapes, in patches of 8" in facts["preparation"]
