"""Peak memory of an inference over few examples and over many.

Claim: nothing of an example is kept once its line is written, so the peak over 20,000
examples is that over 2,000, within 5 %.

`vit22b caption` by a tiny model over a list of images, each run a process of its own.
Prints the peak resident memory of both, and the ratio.

    python benchmarks/inference_memory.py [--few 2000] [--many 20000]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image
from storm_processes import RECIPE

from vit22b_transfer.demo import scenes

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES, SIZE = 100, 32


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--many", type=int, default=20000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="inference_memory_") as folder:
        work = pathlib.Path(folder)
        _draw(work)
        _train(work)
        _peak(work, 32)  # compiles; the others find it done
        peaks = {}
        for count in (options.few, options.many):
            peaks[count] = _peak(work, count)
            print(f"{count} examples: peak {peaks[count]:.1f} MiB", flush=True)
        print(f"ratio: {peaks[options.many] / peaks[options.few]:.3f}")


def _draw(work):
    draw = np.random.default_rng(0)
    for number in range(FILES):
        pixels = draw.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(work / f"{number}.png")


def _train(work):
    """A model of one step, whose MODEL_DIR says all that `caption` needs."""
    (work / "recipe.gin").write_text(RECIPE)
    scenes.write_scenes(work / "data", sizes={"train": 16, "validation": 16})
    values = {"MODEL_DIR": str(work / "model"), "TRAIN_STEPS": 1}
    _run(
        work,
        "train",
        f"--gin_file={work / 'recipe.gin'}",
        "--gin_file=gin_configs/meshes/data_parallel.gin",
        *(f"--gin.{name}={value!r}" for name, value in values.items()),
    )


def _peak(work, count):
    """MiB of a process that captions so many images."""
    place = work / f"list_{count}.jsonl"
    with open(place, "w") as file:
        for number in range(count):
            line = {"image": f"{number % FILES}.png", "image_id": f"image {number}"}
            file.write(json.dumps(line) + "\n")
    out = work / f"captions_{count}.jsonl"
    usage = _run(
        work,
        "caption",
        str(place),
        "--model",
        str(work / "model"),
        "--out",
        str(out),
        "--batch_size=16",
    )
    with open(out) as lines:
        assert sum(1 for _ in lines) == count
    return usage.ru_maxrss / 1024


def _run(work, *arguments):
    """The resources that a command used; it has to end well."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "VIT22B_DATA_DIR": str(work / "data"),
        "VIT22B_VOCABULARY": "",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
    }
    with open(work / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vit22b_transfer.cli", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (work / "output.txt").read_text()
    return usage


if __name__ == "__main__":
    main()
