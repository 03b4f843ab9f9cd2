"""What a run is measured by at some steps: the loss on other data, and a task's scores.

The scores need answers to be generated, which rooms above this one do: the loop takes
an object that does it (`evaluation.training_scores.TrainingScores`, bound by gin in
`gin_configs/runs/generate.gin`) and knows of it what `TaskScores` says.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints.best import KeepBest
from vit22b_transfer.host.file_errors import brief
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training.eval_loss import evaluate_loss, make_eval_step
from vit22b_transfer.training.logs import RunLog

# Kinds of measures, as a checkpoint records those that are still to be done.
LOSS, SCORES = "loss", "scores"

# (params, stop, log) -> metrics by task; `EvaluationStopped` if `stop()` says so.
Scorer = Callable[
    [Any, Callable[[], bool], RunLog], Mapping[str, Mapping[str, float | str]]
]


@runtime_checkable
class TaskScores(Protocol):
    """The tasks' own metrics, on part of their examples, every so many steps."""

    @property
    def generate_every(self) -> int:
        """Steps between scores."""
        ...

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks."""
        ...

    def start(self, model: Any, partitioning: Partitioning) -> Scorer:
        """Checks what can be checked; what it returns is called many times."""
        ...


class Measures:
    """All that a run is measured by, and when; the last step does all of it."""

    def __init__(
        self,
        model: Any,
        partitioning: Partitioning,
        *,
        eval_data: Any,
        evaluate_every: int,
        scores: TaskScores | None,
        total_steps: int,
    ):
        self._model, self._partitioning = model, partitioning
        self._eval_data, self._scores = eval_data, scores
        self._total_steps = total_steps
        self._periods: dict[str, int] = {}
        self._numbers: set[str] = set()  # names of the scores that are no texts
        if eval_data is not None:
            self._periods[LOSS] = evaluate_every
            self._eval_step = make_eval_step(model, partitioning)
        if scores is not None:
            self._periods[SCORES] = scores.generate_every
            self._scorer = scores.start(model, partitioning)

    def due(self, step: int) -> tuple[str, ...]:
        """What is to be measured after this step."""
        return tuple(
            name
            for name, period in self._periods.items()
            if step % period == 0 or step == self._total_steps
        )

    def known(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names`, from a checkpoint's record, that this run has."""
        return tuple(name for name in names if name in self._periods)

    def measure(
        self,
        due: Sequence[str],
        params: Any,
        log: RunLog,
        stop: Callable[[], bool],
    ) -> dict[str, float]:
        """`eval/TASK/METRIC` of the loss, `generated/TASK/METRIC` of generated answers.

        Texts and numbers that are not finite are shown and are no values.

        Raises:
          EvaluationStopped: if `stop` said so; it is all to be done again.
        """
        values = {}
        if LOSS in due:
            values |= evaluate_loss(
                self._eval_data,
                self._model,
                self._eval_step,
                params,
                self._partitioning,
                stop=stop,
            )
        if SCORES in due:
            for task, metrics in self._scorer(params, stop, log).items():
                for name, value in metrics.items():
                    if not isinstance(value, str):
                        self._numbers.add(_name(task, name))
                    if isinstance(value, str) or not math.isfinite(value):
                        log.message(f"{_name(task, name)}: {brief(value)} (not logged)")
                    else:
                        values[_name(task, name)] = value
        return values

    def check_best(
        self, best: KeepBest, checkpoint_every: int, params: Any, batch: Any
    ) -> None:
        """Raises UserError if what is kept by is not measured, or not saved.

        params, batch: abstract, or arrays; nothing is computed. Which scores a task
        has is known when they were computed once (see `check_measured`).
        """
        losses, prefixes = [], []
        if LOSS in self._periods:
            with self._partitioning.activate():
                _, metrics = jax.eval_shape(self._model.eval_fn, params, batch)
            tasks = self._eval_data.tasks
            losses = [f"eval/{task}/{name}" for task in tasks for name in metrics]
        if self._scores is not None:
            prefixes = [_name(task, "") for task in self._scores.tasks]
        is_score = best.metric.startswith(tuple(prefixes))
        if not is_score:
            known = [*losses, *(f"{prefix}METRIC" for prefix in prefixes)]
            best.check_name(known, "Measured are")
        period = self._periods[SCORES if is_score else LOSS]
        if period % checkpoint_every:
            fitting = math.gcd(period, checkpoint_every)
            raise UserError(
                f"{best.metric} is measured every {period} steps, but checkpoints are "
                f"saved every {checkpoint_every}: what is not saved cannot be kept. "
                f"Set train.Periods.checkpoint to a divisor of {period}, such as "
                f"{fitting}."
            )

    def check_measured(self, best: KeepBest, due: Sequence[str]) -> None:
        """Raises UserError if `best` names a score that a task turned out not to have.

        due: what `measure` has just measured. A score that is not finite is there.
        """
        if SCORES in due and best.metric.startswith("generated/"):
            best.check_name(self._numbers, "Measured are")


def _name(task: str, metric: str) -> str:
    return f"generated/{task}/{metric}"
