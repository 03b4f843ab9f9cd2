"""What a trust measure found: a JSON line for each number, and a table of them."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
from jaxtyping import Bool, Float

from vit22b_transfer.evaluation import intervals
from vit22b_transfer.evaluation.intervals import Interval
from vit22b_transfer.experiments import outcomes
from vit22b_transfer.experiments.probe import append_lines
from vit22b_transfer.host import progress, tables, whole_files

RESULTS_FILE = "measures.jsonl"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One number.

    settings: what tells it from the measure's others. count: of how many examples it
    is: images, of BAPPS triplets.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None = None
    interval_kind: str = "none"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    count: int = 0


def share(
    metric: str,
    right: Bool[np.ndarray, " images"] | Float[np.ndarray, " images"],
    settings: Mapping[str, Any] | None = None,
) -> Finding:
    """The mean of images' scores in [0, 1], with its Wilson interval."""
    value = float(np.mean(right))
    interval = outcomes.wilson_interval(value, len(right))
    kind = f"{outcomes.INTERVAL}, over {len(right)} images"
    return Finding(metric, value, interval, kind, settings or {}, len(right))


def mean(
    metric: str,
    scores: Float[np.ndarray, " images"],
    settings: Mapping[str, Any] | None = None,
) -> Finding:
    """The mean of images' scores of any size, with its BCa interval."""
    counts = np.ones(len(scores), np.int64)
    found = intervals.bootstrap(np.asarray(scores, np.float64), counts)
    return resampled(metric, found, len(scores), settings)


def resampled(
    metric: str,
    found: Interval,
    images: int,
    settings: Mapping[str, Any] | None = None,
) -> Finding:
    """A number whose interval was found by resampling so many images."""
    kind = f"{found.method} bootstrap, 95 %, over {images} images"
    interval = (found.low, found.high)
    if not np.isfinite(interval).all():
        interval, kind = None, "undefined"
    return Finding(metric, found.value, interval, kind, settings or {}, images)


def report(
    measure: str,
    findings: Sequence[Finding],
    *,
    protocol: Mapping[str, Any],
    facts: Mapping[str, Any],
    notes: Mapping[str, Any],
    output_dir: str,
    pictures: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Prints the numbers, and adds JSON lines of them to `output_dir/measures.jsonl`.

    protocol: what was measured, and how. facts: head, tower, data. notes: what was
      counted on the way. pictures: paths, relative to `output_dir`. A number that is
      not finite, such as the bias of no decisions, is null.
    """
    folder = whole_files.writable_directory(output_dir, "output directory")
    lines = [
        {
            "measure": measure,
            "metric": found.metric,
            "value": found.value if np.isfinite(found.value) else None,
            "interval": None if found.interval is None else list(found.interval),
            "interval_kind": found.interval_kind,
            "count": found.count,
            "settings": dict(found.settings),
            "protocol": dict(protocol),
            "notes": dict(notes),
            "pictures": [os.path.relpath(path, folder) for path in pictures],
            **facts,
        }
        for found in findings
    ]
    path = os.path.join(folder, RESULTS_FILE)
    append_lines(path, lines)
    _show(measure, findings, protocol, notes)
    for picture in pictures:
        progress.console().print(f"picture: {picture}", markup=False)
    progress.console().print(f"written to {path}", markup=False)
    return lines


def _show(measure, findings, protocol, notes) -> None:
    said = progress.console()
    said.print(measure, markup=False)
    for name, value in protocol.items():
        said.print(f"  {name}: {json.dumps(value)}", markup=False)
    names, values, ranges = [], [], []
    for found in findings:
        told = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in found.settings.items()
            if isinstance(value, str | int | float)
        ]
        names.append(", ".join([found.metric, *told]))
        values.append(f"{found.value:.4f}")
        interval = found.interval
        ranges.append("" if interval is None else "{:.4f} to {:.4f}".format(*interval))
    columns = {"value": values, "95 %": ranges}
    tables.print_table(rich.console.Console(), names, columns)
    for name, value in notes.items():
        said.print(f"  {name}: {value}", markup=False)
