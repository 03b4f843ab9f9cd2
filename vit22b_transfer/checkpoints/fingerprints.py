"""Hashes of parameters, the same on every mesh, and of descriptions."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Bytes of arrays on the devices at a time while stored ones are hashed.
_GROUP_BYTES = 1 << 28


def text_digest(text: str) -> str:
    """Hash of a description, addresses of objects in memory left out."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parameters_digest(params: Any) -> str:
    """Hash of names, shapes, dtypes and values, the same on every mesh.

    The values enter by an integer checksum per array (integer sums do not depend on
    their order), computed where the arrays lie.
    """
    return rows_digest(parameter_rows(params))


def stored_digest(saved: Mapping[str, Any], read: Callable[[Any], Any]) -> str:
    """Hash of arrays that do not fit into memory all at once.

    saved: their shapes and dtypes by '/'-joined name. read: gives the arrays for a tree
      of some of them, laid out as its leaves say.
    """
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), "all"), PartitionSpec())
    rows, group, size = [], {}, 0
    for number, name in enumerate(sorted(saved, key=lambda name: name.split("/")), 1):
        leaf = saved[name]
        group[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
        size += leaf.dtype.itemsize * int(np.prod(leaf.shape))
        if size >= _GROUP_BYTES or number == len(saved):
            rows += parameter_rows(read(traverse_util.unflatten_dict(group, sep="/")))
            group, size = {}, 0
    return rows_digest(rows)


def rows_digest(rows: list[tuple[Any, ...]]) -> str:
    """The hash of `parameter_rows`, of one call or of several for parts in order."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def parameter_rows(params: Any) -> list[tuple[Any, ...]]:
    """Name, shape, dtype and checksum of each array, computed where it lies."""
    sums = jax.device_get(jax.jit(lambda p: jax.tree.map(_checksum, p))(params))
    return [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), int(checksum))
        for (path, leaf), checksum in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(sums),
            strict=True,
        )
    ]


def _checksum(array):
    """uint32 sum of a hash of each element's bits and position."""
    width = f"uint{8 * array.dtype.itemsize}"
    bits = lax.bitcast_convert_type(array, jnp.dtype(width)).astype(jnp.uint32)
    position = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        step = lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        position = position * jnp.uint32(2654435761) + step
    x = bits + position * jnp.uint32(2246822519)
    # The finaliser of MurmurHash3: without it changes of two sign bits would cancel.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return jnp.sum(x ^ (x >> jnp.uint32(16)), dtype=jnp.uint32)
