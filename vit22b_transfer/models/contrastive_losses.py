"""Losses of image-text pairs: sigmoid and softmax, whole or chunked over devices.

The logit of image i and text j is `scale * <image_i, text_j> + bias` over embeddings of
length one. `sigmoid` (Zhai et al. 2023) asks of each pair of the batch whether it
belongs together; `softmax` (Radford et al. 2021) which text belongs to an image and
which image to a text, and no bias changes it.

Chunked, no device ever holds the matrix of all logits: each keeps its images, and the
texts go round the devices of the batch axis, half of them each way, until they are home
again. A device compares the b images it has with b / 2 texts at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax.linen import partitioning as flax_partitioning
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vit22b_transfer import UserError
from vit22b_transfer.models.vit_blocks import check_choice

Form = Literal["sigmoid", "softmax"]
FORMS: tuple[str, ...] = get_args(Form)
# Of the chunked losses: by hand, computing blocks anew, or by JAX through the ring.
Gradient = Literal["recomputed", "autodiff"]
GRADIENTS: tuple[str, ...] = get_args(Gradient)

# Of a pair that does not count, in a softmax.
_NEVER = -1e10


def normalized(x: Float[Array, "batch embed"]) -> Float[Array, "batch embed"]:
    """Rows divided by their length (+ 1e-8, as in big_vision), in float32.

    A row of zeros stays one, and its gradients are numbers: such is the mean over the
    tokens of a text without any, in rows that are no pairs.
    """
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    there = squares > 0
    # The root's own slope at zero is infinite, and that times zero no number.
    lengths = jnp.sqrt(jnp.where(there, squares, jnp.ones_like(squares)))
    return x / (jnp.where(there, lengths, jnp.zeros_like(lengths)) + 1e-8)


def logits(
    images: Float[Array, "images embed"],
    texts: Float[Array, "texts embed"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, "images texts"]:
    """All logits of some images with some texts, in float32."""
    similarity = jnp.einsum(
        "ie,te->it", images, texts, preferred_element_type=jnp.float32
    )
    return similarity * scale.reshape(1, 1) + bias.reshape(1, 1)


def whole_loss(
    images: Float[Array, "batch embed"],
    texts: Float[Array, "batch embed"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    weights: Float[Array, " batch"],
    *,
    form: Form,
) -> Float[Array, ""]:
    """Sum over the pairs of a batch of their losses, from the matrix of all logits.

    Pair i is image i and text i, in rows of length one, in float32.
    weights: 1, or 0 for a pair that is none; its image and its text are nobody's.
    `sigmoid`: sum of -log sigmoid(+logit) of pairs and -log sigmoid(-logit) of all
    others. `softmax`: half the sum of the cross entropies of rows and of columns.
    Divided by the number of pairs that is big_vision's and OpenAI's loss.
    """
    table = logits(images, texts, scale, bias)
    rows, columns = weights[:, None], weights[None]
    pairs = jnp.eye(len(table), dtype=bool)
    if form == "sigmoid":
        signed = jnp.where(pairs, table, -table)
        return -jnp.sum(jax.nn.log_sigmoid(signed) * rows * columns)
    own = jnp.sum(jnp.where(pairs, table, jnp.zeros_like(table)), axis=1)
    table = jnp.where(rows * columns > 0, table, jnp.float32(_NEVER))
    both = jax.nn.logsumexp(table, axis=1) + jax.nn.logsumexp(table, axis=0)
    return jnp.sum((0.5 * both - own) * weights)


def batch_devices() -> tuple[Any, str] | None:
    """The mesh and its axis that examples are split over; None if all are on one.

    Of the mesh that `jax.set_mesh` or `jax.sharding.use_abstract_mesh` made known and
    of flax's rule for `batch`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rules = dict(reversed(flax_partitioning.get_axis_rules()))
    axis = rules.get("batch")
    if mesh.empty or not isinstance(axis, str) or mesh.shape.get(axis, 1) == 1:
        return None
    return mesh, axis


