"""predictions.png: images, and beside each what was predicted and what is true.

Every prediction is marked with a sign and a word, not by colour alone. Words are drawn
one by one, since the gaps between them are lost in a small font.
"""

import collections
import dataclasses
import itertools
import pathlib
import textwrap
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from vit22b_transfer.data import answers
from vit22b_transfer.data.records import printable

_SIDE, _TEXT_WIDTH, _COLUMNS = 160, 460, 2
_FONT_SIZE, _LINE, _GAP, _MARGIN = 15, 20, 6, 12
_LONGEST, _LONGEST_WORD = 160, 32  # characters of a text, and of a word in it
_COMMONEST = 3  # answers that are shown
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_INK, _GREY, _RULE = "#111111", "#5a5a5a", "#d0d0d0"
# Told apart by people who see no red or green, too.
_COLORS = {
    "right": "#00609c",
    "partly right": "#8a5a00",
    "in other words": "#8a5a00",
    "wrong": "#b02000",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of text; `mark` is a key of `_COLORS`, or "" for none."""

    text: str
    mark: str = ""
    color: str = _INK


def draw(panels: Sequence[tuple[pathlib.Path, Sequence[Line]]], path: str) -> None:
    """Writes a PNG with an image (JPEG) and its lines in each panel, two in a row."""
    font = ImageFont.load_default(_FONT_SIZE)
    blocks = [[*_wrapped(lines, font)] for _, lines in panels]
    rows = [range(i, min(i + _COLUMNS, len(panels))) for i in range(0, len(panels), 2)]
    heights = [
        max(_SIDE, *(_LINE * len(blocks[i]) for i in row)) + _MARGIN for row in rows
    ]
    width = _COLUMNS * (_SIDE + _TEXT_WIDTH + 3 * _MARGIN)
    sheet = Image.new("RGB", (width, sum(heights) + 2 * _MARGIN + _LINE), "white")
    pen = ImageDraw.Draw(sheet)
    x = _MARGIN
    for mark in _COLORS:
        x = _line(pen, font, (x, _MARGIN), Line("", mark)) + 3 * _GAP
    y = 2 * _MARGIN + _LINE
    for row, height in zip(rows, heights, strict=True):
        pen.line([(0, y - _MARGIN // 2), (width, y - _MARGIN // 2)], fill=_RULE)
        for column, i in enumerate(row):
            x = _MARGIN + column * width // _COLUMNS
            with Image.open(panels[i][0], formats=["JPEG"]) as image:
                sheet.paste(image.resize((_SIDE, _SIDE)), (x, y))
            for number, line in enumerate(blocks[i]):
                _line(pen, font, (x + _SIDE + _MARGIN, y + number * _LINE), line)
        y += height
    sheet.save(path)


def caption_lines(prediction: str, references: Sequence[str]) -> list[Line]:
    """A caption and the first of its references.

    It is right if it is one of these, else "in other words": right or wrong.
    """
    is_right = prediction.strip() in {reference.strip() for reference in references}
    return [
        Line(prediction, "right" if is_right else "in other words"),
        *(
            Line(f"reference 1 of {len(references)}: {text}", color=_GREY)
            for text in references[:1]
        ),
    ]


def answer_lines(question: str, prediction: str, given: Sequence[str]) -> list[Line]:
    """A question, its predicted answer, and those of the annotators with their number.

    Right is an answer of VQA accuracy 1, wrong one of 0; between them it is partly so.
    """
    score = answers.accuracy([*map(answers.clean, given)], answers.clean(prediction))
    mark = {1.0: "right", 0.0: "wrong"}.get(round(score, 6), "partly right")
    counts = collections.Counter(given).most_common()
    said = ", ".join(f"{answer} ({n})" for answer, n in counts[:_COMMONEST])
    more = len(counts) - _COMMONEST
    said += f" and {more} more" if more > 0 else ""
    return [
        Line(question),
        Line(prediction, mark),
        Line(f"annotators: {said}", color=_GREY),
    ]


def _wrapped(lines: Sequence[Line], font: _Font) -> Iterator[Line]:
    """The lines, broken between words where they are too long."""
    for line in lines:
        room = _TEXT_WIDTH - (_mark_width(line, font) if line.mark else 0)
        begun: list[str] = []
        pieces = []
        text = printable(line.text)
        cut = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
        words = (textwrap.wrap(word, _LONGEST_WORD) for word in cut.split())
        for word in itertools.chain.from_iterable(words):
            if begun and _length([*begun, word], font) > room:
                pieces.append(" ".join(begun))
                begun = []
            begun.append(word)
        pieces.append(" ".join(begun) or "(nothing)")
        for number, piece in enumerate(pieces):
            mark = "" if number else line.mark
            yield dataclasses.replace(line, text=piece, mark=mark)


def _line(pen, font, place, line: Line) -> float:
    """Draws a line, its mark before it; returns where it ends."""
    x, y = place
    if line.mark:
        color = _COLORS[line.mark]
        _sign(pen, line.mark, (x, y + 2), color)
        x += _LINE
        pen.text((x, y), line.mark, fill=color, font=font)
        x += font.getlength(line.mark) + 2 * _GAP
    for word in line.text.split():
        pen.text((x, y), word, fill=line.color, font=font)
        x += font.getlength(word) + _GAP
    return x


def _sign(pen, mark, place, color):
    """A tick, a cross, or a bar between the two: drawn, as fonts lack them."""
    x, y = place
    if mark == "right":
        pen.line([(x, y + 7), (x + 5, y + 12), (x + 14, y + 1)], fill=color, width=3)
    elif mark == "wrong":
        pen.line([(x + 1, y + 1), (x + 12, y + 12)], fill=color, width=3)
        pen.line([(x + 1, y + 12), (x + 12, y + 1)], fill=color, width=3)
    else:
        pen.line([(x, y + 7), (x + 13, y + 7)], fill=color, width=3)


def _mark_width(line: Line, font) -> float:
    return _LINE + font.getlength(line.mark) + 2 * _GAP


def _length(words: Sequence[str], font) -> float:
    return sum(font.getlength(word) for word in words) + _GAP * (len(words) - 1)
