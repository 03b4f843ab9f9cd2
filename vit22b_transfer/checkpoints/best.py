"""Which checkpoints of a run are the best by a metric that was measured at their step.

The values lie in the checkpoints' own records, so they are there or gone with them,
whenever the machine stops; nothing else says which is the best.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.host.gin_arguments import gin_argument

# In a checkpoint's record: {metric: value} of its step.
MEASURED = "measured"


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """Keeps the checkpoints with the best values of a metric besides the newest.

    metric: as it is called in metrics.jsonl, such as `eval/TASK/loss` or
      `generated/TASK/cider_d`.
    mode: "max" if more is better, "min" if less is, as of a loss.
    keep: how many, 1 or more.
    """

    metric: str
    mode: Literal["max", "min"]
    keep: int = 1

    def __post_init__(self):
        if self.mode not in ("max", "min"):
            raise UserError(f"mode={self.mode!r} of KeepBest must be 'max' or 'min'.")
        if self.keep < 1:
            raise UserError(
                f"keep={self.keep} of KeepBest must be at least 1; "
                "train.fine_tune.best = None keeps none."
            )

    def ranked(self, model_dir: str) -> list[tuple[int, float]]:
        """(step, value) of the checkpoints that were measured, the best first.

        Of equal values the earlier is the better. Only what runs of ours wrote counts.
        """
        found = []
        for step in reading.complete_steps(model_dir):
            path = reading.checkpoint_path(model_dir, step)
            if reading.is_ours(path):
                value = reading.read_record(path).get(MEASURED, {}).get(self.metric)
                if value is not None:
                    found.append((step, float(value)))
        sign = -1.0 if self.mode == "max" else 1.0
        return sorted(found, key=lambda item: (sign * item[1], item[0]))

    def steps(self, model_dir: str) -> set[int]:
        """Steps of the checkpoints to keep."""
        return {step for step, _ in self.ranked(model_dir)[: self.keep]}

    def told(self, model_dir: str) -> str:
        """A line that says which is the best, and how to evaluate it."""
        ranked = self.ranked(model_dir)
        if not ranked:
            return f"no checkpoint was measured by {self.metric}, so none is the best"
        step, value = ranked[0]
        path = reading.checkpoint_path(os.path.abspath(model_dir), step)
        return (
            f"best {self.metric} {value:.4f} at step {step}: {path} "
            f"(`vit22b eval` and `infer` take it with "
            f"{gin_argument('CHECKPOINT', path)})"
        )

    def check_name(self, known: Iterable[str], what: str) -> None:
        """Raises UserError with the nearest names if `metric` is not in `known`.

        what: what the known names are, in the message.
        """
        known = sorted(known)
        if self.metric not in known:
            near = difflib.get_close_matches(self.metric, known, n=3, cutoff=0.5)
            shown = near or known
            raise UserError(
                f"KeepBest.metric={self.metric!r} is not measured. "
                f"{'Nearest' if near else what}: {', '.join(shown) or 'none'}."
            )


def measured(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint records of its step: the values that are finite."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return {MEASURED: finite} if finite else {}
