"""Pictures of predicted maps beside the true ones: PNG files in a row of three.

Image, prediction, truth. Classes have colours that differ by hue and lightness; where
there is no class the image stays as it is, in grey. Depths are drawn from dark (near)
to light (far) on one scale for both; where none is known they are black.
"""

import colorsys
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from vit22b_transfer.data.records import printable
from vit22b_transfer.host import whole_files

# The longer side of each of the three, in pixels.
SIDE = 384
_GAP, _LINE, _FONT_SIZE = 8, 18, 13
_SHARE = 0.6  # of the colour over the image
_GOLDEN = 0.6180339887  # turns of hue from a class to the next: none come close soon
_SHOWN = 6  # classes that are named
_INK = "#111111"


def class_colours(count: int) -> UInt8[np.ndarray, "classes 3"]:
    """A colour for each class, the same for the same number."""
    colours = []
    for number in range(count):
        lightness = (0.42, 0.62, 0.30)[number % 3]
        rgb = colorsys.hls_to_rgb(number * _GOLDEN % 1.0, lightness, 0.85)
        colours.append([round(255 * part) for part in rgb])
    return np.array(colours, np.uint8)


def draw_classes(
    path: str,
    image: UInt8[np.ndarray, "rows columns 3"],
    given: Int[np.ndarray, "rows columns"],
    labels: Int[np.ndarray, "rows columns"],
    names: Sequence[str],
) -> None:
    """Writes image, predicted classes and true ones (negative: none)."""
    colours = class_colours(len(names))
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)

    def over(classes):
        known = (classes >= 0)[..., None]
        coloured = colours[np.maximum(classes, 0)]
        mixed = _SHARE * coloured + (1 - _SHARE) * grey
        return np.where(known, mixed, grey).astype(np.uint8)

    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    counts = counts + np.bincount(given.ravel(), minlength=len(names))
    shown = [int(n) for n in np.argsort(-counts, kind="stable")[:_SHOWN] if counts[n]]
    legend = [(names[n], tuple(map(int, colours[n]))) for n in shown]
    _write(path, [image, over(given), over(labels)], legend)


def draw_depths(
    path: str,
    image: UInt8[np.ndarray, "rows columns 3"],
    predicted: Float[np.ndarray, "rows columns"],
    depths: Float[np.ndarray, "rows columns"],
    limits: tuple[float, float],
) -> None:
    """Writes image, predicted metres and true ones (0: unknown).

    limits: metres that are drawn darkest and lightest.
    """
    least, most = limits

    def drawn(metres):
        share = np.clip((metres - least) / (most - least), 0, 1)
        return np.where((metres > 0)[..., None], _ramp(share), 0).astype(np.uint8)

    ends = np.array([0.0, 1.0])
    near, far = (tuple(map(int, colour)) for colour in _ramp(ends))
    legend = [(f"{least:.3g} m", near), (f"{most:.3g} m", far)]
    _write(path, [image, drawn(predicted), drawn(depths)], legend)


def _ramp(share: Float[np.ndarray, "..."]) -> Float[np.ndarray, "... 3"]:
    """Colours from dark blue over red to light yellow: lightness rises with the share.

    So it is read without colours, too.
    """
    points = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    stops = np.array(
        [(20, 10, 60), (105, 25, 110), (190, 55, 85), (245, 135, 30), (250, 250, 160)]
    )
    parts = [np.interp(share, points, stops[:, channel]) for channel in range(3)]
    return np.stack(parts, axis=-1)


def _write(path, panels, legend):
    shown: list[Image.Image] = []
    for panel in panels:
        picture = Image.fromarray(np.ascontiguousarray(panel))
        scale = SIDE / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        # Of classes and depths no pixel is to be between two of them.
        how = Image.Resampling.NEAREST if shown else Image.Resampling.BILINEAR
        shown.append(picture.resize((width, height), how))
    width, height = shown[0].size
    sheet = Image.new(
        "RGB",
        (3 * width + 4 * _GAP, height + 2 * _LINE + 3 * _GAP),
        "white",
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, (title, picture) in enumerate(
        zip(("image", "predicted", "true"), shown, strict=True)
    ):
        left = _GAP + number * (width + _GAP)
        pen.text((left, _GAP // 2), title, fill=_INK, font=font)
        sheet.paste(picture, (left, _GAP + _LINE))
    left, top = _GAP, 2 * _GAP + _LINE + height
    for name, colour in legend:
        pen.rectangle((left, top + 2, left + 11, top + 13), fill=colour)
        text = printable(name)[:24]
        pen.text((left + 16, top), text, fill=_INK, font=font)
        left += 16 + int(font.getlength(text)) + 2 * _GAP
    with whole_files.replacing(path, "wb") as file:
        sheet.save(file, format="PNG")


def picture_path(folder: str, number: int) -> str:
    """Where the picture of a test image, by its number, is written."""
    return os.path.join(folder, f"{number:06}.png")


def spread(count: int, wanted: int) -> set[int]:
    """Numbers of `wanted` of `count` images, evenly over all of them."""
    taken = min(wanted, count)
    return {n * count // taken for n in range(taken)}
