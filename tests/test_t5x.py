"""T5X itself: its axis rules are ours, and its trainer trains our model as we do.

Needs T5X beside the project; `test_t5x_contract.py` needs none.
"""

import functools
import re

import jax
import numpy as np
import optax
import pytest
import t5x_driver
from flax.linen import partitioning as flax_partitioning
from flax.traverse_util import flatten_dict
from t5x_driver import BATCH, MODELS, SHAPES, abstract
from tiny_models import (
    assert_within,
    image_text_model,
    jit,
    model_params,
    relative_difference,
    text_config,
    tower_config,
)

from vit22b_transfer.partitioning import rules

t5x = pytest.importorskip(
    "t5x",
    reason="T5X is not importable: pip install --no-deps -r requirements-t5x.txt",
)

SETTINGS = [(1, 1), (1, 2), (2, 1), (2, 2)]
OWN = (("patch", None), ("lora_rank", None), ("classes", None))
LEARNING_RATE = 1e-3


@pytest.fixture(autouse=True)
def settings_of_t5x():
    """JAX's default promotion, as T5X adds arrays of different types and ranks.

    And quick compilation, which T5X's programs have no options for.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


# Rules


@pytest.mark.parametrize("parameter", range(4))
@pytest.mark.parametrize("activation", range(4))
def test_rules_are_those_of_t5x_and_ours_behind_them(activation, parameter):
    arguments = activation, parameter
    if {activation, parameter} - {1, 2}:
        for function in (
            rules.logical_axis_rules,
            t5x.partitioning.standard_logical_axis_rules,
        ):
            with pytest.raises(ValueError):
                function(*arguments)
        return
    theirs = tuple(t5x.partitioning.standard_logical_axis_rules(*arguments))
    assert rules.logical_axis_rules(*arguments) == (*theirs, *OWN)
    assert t5x_driver.axis_rules(arguments) == theirs


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_laid_out_alike(name, setting):
    _, _, _, params_axes = abstract(name)
    theirs = t5x.partitioning.standard_logical_axis_rules(*setting)
    ours = rules.logical_axis_rules(*setting)
    axes = flatten_dict(flax_partitioning.get_axis_names(params_axes))
    for path, names in axes.items():
        expected = flax_partitioning.logical_to_mesh_axes(tuple(names), theirs)
        assert flax_partitioning.logical_to_mesh_axes(tuple(names), ours) == expected
        assert len(expected) == len(names), path


# The trainer


def model_of(name):
    scan = dict(scan_layers=name == "scanned")
    return image_text_model(
        tower_config(depth=1 + scan["scan_layers"], **scan),
        text_config(num_encoder_layers=1, num_decoder_layers=1, **scan),
        optimizer_def=t5x.optimizers.OptaxWrapper(optax.sgd(LEARNING_RATE)),
    )


def partitioner_of(setting=(1, 1)):
    return t5x.partitioning.PjitPartitioner(
        model_parallel_submesh=(1, 2),
        logical_axis_rules=t5x.partitioning.standard_logical_axis_rules(*setting),
    )


def initializer_of(model, partitioner):
    return t5x.utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes=SHAPES,
        input_types={name: array.dtype.type for name, array in BATCH.items()},
        partitioner=partitioner,
    )


def trainer_of(model, partitioner, params, microbatches=None):
    initializer = initializer_of(model, partitioner)
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    shardings = jax.tree.map(lambda x: x.sharding, state.params)
    placed = jax.device_put(jax.tree.map(np.array, params), shardings.unfreeze())
    state = state.replace_params(type(state.params)(placed))
    return t5x.trainer.Trainer(
        model,
        train_state=state,
        partitioner=partitioner,
        eval_names=["validation"],
        summary_dir=None,
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(1),
        learning_rate_fn=lambda step: 0.0,
        num_microbatches=microbatches,
    )


@functools.cache
def our_two_steps(name):
    """(params at first, losses per token, params after two steps) on one device."""
    model = model_of(name)
    first = params = model_params(model)
    transformation = optax.sgd(LEARNING_RATE)
    step = jit(functools.partial(t5x_driver.accumulate, model), static_argnums=3)
    state, measured = transformation.init(params), []
    for _ in range(2):
        gradients, metrics = step(params, BATCH, None, 1)
        updates, state = transformation.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        measured.append(float(metrics["loss"].compute()))
    return first, measured, jax.device_get(params)


@pytest.mark.parametrize(
    "name, setting, microbatches",
    [("plain", (1, 1), None), ("scanned", (2, 2), 2)],
    ids=["plain", "scanned-2d-microbatches"],
)
def test_two_steps_of_the_trainer_on_eight_devices_are_ours_on_one(
    name, setting, microbatches
):
    first, losses, last = our_two_steps(name)
    partitioner = partitioner_of(setting)
    assert dict(partitioner.mesh.shape) == {"data": 4, "model": 2}
    with trainer_of(model_of(name), partitioner, first, microbatches) as trainer:
        for loss in losses:
            summary = trainer.train(iter([BATCH]), num_steps=1).result()
            assert_within(1e-5, summary["loss"].value, loss, "loss")
        evaluated = trainer.eval({"validation": iter([BATCH])})["validation"]
        assert np.isfinite(evaluated["loss"].value)
        params = jax.device_get(trainer.train_state.params).unfreeze()
        mutables = trainer.train_state.flax_mutables
    assert not mutables
    assert relative_difference(params, last) <= 1e-4
    assert losses[1] < losses[0]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_train_states_are_laid_out_as_our_partitioning_does(setting):
    partitioner = partitioner_of(setting)
    model, _, params, params_axes = abstract("scanned")
    model.optimizer_def = t5x.optimizers.OptaxWrapper(optax.sgd(LEARNING_RATE))
    theirs = initializer_of(model, partitioner).train_state_axes.params
    ours = rules.Partitioning(4, 2, *setting).params_shardings(
        params.unfreeze(), params_axes.unfreeze()
    )
    ours = {path: s.spec for path, s in flatten_dict(ours).items()}
    assert flatten_dict(theirs.unfreeze()) == ours


def test_activations_are_constrained_in_programs_of_the_partitioner():
    model = model_of("plain")
    params, partitioner = model_params(model), partitioner_of((2, 2))
    step = partitioner.partition(
        lambda p, b: model.eval_fn(p, b)[0],
        in_axis_resources=(None, partitioner.data_partition_spec),
        out_axis_resources=None,
    )
    lowered = step.lower(params, BATCH).as_text()
    constrained = re.findall(r"sharding_constraint %(\w+) <@mesh, \[(.*?)\]>", lowered)
    assert len(constrained) == lowered.count("sharding_constraint")
    # Parameters, arguments of the program, are constrained too: they are more.
    activations = [spec for value, spec in constrained if not value.startswith("arg")]
    query_key_value, hidden, block = 3, 1, 1
    patches, cross_attention = 1, query_key_value
    layer = query_key_value + hidden + block
    tower, encoder, decoder = patches + layer, layer, layer + cross_attention
    assert len(activations) == tower + encoder + decoder == 19
    assert all(spec.startswith('{"data"}, {}, {"model"}') for spec in activations)
