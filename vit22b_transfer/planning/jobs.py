"""The run of a recipe, as a plan needs it: devices need not be there."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.models import distillation, multimodal
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.planning import planner
from vit22b_transfer.planning.trace import Value
from vit22b_transfer.training import compiling, inputs, optimizers, state, steps

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Job:
    """The parts of a training run that a plan needs."""

    model: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]
    partitioning: Partitioning
    num_microbatches: int = 1

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "Job":
        """The job of `train.fine_tune` called with these arguments; reads no data."""
        from vit22b_transfer.data import batches

        model, data = arguments["model"], arguments["data"]
        shapes, types = batches.batch_shapes(
            model.FEATURE_CONVERTER_CLS, data.feature_lengths, data.batch_size
        )
        batch = {n: jax.ShapeDtypeStruct(shapes[n], types[n]) for n in shapes}
        if getattr(data, "cache", None) is not None:
            batch = with_features(batch, model.module.tower)
        teacher = getattr(data, "teacher_cache", None)
        inputs.check_taught(model, teacher)
        if teacher is not None:
            shape = (data.batch_size, model.module.num_classes)
            batch[distillation.LOGITS] = jax.ShapeDtypeStruct(shape, np.float32)
        return cls(
            model,
            batch,
            arguments["partitioning"],
            arguments.get("num_microbatches", 1),
        )

    @property
    def batch_size(self) -> int:
        """Examples per step."""
        return next(iter(self.batch.values())).shape[0]

    def with_batch(self, size: int) -> "Job":
        """The same job with batches of another size."""
        batch = {
            name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
            for name, array in self.batch.items()
        }
        return dataclasses.replace(self, batch=batch)

    def variables(self) -> dict[str, Any]:
        """Abstract `params` and `params_axes`."""
        shapes = {name: array.shape for name, array in self.batch.items()}
        types = {name: array.dtype for name, array in self.batch.items()}
        return jax.eval_shape(
            lambda rng: self.model.get_initial_variables(rng, shapes, types),
            jax.random.key(0),
        )

    def run(self) -> planner.Run:
        """What the planner has to know of it: traced once, for any mesh."""
        variables = self.variables()
        return planner.trace_run(
            self.model,
            variables,
            self.batch,
            _optimizer_values(self.model, variables),
            num_microbatches=self.num_microbatches,
        )


def with_features(
    batch: Mapping[str, jax.ShapeDtypeStruct], tower: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch with the tokens of `tower` (a `TowerConfig`) in place of images."""
    if tower is None:
        raise UserError("training on cached features needs a model with a tower.")
    others = dict(batch)
    images = others.pop("encoder_input_images").shape
    shape = (images[0], tower.num_tokens(*images[1:3]), tower.width)
    return {multimodal.FEATURES: jax.ShapeDtypeStruct(shape, tower.dtype), **others}


def compile_step(job: Job, partitioning: Partitioning) -> jax.stages.Compiled:
    """The true train step, compiled for the devices of the mesh; no state is made.

    `partitioning` needs its devices: simulated ones will do.
    """
    update, arguments = abstract_step(job, partitioning)
    step = steps.make_train_step(update, 1)
    return compiling.compile_train_step(step, *arguments, partitioning)


def abstract_step(
    job: Job, partitioning: Partitioning
) -> tuple[Callable[..., Any], tuple[Any, Any, Any, Any]]:
    """The function of the train step, and its state, window, batch and key.

    All of them are abstract but for the key.
    """
    model, replicated = job.model, partitioning.replicated
    batch = {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=partitioning.batch_sharding(array.ndim)
        )
        for name, array in job.batch.items()
    }
    params = state.abstract_variables(model, partitioning, batch)
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    abstract = state.abstract_state(params, optimizer, partitioning)
    update = steps.make_update(
        model, optimizer, partitioning, num_microbatches=job.num_microbatches
    )
    rng = jax.device_put(jax.random.key(0), replicated)
    with partitioning.activate():
        _, window = jax.eval_shape(update, abstract, batch, rng)
    window = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), window
    )
    return update, (abstract, window, batch, rng)


def _optimizer_values(model, variables) -> tuple[Value, ...]:
    params = variables["params"]
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    opt_state = jax.eval_shape(optimizer.init, params)
    by_path = planner.parameter_values(variables)
    values = jax.tree_util.tree_map_with_path(
        lambda path, _: by_path["/".join(entry.key for entry in path)], params
    )
    owners = state.like_parameters(opt_state, params, values, Value((), 0, ()))
    return tuple(
        Value(
            tuple(leaf.shape),
            leaf.dtype.itemsize,
            owner.axes or (None,) * len(leaf.shape),
            is_input=True,
        )
        for leaf, owner in zip(
            jax.tree.leaves(opt_state), jax.tree.leaves(owners), strict=True
        )
    )
