"""Blurs of a picture: out of focus, behind glass, moved, zoomed, or Gaussian.

Functions take pixels in [0, 1] and the constants of a severity, which are in pixels of
a 224-pixel picture and are not scaled with it. What they return may leave [0, 1] by
rounding. Definitions: Hendrycks & Dietterich 2019 (arXiv 1903.12261) and their
published data set.
"""

import numpy as np
import scipy.ndimage
import scipy.signal
from jaxtyping import Float

Pixels = Float[np.ndarray, "height width channels"]


def gaussian(pixels: Pixels, deviation: float) -> Pixels:
    """A Gaussian blur of each channel; beyond the border the nearest pixel goes on."""
    return scipy.ndimage.gaussian_filter(
        pixels, (deviation, deviation, 0.0), mode="nearest"
    )


def defocus(pixels: Pixels, radius: int, softness: float) -> Pixels:
    """The mean over a disk of `radius` pixels, with an edge softened by a Gaussian."""
    reach, half = (8, 1) if radius <= 8 else (radius, 2)
    grid = np.arange(-reach, reach + 1) ** 2
    disk = (grid[:, None] + grid[None, :] <= radius**2).astype(np.float64)
    disk /= disk.sum()
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * softness**2))
    weights /= weights.sum()
    for axis in (0, 1):
        disk = scipy.ndimage.correlate1d(disk, weights, axis, mode="mirror")
    around = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    # The kernel is symmetric: convolution is correlation.
    found = scipy.signal.fftconvolve(around, disk[:, :, None], "valid", axes=(0, 1))
    return np.asarray(found)


def glass(
    pixels: Pixels,
    deviation: float,
    shift: int,
    rounds: int,
    rng: np.random.Generator,
) -> Pixels:
    """A Gaussian blur, pixels taken from nearby ones, and the blur again.

    From the lower right corner on, each pixel takes the value of one at a distance of
    -shift to shift - 1 in both directions, which may have taken its own before. In the
    published data set the other keeps its value, though they were to be exchanged.
    """
    height, width = pixels.shape[:2]
    blurred = np.floor(np.clip(gaussian(pixels, deviation), 0, 1) * 255) / 255
    source = list(range(height * width))
    for _ in range(rounds):
        rows = range(height - shift, shift, -1)
        columns = range(width - shift, shift, -1)
        moves = rng.integers(-shift, shift, (len(rows), len(columns), 2))
        flat = (moves[:, :, 1] * width + moves[:, :, 0]).tolist()
        for row, row_moves in zip(rows, flat, strict=True):
            for column, move in zip(columns, row_moves, strict=True):
                place = row * width + column
                source[place] = source[place + move]
    taken = blurred.reshape(height * width, -1)[source].reshape(pixels.shape)
    return gaussian(taken, deviation)


def motion(
    pixels: Float[np.ndarray, "height width *channels"],
    radius: int,
    deviation: float,
    angle: float,
) -> Float[np.ndarray, "height width *channels"]:
    """A picture smeared along a line: half a Gaussian over 2 `radius` + 1 pixels.

    angle: of the line in degrees, clockwise from the right. Steps along it are rounded
    to pixels; beyond the border the nearest pixel goes on.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    weights /= weights.sum()
    direction = np.deg2rad(angle)
    across = np.ceil(steps * np.cos(direction) - 0.5).astype(int)
    down = np.ceil(steps * np.sin(direction) - 0.5).astype(int)
    height, width = pixels.shape[:2]
    result = np.zeros(pixels.shape)
    for weight, x, y in zip(weights, across, down, strict=True):
        rows = np.clip(np.arange(height) + y, 0, height - 1)
        columns = np.clip(np.arange(width) + x, 0, width - 1)
        result += weight * pixels[rows[:, None], columns]
    return result


def zoom(pixels: Pixels, largest: float, step: float) -> Pixels:
    """The mean of a picture and of its middle enlarged from 1 to `largest` times."""
    factors = np.arange(1, largest, step)
    total = pixels.copy()
    for factor in factors:
        total += enlarged(pixels, factor)
    return total / (len(factors) + 1)


def enlarged(
    pixels: Float[np.ndarray, "height width *channels"], factor: float
) -> Float[np.ndarray, "height width *channels"]:
    """The middle of a picture, `factor` (at least 1) times larger, bilinear."""
    height, width = pixels.shape[:2]
    inner = [int(np.ceil(side / factor)) for side in (height, width)]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    middle = pixels[top : top + inner[0], left : left + inner[1]]
    factors = (factor, factor, 1.0)[: pixels.ndim]
    large = np.asarray(scipy.ndimage.zoom(middle, factors, order=1))
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]
