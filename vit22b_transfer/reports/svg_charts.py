"""Charts as inline SVG in the colours of `html_page`: lines, bars, intervals."""

import math
from collections.abc import Sequence

from vit22b_transfer.experiments.suite_results import Chart, Curve
from vit22b_transfer.reports.html_page import Markup, tag

COLORS = 6
Spot = tuple[int | float, int | float]
_WIDTH, _HEIGHT = 480, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 44
_LEGEND = 18
_BAR = 22


def chart(drawn: Chart) -> Markup:
    """A figure of a chart, with a legend if it has several curves."""
    picture = _bars(drawn) if drawn.bars else _lines(drawn)
    return tag("figure", picture, tag("figcaption", drawn.title))


def interval(
    value: float,
    low: float | None,
    high: float | None,
    paper: float | None,
    *,
    least: float,
    most: float,
    color: int = 0,
    reference: str = "ViT-22B",
) -> Markup:
    """A number on a scale from `least` to `most`: its interval, the paper's as a tick.

    What lies outside of the scale is drawn at its end. reference: what `paper` is.
    """
    width, height = 120, 16

    def place(number: float) -> float:
        share = (number - least) / (most - least) if most > least else 0.5
        return round(4 + (width - 8) * min(max(share, 0.0), 1.0), 1)

    said = f"{value:.4g}, without an interval"
    parts = [_line((4, 8), (width - 4, 8), class_="grid")]
    if low is not None and high is not None:
        said = f"{value:.4g}, 95 % interval {low:.4g} to {high:.4g}"
        parts.append(_line((place(low), 8), (place(high), 8), class_=f"s{color} line"))
    parts.append(tag("circle", cx=place(value), cy=8, r=3.5, class_=f"f{color}"))
    if paper is not None:
        at = place(paper)
        parts.append(_line((at, 1), (at, 15), class_="paper"))
    if paper is not None:
        said += f"; {reference} {paper:.4g}"
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=said,
    )


def _lines(drawn: Chart) -> Markup:
    """Curves with the spans of their points."""
    xs = [_scaled(p[0], drawn.log_x) for c in drawn.curves for p in c.points]
    ys = [p[1] for c in drawn.curves for p in c.points]
    ys += [end for c in drawn.curves for span in c.spans for end in span]
    legend = _LEGEND * len(drawn.curves) if len(drawn.curves) > 1 else 0
    height = _HEIGHT + legend
    (x0, x1), (y0, y1) = _range(xs), _range(ys)
    bottom = _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        room = _WIDTH - _LEFT - _RIGHT
        return round(_LEFT + room * (_scaled(x, drawn.log_x) - x0) / (x1 - x0), 1)

    def up(y: float) -> float:
        return round(bottom - (bottom - _TOP) * (y - y0) / (y1 - y0), 1)

    parts = []
    for tick in _ticks(y0, y1):
        parts += [
            _line((_LEFT, up(tick)), (_WIDTH - _RIGHT, up(tick)), class_="grid"),
            _text(_LEFT - 6, up(tick) + 4, f"{tick:.4g}", "end"),
        ]
    for tick in _across_ticks(drawn, x0, x1):
        parts.append(_text(across(tick), bottom + 16, f"{tick:.4g}", "middle"))
    parts += [
        _text(_WIDTH / 2, bottom + 34, drawn.x, "middle", "soft"),
        _text(_LEFT + 4, _TOP + 10, drawn.y, "start", "soft"),
    ]
    for number, curve in enumerate(drawn.curves):
        color = number % COLORS
        spots = [(across(x), up(y)) for x, y in curve.points]
        for (x, _), (low, high) in zip(spots, curve.spans, strict=False):
            parts.append(_line((x, up(low)), (x, up(high)), class_=f"s{color} span"))
        if len(spots) > 1:
            joined = " ".join(f"{x},{y}" for x, y in spots)
            parts.append(tag("polyline", points=joined, class_=f"s{color} line"))
        if len(spots) <= 40:
            parts += [
                tag("circle", cx=x, cy=y, r=3, class_=f"f{color}") for x, y in spots
            ]
        if legend:
            at = _HEIGHT + _LEGEND * number
            dot = tag("circle", cx=_LEFT + 5, cy=at + 4, r=5, class_=f"f{color}")
            parts += [dot, _text(_LEFT + 16, at + 8, _short(curve.name, 60), "start")]
    return _svg(height, parts, _said(drawn))


def _bars(drawn: Chart) -> Markup:
    """A bar from 0 for each point of the first curve, with its span and its name."""
    curve: Curve = drawn.curves[0]
    values = [point[1] for point in curve.points]
    ends = [end for span in curve.spans for end in span]
    low, high = min([0.0, *values, *ends]), max([0.0, *values, *ends])
    high = high if high > low else low + 1.0
    left, room = 150, _WIDTH - 150 - 60

    def across(value: float) -> float:
        return round(left + room * (value - low) / (high - low), 1)

    parts = []
    for number, value in enumerate(values):
        top = _TOP + _BAR * number
        name = drawn.ticks[number] if number < len(drawn.ticks) else str(number + 1)
        ends = sorted((across(0.0), across(value)))
        parts += [
            _text(left - 8, top + 14, _short(name, 22), "end"),
            tag(
                "rect",
                x=ends[0],
                y=top + 3,
                width=round(ends[1] - ends[0], 1),
                height=_BAR - 8,
                class_="f0",
            ),
            _text(across(max(value, 0.0)) + 6, top + 14, f"{value:.3g}", "start"),
        ]
        if number < len(curve.spans):
            low_end, high_end = map(across, curve.spans[number])
            parts.append(
                _line((low_end, top + 10), (high_end, top + 10), class_="paper")
            )
    bottom = _TOP + _BAR * len(values)
    parts.append(_text(left, bottom + 18, drawn.y, "start", "soft"))
    return _svg(bottom + 28, parts, _said(drawn))


def _svg(height: int | float, parts: Sequence[Markup], said: str) -> Markup:
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH} {height:g}",
        width=_WIDTH,
        height=f"{height:g}",
        role="img",
        aria_label=said,
    )


def _line(start: Spot, end: Spot, class_: str) -> Markup:
    return tag("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=class_)


def _text(
    x: int | float,
    y: int | float,
    words: str,
    anchor: str,
    class_: str | None = None,
) -> Markup:
    return tag(
        "text", words, x=round(x, 1), y=round(y, 1), text_anchor=anchor, class_=class_
    )


def _said(drawn: Chart) -> str:
    """The chart in words, for who does not see it."""
    told = []
    for curve in drawn.curves[:COLORS]:
        points = ", ".join(f"{x:.4g}: {y:.4g}" for x, y in curve.points[:20])
        told.append(f"{_short(curve.name, 60)}: {points}")
    return f"{drawn.title}. {'; '.join(told)}"


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _scaled(x: float, is_log: bool) -> float:
    return math.log10(max(x, 1e-12)) if is_log else x


def _range(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers within a range."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= max(f for f in (1, 2, 5, 10) if f == 1 or f * step <= (high - low) / 4)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [round((first + n) * step, 12) + 0.0 for n in range(count + 1)]


def _across_ticks(drawn: Chart, x0: float, x1: float) -> list[float]:
    """The places of points if they are few, else round numbers."""
    places = sorted({point[0] for curve in drawn.curves for point in curve.points})
    if len(places) <= 8 or not drawn.log_x:
        return places if len(places) <= 8 else _ticks(x0, x1)
    return [10.0**n for n in range(math.ceil(x0), math.floor(x1) + 1)]
