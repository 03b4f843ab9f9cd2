"""T5X's launchers and our own commands as processes, on drawn scenes."""

import os
import subprocess
import sys
from pathlib import Path

from vit22b_transfer.data import vocabularies
from vit22b_transfer.demo import scenes

ROOT = Path(__file__).parent.parent


def draw(folder):
    """Drawn scenes and a vocabulary, as environment variables."""
    sizes = {"train": 64, "validation": 16, "test": 16}
    paths = scenes.write_scenes(folder / "data", seed=3, sizes=sizes)
    annotations = paths["train"].captions.parent
    files = [
        str(annotations / f"{kind}_train.json")
        for kind in ("captions", "questions", "answers")
    ]
    vocabulary = str(folder / "scenes.model")
    vocabularies.train(files, vocabulary, vocab_size=320)
    return {"VIT22B_DATA_DIR": str(folder / "data"), "VIT22B_VOCABULARY": vocabulary}


def started(environment, devices, *arguments):
    """The process of `python -m` with these arguments, not waited for."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    folders = [str(ROOT), *filter(None, sys.path)]
    folders += filter(None, [environment.get("PYTHONPATH")])
    path = os.pathsep.join(folders)
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | environment | {"XLA_FLAGS": flags, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(environment, devices, *arguments):
    """What it says on its second stream, when it has ended well."""
    process = started(environment, devices, *arguments)
    _, said = process.communicate()
    assert process.returncode == 0, said[-4000:]
    return said
