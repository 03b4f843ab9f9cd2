"""The suite's page: the table with intervals drawn, and what each row rests on."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from vit22b_transfer import UserError
from vit22b_transfer.experiments import suite_results as results
from vit22b_transfer.experiments.suite_results import Chart, Line
from vit22b_transfer.host import whole_files
from vit22b_transfer.reports import beside, svg_charts
from vit22b_transfer.reports.html_page import Markup, joined, page, picture, tag

PAGE_FILE = "suite.html"
# Pictures of a row on the page; the others are counted.
MOST_PICTURES = 60


@dataclasses.dataclass(frozen=True)
class Results:
    """What a folder has of one tower: the newest line of each row."""

    folder: str
    lines: Mapping[int, Line]

    @classmethod
    def read(cls, folder: str, fingerprint: str | None = None) -> "Results":
        """Those of a tower, by default of the tower that was judged last.

        Raises:
          UserError: if there are none, or as `suite_results.read_lines`.
        """
        lines = results.newest(results.read_lines(folder), fingerprint)
        if not lines:
            raise UserError(
                f"{folder} has no {results.RESULTS_FILE} of `vit22b suite`; name the "
                "--out of one."
            )
        return cls(folder, lines)

    @property
    def tower(self) -> Mapping[str, str]:
        """Name and fingerprint."""
        return next(iter(self.lines.values())).tower


def write(folder: str, towers: Sequence[Results]) -> str:
    """Writes the page of one tower or several; its path."""
    path = os.path.join(folder, PAGE_FILE)
    with whole_files.replacing(path) as file:
        file.write(html(towers))
    return path


def html(towers: Sequence[Results]) -> str:
    """The page."""
    entries = beside.entries([tower.lines for tower in towers])
    rows = {entry.row.number: entry.row for entry in entries}
    title = "ViT-22B's experiments on " + ", ".join(_name(t) for t in towers)
    return page(
        title,
        tag("h1", title),
        _towers(towers),
        tag("div", _table(entries, towers), class_="scroll"),
        tag(
            "p",
            "Intervals are of 95 %, over the test images. A dashed tick is ViT-22B's "
            "number; one with a ? is from memory, not confirmed against the paper.",
            class_="soft small",
        ),
        *(_section(row, towers) for row in rows.values()),
    )


def _name(tower: Results) -> str:
    """A tower's name without the folders before it."""
    return tower.tower.get("name", "").rstrip("/").rpartition("/")[2] or "a tower"


def _towers(towers: Sequence[Results]) -> Markup:
    """What is judged: a line for each tower."""
    lines = []
    for number, tower in enumerate(towers):
        done = sum(line.status == results.DONE for line in tower.lines.values())
        seconds = sum(line.seconds for line in tower.lines.values())
        color = f"f{number % svg_charts.COLORS}"
        dot = tag(
            "svg",
            tag("circle", cx=5, cy=5, r=5, class_=color),
            viewBox="0 0 10 10",
            width=10,
            height=10,
            style="display:inline",
            aria_hidden="true",
        )
        said = (
            f" {tower.tower.get('name', '')}: weights "
            f"{tower.tower.get('fingerprint', '')}, {done} of "
            f"{len(tower.lines)} rows done, {seconds:,.0f} s"
        )
        lines.append(tag("li", dot, said))
    return tag("ul", *lines, class_="small", style="list-style:none;padding:0")


def _table(entries: Sequence[beside.Entry], towers: Sequence[Results]) -> Markup:
    several = len(towers) > 1
    head = [tag("th", "row", scope="col"), tag("th", "experiment", scope="col")]
    for number, tower in enumerate(towers):
        name = f"{number + 1}: {_name(tower)}" if several else "ours"
        head.append(tag("th", name, class_="number", scope="col"))
        if not several:
            head.append(tag("th", "95 %", class_="number wide", scope="col"))
    head += [
        tag("th", "interval", scope="col"),
        tag("th", "ViT-22B", class_="number", scope="col"),
    ]
    body = [tag("tr", *_cells(entry, towers)) for entry in entries]
    return tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))


