"""Images and labels of their pixels on disk: read, cut alike, refused, counted."""

import dataclasses
import os

import numpy as np
import pytest
import tiny_dense
from PIL import Image
from tiny_runs import ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.data import (
    images,
    paired_folders,
    pixel_batches,
    pixel_crops,
    pixel_labels,
)
from vit22b_transfer.partitioning.rules import Partitioning


@pytest.fixture
def root(tmp_path):
    return tiny_dense.write_pairs(tmp_path / "scenes", train=3, test=2)


def folder(root, **fields):
    return paired_folders.SegmentationFolder(root, **fields)


def save(path, pixels):
    Image.fromarray(pixels).save(path)


def mask(root, number=0):
    return root / "annotations" / "training" / f"{number:02}.png"


def test_pairs_are_read_in_the_order_of_their_names(root):
    pairs = folder(root).pairs("training")
    assert [pair.name for pair in pairs.pairs] == ["00", "01", "02"]
    assert pairs.seen == {0, 1, 2} and not pairs.left_out
    image, labels = folder(root).read(pairs.pairs[1])
    stored = np.asarray(Image.open(mask(root, 1)))
    np.testing.assert_array_equal(labels, stored)
    assert image.shape == (*labels.shape, 3) and labels.dtype == np.int32


def test_numbers_that_are_no_class_are_no_label(root):
    stored = np.zeros((40, 48), np.uint8)
    stored[0], stored[1], stored[2] = 1, 3, 255
    save(mask(root), stored)
    (pair,) = [p for p in folder(root, zero_is_ignored=True).pairs("training").pairs][
        :1
    ]
    _, labels = folder(root, zero_is_ignored=True).read(pair)
    assert (labels[0] == 0).all() and (labels[1] == 2).all()
    assert (labels[2:] == -1).all()
    stored[2] = 7
    save(mask(root), stored)
    _, labels = folder(root, zero_is_ignored=True, ignored=7).read(pair)
    assert (labels[2] == -1).all()
    with pytest.raises(UserError, match="00.png: 3; the classes are 0 to 2, ignored"):
        folder(root, ignored=7).read(pair)
    with pytest.raises(UserError, match="00.png: 7; the classes are 1 to 3, ignored"):
        folder(root, zero_is_ignored=True, ignored=None).read(pair)


def test_masks_with_a_palette_or_of_16_bits_are_numbers_all_the_same(root):
    _, labels, _ = tiny_dense.scene(np.random.default_rng(5))
    palette = Image.fromarray(labels, mode="P")
    palette.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    palette.save(mask(root, 0))
    save(mask(root, 1), labels.astype(np.uint16))
    for pair in folder(root).pairs("training").pairs[:2]:
        np.testing.assert_array_equal(folder(root).read(pair)[1], labels)


def broken(root):
    """Files that are bad, each in its own way: (reason, its words in a message)."""
    images_, masks = root / "images" / "training", root / "annotations" / "training"
    picture, labels, _ = tiny_dense.scene(np.random.default_rng(3))

    def pair(name, picture=picture, labels=labels):
        save(images_ / f"{name}.png", picture)
        save(masks / f"{name}.png", labels)

    pair("small", labels=labels[:20])
    pair("range", labels=labels + np.uint8(9))
    pair("colours", labels=picture)
    pair("cut")
    (images_ / "cut.png").write_bytes((images_ / "cut.png").read_bytes()[:80])
    pair("torn")
    (masks / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    save(images_ / "alone.png", picture)
    save(masks / "lonely.png", labels)
    pair("twice")
    save(images_ / "twice.jpg", picture)
    outside = root / "elsewhere.png"
    save(outside, picture)
    (images_ / "link.png").symlink_to(outside)
    save(masks / "link.png", labels)
    return {
        "label of another size": 1,
        "label out of range": 1,
        "label that cannot be read": 2,
        "image that cannot be read": 1,
        "image without a label": 1,
        "label without an image": 2,  # that of the link, too
        "several images of one name": 2,
        "file that lies outside of its folder": 1,
    }


def test_what_is_bad_is_an_error_or_counted(root):
    expected = broken(root)
    with pytest.raises(
        UserError, match=r"--gin\.SegmentationFolder\.on_bad_record=\"'skip'\""
    ):
        folder(root).pairs("training")
    pairs = folder(root, on_bad_record="skip").pairs("training")
    assert pairs.left_out == expected
    assert [pair.name for pair in pairs.pairs] == ["00", "01", "02"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("small", "small.png is 48x20, its image 48x40"),
        ("range", "range.png: 9; the classes are 0 to 2"),
        ("colours", "colours.png is a PNG of mode RGB: a mask is a grey PNG"),
        ("cut", "image that cannot be read: .*cut.png: corrupt or truncated"),
        ("torn", "torn.png is no PNG that can be read"),
    ],
)
def test_what_is_bad_is_named(root, name, message):
    broken(root)
    places = (
        root / kind / "training" / f"{name}.png" for kind in ("images", "annotations")
    )
    with pytest.raises(paired_folders.BadPairError, match=message):
        folder(root).read(paired_folders.Pair(name, *map(str, places)))


