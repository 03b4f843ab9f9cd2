"""Snow, frost and fog over a picture, and a rubber sheet below it.

Functions take pixels in [0, 1] and the constants of a severity (Hendrycks & Dietterich
2019, arXiv 1903.12261). Constants in pixels are those for 224 and are not scaled, but
those of `elastic`, which are with the shorter side, as they are shares of it.
"""

import numpy as np
import scipy.fft
import scipy.ndimage
from jaxtyping import Float

from vit22b_transfer.evaluation.corruption_blurs import Pixels, enlarged, motion

# Red, green and blue of the darkest and the brightest of the original's pictures of
# frost, as parts of 1, and the deviation within one.
_FROST_COLOURS = np.array([[78.0, 149.0, 166.0], [201.0, 205.0, 214.0]]) / 255
_FROST_DEVIATION = 28 / 255
_LUMA = np.array([0.299, 0.587, 0.114])


def plasma(
    size: int, decay: float, rng: np.random.Generator
) -> Float[np.ndarray, "s s"]:
    """A cloud from 0 to 1 that repeats itself, by the diamond-square algorithm.

    size: of the side, a power of two. decay: by which the height of chance falls as the
    distance of points is halved; the smaller, the finer.
    """
    heights = np.zeros((size, size))
    step, chance = size, 100.0

    def drawn(total):
        # Its square is the published data set's: chance falls by decay squared.
        return total / 4 + chance * rng.uniform(-chance, chance, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        beside = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = drawn(beside + np.roll(beside, -1, 1))
        middles = heights[half::step, half::step]
        heights[::step, half::step] = drawn(
            middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        )
        heights[half::step, ::step] = drawn(
            middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        )
        step, chance = half, chance / decay
    heights -= heights.min()
    return heights / heights.max()


def fog(
    pixels: Pixels, thickness: float, decay: float, rng: np.random.Generator
) -> Pixels:
    """`thickness` times a cloud is added, and all is darkened by as much."""
    cloud = plasma(_power_of_two(max(pixels.shape[:2])), decay, rng)
    cloud = cloud[: pixels.shape[0], : pixels.shape[1], None]
    brightest = pixels.max()
    return (pixels + thickness * cloud) * brightest / (brightest + thickness)


def frost(pixels: Pixels, own: float, ice: float, rng: np.random.Generator) -> Pixels:
    """`own` times the picture and `ice` times drawn frost.

    The published data set takes crops of five photographs of frosted windows, which are
    no part of this package. This frost is drawn: needles and ridges in the colours, the
    brightness and the contrast of those photographs. Errors under it are therefore not
    those of ImageNet-C's frost; say so beside an mCE.
    """
    height, width = pixels.shape[:2]
    cloud = plasma(_power_of_two(max(height, width)), 1.5, rng)[:height, :width]
    texture = 1 - np.abs(2 * cloud - 1)
    for angle in rng.uniform(0, 360, 3):
        seeds = (rng.random((height, width)) < 0.01).astype(np.float64)
        texture += 3 * motion(seeds, 12, 8.0, angle)
    texture = np.clip((texture - texture.mean()) / max(texture.std(), 1e-12), -3, 3)
    dark, bright = _FROST_COLOURS
    colour = dark + rng.random() * (bright - dark)
    layer = np.clip(colour + _FROST_DEVIATION * texture[:, :, None], 0, 1)
    return own * pixels + ice * layer


def snow(
    pixels: Pixels,
    flakes: tuple[float, float, float, float],
    motion_of: tuple[int, float],
    own: float,
    rng: np.random.Generator,
) -> Pixels:
    """Falling flakes over a picture that is paler than before.

    flakes: mean and deviation of noise, how far it is enlarged, below what it is none.
    motion_of: radius and deviation of the flakes' fall, which is downwards at up to 45
    degrees. own: the part of the picture that stays; the rest is at least half white.
    """
    mean, deviation, factor, least = flakes
    layer = rng.normal(mean, deviation, pixels.shape[:2])
    layer = enlarged(layer, factor)
    layer[layer < least] = 0
    layer = np.floor(np.clip(layer, 0, 1) * 255) / 255
    layer = motion(layer, *motion_of, rng.uniform(-135, -45))
    pale = np.maximum(pixels, (pixels @ _LUMA)[:, :, None] * 1.5 + 0.5)
    return own * pixels + (1 - own) * pale + (layer + layer[::-1, ::-1])[:, :, None]


def elastic(
    pixels: Pixels,
    strength: float,
    deviation: float,
    shear: float,
    rng: np.random.Generator,
) -> Pixels:
    """A random affine map, then a smooth random displacement of all pixels.

    All three are in parts of the shorter side, the published 244 pixels of a picture
    of 224: corners of the affine map move by up to `shear`, pixels by `strength` times
    noise from -1 to 1 after a Gaussian of `deviation`.
    """
    height, width = pixels.shape[:2]
    unit = 244 * min(height, width) / 224
    centre, square = np.array([height, width]) / 2, min(height, width) // 3
    corners = centre + square * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = corners + rng.uniform(-shear * unit, shear * unit, (3, 2))
    # Where each pixel comes from: `matrix` takes the moved corners to their places.
    matrix = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    pixels = _taken(pixels, grid @ matrix[:2] + matrix[2], "mirror")
    shifts = [
        strength
        * unit
        * _smoothed(rng.uniform(-1, 1, (height, width)), deviation * unit)
        for _ in range(2)
    ]
    return _taken(pixels, grid + np.stack(shifts, -1), "reflect")


def _taken(pixels, places, mode):
    """The pixels at (row, column) `places`, bilinear; beyond the border reflected."""
    where = np.moveaxis(places, -1, 0)
    channels = [
        scipy.ndimage.map_coordinates(pixels[:, :, n], where, order=1, mode=mode)
        for n in range(pixels.shape[2])
    ]
    return np.stack(channels, axis=-1)


def _smoothed(noise, deviation):
    """A Gaussian cut at 3 deviations, reflected at the border.

    In the cosine transform, whose waves go on so: a deviation may be most of the side,
    and a sum over its window would take seconds.
    """
    reach = np.arange(-int(3 * deviation + 0.5), int(3 * deviation + 0.5) + 1)
    weights = np.exp(-(reach**2) / (2 * deviation**2))
    weights /= weights.sum()
    waves = scipy.fft.dctn(noise)
    for axis, side in enumerate(noise.shape):
        kept = np.cos(np.pi / side * np.outer(np.arange(side), reach)) @ weights
        waves *= np.expand_dims(kept, 1 - axis)
    return scipy.fft.idctn(waves)


def _power_of_two(side):
    return 1 << (side - 1).bit_length()
