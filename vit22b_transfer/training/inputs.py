"""What a run reads: tasks and splits, live or from a cache of a tower's features."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.partitioning.rules import Partitioning


def cache_keys(
    cache: Any, model: Any, name: str, split: str, feature_lengths: Mapping[str, Any]
) -> list[Any]:
    """`feature_cache.CacheKey` of each task of a mixture, or of the task itself."""
    from vit22b_transfer.data import feature_cache, image_lengths
    from vit22b_transfer.data import tasks as registered

    if model.module.tower is None:
        raise UserError("the model has no tower, so there are no features to cache.")
    return [
        feature_cache.CacheKey(
            cache=cache,
            task=task,
            split=split,
            feature_lengths=feature_lengths,
            converter_cls=image_lengths.converter_of(model),
            weights=reading.tower_digest(cache.tower),
            tower=model.module.tower.token_settings(),
        )
        for task in registered.tasks_of(name, split)
    ]


def batch_arguments(
    cache: Any, model: Any, name: str, split: str, feature_lengths: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `batches.train_batches` and `eval_batches`: live or from a cache."""
    from vit22b_transfer.data import feature_cache, image_lengths

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


@dataclasses.dataclass(frozen=True)
class TrainData:
    """What a run trains on: a SeqIO task or mixture, and the size of its batches.

    cache: a `data.feature_cache.FeatureCache`, to read the tokens of a frozen tower in
      place of images.
    augmentation: a `data.augmentation.Augmentation`, for random crops and flips.
    """

    task: str
    split: str
    feature_lengths: Mapping[str, Any]
    batch_size: int
    cache: Any = None
    augmentation: Any = None

    def __post_init__(self):
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
        from vit22b_transfer.data import augmentation, batches
        from vit22b_transfer.data import tasks as registered

        for task in registered.task_names(self.task, self.split):
            registered.check_vocabularies(task, model)
        lengths = augmentation.train_lengths(
            self.task, self.feature_lengths, self.augmentation
        )
        read_as = batch_arguments(self.cache, model, self.task, self.split, lengths)
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

    cache: as in `TrainData`, and both with or both without one.
    """

    tasks: Sequence[str]
    split: str
    feature_lengths: Mapping[str, Any]
    batch_size: int
    cache: Any = None

    def batches(
        self, task: str, model: Any, partitioning: Partitioning
    ) -> Iterator[Any]:
        """One pass over `task`; items have the device batch in `features`."""
        from vit22b_transfer.data import batches
        from vit22b_transfer.data import tasks as registered

        registered.check_vocabularies(task, model)
        read_as = batch_arguments(
            self.cache, model, task, self.split, self.feature_lengths
        )
        return batches.eval_batches(
            task,
            self.split,
            **read_as,
            batch_size=self.batch_size,
            partitioning=partitioning,
        )
