"""The corruptions of ImageNet-C, of pictures of any size, the same in every run.

Definitions and constants are those of Hendrycks & Dietterich 2019 (arXiv 1903.12261)
and its published data set: fifteen corruptions that count in the mean corruption error
(`corruption_errors`) and three that were meant for tuning, each of five severities.
Constants are for pictures of 224 pixels, as a model of that size sees them.

Not as published: frost is drawn (`corruption_weather.frost`), and a picture's chance is
its own, so that no result depends on the order of pictures. The published fourth
corruption for tuning, spatter, is not here.
"""

import difflib
import hashlib
import io
from collections.abc import Callable, Mapping

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import corruption_blurs, corruption_weather
from vit22b_transfer.evaluation.corruption_blurs import Pixels

SEVERITIES = (1, 2, 3, 4, 5)
# Of a side, in pixels: below it a glass blur or a motion of 20 pixels is the picture.
SMALLEST = 32

Corruption = Callable[[Pixels, np.random.Generator, int], Pixels]


def corrupted(
    image: UInt8[np.ndarray, "height width 3"],
    corruption: str,
    severity: int,
    image_id: str,
) -> UInt8[np.ndarray, "height width 3"]:
    """A picture under one of `NAMES` or `EXTRA`, of a severity from 1 to 5.

    Chance depends on image_id, corruption and severity alone. Results are cut to
    0 to 255 and rounded down, as in the published data set.

    Raises:
      UserError: for an unknown corruption or severity, or a side below 32 pixels.
    """
    function = _FUNCTIONS.get(corruption)
    if function is None:
        near = difflib.get_close_matches(corruption, _FUNCTIONS, n=1, cutoff=0.0)
        raise UserError(
            f"there is no corruption {corruption!r}; the nearest is {near[0]!r} of "
            f"{', '.join(_FUNCTIONS)}."
        )
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity!r} is none of 1, 2, 3, 4 and 5.")
    if min(image.shape[:2]) < SMALLEST:
        raise UserError(
            f"a picture of {image.shape[0]} x {image.shape[1]} pixels is too small to "
            f"be corrupted; its sides need {SMALLEST} pixels, resize it first."
        )
    text = f"{corruption}\n{severity}\n{image_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(text).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    result = function(image / 255.0, rng, severity - 1)
    return np.floor(np.clip(result, 0.0, 1.0) * 255).astype(np.uint8)


def _gaussian_noise(pixels, rng, level):
    return pixels + rng.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[level], pixels.shape)


def _shot_noise(pixels, rng, level):
    photons = (60, 25, 12, 5, 3)[level]
    return rng.poisson(pixels * photons) / photons


