"""The host's side of the spike guard: what is written of skipped steps, and going back.

A batch is known by the number of its step, so a run that goes back does not read again:
it takes the state of its last good checkpoint and the batches that come next. All from
that checkpoint on are passed over. To pass over the skipped ones alone would not help:
they have changed nothing, and the others would lead to the same state again.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading, writing
from vit22b_transfer.host.file_errors import brief
from vit22b_transfer.partitioning import processes
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import resuming
from vit22b_transfer.training.logs import RunLog
from vit22b_transfer.training.spike_guard import (
    KEY,
    REASONS,
    Guard,
    SpikeGuard,
    empty_guard,
)
from vit22b_transfer.training.state import TrainState

# The part of a checkpoint's record that says where to go back to, and what was.
RECORD = "spike_guard"
# Times that a run goes back to the same checkpoint: then it is not the data.
_RETURNS = 3
# Characters of an id that are written, and ids of a batch in the output.
_ID_LENGTH, _SHOWN = 100, 3


class SpikeWatch:
    """Looks at what a guarded step decided, where the loop waits for it anyway.

    guard: None for a run without: then nothing is done.
    """

    def __init__(
        self,
        guard: SpikeGuard | None,
        writer: writing.CheckpointWriter,
        log: RunLog,
        window_steps: int,
    ):
        self._guard, self._writer, self._log = guard, writer, log
        self._window_steps = window_steps
        self._told = 0  # the last step whose skip is written
        self._ids: dict[int, list[str] | None] = {}
        # The last good checkpoint, and the steps that had counted when it was saved.
        self._good: int | None = None
        self._good_count = -1
        self._returns: list[list[int]] = []  # [checkpoint, step that went back to it]

    def begin(self, start_step: int, path: str) -> None:
        """Goes on with what the record of the checkpoint at `path` says."""
        self._told = start_step
        if self._guard is None:
            return
        record = reading.read_record(path).get(RECORD, {"good_step": start_step})
        self._good, self._good_count = record["good_step"], record.get("good_count", -1)
        self._returns = [list(pair) for pair in record.get("returns", [])]
        self.hold()

    def beside(
        self, window: Mapping[str, Any], partitioning: Partitioning
    ) -> dict[str, Any]:
        """The window with the guard's place in it."""
        if self._guard is None:
            return dict(window)
        return {**window, KEY: empty_guard(self._window_steps, partitioning)}

    def took(self, step: int, batches: Any) -> None:
        """Remembers whose examples the batch of this step has, up to the next log."""
        if self._guard is not None:
            self._ids[step] = getattr(batches, "image_ids", None)

    def metrics(self, fetched: Mapping[str, Any]) -> dict[str, Any]:
        """The window's metrics; none if no step in it counted."""
        if self._guard is None:
            return dict(fetched)
        plain = {name: x for name, x in fetched.items() if name != KEY}
        return plain if plain["grad_norm"].count > 0 else {}

    def values(self, fetched: Mapping[str, Any]) -> dict[str, float]:
        """What is logged of the guard."""
        if self._guard is None:
            return {}
        return {"spike_guard/skipped": float(fetched[KEY].band.skipped)}

    def tell(self, fetched: Mapping[str, Any], step: int) -> None:
        """Writes a line for each skipped step up to `step` that has none yet."""
        if self._guard is None:
            return
        ring: Guard = fetched[KEY].ring
        first = (step - 1) // self._window_steps * self._window_steps + 1
        for number in range(max(first, self._told + 1), step + 1):
            place = number - first
            if reason := int(ring.reason[place]):
                self._write(number, REASONS[reason], ring.values[:, place])
        self._told = step
        self._ids = {n: ids for n, ids in self._ids.items() if n > step}

    def _write(self, step, reason, values):
        ids = self._ids_of(step)
        loss, norm = (float(value) for value in values)
        line = {
            "reason": reason,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "image_ids": ids,
        }
        self._log.event(step, {f"spike_guard/{name}": x for name, x in line.items()})
        shown = ", ".join(map(brief, ids[:_SHOWN])) if ids else "not known"
        more = f" and {len(ids) - _SHOWN} more" if ids and len(ids) > _SHOWN else ""
        self._log.message(
            f"step {step} is skipped: {reason} (loss {loss:.4g}, gradient norm "
            f"{norm:.4g}); its images: {shown}{more}"
        )

    def _ids_of(self, step: int) -> list[str] | None:
        """Ids of all processes' examples; None if the data does not tell them."""
        ids = self._ids.get(step)
        mine = None if ids is None else [brief(x, _ID_LENGTH) for x in ids]
        parts = map(json.loads, processes.gathered(json.dumps(mine).encode()))
        known = [part for part in parts if part is not None]
        return [name for part in known for name in part] if known else None

    def record(self, fetched: Mapping[str, Any], step: int) -> dict[str, Any]:
        """What the checkpoint of this step says of the guard, which may be a good one.

        Good is one outside of a streak, behind a step that counted since the last: not
        that of a run which has just gone back, nor the one of a streak's end.
        """
        if self._guard is None:
            return {}
        band = fetched[KEY].band
        if int(band.streak) == 0 and int(band.count) != self._good_count:
            self._good, self._good_count = step, int(band.count)
        said = {
            "good_step": self._good,
            "good_count": self._good_count,
            "returns": self._returns,
        }
        return {RECORD: said}

    def hold(self) -> None:
        """Keeps the last good checkpoint; to be called once its save has begun.

        Until then the one before is held: a save may be cut off.
        """
        if self._guard is not None:
            self._writer.held = set() if self._good is None else {self._good}

    def saved(self, fetched: Mapping[str, Any]) -> dict[str, Any]:
        """The window as a checkpoint keeps it: without the steps that were told."""
        if self._guard is None:
            return dict(fetched)
        return dict(fetched) | {KEY: Guard(fetched[KEY].band, None)}

    def goes_back(self, fetched: Mapping[str, Any]) -> bool:
        """Whether so many steps were skipped in a row that the run has to go back.

        Each time it has gone back to the same checkpoint it skips twice as many before
        it does so again: a long stretch of bad batches ends.
        """
        if self._guard is None:
            return False
        most = self._guard.max_skips << self._times()
        return int(fetched[KEY].band.streak) >= most

    def _times(self) -> int:
        """How often the run went back to the last good checkpoint."""
        return sum(good == self._good for good, _ in self._returns)

    def go_back(
        self,
        step: int,
        number: jax.Array,
        model: Any,
        abstract: TrainState,
        window: Any,
    ) -> tuple[TrainState, Any]:
        """The state of the last good checkpoint, to go on with after `step`; window.

        number: `step` as the state has it. To be called without another reference to
        the state's arrays: there may be no memory for two.

        Raises:
          UserError: if there is no such checkpoint, or the run went back to it often.
        """
        assert self._guard is not None
        skips = f"{int(window[KEY].band.streak)} steps in a row were skipped at {step}"
        self._writer.wait()
        model_dir = self._writer.model_dir
        if self._good is None or self._good not in reading.complete_steps(model_dir):
            raise UserError(
                f"{skips}, and there is no good checkpoint to go back to. Lower the "
                "learning rate, lengthen the warmup, save more often "
                "(train.Periods.checkpoint), or let more steps settle the band "
                "(spike_guard.SpikeGuard.settle_steps)."
            )
        path = reading.checkpoint_path(model_dir, self._good)
        times = self._times()
        if times >= _RETURNS:
            raise UserError(
                f"{skips}, and the run went back to {path} {times} times already: "
                "other batches do not help. Lower the learning rate, or widen the band "
                "(spike_guard.SpikeGuard.deviations)."
            )
        guard: Guard = window[KEY]
        restored, before = resuming.resume(path, model, abstract, window)
        self._returns.append([self._good, step])
        band = before[KEY].band
        band = band._replace(
            streak=_like(band.streak, 0),
            skipped=guard.band.skipped,
            lag=_like(band.lag, int(band.lag) + step - self._good),
        )
        self._log.event(step, {"spike_guard/returned_to": self._good})
        self._log.message(
            f"step {step}: {int(guard.band.streak)} steps in a row were skipped; the "
            f"state is that of checkpoint_{self._good} again, the batches of steps "
            f"{self._good + 1} to {step} are passed over"
        )
        state = TrainState(number, restored.params, restored.opt_state)
        return state, dict(window) | {KEY: Guard(band, guard.ring)}


def _like(array: jax.Array, value: int) -> jax.Array:
    return jax.device_put(np.asarray(value, array.dtype), array.sharding)
