"""int8 kernels made of those in floating point that a checkpoint holds."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from vit22b_transfer.checkpoints import reading
from vit22b_transfer.models import int8

# Bytes of kernels in floating point on the devices at a time; a larger one is alone.
_GROUP_BYTES = 1 << 30


def as_saved(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What to read for `wanted`: kernels in the dtype of `saved`, no scales."""
    made = _made(wanted, saved)
    scales = {_scales_of(name) for name in made}
    return {
        name: _stored(leaf, saved[name]) if name in made else leaf
        for name, leaf in wanted.items()
        if name not in scales
    }


def read_arrays(path: str, abstract: Any) -> Any:
    """As `reading.read_arrays`, for int8 kernels that may be saved as floats."""
    wanted, saved = reading.flatten(abstract), reading.saved_arrays(path)
    made = _made(wanted, saved)
    if not made:
        return reading.read_arrays(path, abstract)
    read = {}
    for group in _groups({name: _stored(wanted[name], saved[name]) for name in made}):
        for name, kernel in _read(path, group).items():
            scales = _scales_of(name)
            shardings = wanted[name].sharding, wanted[scales].sharding
            quantize = jax.jit(int8.quantized, out_shardings=shardings)
            read[name], read[scales] = quantize(kernel)
    rest = {name: leaf for name, leaf in wanted.items() if name not in read}
    read |= _read(path, rest) if rest else {}
    return traverse_util.unflatten_dict({name: read[name] for name in wanted}, sep="/")


def _made(wanted, saved):
    """Names of the int8 kernels that the checkpoint has in floating point."""
    return [
        name
        for name, leaf in wanted.items()
        if leaf.dtype == jnp.int8
        and name in saved
        and _scales_of(name) in wanted
        and jnp.issubdtype(saved[name].dtype, jnp.floating)
    ]


def _scales_of(name):
    return name.removesuffix("kernel") + int8.SCALES


def _stored(leaf, saved):
    """The kernel in the dtype of the checkpoint."""
    return jax.ShapeDtypeStruct(leaf.shape, saved.dtype, sharding=leaf.sharding)


def _groups(leaves: dict[str, Any]) -> Iterator[dict[str, Any]]:
    group, size = {}, 0
    for name, leaf in leaves.items():
        num_bytes = leaf.size * leaf.dtype.itemsize
        if group and size + num_bytes > _GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[name] = leaf
        size += num_bytes
    yield group


def _read(path, flat):
    tree = traverse_util.unflatten_dict(flat, sep="/")
    return reading.flatten(reading.read_arrays(path, tree))