def chunked_loss(
    images: Float[Array, "batch embed"],
    texts: Float[Array, "batch embed"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    weights: Float[Array, " batch"],
    *,
    form: Form,
    gradient: Gradient = "recomputed",
) -> Float[Array, ""]:
    """`whole_loss`, chunked over the devices that a batch is split over.

    Where nothing is split, or no mesh is known (see `batch_devices`), it is
    `whole_loss`. Memory for a batch of b pairs a device, of k devices:

    gradient: `recomputed` lets the texts pass once more in the backward pass, with
      their gradients, and computes each block of logits anew: b * b / 2 logits and b
      embeddings at a time, whatever k. `autodiff` differentiates the ring step by
      step, and for that keeps the embeddings that passed: k * b of them. There is
      none for `weights`.

    Raises:
      UserError: if the batch does not divide by the devices, for images and texts that
        are not equally many, or for another word.
    """
    check_choice("form", form, FORMS)
    check_choice("gradient", gradient, GRADIENTS)
    if not len(images) == len(texts) == len(weights):
        raise UserError(
            f"got {len(images)} images, {len(texts)} texts and {len(weights)} weights; "
            "pair i is image i and text i: give equally many."
        )
    arguments = images, texts, scale, bias, weights
    found = batch_devices()
    if found is None:
        return whole_loss(*arguments, form=form)
    mesh, axis = found
    if len(images) % mesh.shape[axis]:
        raise UserError(
            f"a batch of {len(images)} pairs does not divide by the {mesh.shape[axis]} "
            f"devices of mesh axis {axis!r}. Choose a batch size that is a multiple."
        )
    if gradient == "autodiff":
        return _forward(*arguments, mesh, axis, form, True)[0]
    return _recomputed(*arguments, mesh, axis, form)


def nearest_own(
    images: Float[Array, "batch embed"],
    texts: Float[Array, "batch embed"],
    weights: Float[Array, " batch"],
    *,
    chunked: bool,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many images are more like their own text than like any other, and texts.

    chunked: as `chunked_loss`, so that no device has the matrix. Equal similarities
    are a hit, as of a text that occurs twice.
    """
    found = batch_devices() if chunked else None

    def visit(best_texts, fixed, best_images, rows):
        images, weights = rows
        texts, text_weights = fixed
        table = jnp.einsum("ie,te->it", images, texts)
        counted = weights[:, None] * text_weights[None] > 0
        table = jnp.where(counted, table, jnp.float32(_NEVER))
        best_texts = jnp.maximum(best_texts, jnp.max(table, axis=1))
        return best_texts, jnp.maximum(best_images, jnp.max(table, axis=0))

    def hits(images, texts, weights, round_trip):
        start = jnp.full(weights.shape, _NEVER, jnp.float32)
        best = round_trip(
            lambda *arguments: visit(*arguments, (images, weights)),
            start,
            ((texts, weights), start),
        )
        # A sum of another order differs in its last digits.
        own = jnp.sum(images * texts, axis=-1) + 1e-6
        return tuple(jnp.sum(jnp.where(own >= x, weights, 0.0)) for x in best)

    if found is None:
        to_texts, to_images = hits(
            images, texts, weights, lambda visit, kept, moved: visit(kept, *moved)
        )
        return to_texts, to_images
    mesh, axis = found

    def local(images, texts, weights):
        trip = functools.partial(_round_trip, axis)
        return jax.lax.psum(hits(images, texts, weights, trip), axis)

    arguments = images, texts, weights
    to_texts, to_images = _on_devices(local, mesh, axis, arguments, (False, False))
    return to_texts, to_images


# --- The ring ---


def _on_devices(function, mesh, axis, arguments, outputs):
    """`function` of each device's rows of `arguments`; numbers are whole everywhere.

    outputs: of each result, whether it has rows.
    """

    def spec(rows):
        return PartitionSpec(axis) if rows else PartitionSpec()

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(spec(array.ndim) for array in arguments),
        out_specs=tuple(map(spec, outputs)),
        check_vma=False,
    )(*arguments)


def _round_trip(axis: str, visit: Callable[..., Any], kept: Any, travelling: Any):
    """`kept` and `travelling` after each device was visited by all travelling rows.

    visit(kept, fixed, changing) -> (kept, changing) is called with every part of the
    rows of all devices. travelling: (fixed, changing), trees of rows: what is only read
    and what a visit changes. They come home to their own places.
    """
    devices = jax.lax.axis_size(axis)
    size = jax.tree.leaves(travelling)[0].shape[0]
    half = size // 2
    ways = (1, -1) if half else (1,)
    parts = [(0, half), (half, size)] if half else [(0, size)]
    halves = tuple(
        jax.tree.map(lambda x, p=p: x[p[0] : p[1]], travelling) for p in parts
    )

    def send(tree, way):
        to = [(i, (i + way) % devices) for i in range(devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to), tree)

    def step(_, state):
        kept, halves = state
        arrived = []
        for (fixed, changing), way in zip(halves, ways, strict=True):
            # On its way while this block is computed.
            following = send(fixed, way)
            kept, changing = visit(kept, fixed, changing)
            arrived.append((following, send(changing, way)))
        return kept, tuple(arrived)

    # The last visit is apart: what is only read need not come home.
    kept, halves = jax.lax.fori_loop(0, devices - 1, step, (kept, halves))
    home = []
    for (fixed, changing), way in zip(halves, ways, strict=True):
        kept, changing = visit(kept, fixed, changing)
        home.append(send(changing, way))
    return kept, jax.tree.map(lambda *x: jnp.concatenate(x), *home)


def _own_logits(images, texts, scale, bias):
    return jnp.sum(images * texts, axis=-1) * scale.reshape(1) + bias.reshape(1)


def _forward(images, texts, scale, bias, weights, mesh, axis, form, differentiated):
    """The loss, and the log-sums of each image's row and each text's column.

    The sums, which a softmax needs, are empty for a sigmoid.
    """

    def sigmoid_visit(total, fixed, changing, rows):
        images, weights, scale, bias = rows
        texts, text_weights = fixed
        costs = jax.nn.softplus(logits(images, texts, scale, bias))
        return total + jnp.sum(costs * weights[:, None] * text_weights[None]), changing

    def softmax_visit(row_sums, fixed, column_sums, rows):
        images, weights, scale, bias = rows
        texts, text_weights = fixed
        table = logits(images, texts, scale, bias)
        counted = weights[:, None] * text_weights[None] > 0
        table = jnp.where(counted, table, jnp.float32(_NEVER))
        row_sums = jnp.logaddexp(row_sums, jax.nn.logsumexp(table, axis=1))
        return row_sums, jnp.logaddexp(column_sums, jax.nn.logsumexp(table, axis=0))

    visit = sigmoid_visit if form == "sigmoid" else softmax_visit
    # Differentiated as it is, every block of logits would be kept.
    visit = jax.checkpoint(visit) if differentiated else visit

    def local(images, texts, scale, bias, weights):
        rows = images, weights, scale, bias
        own = _own_logits(images, texts, scale, bias)
        never = jnp.full(weights.shape, _NEVER, jnp.float32)
        start = (jnp.float32(0), ()) if form == "sigmoid" else (never, never)
        kept, changed = _round_trip(
            axis,
            lambda kept, fixed, changing: visit(kept, fixed, changing, rows),
            start[0],
            ((texts, weights), start[1]),
        )
        sums = () if form == "sigmoid" else (kept, changed)
        # Of a pair, softplus(-logit) = softplus(logit) - logit.
        total = -jnp.sum(own * weights)
        if form == "sigmoid":
            total += kept
        else:
            total += 0.5 * jnp.sum((kept + changed) * weights)
        return (jax.lax.psum(total, axis), *sums)

    arguments = images, texts, scale, bias, weights
    outputs = (False,) if form == "sigmoid" else (False, True, True)
    loss, *sums = _on_devices(local, mesh, axis, arguments, outputs)
    return loss, tuple(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _recomputed(images, texts, scale, bias, weights, mesh, axis, form):
    return _forward(images, texts, scale, bias, weights, mesh, axis, form, False)[0]


def _recomputed_forward(images, texts, scale, bias, weights, mesh, axis, form):
    arguments = images, texts, scale, bias, weights
    loss, sums = _forward(*arguments, mesh, axis, form, False)
    return loss, (*arguments, *sums)


def _recomputed_backward(mesh, axis, form, saved, gradient):
    """Gradients of all but the weights, from blocks of logits that are computed anew.

    Of a block, the gradient of its logits is sigmoid(logits), or the mean of the
    softmax over rows and of that over columns; of the pairs' own logits, one less.
    """

    def visit(kept, fixed, text_gradients, rows):
        image_gradients, scale_gradient, bias_gradient = kept
        images, scale, bias, weights, *row_sums = rows
        texts, text_weights, *column_sums = fixed
        table = logits(images, texts, scale, bias)
        counted = weights[:, None] * text_weights[None]
        if form == "sigmoid":
            block = jax.nn.sigmoid(table)
        else:
            table = jnp.where(counted > 0, table, jnp.float32(_NEVER))
            by_row = jnp.exp(table - row_sums[0][:, None])
            by_column = jnp.exp(table - column_sums[0][None])
            block = 0.5 * (by_row + by_column)
        block = block * counted
        to_images = jnp.einsum("it,te->ie", block, texts)
        image_gradients += to_images
        scale_gradient += jnp.sum(to_images * images)
        bias_gradient += jnp.sum(block)
        text_gradients += jnp.einsum("it,ie->te", block, images)
        return (image_gradients, scale_gradient, bias_gradient), text_gradients

    def local(images, texts, scale, bias, weights, gradient, *sums):
        zero = jnp.float32(0)
        rows = images, scale, bias, weights, *sums[:1]
        kept, to_texts = _round_trip(
            axis,
            lambda kept, fixed, changing: visit(kept, fixed, changing, rows),
            (jnp.zeros_like(images), zero, zero),
            ((texts, weights, *sums[1:]), jnp.zeros_like(texts)),
        )
        to_images, to_scale, to_bias = kept
        counted = weights[:, None]
        to_images -= counted * texts
        to_texts -= counted * images
        to_scale -= jnp.sum(counted * images * texts)
        to_bias -= jnp.sum(weights)
        factor = (gradient * scale).reshape(1, 1)
        return (
            to_images * factor,
            to_texts * factor,
            gradient * jax.lax.psum(to_scale, axis),
            gradient * jax.lax.psum(to_bias, axis),
        )

    images, texts, scale, bias, weights, *sums = saved
    # Without the barrier the compiler may keep what passed in the forward pass, and so
    # the texts of all devices.
    images, texts, gradient = jax.lax.optimization_barrier((images, texts, gradient))
    arguments = images, texts, scale, bias, weights, gradient, *sums
    gradients = _on_devices(local, mesh, axis, arguments, (True, True, False, False))
    return (*gradients, jnp.zeros_like(weights))


_recomputed.defvjp(_recomputed_forward, _recomputed_backward)
