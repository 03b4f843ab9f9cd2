"""The model object driven as T5X drives it, step by step, without T5X.

`t5x_driver` says what T5X does with a model, so a change that breaks the contract
breaks this file. `test_t5x.py` does the same with T5X itself.
"""

import collections.abc
import functools
import importlib
import inspect
import json
import sys

import clu.metrics
import clu.values
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5x_driver
from flax.linen import partitioning as flax_partitioning
from flax.traverse_util import flatten_dict
from t5x_driver import BATCH, FROZEN, MODELS, SHAPES, abstract, accumulate, infer_step
from tiny_models import (
    assert_within,
    image_text_model,
    jit,
    model_params,
    relative_difference,
    text_config,
    tower_config,
)

from vit22b_transfer.inference import decoding
from vit22b_transfer.partitioning.rules import LOGICAL_AXES, Partitioning


def model_of(decode_fn=None, **arguments):
    """Scanned and frozen: what differs most between T5X's trees and ours."""
    return image_text_model(
        tower_config(scan_layers=True),
        text_config(num_encoder_layers=1, scan_layers=True),
        decode_fn=decode_fn,
        frozen=FROZEN,
        **arguments,
    )


@pytest.fixture(scope="module")
def params():
    """As a train state holds them: frozen dicts, all parameters in one tree."""
    return flax.core.freeze(model_params(model_of()))


# Initial variables


@pytest.mark.slow
@pytest.mark.parametrize(
    "types",
    [
        None,  # eval
        {name: array.dtype.type for name, array in BATCH.items()},  # train
        {name: jnp.dtype(array.dtype) for name, array in BATCH.items()},  # infer
    ],
    ids=["eval", "train", "infer"],
)
def test_shapes_alone_decide_the_variables(types):
    model, *expected = abstract("scanned")
    init = functools.partial(t5x_driver.initialize, model, SHAPES, input_types=types)
    assert list(jax.eval_shape(init, rng=jax.random.PRNGKey(0))) == expected


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_a_plain_array_with_known_axes(name):
    _, others, params, params_axes = abstract(name)
    assert not others, "another collection would become flax_mutables"
    leaves = flatten_dict(params, sep="/")
    axes = flatten_dict(params_axes, sep="/")
    assert axes.keys() == {f"{path}_axes" for path in leaves}
    for path, leaf in leaves.items():
        assert type(leaf) is jax.ShapeDtypeStruct, f"{path} is boxed"
        metadata = axes[f"{path}_axes"]
        assert isinstance(metadata, flax_partitioning.AxisMetadata)
        names = metadata.names
        assert len(names) == leaf.ndim == len(set(names)), path
        assert set(names) <= set(LOGICAL_AXES), path
    # The tree in which T5X looks the names up is that of the parameters.
    specs = flatten_dict(flax_partitioning.get_axis_names(params_axes), sep="/")
    assert specs.keys() == leaves.keys()


def test_stored_types_are_those_of_the_configuration():
    _, _, params, _ = abstract("bfloat16")
    for path, leaf in flatten_dict(params, sep="/").items():
        tower = path.startswith("encoder/tower/")
        assert leaf.dtype == (jnp.bfloat16 if tower else jnp.float32), path


@pytest.mark.parametrize("name", ["scanned", "gemma"])
def test_t5x_leaves_the_module_of_scanned_layers_alone(name):
    model, *_ = abstract(name)
    assert model.module.text.scan_layers
    assert not getattr(model.module, "scan_layers", False)


@pytest.mark.slow
def test_parameters_are_made_in_place_under_the_mesh_of_t5x():
    text = text_config(num_encoder_layers=0, num_decoder_layers=1)
    model = image_text_model(tower_config(depth=1), text)
    _, params, axes = jax.eval_shape(
        functools.partial(t5x_driver.initialize, model, SHAPES), jax.random.PRNGKey(0)
    )
    layout = Partitioning(model=2, parameter_partitioning_dims=2)
    shardings = layout.params_shardings(
        flax.core.unfreeze(params), flax.core.unfreeze(axes)
    )

    def init(rng):
        return flax.core.unfreeze(t5x_driver.initialize(model, SHAPES, rng)[1])

    with t5x_driver.context((1, 2), layout.mesh):
        made = jit(init, out_shardings=shardings)(jax.random.PRNGKey(3))
    assert jax.tree.map(lambda x: x.sharding, made) == shardings
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(made))


# Shardings


