"""Convolutions, batch normalisation and resizing of feature maps [B, H, W, C]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vit22b_transfer.models import layers, products, vit_positions

# The collection in which training tells what batches are normalised by.
BATCH_STATISTICS = "batch_statistics"
_EPSILON = 1e-5


class Conv(nn.Module):
    """A convolution of `size` x `size` points, padded with zeros by `size // 2`.

    The kernel is stored as a matrix: [size * size * inputs, outputs].
    """

    inputs: int
    outputs: int
    size: int = 1
    stride: int = 1
    use_bias: bool = True
    kernel_init: layers.Initializer = layers.fan_in_normal
    axes: tuple[str, str] = ("patch", "embed")

    def setup(self):
        self.dense = layers.Dense(
            self.size * self.size * self.inputs,
            self.outputs,
            self.axes,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
        )

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch rows columns outputs"]:
        kernel = self.dense.weights.reshape(
            self.size, self.size, self.inputs, self.outputs
        )
        around = self.size // 2
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(around, around)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        bias = self.dense.bias
        return y if bias is None else products.add_bias(y, bias)


class Enlarging(nn.Module):
    """A transposed convolution whose points become `factor` x `factor` points each.

    As kernel and stride are the same nothing overlaps: it is a matrix product.
    """

    channels: int
    factor: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns channels"]:
        batch, height, width, channels = x.shape
        factor = self.factor
        dense = layers.Dense(
            channels,
            factor * factor * channels,
            ("embed", "patch"),
            use_bias=False,
            kernel_init=layers.fan_in_normal,
            name="dense",
        )
        y = dense(x).reshape(batch, height, width, factor, factor, channels)
        y = y.swapaxes(2, 3).reshape(batch, height * factor, width * factor, channels)
        bias = _table("bias", channels, nn.initializers.zeros_init())
        return products.add_bias(y, bias)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) over all points of a batch.

    In training it normalises by the batch's own mean and variance, and tells them in
    the collection `BATCH_STATISTICS`. Otherwise by the parameters `mean` and
    `variance`, which no gradient reaches: `with_statistics` puts the means of many
    batches there when training is over (Wu & Johnson 2021, section 3). So a step of
    training changes nothing but what the optimizer does.
    """

    channels: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch height width channels"]:
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        mean = _table("mean", self.channels, zeros)
        variance = _table("variance", self.channels, ones)
        scale = _table("scale", self.channels, ones)
        bias = _table("bias", self.channels, zeros)
        if train:
            mean = jnp.mean(x, axis=(0, 1, 2))
            square = jnp.mean(jnp.square(x), axis=(0, 1, 2))
            self.sow(BATCH_STATISTICS, "batch_mean", mean)
            self.sow(BATCH_STATISTICS, "batch_square", square)
            variance = jnp.maximum(square - jnp.square(mean), 0.0)
        factor = scale * jax.lax.rsqrt(variance + _EPSILON)
        return (x - _last(mean)) * _last(factor) + _last(bias)


def with_statistics(params: dict, told: dict, batches: int) -> dict:
    """Parameters with the mean and variance of all points of some batches.

    told: sums over the batches of what `BatchNorm` tells of each.
    """
    found = dict(params)
    for name, part in told.items():
        if "batch_square" in part:
            (mean,), (square,) = part["batch_mean"], part["batch_square"]
            mean, square = mean / batches, square / batches
            variance = jnp.maximum(square - jnp.square(mean), 0.0)
            found[name] = {
                **params[name],
                "mean": {"embedding": mean},
                "variance": {"embedding": variance},
            }
        else:
            found[name] = with_statistics(params[name], part, batches)
    return found


class NormedConv(nn.Module):
    """A convolution without a bias, batch normalisation, ReLU."""

    inputs: int
    outputs: int
    size: int = 1

    def setup(self):
        self.conv = Conv(self.inputs, self.outputs, self.size, use_bias=False)
        self.norm = BatchNorm(self.outputs)

    def __call__(
        self, x: Float[Array, "batch height width inputs"], *, train: bool
    ) -> Float[Array, "batch height width outputs"]:
        return nn.relu(self.norm(self.conv(x), train=train))


def resized(
    x: Float[Array, "batch height width channels"], size: tuple[int, int]
) -> Float[Array, "batch rows columns channels"]:
    """Bilinear, edges in place: torch's `interpolate` with `align_corners=False`."""
    if x.shape[1:3] == size:
        return x
    shape = (x.shape[0], *size, x.shape[3])
    return jax.image.resize(x, shape, "bilinear", antialias=False)


def doubled(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch rows columns channels"]:
    """Twice as high and wide, bilinear, corner points in place."""
    rows, columns = (
        vit_positions.interpolation(side, 2 * side, "bilinear_corners")
        for side in x.shape[1:3]
    )
    return _mixed_points(x, rows, columns)


def pooled(
    x: Float[Array, "batch height width channels"], size: int
) -> Float[Array, "batch size size channels"]:
    """Means of `size` x `size` parts of the map (torch's adaptive average pooling).

    Part i of n points begins at floor(i n / size) and ends at ceil((i + 1) n / size).
    """
    rows, columns = (_parts(side, size) for side in x.shape[1:3])
    return _mixed_points(x, rows, columns)


def _parts(points, size):
    matrix = np.zeros((size, points))
    for part in range(size):
        start, stop = part * points // size, -(-(part + 1) * points // size)
        matrix[part, start:stop] = 1 / (stop - start)
    return matrix


def _mixed_points(x, rows, columns):
    y = jnp.einsum("hH,bHWc->bhWc", jnp.asarray(rows, x.dtype), x)
    return jnp.einsum("wW,bhWc->bhwc", jnp.asarray(columns, x.dtype), y)


def _table(name, channels, init):
    table = functools.partial(layers.LearnedTable, (channels,), ("embed",), init)
    return table(name=name)()


def _last(vector):
    return vector.reshape(1, 1, 1, -1)
