"""Checkpoints written by Orbax in the background, in T5X's directory layout."""

import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading


class CheckpointWriter:
    """Writes the checkpoints of one run without holding up its loop.

    `save` returns as soon as the arrays are safe from later steps, and waits only for
    the save before it. After a save has finished, all but the newest `keep` checkpoints
    in `model_dir` are removed (None keeps all), of those that this class wrote: what
    T5X left there stays.
    """

    def __init__(self, model_dir: str, keep: int | None = 1):
        if keep is not None and keep < 1:
            raise UserError(f"keep={keep} must be at least 1, or None to keep all.")
        self.model_dir = model_dir
        self.keep = keep
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.AsyncOptions(timeout_secs=3600),
        )
        self._remove(
            name
            for name in os.listdir(model_dir)
            if re.fullmatch(
                reading.STEP_NAME.pattern + r"\.orbax-checkpoint-tmp.*", name
            )
        )

    def save(self, step: int, tree: reading.Tree, record: Mapping[str, Any]) -> None:
        """Starts writing `tree` (see `to_checkpoint_tree`) and a JSON `record`."""
        self.wait()
        path = reading.checkpoint_path(self.model_dir, step)
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
        if self.keep is not None:
            steps = reading.complete_steps(self.model_dir)
            paths = {
                step: reading.checkpoint_path(self.model_dir, step) for step in steps
            }
            own = [step for step in steps if reading.is_ours(paths[step])]
            self._remove(f"checkpoint_{step}" for step in own[: -self.keep])

    def close(self) -> None:
        """Finishes the last save."""
        self.wait()
        self._orbax.close()

    def _remove(self, names):
        if jax.process_index() == 0:
            for name in names:
                shutil.rmtree(os.path.join(self.model_dir, name))
