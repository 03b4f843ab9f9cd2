"""A head learned on a tower by the library's own training loop, and its results told.

So it is deterministic, goes on where it was stopped, and the tower is frozen or trained
as in any other training. Each protocol has a directory of its own for its checkpoints.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import restoring
from vit22b_transfer.experiments import outcomes, probe
from vit22b_transfer.host import progress, whole_files
from vit22b_transfer.models import convolutions
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import state, train

TRAINED, PICTURES = "trained", "pictures"
_LOGGED = 10  # lines of a training, at least


@dataclasses.dataclass(frozen=True)
class HeadTraining:
    """How a head is learned.

    optimizer: as `optimizers.adamw`, with its schedule, which ends at `steps`.
    statistics_batches: the first batches of the training; behind it, batch
      normalisation gets their means and variances. checkpoint_every: in steps; what a
      killed run loses at most. seed: of first weights, order and crops.
    """

    optimizer: Any
    steps: int
    batch_size: int
    statistics_batches: int = 64
    checkpoint_every: int = 1000
    seed: int = 0

    def __post_init__(self):
        if self.statistics_batches < 1:
            raise UserError(
                f"statistics_batches={self.statistics_batches} must be positive."
            )
        schedule = getattr(self.optimizer, "learning_rate", None)
        told = getattr(schedule, "settings", {}).get("total_steps")
        if told not in (None, self.steps):
            raise UserError(
                f"the schedule of the learning rate has total_steps={told}, but the "
                f"head is trained for steps={self.steps}. Recipes set both by "
                "TRAIN_STEPS."
            )

    def learned(
        self,
        model: Any,
        data: Any,
        *,
        directory: str,
        partitioning: Partitioning,
        initial: train.InitialCheckpoint | None = None,
    ) -> Any:
        """The parameters when training is over, in their shardings.

        Raises:
          StoppedError: if a signal stopped it; the same call goes on.
          UserError: as `train.fine_tune`.
        """
        done = train.fine_tune(
            model,
            model_dir=directory,
            data=data,
            total_steps=self.steps,
            partitioning=partitioning,
            initial=initial,
            periods=train.Periods(
                log=max(1, min(50, self.steps // _LOGGED)),
                checkpoint=self.checkpoint_every,
            ),
            seed=self.seed,
        )
        if done.interrupted:
            raise StoppedError(
                f"stopped at step {done.step} of {self.steps}; run the same command "
                f"again to go on. What is learned lies in {directory}."
            )
        batches = data.batches(model, partitioning, seed=self.seed, start_step=0)
        try:
            abstract = state.abstract_variables(model, partitioning, next(batches))
        finally:
            batches.close()
        return restoring.restore_params(
            done.checkpoint, abstract, state.shardings_of(abstract)
        )

    def with_statistics(
        self, params: Any, model: Any, data: Any, partitioning: Partitioning
    ) -> Any:
        """The parameters with the statistics that batch normalisation needs, if any."""
        with partitioning.activate():
            told_of = jax.jit(model.statistics)
            batches = data.batches(model, partitioning, seed=self.seed, start_step=0)
            label, count = "statistics of batches", self.statistics_batches
            told: Any = None
            try:
                with progress.Progress(
                    progress.console(), label, total=count, unit="batches"
                ) as bar:
                    for number in range(count):
                        found = told_of(params, next(batches))
                        if not found:
                            return params
                        told = found if told is None else _added(told, found)
                        bar.show(number + 1)
            finally:
                batches.close()
            head = convolutions.with_statistics(params["head"], told["head"], count)
            return {**params, "head": head}


class StoppedError(UserError):
    """A training that a signal stopped; what is learned is kept."""


def directory_of(output_dir: str, name: str, decides: Mapping[str, Any]) -> str:
    """Where the checkpoints of a training go: one place for all that decides it."""
    text = json.dumps(decides, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return os.path.join(output_dir, TRAINED, f"{name}-{digest}")


def pictures_of(output_dir: str, name: str, directory: str) -> str:
    """A folder for the pictures of what was learned in a directory."""
    folder = os.path.join(output_dir, PICTURES, os.path.basename(directory))
    return whole_files.writable_directory(folder, f"folder of the pictures of {name}")


def tell(
    found: Sequence[outcomes.Measured], output_dir: str, facts: Mapping[str, Any]
) -> None:
    """Appends a line for each number to the file of results, and prints them.

    facts: `probe`, `protocol`, `features`, `train`, `test`; `classes` if there are any.
    """
    path = os.path.join(output_dir, probe.RESULTS_FILE)
    lines = [
        {
            "metric": one.metric,
            "value": one.value,
            "interval": list(one.interval),
            "interval_kind": f"{one.interval_kind}, over {one.images} images",
            "settings": dict(one.settings),
            "notes": dict(one.notes),
            "pictures": list(one.pictures),
            **facts,
        }
        for one in found
    ]
    probe.append_lines(path, lines)
    probe.show(lines)
    progress.console().print(f"written to {path}", markup=False)


def _added(first, second):
    return jax.tree.map(lambda a, b: a + b, first, second)