def test_files_beyond_a_size_are_not_decoded(root, monkeypatch):
    pair = folder(root).pairs("training").pairs[0]
    monkeypatch.setattr(pixel_labels, "MAX_PIXELS", 40 * 48 - 1)
    with pytest.raises(
        UserError, match="48x40 pixels are more than the limit of 1,919"
    ):
        folder(root).read(pair)
    monkeypatch.setattr(pixel_labels, "MAX_BYTES", 50)
    with pytest.raises(UserError, match="bytes, more than the limit of 50"):
        folder(root).read(pair)
    os.remove(pair.label)
    os.mkfifo(pair.label)  # to open it would wait for ever
    with pytest.raises(UserError, match="00.png is not a file"):
        folder(root).read(pair)


@pytest.mark.parametrize("split", ["../training", "", "..", "a/b"])
def test_a_split_is_a_name_and_no_path(root, split):
    with pytest.raises(UserError, match="is no name of a folder"):
        folder(root).pairs(split)


def test_folders_that_are_not_there_or_empty_are_said(root):
    with pytest.raises(UserError, match="images/test is not a directory. The data is"):
        folder(root).pairs("test")
    for kind in ("images", "annotations"):
        (root / kind / "none").mkdir()
    with pytest.raises(UserError, match="split 'none' has no image with labels"):
        folder(root).pairs("none")


def test_the_number_of_classes_is_that_of_the_list_or_given(root):
    assert folder(root).class_names() == tiny_dense.NAMES
    with pytest.raises(UserError, match="has 3 names, but num_classes is 4"):
        folder(root, num_classes=4).class_names()
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match="classes.txt is not there, .* num_classes"):
        folder(root).class_names()
    assert folder(root, num_classes=3).class_names() == ("0", "1", "2")


def test_a_fraction_is_drawn_once_and_smaller_ones_are_parts_of_it():
    pairs = [paired_folders.Pair(f"{n:03}", "", "") for n in range(64)]
    whole = paired_folders.Pairs(pairs, {}, [frozenset({n}) for n in range(64)])
    parts = [{p.name for p in whole.part(f, 1).pairs} for f in (1 / 16, 1 / 4, 1.0)]
    assert [len(part) for part in parts] == [4, 16, 64]
    assert parts[0] < parts[1] < parts[2]
    some = whole.part(1 / 16, 2)
    assert {p.name for p in some.pairs} != parts[0]
    assert some.seen == {int(p.name) for p in some.pairs}
    for fraction in (0.0, 1.5):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            whole.part(fraction, 0)


# --- Depth ---


