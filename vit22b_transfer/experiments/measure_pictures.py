"""Pictures of trust measures: diagrams of lines, rows of marks, overlays on images."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from vit22b_transfer.evaluation.calibration import Reliability
from vit22b_transfer.host import charts, whole_files
from vit22b_transfer.host.file_errors import brief

_SIDE, _ROW = 300, 20
_LEFT = 90  # of rows: where their names stand
BLUE, RED, GREY = (40, 60, 200), (200, 50, 40), (150, 150, 150)
# From nothing to most: black, red, yellow, white.
_HEAT = np.array([[0, 0, 0], [180, 0, 0], [255, 200, 0], [255, 255, 255]], float)


def save_panels(
    path: str,
    panels: Sequence[tuple[Sequence[str], Sequence[charts.Line]]],
) -> str:
    """Writes a PNG of panels beside each other, each of labels and lines; its path."""
    image = Image.new("RGB", (_SIDE * len(panels), _SIDE), charts.WHITE)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    for number, (labels, lines) in enumerate(panels):
        box = (number * _SIDE, 0, _SIDE, _SIDE)
        charts.draw_panel(pen, font, box, [brief(x, 46) for x in labels], lines)
    return save(path, image)


def reliability_diagram(
    path: str, bins: Mapping[str, Reliability], names: Mapping[str, str]
) -> str:
    """Writes accuracy by mean confidence of each bin that is not empty; the path.

    bins: by name, a panel of each; names: what stands below its name.
    """
    panels = []
    for name, found in bins.items():
        used = found.count > 0
        points = zip(found.confidence[used], found.accuracy[used], strict=True)
        line = charts.Line([(float(x), float(y)) for x, y in points], BLUE, 2)
        labels = (f"{name}: accuracy by confidence", names.get(name, ""))
        panels.append((labels, [charts.Line([(0.0, 0.0), (1.0, 1.0)], GREY), line]))
    return save_panels(path, panels)


def curve(
    path: str,
    labels: Sequence[str],
    lines: Mapping[str, tuple[Float[np.ndarray, " points"], Sequence[float]]],
) -> str:
    """Writes one panel of lines (x, y), the first blue, others red; the path."""
    colors = [BLUE, *[RED] * len(lines)]
    drawn = [
        charts.Line(list(zip(map(float, x), map(float, y), strict=True)), color, 1)
        for (x, y), color in zip(lines.values(), colors, strict=False)
    ]
    return save_panels(path, [(labels, drawn)])


def rows_of_shares(
    path: str,
    title: str,
    rows: Sequence[str],
    shares: Mapping[str, Sequence[float]],
) -> str:
    """Writes a row for each name with a mark for each observer's share; the path.

    shares: of each observer a number in [0, 1] for each row; NaN has no mark. A line
      of an observer's colour stands at the mean of those that there are. The first is
      blue, the others red: the figure of the model-vs-human benchmark.
    """
    height = 64 + _ROW * len(rows) + 16 * len(shares)
    image = Image.new("RGB", (_LEFT + 360, height), charts.WHITE)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    pen.text((8, 6), brief(title, 70), charts.BLACK, font)
    top, bottom = 40, 40 + _ROW * len(rows)
    left, right = _LEFT, _LEFT + 340
    pen.rectangle((left, top, right, bottom), outline=GREY)
    pen.text((left, 24), "0 texture", charts.BLACK, font)
    pen.text((right - 44, 24), "shape 1", charts.BLACK, font)
    for number, name in enumerate(rows):
        pen.text((8, top + _ROW * number + 4), brief(name, 13), charts.BLACK, font)
    for number, (observer, values) in enumerate(shares.items()):
        color = RED if number else BLUE
        for row, value in enumerate(values):
            if np.isfinite(value):
                x, y = left + (right - left) * value, top + _ROW * (row + 0.5)
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline=color, fill=color)
        known = [value for value in values if np.isfinite(value)]
        if known:
            x = left + (right - left) * float(np.mean(known))
            pen.line((x, top, x, bottom), color)
        place = (8, bottom + 6 + 16 * number)
        pen.text(place, brief(observer, 60), color, font)
    return save(path, image)


def save_overlays(
    path: str,
    images: UInt8[np.ndarray, "images height width 3"],
    weights: Float[np.ndarray, "images rows cols"],
) -> str:
    """Writes `overlay` of each image, one below the other; the path."""
    rows = [overlay(*pair) for pair in zip(images, weights, strict=True)]
    return save(path, Image.fromarray(np.concatenate(rows)))


def overlay(
    image: UInt8[np.ndarray, "height width 3"], weights: Float[np.ndarray, "rows cols"]
) -> UInt8[np.ndarray, "height threefold 3"]:
    """The image, its heat map of the weights, and both mixed, beside each other.

    weights: at least 0; those from the 99th percentile on are white. They are made as
    large as the image, bilinearly.
    """
    most = float(np.percentile(weights, 99)) or float(np.max(weights))
    scaled = np.asarray(weights, np.float32) / (most if most > 0 else 1.0)
    size = (image.shape[1], image.shape[0])
    scaled = Image.fromarray(scaled).resize(size, Image.Resampling.BILINEAR)
    values = np.clip(np.asarray(scaled), 0, 1)
    places = np.linspace(0, 1, len(_HEAT))
    heat = np.stack([np.interp(values, places, _HEAT[:, c]) for c in range(3)], axis=-1)
    mixed = 0.5 * image + 0.5 * heat
    joined = np.concatenate([image, heat, mixed], axis=1)
    return np.round(joined).astype(np.uint8)


def save(path: str, image: Image.Image) -> str:
    """Writes a PNG, whole or not at all; its path."""
    with whole_files.replacing(path, "wb") as file:
        image.save(file, "PNG")
    return path
