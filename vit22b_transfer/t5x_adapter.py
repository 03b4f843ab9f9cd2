"""What unmodified T5X needs beyond the model contract; the only file that imports it.

`gin_configs/runs/t5x_*.gin` bind what is here; nothing else imports this file. T5X's
trainer adds gradients up and knows nothing of an optax schedule, and its optimizer
wrapper knows the state of some optax parts only.
"""

import copy
import json
import logging
import os
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import identity, reading, restoring
from vit22b_transfer.data import image_lengths
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.inference import prediction_lines
from vit22b_transfer.models import freezing, preparation
from vit22b_transfer.recipes import shipped, t5x_bindings
from vit22b_transfer.training import microbatches, optimizers, state, steps
from vit22b_transfer.training.train import InitialCheckpoint

# pyright: reportMissingImports=false
try:
    from t5x import infer as t5x_infer
    from t5x import models as t5x_models
    from t5x import optimizers as t5x_optimizers
    from t5x import train_state as t5x_train_state
    from t5x import trainer as t5x_trainer
    from t5x import utils as t5x_utils
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"T5X cannot be imported: there is no module {error.name}. From a clone of "
        "this repository: pip install -e '.[t5x]' && "
        "pip install --no-deps -r requirements-t5x.txt"
    ) from error

# T5X reads the run file, which imports this, before the recipe, which imports tasks.
shipped.offer_tasks()

_FINE_TUNE = "vit22b_transfer.training.train.fine_tune"
_RESTORE = "t5x.utils.RestoreCheckpointConfig"


def for_t5x(model: Any, job: str | None = None) -> Any:
    """`model` as T5X takes it: with a T5X optimizer made of its own and its `frozen`.

    Its converter refuses images not prepared for its tower: see `feature_lengths`.

    T5X compares the vocabularies of tasks only with those of models of its own base
    class, so the class of a model that has vocabularies is declared one.

    job: what T5X is about to do by the gin files that it has read, one of
      `t5x_options.JOBS`. What of a recipe is T5X's own matter there is logged.

    Raises:
      UserError: naming what of the recipe would do nothing in this job.
    """
    if job is not None:
        for sentence in t5x_bindings.check(job):
            logging.getLogger(__name__).warning("%s", sentence)
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


def initial_checkpoint() -> InitialCheckpoint | None:
    """What the recipe starts from: `train.fine_tune.initial`."""
    return t5x_bindings.bound_to(_FINE_TUNE, "initial")


def num_microbatches() -> int | None:
    """The recipe's `train.fine_tune.num_microbatches`, None if it says nothing."""
    return t5x_bindings.bound_to(_FINE_TUNE, "num_microbatches")


def one_task(tasks: str | Sequence[str]) -> str:
    """One name for the tasks of a recipe, as T5X takes but one."""
    return registered.one_name(tasks)


def absolute_path(path: str) -> str:
    """`path` from the root; an address such as gs://bucket stays.

    With a relative one T5X fails after data, initialisation and the first evaluation.
    """
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def latest_checkpoint(path: str) -> str:
    """A checkpoint, or the newest finished one in a directory, ours or T5X's.

    Raises:
      UserError: if there is none, or its tower lies in another checkpoint.
    """
    path = reading.resolve(path)
    tower = reading.read_record(path).get("tower")
    if tower:
        raise UserError(
            f"checkpoint {path} was trained on cached features and holds no tower; "
            f"that is in {tower['checkpoint']}. T5X reads one checkpoint: use `vit22b "
            "eval` or `vit22b infer`, which read both."
        )
    return path


def output_directory(path: str) -> str:
    """The recipe's OUTPUT from the root; T5X names the file in it.

    Raises:
      UserError: for the path of a file.
    """
    if path.endswith(".jsonl"):
        raise UserError(
            f"OUTPUT={path!r} is a file, but T5X names its own in a directory: "
            "TASK-predict.jsonl-00000-of-00001. Give the directory."
        )
    return absolute_path(path)


def write_predictions(
    path: str,
    inferences: Any,
    task_ds: Any,
    mode: str,
    vocabulary: Any = None,
    *,
    write_fn: Callable[..., None],
) -> None:
    """The lines of T5X's `write_fn`, each with the `image_id` of its example.

    The line of an image that could not be read holds why, as `error`, in the place of
    what the model says of a black image. A `write_fn` of T5X.
    """
    write_fn(path, inferences, task_ds, mode, vocabulary)
    told = prediction_lines.IN_LINES_OF_T5X & task_ds.element_spec.keys()
    examples = task_ds.map(lambda example: {name: example[name] for name in told})
    with t5x_infer.gfile.GFile(path) as file:
        lines = file.read().split("\n")[:-1]
    with t5x_infer.gfile.GFile(path, "w") as file:
        for line, example in zip(lines, examples.as_numpy_iterator(), strict=True):
            line = prediction_lines.of_t5x(json.loads(line), example)
            file.write(json.dumps(line) + "\n")


# --- Training ---


