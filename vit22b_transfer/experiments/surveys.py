"""What lies in a folder of data sets in standard layouts, found by names.

No image is decoded: files are counted by the ends of their names, and a layout is told
from another content by their names, sizes and modification times. What its lists and
tables say is then compared with that (`layout_checks`). A folder may come from a
stranger: no link is followed that leads out of it or to another folder, no more than so
many files are looked at, and what is odd is counted.
"""

import dataclasses
import difflib
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence

from vit22b_transfer import UserError
from vit22b_transfer.experiments import layout_checks
from vit22b_transfer.experiments.layouts import (
    CLASSES,
    FILE,
    FILES,
    LAYOUTS,
    Found,
    Layout,
    Part,
)
from vit22b_transfer.host import file_errors

# What is looked at of one part of a layout, at most.
MOST_FILES, MOST_DEPTH = 20_000_000, 12
# Names the folder for `tasks.suite`.
VARIABLE = "VIT22B_SUITE_DATA"
# Data sets in `few_shot` and the like.
MOST_SETS = 200
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SHOWN = 3
# Files of a desktop, which are none of a data set.
_OF_SYSTEMS = ("._", ".DS_Store", "Thumbs.db", "desktop.ini")


@dataclasses.dataclass(frozen=True)
class Survey:
    """All that was found in a folder.

    found: by name, such as "imagenet" or "few_shot/pets". refused: why a layout that is
    there in part or is not safe is not used, by name. unknown: what else lies there.
    """

    folder: str
    found: Mapping[str, Found]
    refused: Mapping[str, str]
    unknown: Sequence[str]

    def named(self, name: str) -> list[Found]:
        """The layouts of that name; of "few_shot/*" all in that folder."""
        if not name.endswith("/*"):
            return [self.found[name]] if name in self.found else []
        return [one for key, one in self.found.items() if key.startswith(name[:-1])]

    def why_not(self, name: str) -> str:
        """Why there is no layout of that name, in words."""
        start = name.removesuffix("*")
        for key, reason in self.refused.items():
            if key == name or key.startswith(start):
                return f"{key}: {reason}"
        layout = LAYOUTS[start.rstrip("/")]
        if layout.place:
            return f"no {layout.place}/ in the folder"
        return f"no {layout.parts[0].paths[0]}{_slash(layout.parts[0])} in the folder"


def survey(folder: str) -> Survey:
    """What lies in a folder.

    Raises:
      UserError: if it is no folder, cannot be listed, or its path holds a "$", which
        tasks take for a variable.
    """
    root = os.path.realpath(os.path.expanduser(folder))
    if not os.path.isdir(root):
        raise UserError(f"{folder} is not a directory; a folder of data sets is meant.")
    if "$" in root:
        raise UserError(f"{root} holds a $, which stands for a variable. Rename it.")
    try:
        entries = sorted(os.listdir(root))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}.") from error
    found: dict[str, Found] = {}
    refused, known = {}, set()
    for layout in LAYOUTS.values():
        if layout.place:
            known.add(layout.place.split("/")[0])
        else:
            known |= {path for part in layout.parts for path in part.paths}
            known.add(layout.inside)
        for name, place in _places(layout, root, refused):
            one = _looked_at(layout, name, place, root)
            if isinstance(one, Found):
                one = layout_checks.checked(one, found.get("imagenet"))
            if isinstance(one, Found):
                found[name] = one
            elif one:
                refused[name] = one
    unknown = [name for name in entries if name not in known and not _of_system(name)]
    _made[root] = Survey(root, found, refused, unknown)
    return _made[root]


# The last survey of each folder.
_made: dict[str, Survey] = {}


def made_survey(folder: str) -> Survey:
    """The last survey of a folder that this process made, or one made now."""
    found = _made.get(os.path.realpath(os.path.expanduser(folder)))
    return survey(folder) if found is None else found


def told(survey: Survey) -> Iterator[str]:
    """Lines that say what was found, refused and not known."""
    for one in survey.found.values():
        parts = [f"{count:,} {_unit(one, part)}" for part, count in one.counts.items()]
        yield f"{one.name}: {', '.join(parts)}"
        for note, count in one.notes.items():
            yield f"  {count:,} {note}"
    for name, reason in survey.refused.items():
        yield f"{name}: not used: {reason}"
    for name in survey.unknown[:_SHOWN]:
        near = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.6)
        hint = f"; is {near[0]} meant?" if near else ""
        yield f"{file_errors.brief(name, 80)}: no known layout{hint}"
    if (more := len(survey.unknown) - _SHOWN) > 0:
        yield f"{more:,} others are no known layouts"


def _unit(one: Found, part: str) -> str:
    kinds = {p.name: p.kind for p in LAYOUTS[one.kind].parts}
    return f"{'files' if kinds[part] == FILES else 'images'} of {part}"


