"""The numbers that a run logged, read back from `metrics.jsonl` and `watch.jsonl`."""

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files
from vit22b_transfer.training.logs import METRICS_FILE

# Beside the training's own file: scores of checkpoints, by `vit22b watch`.
WATCHED_FILE = "watch.jsonl"
# Points of a curve; of more every second, third ... one is kept.
MOST_POINTS = 400
# Curves of a run; of lines in bytes, and of names.
_MOST_CURVES, _MOST_LINE, _LONGEST = 500, 1 << 20, 200
_LARGEST = 1e30


class Curves(NamedTuple):
    """Name -> (step, value) in the order of the file, and lines that were left out."""

    points: dict[str, list[tuple[float, float]]]
    damaged: int


def read(model_dir: str) -> Curves:
    """All finite numbers of a run's logs; none if they are not there.

    The last of two values of a step counts. Lines that cannot be read are counted.
    """
    found: dict[str, dict[int, float]] = {}
    damaged = 0
    for file in (METRICS_FILE, WATCHED_FILE):
        for line in lines(os.path.join(model_dir, file)):
            if line is None:
                damaged += 1
                continue
            for name, value in line.items():
                is_new = name not in found and len(found) >= _MOST_CURVES
                if name == "step" or is_new or len(name) > _LONGEST:
                    continue
                if type(value) in (int, float) and _is_drawn(line["step"], value):
                    found.setdefault(name, {})[line["step"]] = float(value)
    points = {
        name: _thinned([(float(step), value) for step, value in values.items()])
        for name, values in found.items()
    }
    return Curves(points, damaged)


def lines(path: str) -> Iterator[dict[str, Any] | None]:
    """The objects of a log with their `step`, None for a line that cannot be read.

    None at all if there is no such file.
    """
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        while text := file.readline(_MOST_LINE):
            try:
                line = json_files.parse(text, os.path.basename(path))
            except UserError:
                line = None
            is_one = isinstance(line, dict) and type(line.get("step")) is int
            yield line if is_one else None


def _is_drawn(step, value):
    return abs(step) < _LARGEST and math.isfinite(value) and abs(value) < _LARGEST


def _thinned(points):
    """At most `MOST_POINTS` of them, the last among them."""
    every = -(-len(points) // MOST_POINTS)
    return points[(len(points) - 1) % every :: every] if points else []