def _cells(entry: beside.Entry, towers: Sequence[Results]) -> list[Markup]:
    number = entry.row.number
    link = tag("a", number, href=f"#row-{number}") if entry.first else ""
    cells = [tag("td", link), tag("td", entry.whole_title)]
    least, most = beside.scale(entry)
    drawn = []
    for place, (one, tower) in enumerate(zip(entry.numbers, towers, strict=True)):
        if one is None:
            state = beside.state(tower.lines.get(number), entry.name)
            how = "bad" if state == "failed" else "soft"
            cells.append(tag("td", state, class_=f"number {how}"))
        else:
            shown = f"{beside.shown(one)} {one.unit}".strip()
            cells.append(tag("td", shown, class_="number"))
            drawn.append(
                svg_charts.interval(
                    one.value,
                    one.low,
                    one.high,
                    entry.paper,
                    least=least,
                    most=most,
                    color=place % svg_charts.COLORS,
                )
            )
        if len(towers) == 1:
            span = "" if one is None else beside.interval(one)
            if one is not None and beside.few(one):
                span += f", of {one.count}"
            cells.append(tag("td", span, class_="number wide soft"))
    cells.append(tag("td", *drawn))
    cells.append(tag("td", beside.paper(entry), class_="number"))
    return cells


def _section(row, towers: Sequence[Results]) -> Markup:
    """What a row rests on: charts, pictures, and folded the protocol of each tower."""
    heading = f"{row.number}. {row.name}" + (f", {row.data}" if row.data else "")
    parts: list[Markup] = [tag("h2", heading)]
    there = [(t, t.lines[row.number]) for t in towers if row.number in t.lines]
    several = len(towers) > 1
    for tower, line in there:
        if line.reason:
            whose = f"{_name(tower)}: " if several else ""
            word = {"failed": "Failed", "done": "Without"}.get(line.status, "Not run")
            how = "bad" if line.status == results.FAILED else "soft"
            parts.append(tag("p", f"{whose}{word}: {line.reason}", class_=how))
    figures = [svg_charts.chart(chart) for chart in _charts(there, several)]
    left = 0
    for tower, line in there:
        for number, one in enumerate(line.pictures):
            if number >= MOST_PICTURES:
                left += 1
                continue
            title = f"{_name(tower)}: {one.title}" if several else one.title
            path = os.path.join(tower.folder, one.file)
            try:
                figures.append(picture(path, title, within=tower.folder))
            except UserError as error:
                figures.append(tag("p", str(error), class_="bad small"))
    if figures:
        parts.append(tag("div", *figures, class_="figures"))
    if left:
        parts.append(tag("p", f"{left} more pictures are not shown.", class_="soft"))
    for tower, line in there:
        if line.status != results.SKIPPED:
            parts.append(_protocol(line, _name(tower) if several else ""))
    return tag("section", *parts, id=f"row-{row.number}")


def _charts(there: Sequence[tuple[Results, Line]], several: bool) -> list[Chart]:
    """Charts of all towers; those of one title in one, a curve for each tower."""
    if not several:
        return [chart for _, line in there for chart in line.charts]
    by_title: dict[tuple[str, bool], list[tuple[str, Chart]]] = {}
    for place, (tower, line) in enumerate(there, 1):
        for chart in line.charts:
            # Bars of several towers stand one below the other.
            key = ((f"{_name(tower)}: {chart.title}" if chart.bars else chart.title),)
            named = by_title.setdefault((*key, chart.bars), [])
            named.append((f"{place}: {_name(tower)}", chart))
    found = []
    for (title, _), charts in by_title.items():
        curves = []
        for name, chart in charts:
            for curve in chart.curves:
                own = f"{name}, {curve.name}" if len(chart.curves) > 1 else name
                curves.append(dataclasses.replace(curve, name=own))
        found.append(dataclasses.replace(charts[0][1], title=title, curves=curves))
    return found


def _protocol(line: Line, tower: str) -> Markup:
    """Folded: commands, every value, data, and what was counted."""
    parts: list[Markup] = []
    for command in line.commands:
        parts.append(tag("pre", command))
    for name, values in line.protocol.items():
        rows = [
            tag("tr", tag("td", tag("code", key)), tag("td", tag("code", value)))
            for key, value in values.items()
        ]
        parts += [tag("p", name), tag("table", tag("tbody", *rows))]
    if line.notes:
        rows = [
            tag("tr", tag("td", key), tag("td", value))
            for key, value in line.notes.items()
        ]
        parts += [tag("p", "Counted:"), tag("table", tag("tbody", *rows))]
    data = ", ".join(f"{name} {digest}" for name, digest in line.data.items())
    parts.append(tag("p", f"Data: {data}. {line.seconds:,.1f} s. Key {line.key}."))
    title = f"Protocol of {tower}" if tower else "Protocol, data, counts"
    return tag("details", tag("summary", title), joined(*parts), class_="small")
