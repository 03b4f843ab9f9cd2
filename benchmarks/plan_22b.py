"""ViT-22B before T5-XXL, compiled for 8, 64 and 256 simulated devices.

Claim: the train step (full, frozen tower, LoRA, cached features) lowers and compiles in
under 60 s and 2 GiB of host memory on two free cores, and its argument bytes are the
planner's.

    python benchmarks/plan_22b.py [--devices 8 64 256]
"""

import argparse
import pathlib
import re
import subprocess
import sys

import interleave

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = ("recipes/coco_captions", "models/vit_scanned", "models/t5_scanned")
RECIPE += ("meshes/activations_2d_fsdp",)
SIZES = ("VIT='22B/14'", "T5='xxl'")
MODES = {
    "full": (),
    "frozen": ("models/frozen_tower",),
    "lora": ("models/lora",),
    "cached": ("runs/cached_features",),
}
# Nothing is read: any path will do.
MACROS = {"cached": ("CACHE_DIR='/cache'", "TOWER_CHECKPOINT='/checkpoint_0'")}


def row(devices: int, mode: str) -> list[str]:
    """One line of the table: a process of its own."""
    files = [f"gin_configs/{name}.gin" for name in (*RECIPE, *MODES[mode])]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vit22b_transfer.cli", "plan", "--compile"),
            *(f"--gin_file={file}" for file in files),
            *(f"--gin.{macro}" for macro in (*SIZES, *MACROS.get(mode, ()))),
            *("--gin.Partitioning.model=8", f"--devices={devices}"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    numbers = r" +([\d.]+) +([\d.]+) +([\d.]+)"
    found = re.search("arguments" + numbers, done.stdout)
    beside = re.search("beside them" + numbers, done.stdout)
    cost = re.search(r"compiled in ([\d.]+) s.*held ([\d.]+) GiB", done.stdout)
    assert found and beside and cost, done.stdout
    return [f"{devices} {mode}", *found.groups(), *beside.groups(), *cost.groups()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256])
    options = parser.parse_args()
    header = ["GiB per device", "arguments planned", "compiled", "ratio"]
    header += ["beside planned", "compiled", "ratio", "seconds", "host GiB"]
    rows = (row(devices, mode) for devices in options.devices for mode in MODES)
    interleave.print_table(header, rows)


if __name__ == "__main__":
    main()
