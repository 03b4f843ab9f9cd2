"""The tasks' own metrics of answers that a model generates while it is trained.

Training lies below inference and evaluation, so the loop only knows what
`training.measures.TaskScores` says; a recipe binds this to it
(`gin_configs/runs/generate.gin`).
"""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.inference import predicting
from vit22b_transfer.partitioning import processes
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training.eval_loss import EvaluationStopped
from vit22b_transfer.training.inputs import EvalData
from vit22b_transfer.training.logs import RunLog
from vit22b_transfer.training.measures import Scorer


@dataclasses.dataclass(frozen=True)
class TrainingScores:
    """Scores of the first examples of each task of `data`, every so many steps.

    data: tasks, split and batches; with a cache, features are read in place of images.
    generate_every: steps between scores, 1 or more; the last step has them too.
    generate_examples: how many of each task, 1 or more; all if the split has fewer.
      They are the first of the split, the same ones each time.

    Answers are generated as by `infer.infer_split` with seed 0, so that on as many
    examples as there are the scores are those of `evaluate.evaluate_checkpoint`.
    """

    data: EvalData
    generate_every: int
    generate_examples: int = 256

    def __post_init__(self):
        for name in ("generate_every", "generate_examples"):
            if (value := getattr(self, name)) < 1:
                raise UserError(
                    f"{name}={value} must be at least 1; to generate nothing set "
                    "train.fine_tune.scores = None."
                )

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks that are scored."""
        return self.data.tasks

    def start(self, model: Any, partitioning: Partitioning) -> Scorer:
        """The function (params, stop, log) -> metrics by task; compiled once.

        Raises:
          UserError: if a task or its split is not there, or it has no metrics.
        """
        from vit22b_transfer.data import objectives, task_metrics
        from vit22b_transfer.data import tasks as registered

        for task in self.data.tasks:
            registered.find_provider(task, self.data.split)
            objectives.check(task, model)
            task_metrics.check(task)
        predicts = functools.cache(
            lambda judge: predicting.make_predict(judge, partitioning)
        )
        return functools.partial(self._scores, model, partitioning, predicts)

    def _scores(
        self,
        model: Any,
        partitioning: Partitioning,
        predicts: Callable[[Any], predicting.Predict],
        params: Any,
        stop: Callable[[], bool],
        log: RunLog,
    ) -> Mapping[str, Mapping[str, float | str]]:
        results = {}
        for task in self.data.tasks:
            if stop():
                raise EvaluationStopped
            lines, lost = self._lines(
                task, model, partitioning, predicts, params, stop, log
            )
            where = f"{task} {self.data.split}"
            scores = evaluate.score_lines(lines, where, task)
            log.message(
                f"generated {scores.num_scored} answers of {where}: "
                f"{scores.num_bad_images} images could not be read, "
                f"{scores.num_empty} answers are empty{lost}"
            )
            results[task] = scores.metrics
        return results

    def _lines(self, task, model, partitioning, predicts, params, stop, log):
        """Lines of the first examples, of all hosts in order; prompts that were cut."""
        from vit22b_transfer.data import objectives

        limits = self.generate_examples, self.data.max_examples
        count = min(limit for limit in limits if limit is not None)
        lines: list[dict[str, Any]] = []
        model, lengths = objectives.judge(model, task, self.data.feature_lengths)
        data = dataclasses.replace(
            self.data, feature_lengths=lengths, max_examples=count
        )
        rows: Any = data.batches(task, model, partitioning)
        with (
            contextlib.closing(rows),
            log.part(f"generating {task}", total=count) as bar,
        ):
            for done, of_batch in predicting.predicted_lines(
                rows, model, predicts(model), params, batch_size=data.batch_size
            ):
                lines += of_batch
                bar.show(done)
                if stop():
                    raise EvaluationStopped
            cut = rows.counters.lost.get("truncated_inputs")
        everything = processes.gathered(json.dumps(lines).encode())
        joined = itertools.chain.from_iterable(map(json.loads, everything))
        ordered = sorted(joined, key=lambda line: line["index"])
        return ordered, f", {cut} prompts were cut" if cut else ""
