"""ViT-22B's asynchronous parallel linear operations (Dehghani et al. 2023, section 3).

A linear layer whose input and output are both split over one mesh axis, on their last
dimension. What has to move between the devices goes round a ring, half of it each way,
and while one piece is on its way the piece that is there is multiplied: no device waits
for a gathered activation, and none holds one. With k devices, n inputs and m outputs,
and in the paper's words for y = A x:

- row form: each device has the rows of A of its outputs; the inputs circulate.
- column form: each device has the columns of A of its inputs; it computes its part of
  all outputs, and the partial sums circulate, growing, until each arrives at home.

Here kernels are A transposed, [n, m]: the row form splits their second dimension. The
backward pass of either form takes the gradient of the inputs by the other form, and the
gradient of the kernel from pieces as they pass: the row form lets the inputs pass once
more for it, the column form needs only the gradients that pass anyway.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import products

Form = Literal["row", "column"]

SUMS = jnp.float32
# The mesh axis that the examples of a batch are split over.
_BATCH_AXIS = "data"
"""What partial sums are accumulated in, on a device and on their way."""


def bytes_moved(
    form: Form, tokens: int, inputs: int, outputs: int, devices: int, dtype: Any
) -> int:
    """Bytes that each device sends in one forward pass, for its `tokens`.

    The backward pass sends as much in the column form, twice as much in the row form.
    Floats per token: row form (k-1) n/k, column form (k-1) m/k, for k devices, n inputs
    and m outputs (Dehghani et al. 2023, section 3). Inputs travel in their own `dtype`,
    partial sums in float32.
    """
    size, dtype = (inputs, dtype) if form == "row" else (outputs, SUMS)
    return (devices - 1) * size // devices * tokens * jnp.dtype(dtype).itemsize


def choose(inputs: int, outputs: int, dtype: Any) -> Form:
    """The form that moves fewer bytes; the row form where both move as many.

    Both move (k-1)/k of one side of the layer (Dehghani et al. 2023, section 3), so the
    number of devices k does not matter: row if n * itemsize(dtype) <= m * 4, for n
    inputs and m outputs. In float32 it is the paper's rule, row unless n > m: column
    for the layer out of the MLP, row elsewhere.
    """
    row, column = (
        bytes_moved(form, 1, 2 * inputs, 2 * outputs, 2, dtype)
        for form in ("row", "column")
    )
    return "row" if row <= column else "column"


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices of one mesh axis, in a ring; their work on one layer.

    The methods run on every device, under `jax.shard_map`; their arrays are the
    device's own: x [..., n/k] and y [..., m/k] of its share of the batch, and the
    kernel [n, m/k] in the row form, [n/k, m] in the column form.
    """

    mesh: Mesh
    axis: str = "model"

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.mesh.shape[self.axis]

    def pieces(self, x: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
        """(first index, piece) of the whole split dimension, own first, then others.

        Half of what each device has goes round one way, half the other way.
        """
        size, half = x.shape[-1], x.shape[-1] // 2
        ways = ((x[..., :half], 1, 0), (x[..., half:], -1, half))
        here = jax.lax.axis_index(self.axis)
        for step in range(self.devices):
            # The next pieces are on their way while the caller uses these.
            last = step == self.devices - 1
            following = [p if last else self._send(p, way) for p, way, _ in ways]
            for piece, way, offset in ways:
                owner = (here - way * step) % self.devices
                yield owner * size + offset, piece
            ways = tuple(
                (piece, way, offset)
                for piece, (_, way, offset) in zip(following, ways, strict=True)
            )

    def scatter_sum(
        self, size: int, part: Callable[[jax.Array, int], jax.Array]
    ) -> jax.Array:
        """This device's [..., size] of the sum over the devices of all their parts.

        `part(first, length)` is what this device adds to that stretch of the sum.
        """
        here, half = jax.lax.axis_index(self.axis), size // 2
        ways = ((1, 0, half), (-1, half, size - half))
        sums = []
        for step in range(self.devices):
            # Sums so far are on their way while the next parts are computed.
            sent = [self._send(s, way[0]) for s, way in zip(sums, ways, strict=False)]
            sums = []
            for way, offset, length in ways:
                owner = (here - way * (step + 1)) % self.devices
                sums.append(part(owner * size + offset, length))
            if sent:
                sums = [a + b for a, b in zip(sent, sums, strict=True)]
        return jnp.concatenate(sums, axis=-1)

    def _send(self, x, way):
        k = self.devices
        return jax.lax.ppermute(x, self.axis, [(i, (i + way) % k) for i in range(k)])

    def row(self, x, kernel):
        """The row form."""
        total = jnp.zeros((*x.shape[:-1], kernel.shape[1]), SUMS)
        for first, piece in self.pieces(x):
            rows = _stretch(kernel, first, piece.shape[-1], 0)
            total += _dot("...i,io->...o", piece, rows)
        return total.astype(x.dtype)

    def row_backward(self, x, kernel, grad):
        """Gradients of x and kernel in the row form."""

        def part(first, length):
            return _dot("...o,io->...i", grad, _stretch(kernel, first, length, 0))

        grad_x = self.scatter_sum(x.shape[-1], part).astype(x.dtype)
        grad_kernel = jnp.zeros_like(kernel)
        for first, piece in self.pieces(x):
            grad_kernel = jax.lax.dynamic_update_slice_in_dim(
                grad_kernel, _weight_gradient(piece, grad), first, 0
            )
        return grad_x, grad_kernel

    def column(self, x, kernel):
        """The column form."""

        def part(first, length):
            return _dot("...i,io->...o", x, _stretch(kernel, first, length, 1))

        return self.scatter_sum(kernel.shape[1] // self.devices, part).astype(x.dtype)

    def column_backward(self, x, kernel, grad):
        """Gradients of x and kernel in the column form."""
        grad_x, grad_kernel = jnp.zeros(x.shape, SUMS), jnp.zeros_like(kernel)
        for first, piece in self.pieces(grad):
            columns = _stretch(kernel, first, piece.shape[-1], 1)
            grad_x += _dot("...o,io->...i", piece, columns)
            grad_kernel = jax.lax.dynamic_update_slice_in_dim(
                grad_kernel, _weight_gradient(x, piece), first, 1
            )
        return grad_x.astype(x.dtype), grad_kernel


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=SUMS)


def _weight_gradient(x, grad):
    batch = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, grad, ((batch, batch), ((), ())))


