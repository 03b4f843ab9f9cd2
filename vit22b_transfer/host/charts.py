"""Line charts of a few panels, drawn with Pillow alone."""

import dataclasses
import math
from collections.abc import Sequence

from PIL import ImageDraw, ImageFont

MARGIN, TITLE = 44, 34
BLACK, GREY, WHITE = (0, 0, 0), (200, 200, 200), (255, 255, 255)
# Lines with fewer points have a dot at each.
_FEW = 40
_LEAST = 1e-12  # what a logarithmic axis shows of 0

Color = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclasses.dataclass(frozen=True)
class Line:
    """Points (x, y), all finite, in the order in which they are joined."""

    points: Sequence[tuple[float, float]]
    color: Color = BLACK
    width: int = 1


def draw_panel(
    pen: ImageDraw.ImageDraw,
    font: Font,
    box: tuple[int, int, int, int],
    labels: Sequence[str],
    lines: Sequence[Line],
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draws a frame with the lines in it, its labels above, its ranges beside it.

    box: (left, top, width, height) in pixels, labels and ranges included.
    log_x, log_y: whether an axis is logarithmic.
    """
    corner, right, bottom = box[:2], box[0] + box[2] - 10, box[1] + box[3] - 18
    left, top = box[0] + MARGIN, box[1] + TITLE
    for i, label in enumerate(labels):
        pen.text((corner[0] + 8, corner[1] + 4 + 13 * i), label, BLACK, font)
    pen.rectangle((left, top, right, bottom), outline=GREY)
    drawn = [
        [(_scaled(x, log_x), _scaled(y, log_y)) for x, y in line.points]
        for line in lines
    ]
    every = [point for points in drawn for point in points]
    if not every:
        pen.text((left + 6, top + 6), "nothing is told", GREY, font)
        return
    (x0, x1), (y0, y1) = (_range([p[axis] for p in every]) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (right - left) * (x - x0) / (x1 - x0)
        return across, bottom - (bottom - top) * (y - y0) / (y1 - y0)

    for line, points in zip(lines, drawn, strict=True):
        spots, r = [place(*point) for point in points], line.width
        if len(spots) > 1:
            pen.line(spots, line.color, line.width)
        for x, y in spots if len(spots) < _FEW else ():
            pen.ellipse((x - r, y - r, x + r, y + r), line.color)
    for value, height in ((y1, top), (y0, bottom - 11)):
        pen.text((corner[0] + 2, height), _shown(value, log_y), BLACK, font)
    pen.text((left, bottom + 3), _shown(x0, log_x), BLACK, font)
    last = _shown(x1, log_x)
    pen.text((right - 6 * len(last), bottom + 3), last, BLACK, font)


def _shown(value: float, is_log: bool) -> str:
    return f"{10.0**value if is_log else value:.3g}"


def _scaled(value: float, is_log: bool) -> float:
    return math.log10(max(value, _LEAST)) if is_log else value


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