def _places(
    layout: Layout, root: str, refused: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """(name, path) of each folder that may be of the layout."""
    place = os.path.join(root, layout.place) if layout.place else root
    if layout.inside:
        other = os.path.join(root, layout.inside)
        parts = [path for part in layout.parts for path in part.paths]
        first, second = (
            [path for path in parts if os.path.lexists(os.path.join(one, path))]
            for one in (place, other)
        )
        if first and second:
            refused[layout.name] = (
                f"{first[0]} and {layout.inside}/{second[0]} are both there; which is "
                "meant? Leave it in one of the two places"
            )
            return
        # A folder of its own name without any of its parts lacks them.
        own = layout.inside == layout.name and os.path.lexists(other)
        place = other if second or (own and not first) else place
    if not layout.several:
        yield layout.name, place
        return
    if not os.path.isdir(place):
        return
    if os.path.islink(place):
        refused[layout.name] = "it is a link; copy or move the folder itself here"
        return
    names = sorted(name for name in os.listdir(place) if not _of_system(name))
    if len(names) > MOST_SETS:
        refused[layout.name] = f"{len(names):,} entries, of at most {MOST_SETS} sets"
        return
    for name in names:
        shown = file_errors.brief(name, 80)
        if not os.path.isdir(os.path.join(place, name)):
            refused[f"{layout.name}/{shown}"] = "it is no folder of a data set"
        elif not _SET_NAME.fullmatch(name):
            refused[f"{layout.name}/{shown}"] = (
                "names of data sets are of letters, digits, _, . and -, at most 64"
            )
        else:
            yield f"{layout.name}/{name}", os.path.join(place, name)


def _looked_at(layout: Layout, name: str, place: str, root: str) -> Found | str:
    """What is there of a layout; "" if nothing is, else why it is not used."""
    own = place != root
    if own and not os.path.isdir(place):
        shown = os.path.relpath(place, root)
        return f"{shown} is no folder" if os.path.lexists(place) else ""
    if own and os.path.islink(place):
        return "it is a link; copy or move the folder itself here"
    paths, missing = {}, []
    for part in layout.parts:
        there = [p for p in part.paths if os.path.lexists(os.path.join(place, p))]
        if len(there) > 1:
            return f"{' and '.join(there)} are both there; which is meant?"
        if there:
            paths[part.name] = os.path.normpath(os.path.join(place, there[0]))
        elif not part.optional:
            missing.append(f"{part.paths[0]}{_slash(part)}")
    if missing and (own or paths):
        return f"{', '.join(missing)} missing"
    if missing:
        return ""
    walk, counts, classes = _Walk(root, place), {}, {}
    for part in layout.parts:
        if part.name not in paths:
            continue
        if problem := walk.take(part, paths[part.name]):
            return problem
        if part.kind != FILE:
            counts[part.name] = walk.count
            classes[part.name] = tuple(walk.classes)
            if not walk.count:
                return f"no image in {os.path.relpath(paths[part.name], root)}"
    digest = walk.digest.hexdigest()[:16]
    return Found(name, place, paths, counts, digest, walk.notes, classes)


def _slash(part: Part) -> str:
    return "" if part.kind == FILE else "/"


def _of_system(name: str) -> bool:
    return name.startswith(_OF_SYSTEMS)


class _Walk:
    """Looks at all files of a layout. count, classes: of the last part."""

    def __init__(self, root: str, place: str):
        self.digest = hashlib.sha256()
        self.notes: dict[str, int] = {}
        self.count, self.classes = 0, []
        self._root, self._place, self._files = root, place, 0

    def take(self, part: Part, path: str) -> str:
        """Adds a part to the digest; why it is not used, or ""."""
        self.count, self.classes = 0, []
        self.digest.update(f"{part.name}\0".encode())
        mode = os.lstat(path).st_mode
        if part.kind == FILE:
            if not stat.S_ISREG(mode):
                return f"{self._shown(path)} is no plain file"
            with open(path, "rb") as file:
                self.digest.update(hashlib.file_digest(file, "sha256").digest())
            return ""
        if not stat.S_ISDIR(mode):
            return f"{self._shown(path)} is no folder (links are not followed)"
        return self._folder(part, path, 0)

    def _folder(self, part: Part, folder: str, depth: int) -> str:
        if depth > MOST_DEPTH:
            return f"{self._shown(folder)}: folders lie deeper than {MOST_DEPTH}"
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            return f"{self._shown(folder)} cannot be listed: {error.strerror}"
        for entry in entries:
            self._files += 1
            if self._files > MOST_FILES:
                return f"more than {MOST_FILES:,} files"
            if _of_system(entry.name):
                self._note("files of a desktop system, left out")
            elif entry.is_dir(follow_symlinks=False):
                before = self.count
                if problem := self._folder(part, entry.path, depth + 1):
                    return problem
                if part.kind == CLASSES and not depth and self.count > before:
                    self.classes.append(entry.name)
            elif problem := self._file(part, entry, depth):
                return problem
        return ""

    def _file(self, part: Part, entry: os.DirEntry, depth: int) -> str:
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            target = os.path.realpath(entry.path)
            if os.path.commonpath([target, self._root]) != self._root:
                return f"{self._shown(entry.path)} is a link that leads out of it"
            if not os.path.isfile(target):
                return f"{self._shown(entry.path)} is a link to no plain file"
            status = os.stat(target)
        if not stat.S_ISREG(status.st_mode):
            return f"{self._shown(entry.path)} is no plain file"
        if part.kind != FILES and not entry.name.lower().endswith(_image_suffixes()):
            self._note("files that are no images by their names, left out")
            return ""
        if part.kind == CLASSES and not depth:
            self._note("images beside the folders of classes, left out")
            return ""
        name = entry.path.removeprefix(self._place)
        facts = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"
        self.digest.update(os.fsencode(facts))
        self.count += 1
        return ""

    def _note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1

    def _shown(self, path: str) -> str:
        return file_errors.brief(os.path.relpath(path, self._root), 120)


def _image_suffixes() -> tuple[str, ...]:
    from vit22b_transfer.data.sources import IMAGE_SUFFIXES

    return IMAGE_SUFFIXES
