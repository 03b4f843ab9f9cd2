"""What unmodified T5X needs beyond the model contract; the only file that imports it.

`gin_configs/runs/t5x_*.gin` bind what is here; nothing else imports this file. T5X's
trainer adds gradients up and knows nothing of an optax schedule, its optimizer wrapper
knows the state of some optax parts only, and its interactive model takes text only:
each has its small answer here.
"""

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading, restoring
from vit22b_transfer.data import batches, preprocessors
from vit22b_transfer.inference.decoding import PAD_ID, Decoded, InitCache, StepFn
from vit22b_transfer.partitioning import rules
from vit22b_transfer.recipes import shipped
from vit22b_transfer.training import optimizers, state, steps

# pyright: reportMissingImports=false
try:
    from t5x import adafactor as t5x_adafactor
    from t5x import decoding as t5x_decoding
    from t5x import interactive_model as t5x_interactive
    from t5x import models as t5x_models
    from t5x import optimizers as t5x_optimizers
    from t5x import partitioning as t5x_partitioning
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

    T5X compares the vocabularies of tasks only with those of models of its own base
    class, so the model's class is declared one.
    """
    t5x_models.BaseTransformerModel.register(type(model))
    model = copy.copy(model)
    if model.optimizer_def is not None:
        model.optimizer_def = Optimizer(model.optimizer_def, model.frozen)
    return model


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


def adafactor_rules() -> Mapping[str, Any]:
    """How T5X's Adafactor factors each of our axes: T5X's rules, and our own names.

    For `adafactor.Adafactor.logical_factor_rules`; without them it fails at the first
    name that T5X has no rule for.
    """
    known = dict(t5x_adafactor.standard_logical_factor_rules())
    unfactored = t5x_adafactor.FactorDim.NONE
    return {name: unfactored for name in rules.LOGICAL_AXES} | known


# --- Decoding ---


def beam_search(
    init_cache: InitCache,
    step_fn: StepFn,
    *,
    batch_size: int,
    max_decode_length: int,
    eos_id: int,
    rng: Array | None = None,
    num_beams: int = 4,
    alpha: float = 0.6,
) -> Decoded:
    """T5X's own beam search, a decode function as in `inference.decoding`.

    T5X moves the cache of a beam to the place of the beam that continues it, so every
    beam sees its own past only. Scores: T5X's, with its length penalty.
    """
    del rng
    beams = (batch_size, num_beams)
    leaves, treedef = jax.tree.flatten(init_cache(1))
    past = jnp.ones((batch_size, 1, 1, max_decode_length), bool)

    def tokens_to_logits(decoding: t5x_decoding.DecodingState):
        def step(tokens, leaves):
            cache = jax.tree.unflatten(treedef, leaves)
            logits, cache = step_fn(tokens, cache, decoding.cur_index, past)
            return logits, jax.tree.leaves(cache)

        # Over the beams of a sequence, which share what the encoder gave.
        cache = [decoding.cache[str(i)] for i in range(len(leaves))]
        logits, cache = jax.vmap(step, in_axes=1, out_axes=1)(
            decoding.cur_token.reshape(*beams, 1),
            [leaf.reshape(*beams, *leaf.shape[1:]) for leaf in cache],
        )
        flat = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in cache]
        logits = logits.reshape(batch_size * num_beams, -1)
        return logits, {str(i): leaf for i, leaf in enumerate(flat)}

    tokens, scores = t5x_decoding.beam_search(
        inputs=jnp.full((batch_size, max_decode_length), PAD_ID, jnp.int32),
        cache={str(i): leaf for i, leaf in enumerate(leaves)},
        tokens_to_logits=tokens_to_logits,
        eos_id=eos_id,
        num_decodes=num_beams,
        alpha=alpha,
    )
    settings = (("method", "t5x_beam_search"), ("num_beams", num_beams))
    return Decoded(
        tokens=tokens[:, -1].astype(jnp.int32),
        scores=scores[:, -1],
        steps=None,  # T5X does not tell
        settings=(*settings, ("alpha", alpha)),
    )


class InteractiveModel(t5x_interactive.InteractiveModel):
    """T5X's interactive model, whose examples may be images with prompts.

    checkpoint: one of our runtime or of T5X in either format, or a directory of them;
      T5X's own interactive model reads only its older format.
    feature_lengths: of `images`, `inputs` and `targets`, as in a task.
    """

    def __init__(
        self,
        model: Any,
        partitioner: t5x_partitioning.PjitPartitioner,
        *,
        checkpoint: str,
        output_dir: str,
        feature_lengths: Mapping[str, Any],
        batch_size: int,
    ):
        shapes, types = batches.batch_shapes(
            model.FEATURE_CONVERTER_CLS, feature_lengths, batch_size
        )
        super().__init__(
            batch_size=batch_size,
            task_feature_lengths=feature_lengths,
            output_dir=absolute_path(output_dir),
            partitioner=partitioner,
            model=for_t5x(model),
            dtype=None,
            restore_mode="specific",
            checkpoint_path="",
            input_shapes=shapes,
            input_types=types,
        )
        fresh = self._train_state.params
        params = restoring.restore_params(
            checkpoint,
            flax.core.unfreeze(fresh),
            flax.core.unfreeze(state.shardings_of(fresh)),
            model=model,
        )
        self._train_state = self._train_state.replace_params(flax.core.freeze(params))
        self._trainer.train_state = self._train_state

    def predict_images(
        self, images: UInt8[np.ndarray, "examples height width 3"], prompts: list[str]
    ) -> list[str]:
        """The text decoded for each image and its prompt."""
        if len(images) != len(prompts):
            raise UserError(
                f"there are {len(images)} images and {len(prompts)} prompts; every "
                "image needs its own prompt."
            )
        results, _ = self.infer_with_preprocessors(
            t5x_interactive.InferenceType.PREDICT_WITH_AUX,
            [{"input": prompt, "target": ""} for prompt in prompts],
            preprocessors.image_prompt_preprocessors(images),
        )
        return [prediction.decode() for _, prediction in results]
