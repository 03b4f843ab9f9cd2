"""Recipes on drawn scenes that start from imported public weights, in our runtime."""

import json
import sys

import numpy as np
import pytest
import tiny_imports

from vit22b_transfer import cli
from vit22b_transfer.demo import scenes
from vit22b_transfer.weights.files import tensor_files

STEPS, RATE = 2, 1e-3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    sizes = {"train": 16, "validation": 8, "test": 8}
    scenes.write_scenes(folder, seed=5, sizes=sizes)
    return folder


@pytest.fixture(autouse=True)
def environment(drawn, monkeypatch):
    monkeypatch.setenv("VIT22B_DATA_DIR", str(drawn))
    monkeypatch.delenv("VIT22B_VOCABULARY", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


def arguments_of(recipe, imported, model_dir, *files):
    """A recipe, the import's model behind it, and the sizes of a tiny run."""
    files = [f"gin_configs/recipes/{recipe}.gin", f"{imported}/model.gin", *files]
    return [
        *(f"--gin_file={file}" for file in files),
        f"--gin.MODEL_DIR={str(model_dir)!r}",
        f"--gin.TRAIN_STEPS={STEPS}",
        "--gin.WARMUP_STEPS=1",
        f"--gin.LEARNING_RATE={RATE}",
        "--gin.BATCH_SIZE=8",
        "--gin.rules.Partitioning.data=1",
        "--gin.FEATURE_LENGTHS={'images': %IMAGE_SIZE, 'inputs': 48, 'targets': 48}",
    ]


def parameters(folder):
    return {
        name: tensor.read()
        for name, tensor in tensor_files.open_tensors(str(folder)).items()
        if name.startswith("target/")
    }


FROZEN = "gin_configs/models/frozen_tower.gin"


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, make, files",
    [
        ("scenes_paligemma", tiny_imports.paligemma, []),
        ("scenes_paligemma", tiny_imports.paligemma, [FROZEN]),
        ("scenes_caption_vqa", tiny_imports.tower_and_t5, []),
    ],
    ids=["PaliGemma", "PaliGemma with a frozen tower", "SigLIP and T5"],
)
def test_a_recipe_trains_and_infers_from_an_import(recipe, make, files, tmp_path):
    imported = make(tmp_path)
    arguments = arguments_of(recipe, imported, tmp_path, *files)
    assert cli.main(["train", *arguments]) == 0
    before = parameters(imported / "checkpoint_0")
    after = parameters(tmp_path / f"checkpoint_{STEPS}")
    fresh = {n for n in after if n not in before}
    assert before.keys() <= after.keys()
    assert all("encoder/projection" in n for n in fresh)
    assert bool(fresh) == (make is tiny_imports.tower_and_t5)
    moved = {n: np.abs(after[n] - before[n]).max() for n in before}
    # AdamW goes about the rate in a step: further than that only from elsewhere.
    assert max(moved.values()) < 2 * STEPS * RATE
    still = {n for n, by in moved.items() if by == 0}
    towers = {n for n in before if "/tower/" in n}
    assert len(towers) > 10
    assert still == towers if files else not still & towers
    if files:  # it infers as the others do
        return
    assert cli.main(["infer", *arguments]) == 0
    (written,) = tmp_path.glob("scenes_vqa-test-*.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(lines) >= 8 and all("prediction" in line for line in lines)


def test_an_import_that_was_never_trained_together_says_to_train_first(
    tmp_path, capsys
):
    imported = tiny_imports.tower_and_t5(tmp_path)
    arguments = arguments_of("scenes_caption_vqa", imported, tmp_path)
    checkpoint = f"--gin.CHECKPOINT={str(imported / 'checkpoint_0')!r}"
    capsys.readouterr()
    assert cli.main(["infer", *arguments, checkpoint]) == 1
    said = capsys.readouterr()
    (line,) = [x for x in said.err.splitlines() if "error:" in x]
    assert "tower and text model have not been trained together: train first" in line
    assert "vocabulary: bytes, 259 tokens" in said.out
    assert len(said.err.splitlines()) < 3