@pytest.mark.parametrize("setting", t5x_driver.RULES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_laid_out_by_the_tables_of_t5x(name, setting):
    _, _, params, params_axes = abstract(name)
    layout = Partitioning(
        model=2,
        activation_partitioning_dims=setting[0],
        parameter_partitioning_dims=setting[1],
    )
    ours = layout.params_shardings(
        flax.core.unfreeze(params), flax.core.unfreeze(params_axes)
    )
    names = flatten_dict(flax_partitioning.get_axis_names(params_axes))
    rules = t5x_driver.axis_rules(setting)
    t5x_specs = {
        path: flax_partitioning.logical_to_mesh_axes(tuple(axes), rules)
        for path, axes in names.items()
    }
    assert {path: s.spec for path, s in flatten_dict(ours).items()} == t5x_specs
    assert any("model" in spec for spec in t5x_specs.values())


def test_activations_are_constrained_under_the_mesh_of_t5x():
    """flax skips constraints there without a word; those of parameters may go."""
    model = image_text_model()
    params = model_params(model)
    layout = Partitioning(model=2)

    def constraints():
        step = jax.make_jaxpr(lambda p, b: model.eval_fn(p, b)[0])(params, BATCH)
        return str(step).count("sharding_constraint")

    with layout.activate():
        ours = constraints()
    with t5x_driver.context((1, 1), layout.mesh):
        assert constraints() == ours - len(jax.tree.leaves(params)) > 15


# Training and its evaluation


@pytest.fixture(scope="module")
def whole(params):
    """(gradients, metrics) of the batch in one piece."""
    return jit(functools.partial(accumulate, model_of()), static_argnums=3)(
        params, BATCH, jax.random.PRNGKey(0), 1
    )


@pytest.mark.slow
def test_sums_over_microbatches_are_those_of_the_batch(params, whole):
    """T5X adds gradients up and never divides: a loss that is a mean would grow."""
    step = jit(functools.partial(accumulate, model_of()), static_argnums=3)
    actual = step(params, BATCH, jax.random.PRNGKey(0), 4)
    assert relative_difference(actual, whole) <= 1e-5


def test_gradients_have_the_tree_of_the_parameters(params, whole):
    gradients, _ = whole
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    flat = flatten_dict(flax.core.unfreeze(gradients), sep="/")
    frozen = {path for path in flat if path.startswith("encoder/tower/")}
    assert {path for path, x in flat.items() if not np.any(x)} == frozen


def test_metrics_can_be_added_to_merged_and_summarised(whole):
    _, metrics = whole
    assert type(metrics) is dict
    metrics = dict(metrics)
    metrics["learning_rate"] = clu.metrics.Average.from_model_output(jnp.ones(1))
    both = jax.device_get(jax.jit(t5x_driver.merged)(metrics, metrics))
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(both))
    values = {name: metric.compute_value() for name, metric in both.items()}
    for name, value in values.items():
        assert isinstance(value, clu.values.Scalar), name
        assert np.shape(value.value) == () and np.isfinite(value.value), name
    # Twice the same step has the same averages; early stopping watches `loss`.
    loss = metrics["loss"]
    assert_within(1e-5, values["loss"].value, loss.total / loss.count)
    assert float(both["loss"].count) == 2 * BATCH["decoder_loss_weights"].sum()


def test_evaluation_takes_positional_arguments_and_gives_the_same_metrics(
    params, whole
):
    loss, metrics = jit(model_of().eval_fn)(params, BATCH)
    assert jnp.shape(loss) == () and type(metrics) is dict
    assert relative_difference(metrics, whole[1]) <= 1e-6


def test_a_frozen_tower_in_bfloat16_gets_zero_gradients_of_its_own_type():
    model, *_ = abstract("bfloat16")
    params = flax.core.freeze(model_params(model))
    with jax.numpy_dtype_promotion("standard"):  # as T5X runs
        step = functools.partial(accumulate, model, num_microbatches=1)
        gradients, _ = jax.eval_shape(step, params, BATCH, jax.random.PRNGKey(0))
    types = jax.tree.map(lambda x: x.dtype, (gradients, params))
    assert types[0] == types[1]


def test_a_frozen_tower_costs_no_backward_pass_even_if_all_gradients_are_read():
    """T5X differentiates everything, and clipping or weight metrics read it all."""

    def flops(frozen):
        text = text_config(num_encoder_layers=0, num_decoder_layers=1)
        model = image_text_model(tower_config(mlp_dim=256), text, frozen=frozen)
        params = jax.eval_shape(lambda: model_params(model))

        def norm(params):
            gradients, _ = accumulate(model, params, BATCH, None, 1)
            squares = (jnp.sum(jnp.square(x)) for x in jax.tree.leaves(gradients))
            return sum(squares, jnp.zeros(()))

        return jit(norm).lower(params).compile().cost_analysis()["flops"]

    assert flops(FROZEN) < 0.7 * flops(())


