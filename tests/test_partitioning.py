"""Rules, meshes and shardings against T5X's tables, on eight simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.linen.partitioning import AxisMetadata, param_with_axes
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from vit22b_transfer.partitioning.rules import (
    LOGICAL_AXES,
    Partitioning,
    logical_axis_rules,
)

SETTINGS = [(1, 1), (2, 1), (1, 2), (2, 2)]

# What t5x.partitioning.standard_logical_axis_rules returns, in its order.
T5X_HEAD = {
    (1, 1): "batch:data vocab:model embed:- mlp:model heads:model kv:- joined_kv:model",
    (1, 2): "batch:data vocab:model mlp:model heads:model kv:- joined_kv:model "
    "embed:data",
    (2, 1): "batch:data vocab:model mlp:model heads:model kv:- joined_kv:model "
    "embed:model",
    (2, 2): "batch:data vocab:model mlp:model heads:model kv:- joined_kv:model "
    "embed:model embed:data",
}
T5X_TAIL = (
    "relpos_buckets:- abspos_buckets:- length:- layers:- stack:- mlp_activations:-"
)

# logical axes -> mesh axes in act1/par1, act2/par1, act1/par2, act2/par2
# (D = data, M = model), as T5X lays these arrays out.
T5X_LAYOUTS = [
    ("patch embed", "- -", "- M", "- D", "- M"),
    ("abspos_buckets embed", "- -", "- M", "- D", "- M"),
    ("embed joined_kv", "- M", "- M", "D M", "D M"),
    ("joined_kv embed", "M -", "M -", "M D", "M D"),
    ("embed heads kv", "- M -", "- M -", "D M -", "D M -"),
    ("heads kv embed", "M - -", "M - -", "M - D", "M - D"),
    ("embed mlp", "- M", "- M", "D M", "D M"),
    ("mlp embed", "M -", "M -", "M D", "M D"),
    ("layers embed mlp", "- - M", "- - M", "- D M", "- D M"),
    ("mlp", "M", "M", "M", "M"),
    ("embed", "-", "M", "D", "M"),
    ("kv", "-", "-", "-", "-"),
    ("heads kv", "M -", "M -", "M -", "M -"),
    ("heads relpos_buckets", "M -", "M -", "M -", "M -"),
    ("vocab embed", "M -", "M -", "M D", "M D"),
    ("embed vocab", "- M", "- M", "D M", "D M"),
    ("batch length embed", "D - -", "D - M", "D - -", "D - M"),
    ("batch length mlp", "D - M", "D - M", "D - M", "D - M"),
    ("batch length heads kv", "D - M -", "D - M -", "D - M -", "D - M -"),
    ("batch length vocab", "D - M", "D - M", "D - M", "D - M"),
]
MESH_AXIS = {"-": None, "D": "data", "M": "model"}


def parse_rules(text):
    pairs = (rule.split(":") for rule in text.split())
    return tuple((name, None if axis == "-" else axis) for name, axis in pairs)


def partitioning(setting, **mesh):
    return Partitioning(
        activation_partitioning_dims=setting[0],
        parameter_partitioning_dims=setting[1],
        **mesh,
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_rules_are_those_of_t5x_in_its_order_then_ours(setting):
    ours = (("patch", None), ("lora_rank", None), ("classes", None))
    t5x = parse_rules(f"{T5X_HEAD[setting]} {T5X_TAIL}")
    assert logical_axis_rules(*setting) == t5x + ours


@pytest.mark.parametrize("row", T5X_LAYOUTS, ids=lambda row: row[0].replace(" ", "-"))
def test_typical_arrays_are_laid_out_as_in_t5x(row):
    axes, *expected = row
    axes = tuple(axes.split())
    for setting, layout in zip(SETTINGS, expected, strict=True):
        spec = partitioning(setting, model=2).spec("w", (8,) * len(axes), axes)
        assert tuple(spec) == tuple(MESH_AXIS[letter] for letter in layout.split())


def test_every_setting_knows_the_same_axes():
    for setting in SETTINGS:
        assert {name for name, _ in logical_axis_rules(*setting)} == set(LOGICAL_AXES)


def test_a_setting_that_t5x_has_not_is_refused():
    with pytest.raises(ValueError, match="1 or 2, got 3 and 1"):
        logical_axis_rules(3, 1)
    with pytest.raises(ValueError, match="1 or 2, got 1 and 0"):
        partitioning((1, 0))


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({}, (8, 1)),
        ({"model": 2}, (4, 2)),
        ({"data": 2, "model": -1}, (2, 4)),
        ({"data": 2, "model": 2}, (2, 2)),
        ({"data": 1, "model": 1}, (1, 1)),
    ],
)
def test_mesh_has_the_asked_sizes_and_automatic_axes(sizes, shape):
    mesh = Partitioning(**sizes).mesh
    assert tuple(mesh.shape.items()) == (("data", shape[0]), ("model", shape[1]))
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_mesh_is_built_once():
    layout = Partitioning(model=2)
    assert layout.mesh is layout.mesh


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 8, "model": 2}, "needs 16 devices, but there are only 8"),
        ({"model": 3}, "8 devices do not divide by 3"),
        ({"model": 16}, "8 devices do not divide by 16"),
    ],
)
def test_a_mesh_that_the_devices_cannot_fill_is_refused_with_numbers(sizes, message):
    with pytest.raises(ValueError, match=message):
        _ = Partitioning(**sizes).mesh


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": -1, "model": -1}, "only one of"),
        ({"data": 0}, "data=0 must be positive"),
        ({"model": -2}, "model=-2 must be positive"),
    ],
)
def test_sizes_without_meaning_are_refused_at_once(sizes, message):
    with pytest.raises(ValueError, match=message):
        Partitioning(**sizes)


def tree(names, shape=(8, 4)):
    params = {"encoder": {"wi": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}}
    axes = {"encoder": {"wi": {"kernel_axes": AxisMetadata(names=names)}}}
    return params, axes


def test_parameters_get_shardings_in_their_own_tree():
    layout = partitioning((1, 2), model=2)
    shardings = layout.params_shardings(*tree(("embed", "mlp")))
    kernel = shardings["encoder"]["wi"]["kernel"]
    assert kernel.mesh is layout.mesh
    assert kernel.spec == PartitionSpec("data", "model")


@pytest.mark.parametrize(
    "names, shape, message",
    [
        (("embd", "mlp"), (8, 4), "no rule for axis 'embd'.*Nearest: embed"),
        (("zzz", "mlp"), (8, 4), "no rule for axis 'zzz'. Known axes: batch"),
        (("embed", "embed"), (8, 4), "'embed' is named more than once"),
        (("embed",), (8, 4), "one axis name per dimension"),
        (
            ("embed", "mlp"),
            (8, 3),
            r"dimension 1 \('mlp'\) of size 3 does not divide by the mesh axis "
            "'model' of size 2",
        ),
    ],
)
def test_bad_axes_are_refused_naming_the_parameter(names, shape, message):
    with pytest.raises(ValueError, match=f"parameter encoder/wi/kernel .*{message}"):
        Partitioning(model=2).params_shardings(*tree(names, shape))


def test_a_parameter_without_axes_is_refused():
    params, _ = tree(("embed", "mlp"))
    with pytest.raises(ValueError, match="encoder/wi/kernel has no logical axes"):
        Partitioning().params_shardings(params, {})


def test_a_dimension_is_replicated_on_purpose_with_none():
    spec = Partitioning(model=2).spec("w", (3, 4), (None, "mlp"))
    assert spec == PartitionSpec(None, "model")


@given(
    axes=st.lists(st.sampled_from(LOGICAL_AXES), min_size=1, max_size=4, unique=True),
    setting=st.sampled_from(SETTINGS),
)
def test_a_mesh_axis_is_given_to_at_most_one_dimension(axes, setting):
    spec = partitioning(setting, model=2).spec("w", (8,) * len(axes), axes)
    given_away = [axis for axis in spec if axis is not None]
    assert len(given_away) == len(set(given_away))


def test_a_batch_is_sharded_over_data_only():
    layout = Partitioning(model=2)
    assert layout.batch_sharding(3).spec == PartitionSpec("data", None, None)
    batch = jax.device_put(np.zeros((8, 6)), layout.batch_sharding(2))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 6)}
    assert layout.replicated.is_fully_replicated
    with pytest.raises(ValueError, match="at least one dimension"):
        layout.batch_sharding(0)


class TwoLayers(nn.Module):
    """A module with real flax axes, scanned, and an activation constraint."""

    @nn.compact
    def __call__(self, x):
        kernel = param_with_axes(
            "wi", nn.initializers.ones, (4, 8), axes=("embed", "mlp")
        )
        return nn.with_logical_constraint(x @ kernel, ("batch", "mlp"))


def test_axes_recorded_by_flax_become_shardings():
    variables = jax.eval_shape(TwoLayers().init, jax.random.key(0), jnp.ones((8, 4)))
    shardings = Partitioning(model=2).params_shardings(
        variables["params"], variables["params_axes"]
    )
    assert shardings["wi"].spec == PartitionSpec(None, "model")


@pytest.mark.parametrize("model", [1, 2, 4])
def test_activation_constraints_take_effect_inside_activate(model):
    layout = Partitioning(model=model)
    module, x = TwoLayers(), jnp.ones((8, 4))
    params = module.init(jax.random.key(0), x)

    def apply(params, x):
        return module.apply(params, x)

    with layout.activate():
        y = jax.jit(apply)(params, x)
    # With one device on an axis, jax drops its name from the inferred sharding.
    assert {shard.data.shape for shard in y.addressable_shards} == {(model, 8 // model)}
    np.testing.assert_array_equal(y, np.full((8, 8), 4.0))


def test_activate_restores_the_surrounding_context():
    layout = Partitioning(model=2)
    with layout.activate():
        assert jax.sharding.get_mesh() == layout.mesh
        with Partitioning(data=1).activate():
            pass
        assert jax.sharding.get_mesh() == layout.mesh
    assert jax.sharding.get_mesh().empty
    with pytest.raises(RuntimeError), layout.activate():
        raise RuntimeError
    assert jax.sharding.get_mesh().empty
