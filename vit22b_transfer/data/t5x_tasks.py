"""What T5X asks of tasks that it takes for tasks of texts: no import of T5X."""

from collections.abc import Sequence
from typing import Any

import seqio

from vit22b_transfer import UserError
from vit22b_transfer.data import tasks as registered


def check_vocabularies(config: Any, model: Any) -> None:
    """In place of T5X's own check, which fails for models without vocabularies.

    config: a `DatasetConfig` of T5X.

    Raises:
      UserError: if the texts of a task are in another vocabulary than the model's.
    """
    for name in registered.task_names(config.mixture_or_task_name, config.split):
        registered.check_vocabularies(name, model)


def predicted_feature(task_names: str | Sequence[str]) -> str:
    """The feature of tasks or mixtures whose vocabulary decodes what a model predicts.

    `targets` if there is one, else the only feature of rank 1, such as `labels`.

    Raises:
      UserError: if no feature can be meant.
    """
    provider = seqio.get_mixture_or_task(registered.one_name(task_names))
    features = provider.output_features
    found = [name for name, feature in features.items() if feature.rank == 1]
    if "targets" in found:
        return "targets"
    if len(found) != 1:
        raise UserError(
            f"{provider.name!r} has no feature 'targets', and of "
            f"{', '.join(sorted(features))} none that only predictions can be in."
        )
    return found[0]
