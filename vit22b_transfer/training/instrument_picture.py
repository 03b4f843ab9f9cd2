"""The picture of a run: what its instruments told, drawn from `metrics.jsonl`.

A row of panels per stack of layers, a line per layer, from blue (the first) to red.
"""

import collections
import math
import os
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files, whole_files
from vit22b_transfer.host.file_errors import brief
from vit22b_transfer.training.instruments import PREFIX
from vit22b_transfer.training.logs import METRICS_FILE

PICTURE_FILE = "instruments.png"
# What is drawn -> (its title, whether its axis is logarithmic).
_PANELS = {
    "largest_logit": ("largest |attention logit|", True),
    "entropy": ("attention entropy (nats)", False),
    "residual_rms": ("residual stream RMS", True),
    "gradient_norm": ("gradient norm", True),
    "update_norm": ("update norm", True),
}
_WIDTH, _HEIGHT, _MARGIN, _TITLE = 250, 190, 44, 34
# Stacks of layers that are drawn, and points of a line.
_MOST_STACKS, _MOST_POINTS = 6, 400
_BLACK, _GREY, _WHITE = (0, 0, 0), (200, 200, 200), (255, 255, 255)

# Neither steps nor values that are larger are drawn.
_LARGEST = 1e30

# step -> value of each layer's line.
Lines = dict[str, list[tuple[float, float]]]


def draw(model_dir: str) -> str | None:
    """Writes `instruments.png` in `model_dir` anew; its path, None if nothing was told.

    Of more than six stacks the first are drawn, and the title says so; of more than 400
    readings every second, third ... one is.
    """
    stacks = _read(os.path.join(model_dir, METRICS_FILE))
    if not stacks:
        return None
    shown = list(stacks.items())[:_MOST_STACKS]
    size = (_WIDTH * len(_PANELS), 28 + _HEIGHT * len(shown))
    image = Image.new("RGB", size, _WHITE)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    title = f"{os.path.basename(os.path.abspath(model_dir))}: instruments by step"
    if len(stacks) > len(shown):
        title += f"; {len(shown)} of {len(stacks)} stacks of layers"
    pen.text((8, 8), brief(title, 160), _BLACK, font)
    for row, (stack, panels) in enumerate(shown):
        for column, (name, (heading, is_log)) in enumerate(_PANELS.items()):
            corner = (column * _WIDTH, 28 + row * _HEIGHT)
            labels = brief(stack, 38), heading
            _panel(pen, font, corner, labels, panels.get(name, {}), is_log)
    path = os.path.join(model_dir, PICTURE_FILE)
    with whole_files.replacing(path, "wb") as file:
        image.save(file, "PNG")
    return path


def _read(path: str) -> dict[str, dict[str, Lines]]:
    """Stack of layers -> panel -> line of each layer; lines cut off are left out."""
    stacks: dict[str, dict[str, Lines]] = {}
    if not os.path.isfile(path):
        return stacks
    with open(path, "rb") as lines:
        for text in lines:
            if PREFIX.encode() not in text:
                continue
            try:
                values = json_files.parse(text, METRICS_FILE)
            except UserError:
                continue
            if not isinstance(values, dict) or type(values.get("step")) is not int:
                continue
            if abs(values["step"]) >= _LARGEST:
                continue
            for stack, panel, layer, value in _layers(values):
                panels = stacks.setdefault(stack, {})
                line = panels.setdefault(panel, collections.defaultdict(list))
                line[layer].append((float(values["step"]), value))
    return stacks


def _layers(values: Mapping[str, object]) -> Iterator[tuple[str, str, str, float]]:
    """(stack, panel, layer, value) of what is told of the layers in one line."""
    for name, value in values.items():
        path, _, panel = name.removeprefix(PREFIX).rpartition("/")
        if not name.startswith(PREFIX) or panel not in _PANELS:
            continue
        before, found, after = path.partition("/layers_")
        if found and isinstance(value, float | int) and abs(value) < _LARGEST:
            # Self- and cross-attention of a layer are two lines.
            yield before, panel, after, float(value)


def _panel(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    corner: tuple[int, int],
    labels: Sequence[str],
    lines: Lines,
    is_log: bool,
) -> None:
    left, top = corner[0] + _MARGIN, corner[1] + _TITLE
    right, bottom = corner[0] + _WIDTH - 10, corner[1] + _HEIGHT - 18
    for i, label in enumerate(labels):
        pen.text((corner[0] + 8, corner[1] + 4 + 13 * i), label, _BLACK, font)
    pen.rectangle((left, top, right, bottom), outline=_GREY)
    drawn = {
        layer: [(step, _scaled(value, is_log)) for step, value in _thinned(points)]
        for layer, points in sorted(lines.items(), key=lambda item: _depth(item[0]))
    }
    every = [point for points in drawn.values() for point in points]
    if not every:
        pen.text((left + 6, top + 6), "nothing is told", _GREY, font)
        return
    (x0, x1), (y0, y1) = (_range([p[axis] for p in every]) for axis in (0, 1))

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * (step - x0) / (x1 - x0)
        return x, bottom - (bottom - top) * (value - y0) / (y1 - y0)

    for i, points in enumerate(drawn.values()):
        share = i / max(1, len(drawn) - 1)
        color = (int(220 * share), 60, int(220 * (1 - share)))
        spots = [place(*point) for point in points]
        if len(spots) > 1:
            pen.line(spots, color)
        for x, y in spots if len(spots) < 40 else ():
            pen.ellipse((x - 1, y - 1, x + 1, y + 1), color)
    for value, height in ((y1, top), (y0, bottom - 11)):
        shown = 10.0**value if is_log else value
        pen.text((corner[0] + 2, height), f"{shown:.3g}", _BLACK, font)
    pen.text((left, bottom + 3), f"{x0:g}", _BLACK, font)
    last = f"{x1:g}"
    pen.text((right - 6 * len(last), bottom + 3), last, _BLACK, font)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return points[:: -(-len(points) // _MOST_POINTS)]


def _scaled(value: float, is_log: bool) -> float:
    return math.log10(max(value, 1e-12)) if is_log else value


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _depth(layer: str) -> tuple[int, str]:
    number, _, rest = layer.partition("/")
    return (int(number) if number.isdecimal() else 0), rest
