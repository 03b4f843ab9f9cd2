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
from vit22b_transfer.data import paired_folders, pixel_crops
from vit22b_transfer.experiments import (
    dense_runs,
    depth,
    features,
    head_training,
    segmentation,
)
from vit22b_transfer.models import dense, dense_heads
from vit22b_transfer.training import optimizers

TOWER = tiny_models.tower_config(depth=1)


def training(steps=30, batch_size=4, **fields):
    schedule = optimizers.cosine(3e-2, total_steps=steps)
    optimizer = optimizers.adamw(schedule)
    return head_training.HeadTraining(
        optimizer, steps, batch_size, statistics_batches=4, **fields
    )


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower") / "tower"
    write_tower(folder)
    return str(folder)


@pytest.fixture
def source(tower, tmp_path):
    return features.FeatureSource(
        TOWER, tower, str(tmp_path / "out"), ONE_DEVICE, (32, 32), 2
    )


def protocol(**fields):
    usual = dense_runs.DenseProtocol(
        dense_heads.LinearHead(),
        training(),
        pixel_crops.RandomCrops((0.8, 1.5)),
        (16, 16),
        pictures=2,
    )
    return dataclasses.replace(usual, **fields)


def lines(path):
    return [
        json.loads(line) for line in (path / "probes.jsonl").read_text().splitlines()
    ]


def test_a_linear_head_learns_the_classes_of_scenes(source, tmp_path, capsys):
    root = tiny_dense.write_pairs(tmp_path / "scenes")
    folder = paired_folders.SegmentationFolder(root)
    found = segmentation.run_segmentation(
        protocol(), source=source, data=folder, output_dir=str(tmp_path / "out")
    )
    print(capsys.readouterr().out)
    print(lines(tmp_path / "out"))