def test_depths_are_metres_by_the_units_of_the_files(tmp_path):
    root = tiny_dense.write_pairs(tmp_path, train=1, test=1, units=256)
    depths = paired_folders.DepthFolder(root, 256.0)
    pair = depths.pairs("training").pairs[0]
    stored = np.asarray(Image.open(pair.label))
    _, metres = depths.read(pair)
    np.testing.assert_array_equal(metres, np.float32(stored / 256))
    assert metres.dtype == np.float32 and {*np.unique(metres)} == {2.0, 4.0, 8.0}
    save(pair.label, np.uint8(stored // 256))
    with pytest.raises(UserError, match="mode L: a depth map is a grey PNG of 16 bits"):
        depths.read(pair)
    with pytest.raises(UserError, match="units_per_metre=0.0 must be above 0"):
        paired_folders.DepthFolder(root, 0.0)


# --- Crops ---


def numbered(rows, columns):
    """An image whose colour says where each pixel was, and the same as labels."""
    down, across = np.mgrid[:rows, :columns]
    image = np.stack([down * 6, across * 6, down * 0], axis=-1).astype(np.uint8)
    return image, (down * 100 + across).astype(np.int32)


@pytest.mark.parametrize("scales, flip", [((1.0, 1.0), True), ((0.5, 2.0), False)])
def test_image_and_labels_are_cut_at_the_same_place(scales, flip):
    image, labels = numbered(40, 36)
    crops = pixel_crops.RandomCrops(scales, flip)
    padded = mirrored = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        cut, marks = crops.draw(
            image, labels, (24, 24), rng, fill=(9, 9, 9), no_label=-1
        )
        assert cut.shape == (24, 24, 3) and marks.shape == (24, 24)
        known = marks >= 0
        padded += not known.all()
        assert (cut[~known] == 9).all()
        down, across = marks[known] // 100, marks[known] % 100
        # Bilinear pixels lie between their neighbours, nearest labels are one of them.
        assert np.abs(cut[known][:, 0] / 6 - down).max() <= 1.5
        assert np.abs(cut[known][:, 1] / 6 - across).max() <= 1.5
        row = marks[0][marks[0] >= 0] % 100
        mirrored += row[0] > row[-1]
    assert (padded > 0) == (scales[0] < 1)
    assert (0 < mirrored < 40) == flip


def test_nothing_is_changed_where_image_and_crop_have_one_size():
    image, labels = numbered(16, 24)
    crops = pixel_crops.RandomCrops((1.0, 1.0), flip=False)
    rng = np.random.default_rng(0)
    cut, marks = crops.draw(image, labels, (16, 24), rng, fill=(0, 0, 0), no_label=-1)
    np.testing.assert_array_equal(cut, image)
    np.testing.assert_array_equal(marks, labels)


def test_labels_are_resized_as_pillow_does_by_the_nearest():
    labels = np.random.default_rng(0).integers(0, 9, (13, 17)).astype(np.uint8)
    for shape in ((26, 34), (6, 5), (13, 40)):
        how = Image.Resampling.NEAREST
        peer = Image.fromarray(labels).resize((shape[1], shape[0]), how)
        found = pixel_crops.resized_labels(labels, shape)
        np.testing.assert_array_equal(found, np.asarray(peer))
    image, _ = numbered(30, 30)
    whole = pixel_crops.resized_image(image, (50, 45))
    part = pixel_crops.resized_image(image, (50, 45), (7, 9), (20, 30))
    # Up to how Pillow rounds where the part ends.
    apart = np.abs(part.astype(int) - whole[7:27, 9:39])
    assert apart[1:-1, 1:-1].max() <= 1


def test_an_image_that_would_become_huge_is_refused():
    with pytest.raises(UserError, match="an image of 1x20000 pixels becomes 512x"):
        pixel_crops.covering((20_000, 1), (512, 512))
    assert pixel_crops.covering((3, 1000), (512, 512), 1e-3) == (1, 171)
    with pytest.raises(UserError, match="scales"):
        pixel_crops.RandomCrops((2.0, 1.0))
    assert images.MAX_PIXELS > 512 * 512


# --- Batches ---


def crop_data(root, **fields):
    usual = pixel_batches.CropData(
        folder(root),
        folder(root).pairs("training").pairs,
        (16, 16),
        4,
        pixel_crops.RandomCrops(),
        (127, 127, 127),
        -1,
        ("warm_up", 2),
    )
    return dataclasses.replace(usual, **fields)


def taken(data, start, count, partitioning=ONE_DEVICE, seed=0):
    stream = data.batches(None, partitioning, seed=seed, start_step=start)
    try:
        found = [next(stream) for _ in range(count)]
    finally:
        stream.close()
    assert stream.counters.counts() == {"examples": 4 * count}
    return [{name: np.asarray(rows) for name, rows in batch.items()} for batch in found]


def test_batches_are_a_function_of_seed_and_step(root):
    data = crop_data(root)
    first = taken(data, 0, 4)
    for again, batch in zip(taken(data, 2, 2), first[2:], strict=True):
        for name in batch:
            np.testing.assert_array_equal(again[name], batch[name])
    assert [batch["warm_up"][0] for batch in first] == [1, 1, 0, 0]
    other = taken(data, 0, 1, seed=1)
    assert not np.array_equal(other[0]["labels"], first[0]["labels"])
    # Of three images no crop comes twice, though each image does.
    crops = np.concatenate([batch["labels"] for batch in first]).reshape(16, -1)
    assert len(np.unique(crops, axis=0)) == 16


def test_batches_are_the_same_on_several_devices(root):
    data = crop_data(root)
    one, many = (
        taken(data, 0, 1, mesh)[0] for mesh in (ONE_DEVICE, Partitioning(4, 2))
    )
    np.testing.assert_array_equal(one["labels"], many["labels"])
    with pytest.raises(UserError, match="batch_size=0 must be positive"):
        taken(crop_data(root, batch_size=0), 0, 1)
