"""Folders of images, and of files that say something of each of their pixels.

    DATA/images/training/a.jpg        DATA/images/validation/b.jpg
    DATA/annotations/training/a.png   DATA/annotations/validation/b.png

Of depths the second folder is `depths`. A label file has the path of its image inside
the split's folder, with `.png` as its end. What is bad (an image or a label without the
other, a file that cannot be read, sizes that differ, a label out of range) is an error
that names it, or with `on_bad_record="skip"` left out, counted and logged: all files
are read once before any work is done.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.data import class_lists, image_folders, images, pixel_labels
from vit22b_transfer.data.records import (
    BadRecords,
    MissingFilesError,
    PathLike,
    printable,
    resolve_path,
    skipping_advice,
)
from vit22b_transfer.host import progress

NO_CLASS = -1
IMAGES, MASKS, DEPTHS = "images", "annotations", "depths"
CLASSES = "classes.txt"
# Files that are read at a time while all are looked at.
_READERS = 4


class BadPairError(UserError):
    """An image and its label that are of no use together; `reason` is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """The files of an image and its labels; `name` is its path in the split."""

    name: str
    image: str
    label: str


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The good pairs of a split, in the order of their names, and what was left out.

    classes: of masks those that occur in each pair; of depths none.
    """

    pairs: Sequence[Pair]
    left_out: Mapping[str, int]
    classes: Sequence[frozenset[int]] = ()

    @property
    def seen(self) -> frozenset[int]:
        """The classes that occur in any of the pairs."""
        return frozenset().union(*self.classes)

    def part(self, fraction: float, seed: int) -> "Pairs":
        """A random share of the pairs, at least one; smaller shares are parts of it.

        Raises:
          UserError: for a fraction that is not above 0 and at most 1.
        """
        if not 0 < fraction <= 1:
            raise UserError(f"fraction={fraction} must be above 0 and at most 1.")
        if fraction == 1:
            return self
        order = np.random.default_rng(seed).permutation(len(self.pairs))
        chosen = np.sort(order[: max(1, round(fraction * len(order)))])
        return dataclasses.replace(
            self,
            pairs=[self.pairs[n] for n in chosen],
            classes=[self.classes[n] for n in chosen] if self.classes else (),
        )


@dataclasses.dataclass(frozen=True)
class SegmentationFolder:
    """Images and index masks of classes.

    root: the folder; may hold `~` and `$VARIABLES`. Its `classes.txt` has the name of a
      class in each line, by id; without that file `num_classes` is needed.
    train, test: names of the splits' folders.
    zero_is_ignored: 0 is no class, and 1 the first one (ADE20k).
    ignored: another number of a mask that is no class; None: there is none.
    """

    root: PathLike
    num_classes: int | None = None
    zero_is_ignored: bool = False
    ignored: int | None = 255
    train: str = "training"
    test: str = "validation"
    on_bad_record: str = "error"

    def class_names(self) -> tuple[str, ...]:
        """Names by id: those of the list, else numbers.

        Raises:
          UserError: if there is neither list nor number, or they differ.
        """
        path = resolve_path(self.root) / CLASSES
        if path.is_file():
            names = class_lists.names(path)
            if self.num_classes not in (None, len(names)):
                raise UserError(
                    f"{path} has {len(names)} names, but num_classes is "
                    f"{self.num_classes}. Leave num_classes out, or mend the list."
                )
            return names
        if self.num_classes is None or self.num_classes < 2:
            raise UserError(
                f"{path} is not there, so that the number of classes is not known. "
                "Write that file, a name in each line, or set num_classes (2 or more)."
            )
        return tuple(map(str, range(self.num_classes)))

    @functools.cached_property
    def _count(self) -> int:
        return len(self.class_names())

    def pairs(self, split: str) -> Pairs:
        """The pairs of a split, all of them read once.

        Raises:
          UserError: for a folder that is not there or empty, or what is bad.
        """
        self.class_names()
        return _checked(self, split, MASKS)

    def read(
        self, pair: Pair
    ) -> tuple[UInt8[np.ndarray, "rows columns 3"], Int[np.ndarray, "rows columns"]]:
        """An image and the class of each pixel, int32; `NO_CLASS` where there is none.

        Raises:
          BadPairError: saying what is wrong with it.
        """
        image, found = _read(pair, pixel_labels.read_indices)
        none = np.zeros(found.shape, bool)
        if self.ignored is not None:
            none |= found == self.ignored
        if self.zero_is_ignored:
            none |= found == 0
            found = found - 1
        count = self._count
        wrong = ~none & (found >= count)
        if wrong.any():
            first = int(self.zero_is_ignored)
            value = int(found[wrong][0]) + first
            raise BadPairError(
                "label out of range",
                f"{printable(pair.label)}: {value}; the classes are {first} to "
                f"{count - 1 + first}, ignored is {self.ignored}, zero_is_ignored is "
                f"{self.zero_is_ignored}",
            )
        return image, np.where(none, NO_CLASS, found).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class DepthFolder:
    """Images and depth maps: grey PNG of 16 bits, 0 where no depth is known.

    units_per_metre: 1000 of millimetres, 256 of KITTI. The others as in
      `SegmentationFolder`.
    """

    root: PathLike
    units_per_metre: float
    train: str = "training"
    test: str = "validation"
    on_bad_record: str = "error"

    def __post_init__(self):
        if not 0 < self.units_per_metre < float("inf"):
            raise UserError(
                f"units_per_metre={self.units_per_metre} must be above 0: 1000 where "
                "depths are in millimetres, 256 in KITTI's files."
            )

    def pairs(self, split: str) -> Pairs:
        """As `SegmentationFolder.pairs`."""
        return _checked(self, split, DEPTHS)

    def read(
        self, pair: Pair
    ) -> tuple[UInt8[np.ndarray, "rows columns 3"], Float[np.ndarray, "rows columns"]]:
        """An image and metres of each pixel, float32; 0 where none is known.

        Raises:
          BadPairError: saying what is wrong with it.
        """
        return _read(
            pair, lambda path: pixel_labels.read_depths(path, self.units_per_metre)
        )


def _checked(folder: Any, split: str, labels: str) -> Pairs:
    root = resolve_path(folder.root)
    advice = skipping_advice(type(folder).__name__)
    bad = BadRecords(folder.on_bad_record, f"{root}, split {printable(split)}", advice)
    listed = _listed(root, split, labels, bad)
    good, classes = [], []
    label = f"{printable(split)}: files looked at"
    with (
        concurrent.futures.ThreadPoolExecutor(_READERS) as pool,
        progress.Progress(progress.console(), label, total=len(listed)) as bar,
    ):
        looks = pool.map(lambda pair: _look(folder, pair), listed)
        for pair, found in zip(listed, looks, strict=True):
            if isinstance(found, BadPairError):
                bad.add(found.reason, found.detail)
            else:
                good.append(pair)
                classes.append(found)
            bar.add(1)
    bad.log()
    if not good:
        left_out = bad.tally.summary()
        raise UserError(
            f"{root}: split {printable(split)!r} has no image with labels"
            + (f"; left out: {left_out}." if left_out else ".")
        )
    return Pairs(good, bad.tally.counts(), classes)


def _look(folder, pair):
    """Classes that occur in a mask (none in depths), or what is wrong with the pair."""
    try:
        _, found = folder.read(pair)
    except BadPairError as error:
        return error
    if found.dtype != np.int32:
        return frozenset()
    return frozenset(int(n) for n in np.unique(found) if n != NO_CLASS)


def _read(pair, read_label):
    try:
        image = images.read_whole(pair.image)
    except UserError as error:
        raise BadPairError("image that cannot be read", str(error)) from error
    try:
        found = read_label(pair.label)
    except UserError as error:
        raise BadPairError("label that cannot be read", str(error)) from error
    if image.shape[:2] != found.shape:
        (rows, columns), (high, wide) = image.shape[:2], found.shape
        raise BadPairError(
            "label of another size",
            f"{printable(pair.label)} is {wide}x{high}, its image {columns}x{rows}",
        )
    return image, found


def _listed(root: pathlib.Path, split: str, labels: str, bad: BadRecords) -> list[Pair]:
    """The pairs of a split by their names, without a look into the files."""
    if not split or split != os.path.basename(split) or split in (".", ".."):
        raise UserError(f"split {split!r} is no name of a folder in {root / IMAGES}.")
    places = [root / kind / split for kind in (IMAGES, labels)]
    for place in places:
        if not place.is_dir():
            raise MissingFilesError(
                f"{place} is not a directory. The data is laid out as "
                f"{IMAGES}/{split}/NAME.jpg and {labels}/{split}/NAME.png in {root}."
            )
    found, of_labels = (
        _files(place, suffixes, bad)
        for place, suffixes in zip(
            places, (tuple(images.IMAGE_FORMATS), (".png",)), strict=True
        )
    )
    twice = {
        stem
        for stem, count in collections.Counter(stem for stem, _ in found).items()
        if count > 1
    }
    by_stem = dict(of_labels)
    pairs = []
    for stem, path in found:
        if stem in twice:
            bad.add("several images of one name", f"{path}")
        elif stem not in by_stem:
            bad.add(
                "image without a label",
                f"{path}: there is no {labels}/{split}/{stem}.png",
            )
        else:
            pairs.append(Pair(stem, path, by_stem[stem]))
    stems = {stem for stem, _ in found}
    for stem, path in of_labels:
        if stem not in stems:
            bad.add("label without an image", path)
    return pairs


def _files(
    place: pathlib.Path, suffixes: tuple[str, ...], bad: BadRecords
) -> list[tuple[str, str]]:
    """(path inside the folder without its end, whole path) of all files, in order.

    A link that leads out of the folder is bad: the folder itself may be a link.
    """
    folder, inside = image_folders.ImageFolder(place), os.path.realpath(place)
    found, others = [], []
    for directory, names in folder.walk():
        for name in names:
            path = os.path.join(directory, name)
            if not name.lower().endswith(suffixes):
                others.append(path)
                continue
            real = os.path.realpath(path)
            if os.path.commonpath([inside, real]) != inside:
                bad.add("file that lies outside of its folder", f"{path} -> {real}")
                continue
            found.append((os.path.splitext(os.path.relpath(path, place))[0], path))
    image_folders.tell_others(place, suffixes, others)
    return sorted(found)


def tell_missing_classes(pairs: Pairs, names: Sequence[str], split: str) -> int:
    """Logs which classes occur in no mask of a split; how many."""
    missing = [name for n, name in enumerate(names) if n not in pairs.seen]
    if missing:
        shown = ", ".join(printable(name)[:60] for name in missing[:5])
        more = ", ..." if len(missing) > 5 else ""
        logging.getLogger(__name__).warning(
            "split %r: %d of %d classes occur in no mask (%s%s)",
            split,
            len(missing),
            len(names),
            shown,
            more,
        )
    return len(missing)
