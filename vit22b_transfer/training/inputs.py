"""What a run reads: tasks and splits, live or from a cache of a tower's features."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.partitioning.rules import Partitioning


def cache_keys(
    cache: Any, model: Any, name: str, split: str, feature_lengths: Mapping[str, Any]
) -> list[Any]:
    """`feature_cache.CacheKey` of each task of a mixture, or of the task itself."""
    if model.module.tower is None:
        raise UserError("the model has no tower, so there are no features to cache.")
    if not getattr(model, "reads_cached_features", True):
        raise UserError(
            f"cached features are the tower's tokens, but {type(model).__name__} takes "
            "what the tower pools of them. Leave gin_configs/runs/cached_features.gin "
            "out; a frozen tower (models/frozen_tower.gin) is run in every step."
        )
    digest = reading.tower_digest(cache.tower)
    settings = model.module.tower.token_settings()
    return _keys(cache, model, name, split, feature_lengths, digest, settings)


def teacher_keys(
    cache: Any, model: Any, name: str, split: str, feature_lengths: Mapping[str, Any]
) -> list[Any]:
    """`feature_cache.CacheKey` of what the model's teacher says of each task.

    Raises:
      UserError: if the model does not learn from cached logits.
    """
    check_taught(model, cache)
    digest = reading.classifier_digest(cache.teacher)
    settings = model.distillation.teacher_settings(model.module.num_classes)
    return _keys(cache, model, name, split, feature_lengths, digest, settings)


def _keys(cache, model, name, split, feature_lengths, weights, tower):
    from vit22b_transfer.data import feature_cache, image_lengths
    from vit22b_transfer.data import tasks as registered

    return [
        feature_cache.CacheKey(
            cache=cache,
            task=task,
            split=split,
            feature_lengths=feature_lengths,
            converter_cls=image_lengths.converter_of(model),
            weights=weights,
            tower=tower,
        )
        for task in registered.tasks_of(name, split)
    ]


def check_taught(model: Any, cache: Any) -> None:
    """Raises UserError unless data and model say the same of a teacher's logits.

    cache: a `data.teacher_cache.TeacherCache`, or None for images alone.
    """
    lesson = getattr(model, "distillation", None)
    wanted = lesson is not None and lesson.cached
    if wanted and cache is None:
        raise UserError(
            "the model learns from a teacher's cached logits, but the data has no "
            "teacher_cache to read them from: gin_configs/runs/distill_cached.gin "
            "names one for TrainData and EvalData."
        )
    if cache is not None and not wanted:
        raise UserError(
            f"teacher_cache ({cache}) has no effect: the model does not learn from "
            "cached logits. Name gin_configs/runs/distill_cached.gin, which sets "
            "Distillation.cached too, or leave teacher_cache out."
        )


def batch_arguments(
    cache: Any,
    model: Any,
    name: str,
    split: str,
    feature_lengths: Mapping[str, Any],
    teacher_cache: Any = None,
) -> dict[str, Any]:
    """Arguments of `batches.train_batches` and `eval_batches`: live or from a cache."""
    from vit22b_transfer.data import feature_cache, image_lengths
    from vit22b_transfer.data import teacher_cache as teachers

    check_taught(model, teacher_cache)
    if teacher_cache is not None and cache is None:
        keys = teacher_keys(teacher_cache, model, name, split, feature_lengths)
        taught = teachers.open_tasks(keys, model.module.num_classes)
        return {
            "feature_lengths": taught.lengths(feature_lengths),
            "converter_cls": taught.converter_cls,
            "task_overrides": taught.tasks,
        }
    if cache is None:
        return {
            "feature_lengths": feature_lengths,
            "converter_cls": image_lengths.converter_of(model),
        }

    keys = cache_keys(cache, model, name, split, feature_lengths)
    cached = feature_cache.open_tasks(keys)
    return {
        "feature_lengths": cached.lengths(feature_lengths),
        "converter_cls": cached.converter_cls,
        "task_overrides": cached.tasks,
    }


def check_splits(eval_data: Any) -> None:
    """UserError if a split of an `EvalData` is not there, before any step is taken."""
    if isinstance(eval_data, EvalData):
        from vit22b_transfer.data import tasks as registered

        for task in eval_data.tasks:
            registered.task_names(task, eval_data.split)


@dataclasses.dataclass(frozen=True)
class TrainData:
    """What a run trains on: a SeqIO task or mixture, and the size of its batches.

    cache: a `data.feature_cache.FeatureCache`, to read the tokens of a frozen tower in
      place of images.
    augmentation: a `data.augmentation.Augmentation`, for random crops and flips.
    teacher_cache: a `data.teacher_cache.TeacherCache`, to read a teacher's logits
      beside images, which are then as they are.
    """

    task: str
    split: str
    feature_lengths: Mapping[str, Any]
    batch_size: int
    cache: Any = None
    augmentation: Any = None
    teacher_cache: Any = None

    def __post_init__(self):
        if self.teacher_cache is not None and self.augmentation is not None:
            raise UserError(
                "the cached logits of a teacher are of images as they are, but the "
                f"augmentation ({self.augmentation}) shows others in every step. Leave "
                "gin_configs/runs/augment.gin out, or run the teacher: name "
                "gin_configs/runs/distill.gin in place of distill_cached.gin."
            )
        if self.cache is not None and self.augmentation is not None:
            raise UserError(
                "cached features are of images as they are, so that the augmentation "
                f"({self.augmentation}) would have no effect. Leave either "
                "gin_configs/runs/augment.gin or cached_features.gin out."
            )

    def batches(
        self, model: Any, partitioning: Partitioning, *, seed: int, start_step: int
    ) -> Iterator[Mapping[str, Any]]:
        """Endless device batches; the first is that of step `start_step`."""
        from vit22b_transfer.data import augmentation, batches, objectives
        from vit22b_transfer.data import tasks as registered

        for task in registered.task_names(self.task, self.split):
            objectives.check(task, model)
            registered.check_vocabularies(task, model)
            registered.check_classes(task, model)
        lengths = augmentation.train_lengths(
            self.task, self.feature_lengths, self.augmentation
        )
        read_as = batch_arguments(
            self.cache, model, self.task, self.split, lengths, self.teacher_cache
        )
        return batches.train_batches(
            self.task,
            self.split,
            **read_as,
            batch_size=self.batch_size,
            partitioning=partitioning,
            seed=seed,
            start_step=start_step,
        )


@dataclasses.dataclass(frozen=True)
class EvalData:
    """What the loss is measured on while training: one split of some SeqIO tasks.

    cache, teacher_cache: as in `TrainData`, and both with or both without one.
    max_examples: how many of the first examples of each task; None: all.
    """

    tasks: Sequence[str]
    split: str
    feature_lengths: Mapping[str, Any]
    batch_size: int
    cache: Any = None
    max_examples: int | None = None
    teacher_cache: Any = None

    def batches(
        self, task: str, model: Any, partitioning: Partitioning
    ) -> Iterator[Any]:
        """One pass over `task`; items have the device batch in `features`."""
        from vit22b_transfer.data import batches, objectives
        from vit22b_transfer.data import tasks as registered

        objectives.check(task, model)
        registered.check_vocabularies(task, model)
        registered.check_classes(task, model)
        read_as = batch_arguments(
            self.cache,
            model,
            task,
            self.split,
            self.feature_lengths,
            self.teacher_cache,
        )
        return batches.eval_batches(
            task,
            self.split,
            **read_as,
            batch_size=self.batch_size,
            partitioning=partitioning,
            max_examples=self.max_examples,
        )


def check_run(model: Any, total_steps: int, num_microbatches: int) -> None:
    """Raises UserError for what no run can begin with."""
    for name, value in (
        ("total_steps", total_steps),
        ("num_microbatches", num_microbatches),
    ):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    optimizer = model.optimizer_def
    if not (
        callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update")
    ):
        raise UserError(
            f"the model's optimizer_def is {optimizer!r}; to train it must be an optax "
            "transformation such as optimizers.adamw(...)."
        )


def check_batch(batch: Any, partitioning: Partitioning, num_microbatches: int) -> int:
    """Number of examples in the batch; UserError if the mesh cannot divide it."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    data_size = partitioning.mesh.shape["data"]
    if rows % (data_size * num_microbatches):
        raise UserError(
            f"a batch of {rows} examples does not divide by the mesh's data axis of "
            f"{data_size} x num_microbatches={num_microbatches}. Choose a batch_size "
            f"that is a multiple of {data_size * num_microbatches}."
        )
    return rows
