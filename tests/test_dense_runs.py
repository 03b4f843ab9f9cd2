"""Segmentation and depth end to end, on drawn scenes and a tower of one block."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_dense
import tiny_models
from PIL import Image
from test_probe_features import write_tower
from tiny_runs import ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.data import paired_folders, pixel_crops
from vit22b_transfer.experiments import (
    dense_pictures,
    dense_runs,
    depth,
    features,
    head_training,
    segmentation,
)
from vit22b_transfer.models import dense, dense_heads
from vit22b_transfer.training import optimizers, train

TOWER = tiny_models.tower_config(depth=1)


def training(steps, **fields):
    optimizer = optimizers.adamw(optimizers.cosine(2e-2, total_steps=steps))
    return head_training.HeadTraining(
        optimizer, steps, 4, statistics_batches=4, **fields
    )


CROPS = pixel_crops.RandomCrops((0.8, 1.2), flip=True)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower") / "tower"
    write_tower(folder)
    return str(folder)


@pytest.fixture
def source(tower, tmp_path):
    path = str(tmp_path / "features")
    return features.FeatureSource(TOWER, tower, path, ONE_DEVICE, (32, 32), 2)


def lines(path):
    text = (path / "probes.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_a_linear_head_learns_classes_that_are_judged_at_the_masks_size(
    source, tmp_path, capsys
):
    root = tiny_dense.write_pairs(tmp_path / "scenes", offset=1)
    names = (*tiny_dense.NAMES, "nowhere")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "annotations" / "validation" / "lonely.png").write_bytes(b"")
    folder = paired_folders.SegmentationFolder(
        root, zero_is_ignored=True, on_bad_record="skip"
    )
    protocol = dense_runs.DenseProtocol(
        dense_heads.LinearHead(), training(40), CROPS, (16, 16), 0.5, pictures=2
    )
    out = tmp_path / "out"
    given = dict(source=source, data=folder, output_dir=str(out))
    mean, share = segmentation.run_segmentation(protocol, **given)
    assert (mean.metric, share.metric) == ("mean_iou", "pixel_accuracy")
    assert 0.4 < mean.value < 1 and 0.8 < share.value < 1
    assert mean.interval[0] <= mean.value <= mean.interval[1]
    line, _ = lines(out)
    assert line["value"] == mean.value and line["classes"] == 4
    assert [*line["settings"]["iou"]] == [*names]
    assert line["settings"]["iou"]["nowhere"] is None
    three = [value for value in line["settings"]["iou"].values() if value is not None]
    assert np.mean(three) == pytest.approx(mean.value)
    assert line["notes"] == {
        "validation: label without an image": 1,
        "training: classes in no mask": 1,
        "validation: classes in no mask": 1,
        "classes that occur nowhere, left out of the mean": 1,
    }
    assert line["train"]["images"] == 3 and line["test"]["images"] == 3
    assert line["protocol"]["training"]["optimizer"]["learning_rate"]["peak"] == 0.02
    assert line["protocol"]["fraction"] == 0.5
    for path in line["pictures"]:
        with Image.open(path) as picture:
            assert picture.size == (3 * 384 + 4 * 8, 320 + 2 * 18 + 3 * 8)
    assert len(line["pictures"]) == 2
    assert "mean_iou" in (shown := capsys.readouterr().out) and "trained" in shown


@pytest.mark.slow
def test_depths_are_learned_with_the_tower_where_it_is_asked_for(
    source, tmp_path, monkeypatch
):
    root = tiny_dense.write_pairs(tmp_path / "scenes", units=1000, test=4)
    path = root / "depths" / "validation" / "03.png"
    Image.fromarray(np.zeros((40, 48), np.uint16)).save(path)
    folder = paired_folders.DepthFolder(root, 1000.0)
    protocol = depth.DepthProtocol(
        dense_heads.LinearHead(dropout=0.0),
        training(40),
        dataclasses.replace(CROPS, scales=(1.0, 1.0)),
        (32, 16),
        train_trunk=True,
        pictures=1,
        depths=dense.Depth(1e-3, 10.0, 32),
    )
    out = tmp_path / "out"
    given = dict(source=source, data=folder, output_dir=str(out))
    found = depth.run_depth(protocol, **given)
    with monkeypatch.context() as patch:  # what is learned is read again
        patch.setattr(train.compiling, "compile_steps", lambda *_, **__: None)
        again = depth.run_depth(protocol, **given)
    assert [one.value for one in again] == [one.value for one in found]
    by_name = {one.metric: one for one in found}
    assert by_name["rmse"].value < 2.4  # the deviation of the depths is 2.5 metres
    assert by_name["delta_1.25^3"].value > 0.5
    for one in found:
        assert one.interval[0] <= one.value <= one.interval[1] and one.images == 3
    line = lines(out)[0]
    assert line["notes"] == {"test images without a valid depth, left out": 1}
    assert line["metric"] == "mse" and len(line["pictures"]) == 1
    with Image.open(line["pictures"][0]) as picture:
        assert picture.mode == "RGB"
    model = dense.DenseModel(TOWER, protocol.head, protocol.depths)
    (made,) = (out / "trained").iterdir()
    before = saved(source.checkpoint, model)
    after = saved(str(made), model)
    moved = [np.abs(after[name] - before[name]).max() for name in before]
    assert min(moved) > 0 and len(before) > 10


def saved(path, model):
    """The tower's arrays in a checkpoint."""
    from vit22b_transfer.checkpoints import restoring
    from vit22b_transfer.training import state

    batch = {"encoder_input_images": jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)}
    tree = state.abstract_variables(model, ONE_DEVICE, batch)["encoder"]
    read = restoring.restore_partial(path, {"encoder": tree}).params
    return {n: np.asarray(leaf) for n, leaf in reading.flatten(read).items()}


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(stride=(40, 8)), "windows of 32x32 pixels at a stride of"),
        (dict(head=dense_heads.UperNet()), "1 blocks, too few for 4 levels"),
        (dict(fraction=0.0), "fraction=0.0"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(source, tmp_path, fields, message):
    root = tiny_dense.write_pairs(tmp_path / "scenes", train=1, test=1)
    usual = dense_runs.DenseProtocol(
        dense_heads.LinearHead(), training(4), CROPS, (8, 8)
    )
    given = dict(source=source, data=paired_folders.SegmentationFolder(root))
    given["output_dir"] = str(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        segmentation.run_segmentation(dataclasses.replace(usual, **fields), **given)
    with pytest.raises(UserError, match="an interval needs two test images"):
        segmentation.run_segmentation(usual, **given)
    assert not (tmp_path / "out" / "trained").exists()


def test_depths_that_none_can_be_judged_by_are_said_before_any_work(source, tmp_path):
    root = tiny_dense.write_pairs(tmp_path / "scenes", train=1, test=2, units=1000)
    protocol = depth.DepthProtocol(
        dense_heads.LinearHead(),
        training(4),
        CROPS,
        (8, 8),
        depths=dense.Depth(1e-3, 10.0, None),
    )
    given = dict(source=source, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="0 of 2 test images have .* units_per_metre"):
        data = paired_folders.DepthFolder(root, 1.0)
        depth.run_depth(protocol, data=data, **given)
    part = dataclasses.replace(protocol, judged_part=(45, 471, 41, 601))
    with pytest.raises(UserError, match="does not lie in a depth map of 40 rows"):
        data = paired_folders.DepthFolder(root, 1000.0)
        depth.run_depth(part, data=data, **given)


def test_a_schedule_ends_with_the_training():
    optimizer = optimizers.adamw(optimizers.cosine(1e-3, total_steps=10))
    with pytest.raises(UserError, match="total_steps=10, but .* steps=20"):
        head_training.HeadTraining(optimizer, 20, 4)
    with pytest.raises(UserError, match="statistics_batches=0 must be positive"):
        head_training.HeadTraining(optimizer, 10, 4, statistics_batches=0)


def test_classes_have_colours_that_differ():
    colours = dense_pictures.class_colours(150).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2)
    assert apart[~np.eye(150, dtype=bool)].min() > 0
    near = [apart[n, n + 1] for n in range(149)]
    assert min(near) > 90


def test_pictures_are_spread_over_the_test_images():
    assert dense_pictures.spread(100, 4) == {0, 25, 50, 75}
    assert dense_pictures.spread(2, 8) == {0, 1}
    assert dense_pictures.spread(5, 0) == set()
