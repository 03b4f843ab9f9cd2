"""The train state: step, parameters and optimizer state, and how it is laid out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization, traverse_util

from vit22b_transfer.models import freezing
from vit22b_transfer.partitioning.rules import Partitioning

Tree = Any


class TrainState(NamedTuple):
    """What a step updates. Frozen parameters have no leaves in `opt_state`."""

    step: Any
    params: Any
    opt_state: Any


def abstract_variables(
    model: Any, partitioning: Partitioning, batch: Mapping[str, Any]
) -> Tree:
    """Shape, dtype and sharding of every parameter; nothing is allocated."""
    with partitioning.activate():
        variables = jax.eval_shape(
            lambda rng: _initial_variables(model, rng, batch), jax.random.key(0)
        )
    shardings = partitioning.params_shardings(
        variables["params"], variables["params_axes"]
    )
    return jax.tree.map(_with_sharding, variables["params"], shardings)


def abstract_state(
    params: Tree, optimizer: optax.GradientTransformation, partitioning: Partitioning
) -> TrainState:
    """Shape, dtype and sharding of the whole train state, from abstract parameters.

    Optimizer state that is shaped like its parameter is sharded like it. The rest
    (counts, rows and columns of a factored second moment) is small and replicated.
    """
    opt_state = jax.eval_shape(optimizer.init, params)
    replicated = partitioning.replicated
    shardings = like_parameters(
        opt_state, params, shardings_of(params), default=replicated
    )
    opt_state = jax.tree.map(_with_sharding, opt_state, shardings)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(step, params, opt_state)


def like_parameters(opt_state: Tree, params: Tree, values: Tree, default: Any) -> Tree:
    """For each array of an optimizer state the value of the parameter it belongs to.

    `values` has one value per parameter. Arrays with no parameter's name at the end of
    their path, or of another shape (counts, factored moments), get `default`.
    """
    paths = [_keys(path) for path, _ in _leaves(params)]
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(values), strict=True)
    by_path = dict(zip(paths, leaves, strict=True))

    def value_of(path, leaf):
        keys = _keys(path)
        for start in range(len(keys)):
            param, value = by_path.get(keys[start:], (None, None))
            if param is not None and param.shape == leaf.shape:
                return value
        return default

    return jax.tree_util.tree_map_with_path(value_of, opt_state)


def init_params(
    model: Any,
    rng: jax.Array,
    batch: Mapping[str, Any],
    abstract_params: Tree,
    partitioning: Partitioning,
) -> Tree:
    """Fresh values for the parameters in `abstract_params`, born in their shardings.

    `abstract_params` may be a part of the model's parameters: the rest is not computed.
    """

    with partitioning.activate():
        return initializer(model, batch, abstract_params)(rng)


def initializer(
    model: Any, batch: Mapping[str, Any], abstract_params: Tree
) -> Callable[[jax.Array], Tree]:
    """The jitted function rng -> parameters of `init_params`."""

    def init(rng):
        return _select(_initial_variables(model, rng, batch)["params"], abstract_params)

    return jax.jit(init, out_shardings=shardings_of(abstract_params))


def fresh_state(
    params: Tree, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """The state before the first step, around given parameters."""

    def init(params):
        return jnp.zeros((), jnp.int32), optimizer.init(params)

    shardings = shardings_of((abstract.step, abstract.opt_state))
    step, opt_state = jax.jit(init, out_shardings=shardings)(params)
    return TrainState(step, params, opt_state)


def describe(params: Any, frozen: Sequence[str], partitioning: Partitioning) -> str:
    """How many parameters are trained and frozen, and the mesh."""
    trained, fixed = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
        for part in freezing.split_frozen(params, frozen)
    )
    mesh = " x ".join(f"{name} {n}" for name, n in partitioning.mesh.shape.items())
    return f"{trained:,} trained parameters, {fixed:,} frozen; mesh: {mesh}"


def to_checkpoint_tree(state: TrainState) -> dict[str, Any]:
    """Nested dicts in the layout and under the names of a T5X checkpoint.

    Parts of the optimizer state without arrays (of a clipping, of frozen parameters)
    are left out, as T5X leaves them out.
    """
    param_states = serialization.to_state_dict(state.opt_state)
    tree = {"step": state.step, "param_states": param_states}
    without_empty = traverse_util.unflatten_dict(traverse_util.flatten_dict(tree))
    return {"target": state.params, "state": without_empty}


def from_checkpoint_tree(tree: Mapping[str, Any], abstract: TrainState) -> TrainState:
    """The inverse of `to_checkpoint_tree`."""
    flat = traverse_util.flatten_dict(
        serialization.to_state_dict(abstract.opt_state), keep_empty_nodes=True
    )
    flat |= traverse_util.flatten_dict(tree["state"].get("param_states", {}))
    opt_state = serialization.from_state_dict(
        abstract.opt_state, traverse_util.unflatten_dict(flat)
    )
    return TrainState(tree["state"]["step"], tree["target"], opt_state)


def shardings_of(tree: Tree) -> Tree:
    """The sharding of each array, concrete or abstract."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _initial_variables(model, rng, batch):
    # Keywords and types as T5X calls it, so one model serves both runtimes.
    return model.get_initial_variables(
        rng=rng,
        input_shapes={name: tuple(array.shape) for name, array in batch.items()},
        input_types={name: array.dtype for name, array in batch.items()},
    )


def _with_sharding(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _select(tree, like):
    if not isinstance(like, Mapping):
        return tree
    return {name: _select(tree[name], part) for name, part in like.items()}


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def _keys(path):
    """Dictionary keys and field names of a tree path, without what lies between."""
    return tuple(
        str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path
    )