# Inference


def test_only_prediction_names_rng_and_nothing_names_flax_mutables():
    model = model_of(decoding.greedy)
    for name, names_rng in (
        ("predict_batch", True),
        ("predict_batch_with_aux", True),
        ("score_batch", False),
    ):
        function = getattr(model, name)
        for form in (function, functools.partial(function)):
            names = inspect.signature(form).parameters
            assert list(names)[:2] == ["params", "batch"]
            assert ("rng" in names) == names_rng and "flax_mutables" not in names


@pytest.mark.slow
def test_predictions_scores_and_auxiliary_values_have_rows_in_front(params):
    model = model_of(decoding.greedy)
    arguments = params, BATCH, None, np.arange(8)[::-1].copy()
    indices, tokens = infer_step(model.predict_batch)(*arguments)
    _, both = infer_step(model.predict_batch_with_aux)(*arguments)
    _, scores = infer_step(model.score_batch)(*arguments)
    assert tokens.shape == (8, 5) and jnp.issubdtype(tokens.dtype, jnp.integer)
    assert type(both) is tuple and len(both) == 2
    assert isinstance(both[1], collections.abc.Mapping)
    assert all(leaf.shape[0] == 8 for leaf in jax.tree.leaves(both[1]))
    np.testing.assert_array_equal(both[0], tokens)
    assert scores.shape == (8,) and np.all(np.isfinite(scores))
    # Brought into order, taken apart and written as JSON.
    order = np.asarray(indices)
    rows = jax.tree.map(lambda x: np.asarray(x)[order].tolist(), (tokens, scores))
    assert json.loads(json.dumps(rows)) == list(rows)


@pytest.mark.parametrize("key", [jax.random.PRNGKey, jax.random.key])
def test_the_key_of_the_batch_decides_the_samples(params, key):
    step = infer_step(model_of(decoding.sample).predict_batch)
    arguments = params, BATCH
    _, one = step(*arguments, key(0), np.arange(8))
    _, same = step(*arguments, key(0), np.arange(8))
    _, other = step(*arguments, key(1), np.arange(8))
    np.testing.assert_array_equal(one, same)
    assert np.any(np.asarray(one) != np.asarray(other))


def test_sampling_without_a_key_says_so(params):
    step = infer_step(model_of(decoding.sample).predict_batch)
    with pytest.raises(ValueError, match="sample needs rng"):
        step(params, BATCH, None, np.arange(8))


@pytest.mark.slow
@pytest.mark.parametrize("make", [model_of, MODELS["gemma"]], ids=["t5", "gemma"])
def test_plain_and_frozen_dicts_of_parameters_give_the_same_program(make):
    model = make()  # scanned and with a frozen tower
    model.decode_fn = decoding.greedy
    params = flax.core.freeze(model_params(model))
    for function in (
        lambda p: accumulate(model, p, BATCH, None, 1),
        lambda p: model.predict_batch_with_aux(p, BATCH),
    ):
        frozen, plain = map(jax.make_jaxpr(function), (params, params.unfreeze()))
        assert str(frozen) == str(plain)


@pytest.mark.parametrize("name", ["scanned", "gemma"])
def test_every_leaf_of_the_decoding_cache_has_the_batch_in_front(name):
    """T5X's beam search knows no other layout."""
    model, _, params, _ = abstract(name)

    def cache(params, images, tokens):
        return model.module.start_decoding(params, images, tokens, 7)[0](2)

    inputs = BATCH["encoder_input_images"], BATCH["encoder_input_tokens"]
    leaves = jax.tree.leaves(jax.eval_shape(cache, params.unfreeze(), *inputs))
    assert leaves and all(leaf.shape[0] == 8 for leaf in leaves)


def test_images_that_do_not_fit_the_tower_are_refused_naming_both_sizes():
    model, *_ = abstract("parallel")
    shapes = SHAPES | {"encoder_input_images": (8, 20, 16, 3)}
    with pytest.raises(ValueError, match="20x16 but patch_size 8"):
        model.get_initial_variables(jax.random.PRNGKey(0), shapes)


# The adapter


def test_without_t5x_the_adapter_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "t5x", None)
    monkeypatch.delitem(sys.modules, "vit22b_transfer.t5x_adapter", raising=False)
    with pytest.raises(ModuleNotFoundError, match="-r requirements-t5x.txt"):
        importlib.import_module("vit22b_transfer.t5x_adapter")
