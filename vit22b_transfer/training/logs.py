"""What a run writes about itself: `metrics.jsonl`, TensorBoard, a progress bar."""

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Mapping

from vit22b_transfer.host import progress, whole_files

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

    def start(self, step: int) -> None:
        """Opens the files, to go on after `step`.

        What an earlier, killed run logged beyond it is removed: those steps are taken
        again. So call it when nothing can fail any more.
        """
        if not self._is_writer:
            return
        path = os.path.join(self._model_dir, METRICS_FILE)
        whole_files.remove_unfinished(path)
        _drop_lines_after(path, step)
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

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line and one event; on disk when this returns."""
        if self._metrics is None or self._events is None:
            return
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        self._events.write(step, values)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._bar is not None:
            self._bar.show(step)

    def report(self, step: int, loss: float, examples_per_second: float, eta: float):
        """Shows where the run stands; `eta` in seconds."""
        if not self._is_writer:
            return
        left = str(datetime.timedelta(seconds=round(eta)))
        text = f"loss {loss:.4f}  {examples_per_second:.1f} examples/s  ETA {left}"
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


def _drop_lines_after(path, step):
    """Keeps the complete lines of steps up to `step`."""
    if not os.path.isfile(path):
        return
    kept = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            # A line without its end was being written when the run was killed.
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    with whole_files.replacing(path) as file:
        file.writelines(kept)
