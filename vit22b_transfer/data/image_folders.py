"""Folders of images: a file is found by its name, and all files are listed once."""

import logging
import os
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence

from vit22b_transfer.data.records import MissingFilesError, printable

# Files that macOS puts beside others where it cannot store what it knows of them; such
# as `._photo.jpg`, which is no image.
_BESIDE_OTHERS = "._"
_SHOWN, _SHOWN_LENGTH = 3, 80


class ImageFolder:
    """The files of a directory tree, listed once per directory.

    paths_outside: whether file names may lead out of it, by `..` or from the root.
    """

    def __init__(self, root: pathlib.Path, *, paths_outside: bool = False):
        if not root.is_dir():
            raise MissingFilesError(
                f"{root} is not a directory; an image folder is expected."
            )
        self.root = root
        self._paths_outside = paths_outside
        self._names: dict[str, set[str]] = {}
        self._forms: dict[str, dict[str, list[str]]] = {}

    def find(self, file_name: str) -> tuple[str | None, str]:
        """(path, "") of a file given relative to the root, or (None, the problem).

        A name that is there in the other Unicode form alone is found: systems write an
        accent as a part of its letter (NFC) or behind it (NFD).
        """
        if "\0" in file_name:
            return None, "file name with a NUL character"
        inside = os.path.normpath(file_name)
        leaves = os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir
        if leaves and not self._paths_outside:
            return None, "file name that leaves the image folder (see paths_outside)"
        if not file_name.strip():
            return None, "missing image file"
        whole = os.path.join(self.root, inside)
        directory, name = os.path.split(whole)
        if name in self._names_in(directory):
            return whole, ""
        if whole.isascii():
            return None, "missing image file"
        return self._in_another_form(inside)

    def _names_in(self, directory: str) -> set[str]:
        if directory not in self._names:
            try:
                self._names[directory] = set(os.listdir(directory))
            except OSError:
                self._names[directory] = set()
        return self._names[directory]

    def _in_another_form(self, inside: str) -> tuple[str | None, str]:
        """As `find`, folder by folder."""
        path = str(self.root)
        for name in inside.split(os.sep):
            names = self._names_in(path)
            if name not in names and name not in ("", os.pardir):
                if path not in self._forms:
                    self._forms[path] = {}
                    for there in names:
                        form = unicodedata.normalize("NFC", there)
                        self._forms[path].setdefault(form, []).append(there)
                found = self._forms[path].get(unicodedata.normalize("NFC", name), [])
                if len(found) > 1:
                    return None, "file name in none of the Unicode forms of several"
                if not found:
                    return None, "missing image file"
                name = found[0]
            path = os.path.join(path, name or os.sep)
        return path, ""

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """(directory, its files) of the tree; links are followed, each folder once.

        What macOS puts beside files is left out, counted and logged; so is a folder
        that cannot be listed.
        """
        seen, beside, unread = set(), 0, []
        tree = os.walk(self.root, followlinks=True, onerror=unread.append)
        for directory, folders, names in tree:
            status = os.stat(directory)
            identity = status.st_dev, status.st_ino
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            usual = [name for name in names if not name.startswith(_BESIDE_OTHERS)]
            beside += len(names) - len(usual)
            yield directory, usual
        log = logging.getLogger(__name__)
        if beside:
            log.warning(
                "%s: %d files are no images but what macOS puts beside others (%s...), "
                "and are left out",
                self.root,
                beside,
                _BESIDE_OTHERS,
            )
        for error in unread:
            log.warning("%s: a folder is left out: %r", self.root, error)


def tell_others(
    root: pathlib.Path, suffixes: Sequence[str], others: Sequence[str]
) -> None:
    """Logs how many files are no images by their names, if there are any, and which.

    others: their paths.
    """
    if others:
        paths = sorted(os.path.relpath(path, root) for path in others)[:_SHOWN]
        shown = ", ".join(printable(path)[-_SHOWN_LENGTH:] for path in paths)
        logging.getLogger(__name__).warning(
            "%s: %d files do not end in %s and are left out: %s%s",
            root,
            len(others),
            ", ".join(suffixes),
            shown,
            ", ..." if len(others) > _SHOWN else "",
        )
