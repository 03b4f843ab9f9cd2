"""What the adapter adds to T5X: optimizers and paths.

Needs T5X beside the project.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax.core import FrozenDict, freeze, unfreeze

from vit22b_transfer import UserError
from vit22b_transfer.data import converters
from vit22b_transfer.models.preparation import Preparation
from vit22b_transfer.training import optimizers

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
t5x_adapter = pytest.importorskip("vit22b_transfer.t5x_adapter", reason=_REASON)

from t5x import models as t5x_models  # noqa: E402
from t5x import partitioning as t5x_partitioning  # noqa: E402
from t5x import trainer as t5x_trainer  # noqa: E402
from t5x import utils as t5x_utils  # noqa: E402


@pytest.fixture(autouse=True)
def settings_of_t5x():
    """JAX's default promotion, as T5X adds arrays of different types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def partitioner():
    return t5x_partitioning.PjitPartitioner(model_parallel_submesh=(1, 2))


# --- The model and its optimizer ---


def test_t5x_compares_the_vocabularies_of_our_models():
    model = tiny_models.image_text_model(optimizer_def=optimizers.adamw(0.1))
    adapted = t5x_adapter.for_t5x(model)
    assert isinstance(adapted, t5x_models.BaseTransformerModel)
    assert isinstance(adapted.optimizer_def, t5x_adapter.Optimizer)
    assert adapted.get_initial_variables.__self__ is adapted
    assert not isinstance(model.optimizer_def, t5x_adapter.Optimizer)


def test_tasks_of_t5x_are_told_how_the_tower_takes_its_images():
    how = Preparation(filter="bicubic")
    model = tiny_models.image_text_model(tiny_models.tower_config(preparation=how))
    model.FEATURE_CONVERTER_CLS = converters.ImageTextFeatureConverter
    lengths = t5x_adapter.feature_lengths(model, {"images": 16, "inputs": 4})
    assert lengths["images"].how == how and tuple(lengths["images"]) == (16, 16)
    assert (
        t5x_adapter.for_t5x(model).FEATURE_CONVERTER_CLS(pack=False).preparation == how
    )


def test_parameters_come_back_in_the_structure_they_were_given_in():
    params = freeze({"a": {"kernel": jnp.ones((2, 2))}, "b": jnp.ones(2)})
    optimizer = t5x_adapter.Optimizer(optimizers.adamw(0.1), ("a/.*",)).create(params)
    stepped = optimizer.apply_gradient(params, learning_rate=0.0)
    assert isinstance(stepped.target, FrozenDict)
    assert jax.tree.structure(unfreeze(stepped.target)) == (
        jax.tree.structure(unfreeze(params))
    )
    assert int(stepped.state.step) == 1


def test_a_frozen_parameter_keeps_its_negative_zeros():
    """Adding the zero of `set_to_zero` would make them positive."""
    params = {"a": jnp.asarray([-0.0, 1.0]), "b": jnp.ones(2)}
    optimizer = t5x_adapter.Optimizer(optimizers.sgd(0.1), ("a",)).create(params)
    stepped = optimizer.apply_gradient(params, learning_rate=0.0)
    before, after = np.asarray(params["a"]), np.asarray(stepped.target["a"])
    assert after.tobytes() == before.tobytes()
    assert not np.array_equal(stepped.target["b"], params["b"])


def train_state_of(definition):
    """(shapes of the train state, its layout on 4 x 2 devices)."""
    model = t5x_adapter.for_t5x(tiny_models.image_text_model())
    initializer = t5x_utils.TrainStateInitializer(
        optimizer_def=definition,
        init_fn=model.get_initial_variables,
        input_shapes={k: v.shape for k, v in tiny_models.batch(8).items()},
        partitioner=partitioner(),
    )
    return initializer.global_train_state_shape, initializer.train_state_axes


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_optimizer_state_is_laid_out_like_its_parameters(name):
    """Adafactor's too, and the average, which T5X's wrapper of optax does not know."""
    definition = t5x_adapter.Optimizer(getattr(optimizers, name)(1e-3, ema_decay=0.9))
    shapes, axes = train_state_of(definition)
    params = jax.tree.leaves(unfreeze(axes.params))
    for names in (("mu", "trace", "ema"), ("weight_average",)):
        kept = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(axes.param_states)
            if any(getattr(entry, "name", "") in names for entry in path)
        ]
        assert kept == params
    assert jax.sharding.PartitionSpec(None, "model") in params


@pytest.mark.parametrize("of_recipe, own", [(2, None), (None, 2), (2, 2), (None, None)])
def test_the_step_is_taken_in_microbatches_whoever_asks_for_them(of_recipe, own):
    model = t5x_adapter.for_t5x(
        tiny_models.image_text_model(optimizer_def=optimizers.adamw(0.1))
    )
    rows, loss_fn = set(), model.loss_fn

    def recorded(params, batch, dropout_rng):
        rows.add(len(batch["encoder_input_tokens"]))
        return loss_fn(params, batch, dropout_rng)

    model.loss_fn = recorded
    batch = tiny_models.batch(8)
    initializer = t5x_utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: array.shape for name, array in batch.items()},
        partitioner=partitioner(),
    )
    trained = initializer.global_train_state_shape

    def trainer(of_recipe):
        return t5x_adapter.mean_gradient_trainer(
            model,
            trained,
            partitioner(),
            [],
            None,
            initializer.train_state_axes,
            jax.random.PRNGKey(0),
            trainer_cls=functools.partial(
                t5x_trainer.Trainer, learning_rate_fn=None, num_microbatches=own
            ),
            num_microbatches=of_recipe,
        )

    with trainer(of_recipe) as made:
        made._partitioned_train_step.lower(trained, batch)
    assert rows == {4 if of_recipe or own else 8}
    if own:
        with pytest.raises(UserError, match="num_microbatches=4, but T5X's .*=2"):
            trainer(4)


def test_paths_are_made_absolute_and_addresses_left():
    assert t5x_adapter.absolute_path("runs/vqa") == os.path.abspath("runs/vqa")
    assert t5x_adapter.absolute_path("gs://bucket/vqa") == "gs://bucket/vqa"
