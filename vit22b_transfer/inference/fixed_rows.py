"""Predictions of an example that depend on nothing but the example: the order of sums.

In which order a program takes its sums follows from the shapes that it is compiled
for, so what is predicted in batches of 2 and of 8, or on 1 and on 8 devices, differs by
rounding. Here each device computes a fixed number of examples at a time, those that
stand together in the split, by one program that knows of no other device; batch and
mesh only say how often it runs, and where.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from vit22b_transfer import UserError
from vit22b_transfer.models import projections
from vit22b_transfer.partitioning.rules import Partitioning

# Of each backend: what else fixes the order of sums. On CPUs Eigen would cut sums by
# the number of its threads; on GPUs kernels would be chosen by how long they took, and
# some add up in any order.
_OPTIONS: dict[str, dict[str, bool | int]] = {
    "cpu": {"xla_cpu_multi_thread_eigen": False},
    "gpu": {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0},
}
_ROWS = PartitionSpec("data")


def check(partitioning: Partitioning, batch_size: int, rows: int) -> None:
    """Raises a UserError if batches cannot be computed `rows` examples at a time.

    That is if a device holds a part of the parameters only, or if its examples of a
    batch are no multiple of `rows`.
    """
    if rows < 1:
        raise UserError(f"fixed_rows is {rows}; it must be at least 1, or None.")
    devices, model = (partitioning.mesh.shape[axis] for axis in ("data", "model"))
    if model > 1 or (devices > 1 and partitioning.parameter_partitioning_dims > 1):
        raise UserError(
            "fixed_rows (--deterministic) needs whole parameters on each device, but "
            f"the mesh data={devices} x model={model} splits them, and with them sums. "
            "Use gin_configs/meshes/data_parallel.gin."
        )
    step = rows * devices
    if batch_size % step:
        raise UserError(
            f"batch_size {batch_size} does not divide by {step}: {devices} devices "
            f"with fixed_rows={rows} each (--deterministic). Use "
            f"{max(1, batch_size // step) * step} or another multiple of {step}."
        )


class FixedRows:
    """A `predicting.Predict` whose rows are equal to the bit whatever batch and mesh.

    rows: examples that a device computes at a time. They are computed together, so the
      same number of them gives the same bytes, another one others.
    The same kind of device, number of rows and version of JAX are still needed. All
    images are encoded, repeated ones too.
    """

    def __init__(self, model: Any, partitioning: Partitioning, rows: int):
        self._model, self._mesh, self._rows = model, partitioning.mesh, rows

    def __call__(
        self, params: Any, batch: Any, seed: np.uint32, number: np.uint32
    ) -> tuple[Any, Any]:
        """As a `predicting.Predict`, of a batch that `check` allows."""
        size, devices = next(iter(batch.values())).shape[0], self._mesh.shape["data"]
        parts, rest = divmod(size, self._rows * devices)
        assert not rest
        batch = jax.device_put(dict(batch), NamedSharding(self._mesh, _ROWS))
        outputs = [
            self._predict(params, *self._part(batch, seed, number, np.int32(part)))
            for part in range(parts)
        ]
        return self._joined(outputs)

    @functools.cached_property
    def _part(self):
        """The jitted (batch, seed, number, part) -> rows of each device and keys."""

        def part(batch, seed, number, part):
            local = next(iter(batch.values())).shape[0]
            first = part * self._rows
            taken = {
                name: lax.dynamic_slice_in_dim(value, first, self._rows)
                for name, value in batch.items()
            }
            # As `predicting.example_keys`: by the index in the split.
            row = lax.axis_index("data") * local + first
            devices = self._mesh.shape["data"]
            index = number * jnp.uint32(local * devices) + row.astype(jnp.uint32)
            indices = index + jnp.arange(self._rows, dtype=jnp.uint32)
            fold = jax.vmap(jax.random.fold_in, (None, 0))
            return taken, fold(jax.random.key(seed), indices)

        nothing = PartitionSpec()
        return jax.jit(
            self._mapped(part, (_ROWS, nothing, nothing, nothing), (_ROWS, _ROWS))
        )

    @functools.cached_property
    def _predict(self):
        """The jitted (params, rows of each device, keys) -> (predictions, aux)."""

        def predict(params, batch, keys):
            # No rules: this device is all that the program knows of.
            with (
                flax_partitioning.axis_rules(()),
                projections.projecting_with(None),
            ):
                return self._model.predict_batch_with_aux(params, batch, rng=keys)

        return jax.jit(
            self._mapped(predict, (PartitionSpec(), _ROWS, _ROWS), _ROWS),
            compiler_options=_OPTIONS.get(jax.default_backend(), {}),
        )

    @functools.cached_property
    def _joined(self):
        """The jitted outputs of all parts -> those of the batch, on every device."""

        def join(outputs):
            return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)

        replicated = NamedSharding(self._mesh, PartitionSpec())
        mapped = self._mapped(join, (_ROWS,), _ROWS)
        return jax.jit(mapped, out_shardings=replicated)

    def _mapped(self, function, inputs, outputs):
        return jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=inputs,
            out_specs=outputs,
            check_vma=False,
        )
