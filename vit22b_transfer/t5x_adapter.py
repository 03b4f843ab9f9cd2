"""What unmodified T5X needs beyond the model contract; the only file that imports it.

`gin_configs/runs/t5x_*.gin` bind what is here; nothing else imports this file. T5X's
trainer adds gradients up and knows nothing of an optax schedule, and its optimizer
wrapper knows the state of some optax parts only.
"""

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax
import jax.numpy as jnp
import optax

from vit22b_transfer.checkpoints import identity, reading
from vit22b_transfer.data import image_lengths
from vit22b_transfer.models import preparation
from vit22b_transfer.recipes import shipped
from vit22b_transfer.training import optimizers, state, steps

# pyright: reportMissingImports=false
try:
    from t5x import models as t5x_models
    from t5x import optimizers as t5x_optimizers
    from t5x import trainer as t5x_trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"T5X cannot be imported: there is no module {error.name}. From a clone of "
        "this repository: pip install -e '.[t5x]' && "
        "pip install --no-deps -r requirements-t5x.txt"
    ) from error

# T5X reads the run file, which imports this, before the recipe, which imports tasks.
shipped.offer_tasks()


def for_t5x(model: Any) -> Any:
    """`model` as T5X takes it: with a T5X optimizer made of its own and its `frozen`.

    Its converter refuses images that are not prepared as its tower's were: see
    `feature_lengths`.

    T5X compares the vocabularies of tasks only with those of models of its own base
    class, so the class of a model that has vocabularies is declared one.
    """
    if hasattr(model, "input_vocabulary"):
        t5x_models.BaseTransformerModel.register(type(model))
    identity.show_vocabulary(model)
    model = copy.copy(model)
    if preparation.of_model(model) is not None:
        model.FEATURE_CONVERTER_CLS = image_lengths.converter_of(model)
    if model.optimizer_def is not None:
        model.optimizer_def = Optimizer(model.optimizer_def, model.frozen)
    return model


def feature_lengths(model: Any, lengths: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of a run, which tell every task how the model's tower takes its images."""
    return image_lengths.prepared(lengths, preparation.of_model(model))


def absolute_path(path: str) -> str:
    """`path` from the root; an address such as gs://bucket stays.

    With a relative one T5X fails after data, initialisation and the first evaluation.
    """
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def latest_checkpoint(model_dir: str) -> str:
    """The newest finished checkpoint in `model_dir`, of our runtime or T5X's."""
    return reading.resolve(model_dir)


# --- Training ---


class Optimizer(t5x_optimizers.OptaxWrapper):
    """An optimizer of `training.optimizers` with frozen parameters, for T5X.

    The state is that of our runtime, name by name, so either resumes the other's. Any
    optax part will do: state of a parameter's shape is laid out like the parameter.
    """

    def __init__(
        self,
        optimizer: optimizers.ScheduledOptimizer,
        frozen: Sequence[str] = (),
    ):
        super().__init__(optimizer)
        self.frozen = tuple(frozen)
        self.learning_rate = optimizer.learning_rate

    def init_state(self, params: Any) -> t5x_optimizers.OptimizerState:
        """Step 0 and the state of the trained parameters."""
        params = flax.core.unfreeze(params)
        return t5x_optimizers.OptimizerState(
            step=jnp.zeros((), jnp.int32),
            param_states=self._optax(params).init(params),
        )

    def apply_gradient(self, hyper_params, params, state, grads):
        """(new parameters, new state). Frozen parameters are returned as they are."""
        del hyper_params
        like, params = params, flax.core.unfreeze(params)
        new_params, param_states = steps.apply_gradients(
            self._optax(params),
            flax.core.unfreeze(grads),
            state.param_states,
            params,
            self.frozen,
        )
        if isinstance(like, flax.core.FrozenDict):
            new_params = flax.core.freeze(new_params)
        return new_params, t5x_optimizers.OptimizerState(
            step=state.step + 1, param_states=param_states
        )

    def derive_logical_axes(self, optimizer, param_logical_axes):
        """`optimizer` with logical axes, or None, in place of its arrays."""
        axes = state.like_parameters(
            optimizer.state.param_states,
            flax.core.unfreeze(optimizer.target),
            flax.core.unfreeze(param_logical_axes),
            default=None,
        )
        return optimizer.replace(
            target=param_logical_axes,
            state=t5x_optimizers.OptimizerState(step=None, param_states=axes),
        )

    def _optax(self, params) -> optax.GradientTransformation:
        return optimizers.freeze(self.optax_optimizer, params, self.frozen)


def mean_gradient_trainer(
    model: Any,
    train_state: Any,
    partitioner: Any,
    eval_names: Collection[str],
    summary_dir: str | None,
    train_state_axes: Any,
    rng: Any,
    *,
    trainer_cls: Callable[..., t5x_trainer.Trainer],
) -> t5x_trainer.Trainer:
    """T5X's trainer, taking our runtime's steps: gradients are means over tokens.

    T5X adds up the gradients of microbatches, whatever these are normalised by, and
    logs a learning rate that optax never sees. Here sums are divided once, by the
    weight of the whole batch, and the logged rate is the optimizer's own. A function
    around `trainer_cls`, so that what gin binds to T5X's own class still counts.
    """
    made = trainer_cls(
        model=model,
        train_state=train_state,
        partitioner=partitioner,
        eval_names=eval_names,
        summary_dir=summary_dir,
        train_state_axes=train_state_axes,
        rng=rng,
    )
    steps.check_microbatches(model, made._num_microbatches or 1)
    learning_rate = model.optimizer_def.learning_rate

    def train_step(train_state, batch):
        grads, metrics, _ = t5x_trainer.accumulate_grads_microbatched(
            model,
            train_state,
            batch,
            made._get_step_rng(train_state.step),
            made._num_microbatches,
            partitioner.data_partition_spec,
        )
        return t5x_trainer.apply_grads(
            train_state,
            steps.mean_gradients(grads, metrics),
            metrics,
            learning_rate(train_state.step),
            made._weight_metrics_computer,
        )

    made._learning_rate_fn = learning_rate
    made._partitioned_train_step = partitioner.partition(
        train_step,
        in_axis_resources=(train_state_axes, partitioner.data_partition_spec),
        out_axis_resources=(train_state_axes, None),
        donate_argnums=(0,),
    )
    return made
