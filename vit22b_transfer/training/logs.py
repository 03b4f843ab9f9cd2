"""What a run writes about itself: `metrics.jsonl`, TensorBoard, a progress bar."""

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files, progress, whole_files

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """The log of one run in `model_dir`; only process 0 writes anything.

    On a terminal there is a progress bar, elsewhere plain lines.
    """

    def __init__(self, model_dir: str, *, total_steps: int, is_writer: bool = True):
        self._model_dir = model_dir
        self._total_steps = total_steps
        self._is_writer = is_writer
        self._console = progress.console()
        self._metrics = self._events = self._bar = None
        self._open = contextlib.ExitStack()
        self._losses: list[tuple[float, int]] = []  # with their steps
        self._has_failed = False

    def start(self, step: int, *, to_evaluate: bool = False) -> None:
        """Opens the files, to go on after `step`, or with the evaluation of that step.

        What an earlier, killed run logged beyond it is removed and told: those steps
        are taken again. So are lines that cannot be read, which are counted. So call it
        when nothing can fail any more.
        """
        if not self._is_writer:
            return
        path = os.path.join(self._model_dir, METRICS_FILE)
        whole_files.remove_unfinished(path)
        self._losses, damaged, last = _drop_lines_after(path, step, to_evaluate)
        if last > step:
            self.message(
                f"{last - step} logged steps have no whole checkpoint ({step + 1} to "
                f"{last}): they are done again"
            )
        if damaged:
            self.message(
                f"{path}: {damaged} lines were cut off or damaged, as by a power cut; "
                "they are left out"
            )
        self._metrics = self._open.enter_context(open(path, "a", encoding="utf-8"))
        self._events = _TensorBoardFile(self._model_dir, step)
        self._open.callback(self._events.close)
        self._bar = self._open.enter_context(
            progress.Progress(
                self._console,
                "training",
                total=self._total_steps,
                done=step,
                unit="steps",
                lines=False,
            )
        )

    def scalars(
        self,
        step: int,
        values: Mapping[str, float],
        lists: Mapping[str, list[float]] | None = None,
    ) -> None:
        """Appends one line and one event; on disk when this returns.

        lists: what is in the line alone.
        """
        self._append(step, {**values, **(lists or {})}, values)
        self._losses += _losses({"step": step, **values})

    def event(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a line of what JSON can say to the file alone."""
        self._append(step, values, {})

    def _append(self, step, line, scalars):
        if self._metrics is None or self._events is None:
            return
        try:
            os.stat(self._metrics.name)  # a removed file can be written, and is lost
            self._metrics.write(json.dumps({"step": step, **line}) + "\n")
            self._metrics.flush()
            if scalars:
                self._events.write(step, scalars)
        except OSError:
            self._has_failed = True
            raise

    def summary(self) -> str:
        """The best of the run's training losses and the last, with their steps."""
        if not self._losses:
            return "no loss was logged"
        (best, best_step), (last, last_step) = min(self._losses), self._losses[-1]
        return (
            f"best loss {best:.4f} at step {best_step}, last loss {last:.4f} at step "
            f"{last_step}"
        )

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._bar is not None:
            self._bar.show(step)

    def part(self, label: str, *, total: int | None) -> progress.Progress:
        """Progress of something that holds up the steps; a context manager."""
        return progress.Progress(
            self._console if self._is_writer else progress.console(quiet=True),
            label,
            total=total,
            beside=self._bar,
        )

    def report(
        self, step: int, loss: float | None, examples_per_second: float, eta: float
    ):
        """Shows where the run stands; `eta` in seconds; None: no step counted."""
        if not self._is_writer:
            return
        left = str(datetime.timedelta(seconds=round(eta)))
        said = "no loss" if loss is None else f"loss {loss:.4f}"
        text = f"{said}  {examples_per_second:.1f} examples/s  ETA {left}"
        if self._bar is not None and self._bar.is_bar:
            self._bar.show(step, report=text)
        else:
            self.message(f"step {step}/{self._total_steps}  {text}")

    def message(self, text: str) -> None:
        """Prints a line (above the progress bar, if there is one)."""
        if self._is_writer:
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Stops the bar and closes the files."""
        # What could not be written would be tried again, and be an error again.
        failure = (OSError,) if self._has_failed else ()
        with contextlib.suppress(*failure):
            self._open.close()


class StepTimer:
    """Steps per second between logs, without evaluations and saves."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        """Leaves the time since the last call out of account."""
        self._step, self._time = step, time.perf_counter()

    def steps_per_second(self, step: int) -> float:
        """Speed since the last call."""
        speed = (step - self._step) / (time.perf_counter() - self._time)
        self.restart(step)
        return speed


class _TensorBoardFile:
    """An event file written without importing TensorFlow, as tensorboard's own does."""

    def __init__(self, directory, start_step):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        file = open(os.path.join(directory, name), "wb")
        self._records = record_writer.RecordWriter(file)
        self._add(file_version="brain.Event:2")
        # Tells TensorBoard to forget what a killed run wrote from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=start_step + 1, session_log=start)

    def write(self, step, values):
        scalars = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]
        self._add(step=step, summary=self._summary(value=scalars))

    def close(self):
        self._records.close()

    def _add(self, **fields):
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()


def _drop_lines_after(path, step, to_evaluate):
    """Keeps the whole lines of steps up to `step`, but not the evaluation to be done.

    Returns their losses, how many lines could not be read, and the last step of all.
    """
    losses, damaged, last = [], 0, 0
    if not os.path.isfile(path):
        return losses, damaged, last
    with open(path, "rb") as lines, whole_files.replacing(path, "wb") as kept:
        for line in lines:
            values = _values(line)
            if values is None:
                damaged += 1
                continue
            last = max(last, values["step"])
            if values["step"] <= step - (to_evaluate and _is_evaluation(values)):
                kept.write(line)
                losses += _losses(values)
    return losses, damaged, last


def _values(line):
    """The values of a line; None if it is cut off, or no line of ours."""
    if not line.endswith(b"\n"):
        return None
    try:
        values = json_files.parse(line, METRICS_FILE)
    except UserError:
        return None
    is_ours = isinstance(values, dict) and type(values.get("step")) is int
    return values if is_ours else None


def _is_evaluation(values):
    return any(name.startswith(("eval/", "generated/")) for name in values)


def _losses(values):
    """[(training loss, step)] of a line that has one."""
    loss = values.get("train/loss")
    return [(loss, values["step"])] if isinstance(loss, float) else []
