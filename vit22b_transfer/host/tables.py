"""Tables on a terminal, in which every name stays whole.

Where the columns do not fit beside each other they become several tables.
"""

from collections.abc import Iterator, Mapping, Sequence

import rich.cells
import rich.console
import rich.table
import rich.text

# Of a column, beside its cells: a blank on either side, and a line.
_FRAME = 3


def print_table(
    console: rich.console.Console,
    names: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    *,
    heading: str = "",
    title: str = "",
    section: int | None = None,
) -> None:
    """Prints the rows `names` with the cells of `columns`, in as many tables as needed.

    heading: above the names. section: the number of the row before which a line stands.
    A heading of a column is broken between words alone; one that fits nowhere stands
    above its table. Nothing is taken for markup.
    """
    first = max(map(_width, [heading, *names]))
    for group, above in _groups(columns, console.width - first - _FRAME - 1):
        if above:
            console.print(above, markup=False, highlight=False, soft_wrap=True)
        table = rich.table.Table(title=rich.text.Text(title) if title else None)
        widths = [_wanted(name, columns[name], above) for name in group]
        if _total(widths) + first + _FRAME + 1 > console.width:
            widths = [_needed(name, columns[name], above) for name in group]
        room = console.width - _total(widths) - _FRAME - 1
        table.add_column(
            rich.text.Text(heading), width=max(1, min(first, room)), overflow="fold"
        )
        for name, width in zip(group, widths, strict=True):
            shown = "" if above else name
            table.add_column(
                rich.text.Text(shown), width=width, overflow="fold", justify="right"
            )
        for number, name in enumerate(names):
            if number == section:
                table.add_section()
            cells = [name, *(columns[column][number] for column in group)]
            table.add_row(*map(rich.text.Text, cells))
        console.print(table)


def _groups(
    columns: Mapping[str, Sequence[str]], room: int
) -> Iterator[tuple[list[str], str]]:
    """Names of columns that fit beside each other, and a heading that does not fit."""
    group = []
    for name, cells in columns.items():
        widths = [_needed(n, columns[n]) for n in [*group, name]]
        if group and _total(widths) > room:
            yield group, ""
            group = []
        if _total([_needed(name, cells)]) > room:
            yield [name], name
        else:
            group.append(name)
    if group:
        yield group, ""


def _wanted(name: str, cells: Sequence[str], above: str = "") -> int:
    return max(map(_width, ["" if above else name, *cells]))


def _needed(name: str, cells: Sequence[str], above: str = "") -> int:
    words = [] if above else name.split()
    return max(map(_width, ["", *words, *cells]))


def _width(text: str) -> int:
    return rich.cells.cell_len(text)


def _total(widths: Sequence[int]) -> int:
    return sum(width + _FRAME for width in widths)