class Optimizer(t5x_optimizers.OptaxWrapper):
    """An optimizer of `training.optimizers` with frozen parameters, for T5X.

    The state is that of our runtime, name by name, so either resumes the other's. Any
    optax part will do: state of a parameter's shape is laid out like it.
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


class TrainStateInitializer(t5x_utils.TrainStateInitializer):
    """T5X's, whose fresh train state has the parameters of an initial checkpoint.

    Ours are read by our own code: rules, dtypes, int8 kernels, low-rank updates and
    what a vocabulary or a factor must be are as in our runtime. A run that goes on from
    its own checkpoints needs no fresh state.

    initial: where parameters come from; what it lacks is fresh.
    fallback_of: the checkpoint that T5X's own restore reads; it asks for a fresh state
      to take from it what that lacks.
    """

    def __init__(
        self,
        optimizer_def: Any,
        init_fn: Callable[..., Any],
        input_shapes: Mapping[str, Any],
        partitioner: Any,
        input_types: Mapping[str, Any] | None = None,
        *,
        initial: InitialCheckpoint | None = None,
        fallback_of: str | None = None,
    ):
        super().__init__(
            optimizer_def=optimizer_def,
            init_fn=init_fn,
            input_shapes=input_shapes,
            partitioner=partitioner,
            input_types=input_types,
        )
        self._optimizer_def = optimizer_def
        self._model: Any = init_fn.__self__  # pyright: ignore
        self._initial = initial
        self._fallback_of = fallback_of

    def from_scratch(self, init_rng: jax.Array) -> Any:
        """The train state before the first step.

        Raises:
          UserError: if a frozen parameter would stay random, or a file does not fit.
        """
        if (path := self._fallback_of) is not None:
            rules = t5x_bindings.bound_to(_RESTORE, "assignment_map", ())
            params = self._abstract_params()
            restoring.check_frozen_are_loaded(path, params, self._model.frozen, rules)
            restoring.check_t5x_restores_the_same(path, initial_checkpoint())
        if (initial := self._initial) is None:
            restoring.check_nothing_is_given(self._model, path)
            return super().from_scratch(init_rng)
        restored = restoring.restore_initial(
            initial.path,
            self._abstract_params(),
            initial.rules,
            cast=initial.cast,
            image_size=initial.image_size,
            model=self._model,
        )
        logging.getLogger(__name__).warning(
            "initial checkpoint %s\n%s", initial.path, restored.summary()
        )
        params = restored.params
        if restored.kept:
            params = freezing.merge_frozen(
                self._fresh(init_rng, restored.kept), restored.params
            )
        return self._around(params)

    def _abstract_params(self) -> Any:
        """Shape, dtype and sharding of every parameter."""
        mesh = self._partitioner.mesh
        shapes, specs = (
            flax.core.unfreeze(state.params)
            for state in (self.global_train_state_shape, self.train_state_axes)
        )
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
            ),
            shapes,
            specs,
        )

    def _fresh(self, rng: jax.Array, names: Sequence[str]) -> Any:
        """Fresh values of some parameters; the others are not computed."""

        def chosen(tree):
            flat = reading.flatten(flax.core.unfreeze(tree))
            return {name: flat[name] for name in names}

        fresh = self._partitioner.partition(
            lambda rng: chosen(self._initialize_train_state(rng).params),
            in_axis_resources=None,
            out_axis_resources=chosen(self.train_state_axes.params),
        )(rng)
        return flax.traverse_util.unflatten_dict(fresh, sep="/")

    def _around(self, params: Any) -> Any:
        """The state at step 0 around given parameters."""
        axes = self.global_train_state_shape.params_axes

        def create(params):
            variables = flax.core.freeze({"params": params, "params_axes": axes})
            return t5x_train_state.FlaxOptimTrainState.create(
                self._optimizer_def, variables
            )

        return self._partitioner.partition(
            create,
            in_axis_resources=(flax.core.unfreeze(self.train_state_axes.params),),
            out_axis_resources=self.train_state_axes,
        )(params)


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
    num_microbatches: int | None = None,
) -> t5x_trainer.Trainer:
    """T5X's trainer, taking our runtime's steps: gradients are means over tokens.

    T5X adds up gradients of microbatches as they are, logs a rate that optax never sees
    and differentiates frozen parameters. Here sums are divided once, by the weight of
    the whole batch, the logged rate is the optimizer's, and only what is trained is
    differentiated. So that what gin binds to `trainer_cls` counts, it is called here.

    num_microbatches: the recipe's; T5X's own, if set, must say the same.

    Raises:
      UserError: if the numbers of microbatches differ, or the loss is no sum over them.
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
    own = made._num_microbatches
    if num_microbatches is not None and own not in (None, num_microbatches):
        raise UserError(
            f"train.fine_tune.num_microbatches={num_microbatches}, but T5X's "
            f"trainer.Trainer.num_microbatches={own}. Set one of the two."
        )
    made._num_microbatches = own if num_microbatches is None else num_microbatches
    microbatches.check(model, made._num_microbatches or 1)
    learning_rate = model.optimizer_def.learning_rate

    def train_step(train_state, batch):
        trained, frozen = freezing.split_frozen(
            flax.core.unfreeze(train_state.params), model.frozen
        )

        def loss_fn(params, batch, dropout_rng):
            params = freezing.merge_frozen(params, frozen)
            # For losses that are chunked over devices; T5X says its mesh otherwise.
            with jax.sharding.use_abstract_mesh(partitioner.mesh.abstract_mesh):
                return model.loss_fn(params, batch, dropout_rng)

        # Of the model T5X asks for no more, and of the state for the parameters.
        grads, metrics, _ = t5x_trainer.accumulate_grads_microbatched(
            types.SimpleNamespace(loss_fn=loss_fn),
            types.SimpleNamespace(
                params=trained, flax_mutables=train_state.flax_mutables
            ),
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