def _impulse_noise(pixels, rng, level):
    """Single values are made black or white, half of them each."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    hit = rng.random(pixels.shape) < share
    return np.where(hit, rng.random(pixels.shape) < 0.5, pixels)


def _speckle_noise(pixels, rng, level):
    deviation = (0.15, 0.2, 0.35, 0.45, 0.6)[level]
    return pixels * (1 + rng.normal(0, deviation, pixels.shape))


def _gaussian_blur(pixels, rng, level):
    return corruption_blurs.gaussian(pixels, (1.0, 2.0, 3.0, 4.0, 6.0)[level])


def _defocus_blur(pixels, rng, level):
    radius, softness = (3, 4, 6, 8, 10)[level], (0.1, 0.5, 0.5, 0.5, 0.5)[level]
    return corruption_blurs.defocus(pixels, radius, softness)


def _glass_blur(pixels, rng, level):
    deviation = (0.7, 0.9, 1.0, 1.1, 1.5)[level]
    shift, rounds = ((1, 2), (2, 1), (2, 3), (3, 2), (4, 2))[level]
    return corruption_blurs.glass(pixels, deviation, shift, rounds, rng)


def _motion_blur(pixels, rng, level):
    radius, deviation = (10, 15, 15, 15, 20)[level], (3.0, 5.0, 8.0, 12.0, 15.0)[level]
    angle = rng.uniform(-45, 45)
    return corruption_blurs.motion(pixels, radius, deviation, angle)


def _zoom_blur(pixels, rng, level):
    largest = (1.11, 1.16, 1.21, 1.26, 1.31)[level]
    step = (0.01, 0.01, 0.02, 0.02, 0.03)[level]
    return corruption_blurs.zoom(pixels, largest, step)


def _snow(pixels, rng, level):
    flakes = (
        (0.1, 0.3, 3.0, 0.5),
        (0.2, 0.3, 2.0, 0.5),
        (0.55, 0.3, 4.0, 0.9),
        (0.55, 0.3, 4.5, 0.85),
        (0.55, 0.3, 2.5, 0.85),
    )[level]
    motion_of = ((10, 4.0), (12, 4.0), (12, 8.0), (12, 8.0), (12, 12.0))[level]
    own = (0.8, 0.7, 0.7, 0.65, 0.55)[level]
    return corruption_weather.snow(pixels, flakes, motion_of, own, rng)


def _frost(pixels, rng, level):
    own, ice = (1.0, 0.8, 0.7, 0.65, 0.6)[level], (0.4, 0.6, 0.7, 0.7, 0.75)[level]
    return corruption_weather.frost(pixels, own, ice, rng)


def _fog(pixels, rng, level):
    thickness = (1.5, 2.0, 2.5, 2.5, 3.0)[level]
    decay = (2.0, 2.0, 1.7, 1.5, 1.4)[level]
    return corruption_weather.fog(pixels, thickness, decay, rng)


def _brightness(pixels, rng, level):
    """More of HSV's value at the same hue and saturation."""
    value = pixels.max(axis=2, keepdims=True)
    more = np.clip(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 0, 1)
    return np.where(value > 0, pixels * more / np.where(value > 0, value, 1), more)


def _saturate(pixels, rng, level):
    """Another of HSV's saturation at the same hue and value; grey has the hue red."""
    factor, more = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[level]
    value = pixels.max(axis=2, keepdims=True)
    range_ = value - pixels.min(axis=2, keepdims=True)
    old = range_ / np.where(value > 0, value, 1)
    new = np.clip(old * factor + more, 0, 1)
    coloured = value - (value - pixels) * new / np.where(old > 0, old, 1)
    red = value * (1 - new * np.array([0.0, 1.0, 1.0]))
    return np.where(old > 0, coloured, red)


def _contrast(pixels, rng, level):
    mean = pixels.mean(axis=(0, 1))
    return (pixels - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def _elastic_transform(pixels, rng, level):
    strength = (2.0, 2.0, 0.05, 0.07, 0.12)[level]
    deviation = (0.7, 0.08, 0.01, 0.01, 0.01)[level]
    shear = (0.1, 0.2, 0.02, 0.02, 0.02)[level]
    return corruption_weather.elastic(pixels, strength, deviation, shear, rng)


def _pixelate(pixels, rng, level):
    """Fewer pixels, each the mean of a box, then as many as before."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    picture = _picture(pixels)
    fewer = [int(side * share) for side in picture.size]
    box = PIL.Image.Resampling.BOX
    small = picture.resize((fewer[0], fewer[1]), box)
    return np.asarray(small.resize(picture.size, box)) / 255


def _jpeg_compression(pixels, rng, level):
    file = io.BytesIO()
    _picture(pixels).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return np.asarray(PIL.Image.open(file)) / 255


def _picture(pixels):
    return PIL.Image.fromarray(np.round(pixels * 255).astype(np.uint8))


# In the order of the paper's table: noise, blur, weather, digital.
_COUNTED: Mapping[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
_TUNING: Mapping[str, Corruption] = {
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "saturate": _saturate,
}
_FUNCTIONS = {**_COUNTED, **_TUNING}
NAMES = tuple(_COUNTED)
EXTRA = tuple(_TUNING)
