"""What README.md says is so: its commands run, its tree is the tree."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vit22b_transfer.data import scenes

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


def test_own_captions_commands_run_as_written(own_data):
    folder, broken = own_data
    commands = block("test: my-captions")
    assert len(commands.splitlines()) <= 30
    # The installed command, whichever environment the tests run in.
    binaries = folder / "bin"
    binaries.mkdir()
    command = binaries / "vit22b"
    command.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m vit22b_transfer.cli "$@"\n'
    )
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
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


def test_the_tree_names_every_module():
    tree = README[README.index("## The tree") :]
    package = ROOT / "vit22b_transfer"
    modules = {p.name for p in package.rglob("*.py") if p.name != "__init__.py"}
    named = set(re.findall(r"\w+\.py", tree))
    assert named == modules


@pytest.mark.parametrize("title, limit", [("Your own captions", 30), ("Under T5X", 25)])
def test_the_sections_keep_their_promised_length(title, limit):
    start = README.index(f"## {title}")
    section = README[start : README.index("\n## ", start)]
    assert len(section.strip().splitlines()) <= limit
