"""The picture of a run: what its instruments told, drawn from `metrics.jsonl`.

A row of panels per stack of layers, a line per layer, from blue (the first) to red.
"""

import collections
import os
from collections.abc import Iterator, Mapping

from PIL import Image, ImageDraw, ImageFont

from vit22b_transfer import UserError
from vit22b_transfer.host import charts, json_files, whole_files
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
_WIDTH, _HEIGHT = 250, 190
# Stacks of layers that are drawn, and points of a line.
_MOST_STACKS, _MOST_POINTS = 6, 400

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
    image = Image.new("RGB", size, charts.WHITE)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    title = f"{os.path.basename(os.path.abspath(model_dir))}: instruments by step"
    if len(stacks) > len(shown):
        title += f"; {len(shown)} of {len(stacks)} stacks of layers"
    pen.text((8, 8), brief(title, 160), charts.BLACK, font)
    for row, (stack, panels) in enumerate(shown):
        for column, (name, (heading, is_log)) in enumerate(_PANELS.items()):
            box = (column * _WIDTH, 28 + row * _HEIGHT, _WIDTH, _HEIGHT)
            labels = brief(stack, 38), heading
            lines = _colored(panels.get(name, {}))
            charts.draw_panel(pen, font, box, labels, lines, log_y=is_log)
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


def _colored(lines: Lines) -> list[charts.Line]:
    """The lines from blue (the first layer) to red."""
    ordered = sorted(lines.items(), key=lambda item: _depth(item[0]))
    last = max(1, len(ordered) - 1)
    return [
        charts.Line(
            _thinned(points), (int(220 * i / last), 60, int(220 * (1 - i / last)))
        )
        for i, (_, points) in enumerate(ordered)
    ]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return points[:: -(-len(points) // _MOST_POINTS)]


def _depth(layer: str) -> tuple[int, str]:
    number, _, rest = layer.partition("/")
    return (int(number) if number.isdecimal() else 0), rest
