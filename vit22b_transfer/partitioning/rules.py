"""Device mesh and shardings, derived from the logical axis names of arrays.

The rules are those of T5X (`t5x.partitioning.standard_logical_axis_rules`), so that a
model is laid out alike in both runtimes.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit22b_transfer import UserError
from vit22b_transfer.models import projections
from vit22b_transfer.partitioning import parallel_linear

MESH_AXES = ("data", "model")

Rule = tuple[str, str | None]

# (activation dims, parameter dims) -> rules. Order matters: for one array the rules are
# tried from top to bottom, each mesh axis is given away once, and None settles a name.
_SETTINGS: dict[tuple[int, int], tuple[Rule, ...]] = {
    (1, 1): (
        ("batch", "data"),
        ("vocab", "model"),
        ("embed", None),
        ("mlp", "model"),
        ("heads", "model"),
        ("kv", None),
        ("joined_kv", "model"),
    ),
    (2, 1): (
        ("batch", "data"),
        ("vocab", "model"),
        ("mlp", "model"),
        ("heads", "model"),
        ("kv", None),
        ("joined_kv", "model"),
        ("embed", "model"),
    ),
    (1, 2): (
        ("batch", "data"),
        ("vocab", "model"),
        ("mlp", "model"),
        ("heads", "model"),
        ("kv", None),
        ("joined_kv", "model"),
        ("embed", "data"),
    ),
    (2, 2): (
        ("batch", "data"),
        ("vocab", "model"),
        ("mlp", "model"),
        ("heads", "model"),
        ("kv", None),
        ("joined_kv", "model"),
        ("embed", "model"),
        ("embed", "data"),
    ),
}

_REPLICATED: tuple[Rule, ...] = (
    ("relpos_buckets", None),
    ("abspos_buckets", None),
    ("length", None),
    ("layers", None),
    ("stack", None),
    ("mlp_activations", None),
)

# Names that T5X has no word for: pixels of a flattened patch, what lies between the two
# matrices of a low-rank update, and classes, of which there may be any number: 29,593
# do not divide by 2.
_NOT_IN_T5X: tuple[Rule, ...] = (
    ("patch", None),
    ("lora_rank", None),
    ("classes", None),
)

LOGICAL_AXES: tuple[str, ...] = tuple(
    dict.fromkeys(name for name, _ in _SETTINGS[1, 1] + _REPLICATED + _NOT_IN_T5X)
)


def logical_axis_rules(
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
) -> tuple[Rule, ...]:
    """(logical axis, mesh axis) pairs: T5X's in T5X's order, then ours.

    Raises:
      UserError: if the setting does not exist.
    """
    setting = (activation_partitioning_dims, parameter_partitioning_dims)
    if setting not in _SETTINGS:
        raise UserError(
            "activation_partitioning_dims and parameter_partitioning_dims must each be "
            f"1 or 2, got {setting[0]} and {setting[1]}."
        )
    return _SETTINGS[setting] + _REPLICATED + _NOT_IN_T5X


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """Mesh of `data` x `model` devices and the rules that lay arrays out on it.

    A size of -1 means all devices that the other size leaves over. With
    `ring_projections`, towers with `fused_projections` compute these as
    `parallel_linear` does; everything else is laid out as without it.
    """

    data: int = -1
    model: int = 1
    activation_partitioning_dims: int = 1
    parameter_partitioning_dims: int = 1
    ring_projections: bool = False

    def __post_init__(self):
        for name, size in (("data", self.data), ("model", self.model)):
            if size != -1 and size < 1:
                raise UserError(
                    f"mesh size {name}={size} must be positive, or -1 for all devices."
                )
        if self.data == self.model == -1:
            raise UserError("only one of the mesh sizes data and model can be -1.")
        logical_axis_rules(
            self.activation_partitioning_dims, self.parameter_partitioning_dims
        )
        if self.ring_projections and self.activation_partitioning_dims != 2:
            raise UserError(
                "ring_projections needs activations that are split on embed. Set "
                "activation_partitioning_dims=2, or ring_projections=False."
            )

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The device mesh with axes 'data' and 'model', of `AxisType.Auto`."""
        devices = jax.devices()
        data, model = mesh_sizes(self.data, self.model, len(devices))
        if data * model < len(devices) and jax.process_count() > 1:
            raise UserError(
                f"mesh data={data} x model={model} uses {data * model} of "
                f"{len(devices)} devices; with several hosts it must use all of them."
            )
        return jax.make_mesh(
            (data, model),
            MESH_AXES,
            axis_types=(AxisType.Auto, AxisType.Auto),
            devices=devices[: data * model],
        )

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The logical axis rules of this setting."""
        return logical_axis_rules(
            self.activation_partitioning_dims, self.parameter_partitioning_dims
        )

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device holds in full."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch_sharding(self, ndim: int) -> NamedSharding:
        """The sharding of a batch: dimension 0 over 'data', the others in full."""
        if ndim < 1:
            raise UserError("a batch needs at least one dimension, got a scalar.")
        return NamedSharding(self.mesh, PartitionSpec("data", *[None] * (ndim - 1)))

    def params_shardings(
        self, abstract_params: Mapping[str, Any], params_axes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Tree of `NamedSharding`, one per parameter.

        `params_axes` is the flax collection of that name: beside each parameter `p`
        an `AxisMetadata` leaf `p_axes`.

        Raises:
          UserError: if a parameter has no axes, an axis name is unknown or repeated,
            or a dimension does not divide by the mesh axis that it is sharded over.
        """
        params: dict[str, Any] = traverse_util.flatten_dict(abstract_params, sep="/")
        axes: dict[str, Any] = traverse_util.flatten_dict(params_axes, sep="/")
        shardings = {}
        for name, param in params.items():
            if f"{name}_axes" not in axes:
                raise UserError(
                    f"parameter {name} has no logical axes: params_axes lacks "
                    f"{name}_axes. Create it with param_with_axes."
                )
            spec = self.spec(name, tuple(param.shape), axes[f"{name}_axes"].names)
            shardings[name] = NamedSharding(self.mesh, spec)
        return traverse_util.unflatten_dict(shardings, sep="/")

    def spec(
        self, name: str, shape: tuple[int, ...], axes: Sequence[str | None]
    ) -> PartitionSpec:
        """Mesh axis per dimension of the array called `name` in error messages."""
        axes = tuple(axes)
        described = f"parameter {name} with shape {shape} and logical axes {axes}"
        if len(axes) != len(shape):
            raise UserError(f"{described}: one axis name per dimension is needed.")
        known = list(dict.fromkeys(logical for logical, _ in self.rules))
        for axis in axes:
            if axis is not None and axis not in known:
                nearest = difflib.get_close_matches(axis, known, n=3, cutoff=0.5)
                raise UserError(
                    f"{described}: there is no rule for axis {axis!r}. "
                    + (f"Nearest: {', '.join(nearest)}. " if nearest else "")
                    + f"Known axes: {', '.join(known)}."
                )
            if axis is not None and axes.count(axis) > 1:
                raise UserError(
                    f"{described}: axis {axis!r} is named more than once, so it is "
                    "ambiguous which dimension to shard."
                )
        spec = flax_partitioning.logical_to_mesh_axes(axes, self.rules)
        assert spec is not None
        for dimension, mesh_axis in enumerate(spec):
            size = 1 if mesh_axis is None else self.mesh.shape[mesh_axis]
            if shape[dimension] % size:
                raise UserError(
                    f"{described}: dimension {dimension} ({axes[dimension]!r}) of size "
                    f"{shape[dimension]} does not divide by the mesh axis "
                    f"{mesh_axis!r} of size {size}. Choose a mesh whose {mesh_axis!r} "
                    f"size divides {shape[dimension]}, or change the model."
                )
        return spec

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Context in which model code is traced and run: the mesh and the rules.

        Only here do the models' `with_sharding_constraint` calls take effect.
        """
        project = None
        if self.ring_projections:
            ring = parallel_linear.Ring(self.mesh)
            project = functools.partial(parallel_linear.linear, ring=ring)
        # flax looks for the mesh of jax.set_mesh; under `with mesh:` it skips silently.
        with (
            jax.set_mesh(self.mesh),
            flax_partitioning.axis_rules(self.rules),
            projections.projecting_with(project),
        ):
            yield


def mesh_sizes(data: int, model: int, num_devices: int) -> tuple[int, int]:
    """Sizes of the mesh axes, -1 resolved.

    Raises:
      UserError: if there are not as many devices.
    """
    fixed = math.prod(size for size in (data, model) if size != -1)
    if -1 in (data, model):
        if num_devices % fixed:
            raise UserError(
                f"mesh data={data} x model={model}: {num_devices} devices do not "
                f"divide by {fixed}."
            )
        rest = num_devices // fixed
        return (rest, model) if data == -1 else (data, rest)
    if fixed > num_devices:
        raise UserError(
            f"mesh data={data} x model={model} needs {fixed} devices, but there are "
            f"only {num_devices}. Use -1 for one size, or smaller sizes."
        )
    return data, model
