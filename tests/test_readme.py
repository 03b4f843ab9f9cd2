"""What README.md says is so: its commands run, its tree is the tree."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch_peers import import_peer

from vit22b_transfer.data import vocabularies
from vit22b_transfer.demo import scenes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(mark):
    """The fenced block after the HTML comment `mark`."""
    found = re.search(rf"<!-- {mark} -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no block marked {mark}"
    return found.group(1)


@pytest.fixture
def own_data(tmp_path):
    """A user's folder: COCO captions, images, and new images, one of them broken."""
    sizes = {"train": 24, "validation": 8, "test": 6}
    drawn = scenes.write_scenes(tmp_path / "drawn", seed=3, sizes=sizes)
    (tmp_path / "images").mkdir()
    for split in ("train", "validation"):
        shutil.copy(drawn[split].captions, tmp_path / f"{split}.json")
        for image in drawn[split].images.iterdir():
            shutil.copy(image, tmp_path / "images")
    shutil.copytree(drawn["test"].images, tmp_path / "new_images")
    broken = sorted((tmp_path / "new_images").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:100])
    return tmp_path, broken.name


def run_as_written(commands, folder, **variables):
    """Runs the lines in the folder, with the command of this environment."""
    binaries = folder / "bin"
    binaries.mkdir()
    command = binaries / "vit22b"
    command.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m vit22b_transfer.cli "$@"\n'
    )
    command.chmod(0o755)
    environment = (
        os.environ
        | variables
        | {
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "",
        }
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_own_captions_commands_run_as_written(own_data):
    folder, broken = own_data
    run_as_written(block("test: my-captions"), folder)
    lines = [
        json.loads(x) for x in (folder / "captions.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 6
    assert [line["index"] for line in lines] == list(range(6))
    failed = [line for line in lines if "error" in line]
    assert len(failed) == 1 and broken in json.dumps(failed[0])
    assert all(isinstance(x["prediction"], str) for x in lines if "error" not in x)
    metrics = json.loads((folder / "my_model" / "metrics.json").read_text())
    assert "cider_d" in metrics["my_captions/validation"]["metrics"]
    assert (folder / "my_model" / "checkpoint_20").is_dir()


def save_public_models(folder):
    """`siglip` and `t5`, tiny, in the files of the published ones."""
    transformers = import_peer("transformers")
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.SiglipVisionConfig(
        hidden_size=16, image_size=32, patch_size=16, **sizes
    )
    transformers.SiglipVisionModel(config).save_pretrained(folder / "siglip")
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    pixels["size"] = {"height": 32, "width": 32}
    (folder / "siglip" / "preprocessor_config.json").write_text(json.dumps(pixels))
    config = transformers.T5Config(
        vocab_size=384,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    vocabularies.train(
        [str(folder / "train.json")],
        str(folder / "t5" / "spiece.model"),
        vocab_size=320,
    )


def test_commands_for_public_weights_run_as_written(own_data):
    folder, _ = own_data
    save_public_models(folder)
    recipe = ["--gin_file=gin_configs/recipes/my_captions.gin"]
    recipe += [f"--gin.MODEL_DIR='{folder}/tuned'", "--gin.BATCH_SIZE=8"]
    recipe += ["--gin.TRAIN_STEPS=6", "--gin.WARMUP_STEPS=2"]
    shown = run_as_written(
        block("test: public-weights"),
        folder,
        RECIPE=" ".join(recipe),
        MY_CAPTIONS_JSON="train.json",
        MY_VALIDATION_JSON="validation.json",
        MY_IMAGES="images",
    )
    assert "initial checkpoint" in shown and "encoder/projection" in shown
    assert (folder / "exported" / "model.safetensors").is_file()
    assert "shared.weight" in shown


def test_the_tree_names_every_module():
    tree = README[README.index("## The tree") :]
    package = ROOT / "vit22b_transfer"
    modules = {p.name for p in package.rglob("*.py") if p.name != "__init__.py"}
    named = set(re.findall(r"\w+\.py", tree))
    assert named == modules


@pytest.mark.parametrize(
    "title, limit",
    [("Your own captions", 30), ("Start from public weights", 20), ("Under T5X", 25)],
)
def test_the_sections_keep_their_promised_length(title, limit):
    start = README.index(f"## {title}")
    section = README[start : README.index("\n## ", start)]
    assert len(section.strip().splitlines()) <= limit
