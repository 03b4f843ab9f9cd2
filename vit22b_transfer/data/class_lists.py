"""Lists of classes and the hierarchy over them, as text files.

A class list has one name per line; the class of line n has the id n - 1. A hierarchy
has one `child,parent` per line, all of them names of the list; a class may have several
parents. What an image is labelled with then has its ancestors as labels, too, as in the
flattened hierarchy of JFT.
"""

import dataclasses
import difflib
import functools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import seqio

from vit22b_transfer import UserError
from vit22b_transfer.data import text_files
from vit22b_transfer.data.records import PathLike, printable, resolve_path

_HEADER = ["child", "parent"]


class ClassIds(seqio.PassThroughVocabulary):
    """The vocabulary of a feature of class ids: they stand for themselves.

    SeqIO wants one of every vector of numbers, and decodes with it what a model
    predicts, which may be one id. How many classes there are, the model knows.
    """

    def __init__(self):
        super().__init__(size=0)

    def decode(self, ids):
        """`ids`, one or several."""
        return ids

    def decode_tf(self, ids):
        """`ids`, one or several."""
        return ids


@dataclasses.dataclass(frozen=True)
class Classes:
    """Names by id, and of each id those of its parents in the hierarchy."""

    names: tuple[str, ...]
    parents: Mapping[int, frozenset[int]]

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Id by name, accents in one form (NFC)."""
        return {_form(name): number for number, name in enumerate(self.names)}

    def id_of(self, name: str) -> int | None:
        """The id of a class; None if there is no such class."""
        return self.ids.get(_form(name))

    def nearest(self, name: str) -> str:
        """The names nearest to an unknown one, in words."""
        near = difflib.get_close_matches(name[:200], self.names, n=3, cutoff=0.4)
        return f"nearest: {', '.join(map(repr, near))}" if near else "none is near"

    def with_ancestors(self, ids: Iterable[int]) -> tuple[int, ...]:
        """The ids and those of all their ancestors, each once, ascending."""
        every = set(ids)
        todo = list(every)
        while todo:
            above = self.parents.get(todo.pop(), frozenset()) - every
            every |= above
            todo += above
        return tuple(sorted(every))


def names(path: PathLike) -> tuple[str, ...]:
    """The names of a class list, by id. `path` may hold `~` and `$VARIABLES`.

    Raises:
      UserError: if the file cannot be read, or has a name twice or fewer than two.
    """
    path = resolve_path(path)
    found: dict[str, int] = {}
    listed = []
    for number, line in text_files.lines(path):
        name = line.strip()
        first = found.setdefault(_form(name), number)
        if first != number:
            raise UserError(
                f"{path}, line {number}: class {printable(name)[:200]!r} stands in "
                f"line {first} already; a class has one id."
            )
        listed.append(name)
    if len(listed) < 2:
        raise UserError(
            f"{path} lists one class, {printable(listed[0])[:200]!r}: there is nothing "
            "to tell apart. List all classes, one name per line."
        )
    return tuple(listed)


def read(path: PathLike, hierarchy: PathLike | None = None) -> Classes:
    """A class list, and the hierarchy over it if there is one.

    Raises:
      UserError: as `names`; or if a line of the hierarchy is no pair of the list's
        names, or a class is its own ancestor.
    """
    listed = names(path)
    if hierarchy is None:
        return Classes(listed, {})
    hierarchy = resolve_path(hierarchy)
    parents = _parents(hierarchy, Classes(listed, {}))
    _check_acyclic(parents, listed, hierarchy)
    return Classes(listed, {child: frozenset(some) for child, some in parents.items()})


def _parents(path, classes) -> dict[int, set[int]]:
    parents: dict[int, set[int]] = {}
    for count, (number, row) in enumerate(text_files.csv_rows(path)):
        row = [cell.strip() for cell in row]
        if count == 0 and row == _HEADER and classes.id_of(_HEADER[0]) is None:
            continue
        if len(row) != 2:
            raise UserError(
                f"{path}, line {number}: {len(row)} columns; a line is child,parent "
                "(a name with a comma is quoted)."
            )
        pair = []
        for name in row:
            found = classes.id_of(name)
            if found is None:
                raise UserError(
                    f"{path}, line {number}: there is no class "
                    f"{printable(name)[:200]!r} in the class list; "
                    f"{classes.nearest(name)}. Every class of the hierarchy needs an "
                    "id: list it."
                )
            pair.append(found)
        parents.setdefault(pair[0], set()).add(pair[1])
    return parents


def _check_acyclic(
    parents: Mapping[int, set[int]], listed: Sequence[str], path: object
) -> None:
    """Raises UserError naming a circle. Not recursive: a chain may be long."""
    done: set[int] = set()
    for start in parents:
        chain = [(start, iter(sorted(parents[start])))]
        on_chain = {start}
        while chain:
            child, left = chain[-1]
            parent = next((one for one in left if one not in done), None)
            if parent is None:
                done.add(child)
                on_chain.discard(child)
                chain.pop()
            elif parent in on_chain:
                circle = [number for number, _ in chain]
                circle = [*circle[circle.index(parent) :], parent]
                shown = " -> ".join(printable(listed[n])[:60] for n in circle[:6])
                more = " -> ..." if len(circle) > 6 else ""
                raise UserError(
                    f"{path}: the hierarchy runs in a circle: {shown}{more}. A class "
                    "cannot be its own ancestor: remove one of these lines."
                )
            else:
                chain.append((parent, iter(sorted(parents.get(parent, ())))))
                on_chain.add(parent)


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)
