"""The numbers that a run logged, read back from its `metrics.jsonl`."""

import math
import os
from typing import NamedTuple

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files
from vit22b_transfer.training.logs import METRICS_FILE

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
    """All finite numbers of a run's log; none if it is not there.

    The last of two values of a step counts. Lines that cannot be read are counted.
    """
    path = os.path.join(model_dir, METRICS_FILE)
    found: dict[str, dict[int, float]] = {}
    damaged = 0
    if not os.path.isfile(path):
        return Curves({}, 0)
    with open(path, "rb") as lines:
        while text := lines.readline(_MOST_LINE):
            try:
                line = json_files.parse(text, METRICS_FILE)
            except UserError:
                line = None
            if not isinstance(line, dict) or type(line.get("step")) is not int:
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


def _is_drawn(step, value):
    return abs(step) < _LARGEST and math.isfinite(value) and abs(value) < _LARGEST


def _thinned(points):
    """At most `MOST_POINTS` of them, the last among them."""
    every = -(-len(points) // MOST_POINTS)
    return points[(len(points) - 1) % every :: every] if points else []
