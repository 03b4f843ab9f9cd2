"""A model with the parameters of a checkpoint, and the split that it is to read."""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import (
    averages,
    fingerprints,
    identity,
    reading,
    restoring,
)
from vit22b_transfer.host import progress
from vit22b_transfer.inference import fixed_rows as fixed
from vit22b_transfer.inference import predicting, shared_images
from vit22b_transfer.models import multimodal
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training.state import abstract_variables, shardings_of

Weights = Literal["trained", "average"]


@dataclasses.dataclass(frozen=True)
class RestoredModel:
    """A model with the parameters of a checkpoint on the devices of a mesh.

    weights: which of the checkpoint's; fixed_rows: see `infer_split`.
    """

    model: Any
    partitioning: Partitioning
    checkpoint: str
    params: Any
    weights: str = "trained"
    fixed_rows: int | None = None

    @functools.cached_property
    def predict(self) -> predicting.Predict:
        """That of `predicting.make_predict`, or of `fixed_rows.FixedRows`."""
        if self.fixed_rows is not None:
            return fixed.FixedRows(self.model, self.partitioning, self.fixed_rows)
        return predicting.make_predict(self.model, self.partitioning)

    @functools.cached_property
    def shared(self) -> shared_images.SharedImages | None:
        """What predicts batches whose images repeat; None for models of other kinds.

        None too with `fixed_rows`: which images repeat depends on the batch.
        """
        model = self.model
        if self.fixed_rows is not None:
            return None
        is_one = isinstance(model, multimodal.ImageTextModel)
        if not is_one or model.module.tower is None:
            return None
        return shared_images.SharedImages(model, self.partitioning)

    def judging(self, data: "SplitToRead") -> tuple["RestoredModel", "SplitToRead"]:
        """What predicts a task, and the split with the feature lengths that it takes.

        Of a mixed model that is its part for the task's objective.
        """
        from vit22b_transfer.data import objectives

        model, lengths = objectives.judge(self.model, data.task, data.feature_lengths)
        if model is self.model:
            return self, data
        part = self._parts.setdefault(id(model), dataclasses.replace(self, model=model))
        return part, dataclasses.replace(data, feature_lengths=lengths)

    @functools.cached_property
    def _parts(self) -> dict[int, "RestoredModel"]:
        """Those asked for before, so that each is compiled once."""
        return {}

    @functools.cached_property
    def params_digest(self) -> str:
        """A hash of the parameters."""
        return fingerprints.parameters_digest(self.params)


@dataclasses.dataclass(frozen=True)
class SplitToRead:
    """A split of a task and the shapes of its batches.

    feature_lengths: of what the model's converter reads. Decoded texts are no longer
      than `targets`, unless the model has its own `max_decode_length`.
    max_examples: how many of the first examples; None: all.
    """

    task: str
    split: str
    feature_lengths: Mapping[str, Any]
    batch_size: int
    max_examples: int | None = None

    def cut_to(self) -> int | None:
        """The number of first examples that are read, None if it is all of them."""
        from vit22b_transfer.data import tasks as registered

        return registered.cut_to(self.task, self.split, self.max_examples)

    def part(self) -> str:
        """`the first 16 of 500 examples alone`; "" of a whole split."""
        from vit22b_transfer.data import tasks as registered

        cut = self.cut_to()
        if cut is None:
            return ""
        size = registered.num_examples(self.task, self.split)
        return f"the first {cut} of {size or 'its'} examples alone"


def restore(
    model: Any,
    partitioning: Partitioning,
    checkpoint: str,
    feature_lengths: Mapping[str, Any],
    batch_size: int,
    *,
    weights: Weights = "trained",
    fixed_rows: int | None = None,
) -> RestoredModel:
    """The model with a checkpoint's parameters, laid out on the mesh.

    weights, fixed_rows: see `infer_split`.
    """
    from vit22b_transfer.data import batches, image_lengths, placement

    if weights not in (known := typing.get_args(Weights)):
        raise UserError(f"weights={weights!r} must be one of {', '.join(known)}.")
    identity.show_vocabulary(model)
    path = reading.resolve(checkpoint)
    # A batch that the mesh cannot hold is an error before gigabytes are read.
    placement.Placement.on(partitioning, batch_size)
    if fixed_rows is not None:
        fixed.check(partitioning, batch_size, fixed_rows)
    shapes, types = batches.batch_shapes(
        image_lengths.converter_of(model), feature_lengths, batch_size
    )
    batch = {
        name: jax.ShapeDtypeStruct(shape, types[name]) for name, shape in shapes.items()
    }
    abstract = abstract_variables(model, partitioning, batch)
    if weights == "average":
        params, count = averages.restore(path, abstract, model=model)
        rest = len(jax.tree.leaves(abstract)) - count
        progress.console(quiet=jax.process_index() > 0).print(
            f"{path}: the average of {count} parameters; {rest} frozen in its training "
            "are as they were",
            markup=False,
        )
    elif any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(abstract)):
        params = restoring.restore_whole(path, abstract, model=model)
    else:
        params = restoring.restore_params(
            path, abstract, shardings_of(abstract), model=model
        )
    if left_out := restoring.teacher_left_out(path, abstract):
        progress.console(quiet=jax.process_index() > 0).print(
            f"{path}: the teacher of its distillation ({left_out} arrays) is left out",
            markup=False,
        )
    return RestoredModel(model, partitioning, path, params, weights, fixed_rows)