def _stretch(kernel, first, length, dimension):
    return jax.lax.dynamic_slice_in_dim(kernel, first, length, dimension)


def _specs(
    ring: Ring, form: Form, shape: tuple[int, ...]
) -> tuple[PartitionSpec, PartitionSpec]:
    """Of activations of this shape and of the kernel.

    A batch that does not divide, such as the one example of an initialisation, is
    computed by all.
    """
    even = len(shape) > 1 and shape[0] % ring.mesh.shape[_BATCH_AXIS] == 0
    batch = [_BATCH_AXIS if even else None, *[None] * (len(shape) - 2)]
    kernel = (None, ring.axis) if form == "row" else (ring.axis, None)
    return PartitionSpec(*batch[: len(shape) - 1], ring.axis), PartitionSpec(*kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _on_ring(x, kernel, ring: Ring, form: Form):
    activation, weights = _specs(ring, form, x.shape)
    return jax.shard_map(
        ring.row if form == "row" else ring.column,
        mesh=ring.mesh,
        in_specs=(activation, weights),
        out_specs=activation,
        check_vma=False,
    )(x, kernel)


def _forward(x, kernel, ring, form):
    # `_on_ring` itself: remat policies that keep matmul results must not see, and keep,
    # the many partial ones.
    return _on_ring(x, kernel, ring, form), (x, kernel)


def _backward(ring, form, saved, grad):
    # Without the barrier the compiler may keep what passed in the forward pass, and so
    # all of x on every device.
    x, kernel, grad = jax.lax.optimization_barrier((*saved, grad))
    activation, weights = _specs(ring, form, x.shape)

    def backward(x, kernel, grad):
        own = ring.row_backward if form == "row" else ring.column_backward
        grad_x, grad_kernel = own(x, kernel, grad)
        if _BATCH_AXIS in activation:
            grad_kernel = jax.lax.psum(grad_kernel, _BATCH_AXIS)
        return grad_x, grad_kernel

    return jax.shard_map(
        backward,
        mesh=ring.mesh,
        in_specs=(activation, weights, activation),
        out_specs=(activation, weights),
        check_vma=False,
    )(x, kernel, grad.astype(x.dtype))


_on_ring.defvjp(_forward, _backward)


def linear(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    *,
    ring: Ring,
    form: Form | None = None,
) -> Float[Array, "*batch outputs"]:
    """`x @ kernel` in x's dtype, summed in float32, by the cheaper form or the given.

    x and the result are split over the ring on their last dimension, and over the
    batch axis on their first. A ring of one device is the plain product.

    Raises:
      UserError: if a dimension does not divide as the form needs it.
    """
    if ring.devices == 1:
        return products.linear(x, kernel)
    inputs, outputs = kernel.shape
    form = form or choose(inputs, outputs, x.dtype)
    moves = 0 if form == "row" else 1
    for dimension, name in enumerate(("inputs", "outputs")):
        # Each device's part of what moves is halved; the gradients move likewise.
        parts = ring.devices * (2 if dimension == moves else 1)
        if kernel.shape[dimension] % parts:
            raise UserError(
                f"kernel of shape {kernel.shape} on the ring of the {ring.devices} "
                f"devices of mesh axis {ring.axis!r}, {form} form: its "
                f"{kernel.shape[dimension]} {name} do not divide into {parts} equal "
                f"parts. Choose a mesh whose {ring.axis!r} size fits, or a mesh file "
                "without rings."
            )
    return _on_ring(x, kernel, ring, form)
