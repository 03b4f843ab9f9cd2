"""The tower's fused projections, which a partitioning may compute in its own way."""

import contextlib
import contextvars
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import products

Projecting = Callable[[jax.Array, jax.Array], jax.Array]

# Name of the results, for rematerialisation that keeps those of matmuls.
NAME = "projection"

_projecting = contextvars.ContextVar[Projecting | None]("projecting", default=None)


@contextlib.contextmanager
def projecting_with(function: Projecting | None):
    """Context in which `projection` calls `function`; with None, `products.linear`.

    It takes effect where a function is traced, as flax's axis rules do.
    """
    token = _projecting.set(function)
    try:
        yield
    finally:
        _projecting.reset(token)


def projection(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """`x @ kernel` in x's dtype, computed as `projecting_with` says."""
    function = _projecting.get()
    if function is None:
        return products.linear(x, kernel)
    return checkpoint_name(function(x, kernel), NAME)


def refuse_separate() -> None:
    """Raises UserError under `projecting_with`; for towers that use no `projection`."""
    if _projecting.get() is not None:
        raise UserError(
            "the mesh computes fused projections as rings (ring_projections), but this "
            "tower has none. Set fused_projections=True in its config, which needs "
            "parallel blocks, or choose a mesh file without rings."
        )
