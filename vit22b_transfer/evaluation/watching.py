"""Every new checkpoint of a run evaluated beside its training.

What was found stands in `RUN/watch.jsonl`, a line for each checkpoint, which
`training.curves` reads beside what the training logged; predictions and their tables
stand in `RUN/watch`. Killed and started again it goes on: predictions where they were,
and no checkpoint twice.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.evaluation.evaluate import Scores
from vit22b_transfer.host import locks
from vit22b_transfer.training import curves, resuming

FOLDER = "watch"
# Seconds between looks.
_WAIT = 10.0

Evaluate = Callable[..., Mapping[str, Scores]]


def watch(
    run: str,
    evaluate: Evaluate,
    *,
    tell: Callable[[str], None] = print,
    wait: float = _WAIT,
) -> list[int]:
    """Evaluates each checkpoint until the run is finished; the steps of this call.

    evaluate: takes `checkpoint` and `output_dir`, as `evaluate.evaluate_checkpoint`.
    tell: is given lines of what is done.
    A checkpoint that is removed while it is read is left out, and told: a run that
    keeps one checkpoint only removes them as it goes.

    Raises:
      UserError: if the run is not there, is watched already, or an evaluation fails
        whose checkpoint is still there.
    """
    run = os.path.abspath(os.path.expanduser(run))
    if not os.path.isdir(run):
        raise UserError(f"{run} is no directory; name the MODEL_DIR of a training.")
    output = os.path.join(run, FOLDER)
    os.makedirs(output, exist_ok=True)
    place = os.path.join(run, curves.WATCHED_FILE)
    steps: list[int] = []
    with locks.held(output):
        known = {line["step"] for line in curves.lines(place) if line is not None}
        left_out: set[int] = set()
        waits = False
        while True:
            # Asked first: what is written meanwhile is seen by what follows.
            finished = _is_finished(run)
            new = [
                step
                for step in reading.complete_steps(run)
                if step not in known | left_out
            ]
            for step in new[:1]:
                waits = False
                if _evaluated(run, step, evaluate, output, place, tell):
                    known.add(step)
                    steps.append(step)
                else:
                    left_out.add(step)
            if new:
                continue
            if finished:
                tell(f"{run} is finished; {len(known)} checkpoints were evaluated")
                return steps
            if not waits:
                tell(f"waiting for the next checkpoint of {run}")
                waits = True
            time.sleep(wait)


def _evaluated(run, step, evaluate, output, place, tell):
    """Whether a checkpoint was evaluated and entered; it may be removed meanwhile."""
    path = reading.checkpoint_path(run, step)
    tell(f"evaluating {path}")
    try:
        results = evaluate(checkpoint=path, output_dir=output)
    except Exception:
        if reading.is_complete(path):
            raise
        tell(f"{path} was removed while it was read; it is left out")
        return False
    values: dict[str, Any] = {"step": step}
    for task, scores in results.items():
        for name, value in scores.metrics.items():
            if isinstance(value, int | float):
                values[f"watch/{task}/{name}"] = float(value)
    _append(place, values)
    return True


def _append(place: str, values: Mapping[str, Any]) -> None:
    """A line more; what a killed process left of one stays a line of its own."""
    with open(place, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(values).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _is_finished(run: str) -> bool:
    """Whether the newest checkpoint is the last of its training."""
    step = reading.latest_step(run)
    if step is None:
        return False
    path = reading.checkpoint_path(run, step)
    try:
        record = reading.read_record(path)
        unfinished = resuming.to_measure(path)
    except (UserError, OSError):
        if reading.is_complete(path):
            raise
        return False
    return record.get("settings", {}).get("total_steps") == step and not unfinished
