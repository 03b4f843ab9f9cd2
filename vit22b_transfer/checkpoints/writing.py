"""Checkpoints written by Orbax in the background, in T5X's directory layout."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import orbax_noise, reading
from vit22b_transfer.checkpoints.best import KeepBest
from vit22b_transfer.host import whole_files


class CheckpointWriter:
    """Writes the checkpoints of one run without holding up its loop.

    `save` returns as soon as the arrays are safe from later steps, and waits only for
    the save before it. After a save has finished, all but the newest `keep` checkpoints
    in `model_dir` and the best by `best` are removed (None keeps all), of those that
    this class wrote: what T5X left there stays. Before the first save nothing is
    removed: a run that does not get so far leaves all as it was. Whoever writes holds
    the lock of `model_dir`.
    """

    def __init__(
        self, model_dir: str, keep: int | None = 1, best: KeepBest | None = None
    ):
        if keep is not None and keep < 1:
            raise UserError(f"keep={keep} must be at least 1, or None to keep all.")
        self.model_dir = model_dir
        self.keep = keep
        self.best = best
        orbax_noise.hush()
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.AsyncOptions(timeout_secs=3600),
        )
        self.held: set[int] = set()  # kept as well, whatever comes after them
        self._began = False
        self._on_disk: set[int] = set()

    def sweep(self) -> None:
        """Removes what killed processes left of writing and of removing checkpoints.

        To be called when a run is about to go on, and nothing can fail any more.
        """
        left = r"\.orbax-checkpoint-tmp.*|" + re.escape(whole_files.DELETED)
        pattern = f"{reading.STEP_NAME.pattern}({left})"
        self._remove(n for n in os.listdir(self.model_dir) if re.fullmatch(pattern, n))

    def check(self) -> None:
        """Raises what went wrong in the background; to be called now and then."""
        self._orbax.check_for_errors()

    def save(self, step: int, tree: reading.Tree, record: Mapping[str, Any]) -> None:
        """Starts writing `tree` (see `to_checkpoint_tree`) and a JSON `record`."""
        self.wait()
        if not self._began:
            self.sweep()
        self._began = True
        os.stat(
            self.model_dir
        )  # Orbax would make it anew, without the log and the lock
        path = self._path(step)
        if os.path.isdir(path) and not reading.is_complete(path):
            self._remove([os.path.basename(path)])
        self._orbax.save(
            path,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(tree), run=ocp.args.JsonSave(dict(record))
            ),
        )

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what went wrong."""
        self._orbax.wait_until_finished()
        if self._began:
            self.remove_old()

    def remove_old(self) -> None:
        """Removes what is neither among the newest nor among the best.

        To be called by itself where values of a checkpoint came after its save.
        """
        if self.keep is None or jax.process_index() > 0:
            return
        steps = reading.complete_steps(self.model_dir)
        own = [s for s in steps if reading.is_ours(self._path(s))]
        kept = set(own[-self.keep :]) | (self.held & set(own))
        if len(own) > len(kept) and self.best is not None:
            kept |= self.best.steps(self.model_dir)
        if old := [step for step in own if step not in kept]:
            # Orbax leaves it to the system when the files reach the disk.
            for step in kept - self._on_disk:
                whole_files.sync_tree(self._path(step))
            self._on_disk = kept
            self._remove(f"checkpoint_{step}" for step in old)

    def close(self) -> None:
        """Finishes the last save."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _path(self, step):
        return reading.checkpoint_path(self.model_dir, step)

    def _remove(self, names):
        if jax.process_index() == 0:
            for name in names:
                whole_files.remove_tree(os.path.join(self.model_dir, name))
