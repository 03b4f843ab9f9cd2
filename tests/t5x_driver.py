"""What T5X does with a model and a mesh, in our own words: T5X is not imported.

Read from T5X at cc342d4: `utils.TrainStateInitializer`, `train_state`, `trainer`,
`partitioning`, and `utils.get_infer_fn`.
"""

import contextlib
import dataclasses
import functools
import inspect
import warnings

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import tiny_gemma
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh
from tiny_models import (
    batch,
    classic_tower_config,
    image_text_model,
    jit,
    text_config,
    tower_config,
)

from vit22b_transfer.models.lora import LoraConfig

BATCH = batch(8, inputs=4, targets=5)
SHAPES = {name: array.shape for name, array in BATCH.items()}

FROZEN = ("encoder/tower/.*",)


def prefix_lm_model(family, **overrides):
    return tiny_gemma.prefix_lm_model(
        tiny_gemma.prefix_lm_module(family, **overrides), frozen=FROZEN
    )


MODELS = {
    "parallel": image_text_model,
    "classic": lambda: image_text_model(classic_tower_config(pooling="cls")),
    "fused": lambda: image_text_model(tower_config(fused_projections=True)),
    "tied": lambda: image_text_model(text=text_config(tied_logits=True)),
    "blind": lambda: image_text_model(blind=True),
    "scanned": lambda: image_text_model(
        tower_config(scan_layers=True), text_config(scan_layers=True)
    ),
    "bfloat16": lambda: image_text_model(
        tower_config(scan_layers=True, param_dtype=jnp.bfloat16), frozen=FROZEN
    ),
    "gemma": lambda: prefix_lm_model("gemma", scan_layers=True),
    "gemma3": lambda: prefix_lm_model("gemma3"),
    "LoRA": lambda: image_text_model(
        text=text_config(scan_layers=True), lora=LoraConfig(2, 4.0, (".*kernel",))
    ),
}

# t5x.partitioning.standard_logical_axis_rules at cc342d4 by (activation, parameter)
# partitioning dims, in its order; D = data, M = model, - = replicated.
RULES = {
    (1, 1): "batch:D vocab:M embed:- mlp:M heads:M kv:- joined_kv:M",
    (1, 2): "batch:D vocab:M mlp:M heads:M kv:- joined_kv:M embed:D",
    (2, 1): "batch:D vocab:M mlp:M heads:M kv:- joined_kv:M embed:M",
    (2, 2): "batch:D vocab:M mlp:M heads:M kv:- joined_kv:M embed:M embed:D",
}
COMMON_RULES = (
    "relpos_buckets:- abspos_buckets:- length:- layers:- stack:- mlp_activations:-"
)
MESH_AXIS = {"D": "data", "M": "model", "-": None}


def axis_rules(setting):
    pairs = (pair.split(":") for pair in f"{RULES[setting]} {COMMON_RULES}".split())
    return tuple((name, MESH_AXIS[axis]) for name, axis in pairs)


@contextlib.contextmanager
def context(setting, mesh):
    """What surrounds every program that T5X's partitioner compiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mesh_context = Mesh(mesh.devices, mesh.axis_names)
        with mesh_context, flax_partitioning.axis_rules(axis_rules(setting)):
            yield


def initialize(model, input_shapes, rng, input_types=None):
    """(other collections, params, params_axes), taken apart as for a train state."""
    init_fn = model.get_initial_variables
    assert init_fn.__self__ is model, "T5X finds the model through the bound method"
    variables = flax.core.freeze(
        init_fn(rng=rng, input_shapes=input_shapes, input_types=input_types)
    )
    others, params = flax.core.frozen_dict.pop(variables, "params")
    others, params_axes = flax.core.frozen_dict.pop(others, "params_axes")
    return others, params, params_axes


@functools.cache
def abstract(name):
    """(model, other collections, params, params_axes) of one of `MODELS`."""
    model = MODELS[name]()
    init = functools.partial(initialize, model, SHAPES)
    return model, *jax.eval_shape(init, jax.random.PRNGKey(0))


def merged(a, b):
    """Metrics of two steps as those of both."""
    return jax.tree.map(lambda a, b: a.merge(b), a, b, is_leaf=is_metric)


def is_metric(value):
    return isinstance(value, clu.metrics.Metric)


def _zeros(metric):
    """The metric with zeros in the place of its shapes."""
    fields = {
        field.name: jnp.zeros(value.shape, value.dtype)
        for field in dataclasses.fields(metric)
        for value in [getattr(metric, field.name)]
    }
    return type(metric)(**fields)


def accumulate(model, params, batch, rng, num_microbatches):
    """(gradients, metrics) of one step: sums over the microbatches, never divided."""
    grad_fn = jax.value_and_grad(model.loss_fn, has_aux=True)
    if num_microbatches == 1:
        (_, metrics), gradients = grad_fn(params, batch, rng)
        return gradients, metrics
    size = next(iter(batch.values())).shape[0] // num_microbatches

    def part(index, rng):
        rows = {
            name: jax.lax.dynamic_slice_in_dim(array, index * size, size)
            for name, array in batch.items()
        }
        return grad_fn(params, rows, rng)

    def step(index, state):
        rng, gradients, before = state
        rng, part_rng = jax.random.split(rng)
        (_, metrics), more = part(index, part_rng)
        gradients = jax.tree.map(jnp.add, gradients, more)
        metrics = jax.lax.cond(
            index == 0, lambda: metrics, lambda: merged(before, metrics)
        )
        return rng, gradients, metrics

    (_, shapes), _ = jax.eval_shape(part, 0, rng)
    metrics = {name: _zeros(metric) for name, metric in shapes.items()}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    _, gradients, metrics = jax.lax.fori_loop(
        0, num_microbatches, step, (rng, zeros, metrics)
    )
    return gradients, metrics


def infer_step(function):
    """Jitted (params, batch, rng, indices) -> indices, result: arguments by name."""
    names = inspect.signature(function).parameters
    assert "flax_mutables" not in names

    def step(params, batch, rng, indices):
        if "rng" in names:
            return indices, function(params, batch, rng)
        return indices, function(params, batch)

    return jit(step)
