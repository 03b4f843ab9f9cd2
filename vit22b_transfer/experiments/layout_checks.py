"""Whether the lists and tables of a layout fit its files, before any tower is run.

Names alone say that a part is there (`surveys`); here the small files are read: class
lists, ReaL's judgements, what people answered. What does not fit would be found out
only behind hours of features, or not at all: images of a class that is in no list are
judged by nobody, and the accuracy of the others is no accuracy of the split.
"""

import dataclasses
import difflib
import os
from collections.abc import Sequence

from vit22b_transfer import UserError
from vit22b_transfer.experiments.layouts import Found
from vit22b_transfer.host import file_errors

_SHOWN = 3
# ImageNet's list has 10 kB; JFT-3B's 30,000 names would have 500 kB.
_MOST_BYTES = 16 << 20


def checked(found: Found, imagenet: Found | None) -> Found | str:
    """A layout with more notes, or why it cannot be used.

    imagenet: the layout whose classes `imagenet_v2`, ReaL and the like are told in;
      without it they are not looked at, as nothing can be run on them.
    """
    try:
        if "classes" in found.paths:
            return _with_list(found)
        if imagenet is None:
            return found
        names = _names(imagenet.paths["classes"])
        if found.name == "imagenet_real":
            _check_judgements(found, imagenet, len(names))
        elif found.name == "objectnet":
            _check_objectnet(found, len(names))
        elif found.name in ("imagenet_v2", "imagenet_r", "imagenet_a"):
            _check_variant(found, names)
        elif found.name == "model_vs_human":
            _check_people(found, names)
    except UserError as error:
        return file_errors.told(error)
    return found


def _names(path: str) -> tuple[str, ...]:
    from vit22b_transfer.data import class_lists

    if os.path.getsize(path) > _MOST_BYTES:
        raise UserError(
            f"{os.path.basename(path)} has more than {_MOST_BYTES} bytes; a class list "
            "has one name per line"
        )
    return class_lists.names(path)


def _with_list(found: Found) -> Found:
    """A layout with a class list of its own."""
    names = _names(found.paths["classes"])
    notes = dict(found.notes)
    for part, folders in found.classes.items():
        unknown = _unknown(folders, names)
        if unknown and part == "validation":
            raise UserError(
                f"{_said(unknown, found.paths[part])} not in classes.txt, which has "
                f"{len(names)} names; {_nearest(unknown[0], names)}. Nobody would "
                "judge their images: list each class, or take these folders out"
            )
        if unknown:
            notes[f"folders of {part} that are not in classes.txt, left out"] = len(
                unknown
            )
    return dataclasses.replace(found, notes=notes)


def _check_variant(found: Found, names: Sequence[str]) -> None:
    """Raises UserError unless each folder is of one of ImageNet's classes."""
    from vit22b_transfer.evaluation import class_subsets

    folders = found.classes["test"]
    if found.name == "imagenet_v2" and all(
        folder.isascii() and folder.isdecimal() for folder in folders
    ):
        large = [name for name in folders if len(name) > 9 or int(name) >= len(names)]
        if large and _unknown(folders, names):
            raise UserError(
                f"{_said(large, found.place)} no class ids: classes.txt has the ids 0 "
                f"to {len(names) - 1}"
            )
        return
    if unknown := _unknown(folders, names):
        raise UserError(
            f"{_said(unknown, found.place)} not in classes.txt; "
            f"{_nearest(unknown[0], names)}. Call each folder as ImageNet's is called "
            "there, or take it out"
        )
    official = {
        "imagenet_r": class_subsets.IMAGENET_R,
        "imagenet_a": class_subsets.IMAGENET_A,
    }.get(found.name)
    if official is not None and len(names) == class_subsets.CLASSES:
        some = {names[number] for number in official}
        if others := [name for name in folders if name not in some]:
            raise UserError(
                f"{_said(others, found.place)} none of the {len(official)} classes of "
                f"{found.name}. Is classes.txt ImageNet's 1000, in their order?"
            )


def _check_objectnet(found: Found, classes: int) -> None:
    """Raises UserError without ImageNet's classes, or any folder that is judged."""
    from vit22b_transfer.evaluation import class_subsets

    if classes != class_subsets.CLASSES:
        raise UserError(
            f"it is judged by ImageNet's {class_subsets.CLASSES} classes, but "
            f"classes.txt has {classes}"
        )
    folders = found.classes["test"]
    if not {*folders} & {*class_subsets.OBJECTNET}:
        near = _nearest(folders[0], tuple(class_subsets.OBJECTNET))
        raise UserError(
            f"none of its folders, such as {_brief(folders[0])}, is one of the 113 of "
            f"ObjectNet that ImageNet has; {near}"
        )


def _check_judgements(found: Found, imagenet: Found, classes: int) -> None:
    from vit22b_transfer.experiments import variants

    images = _images(imagenet.paths["validation"])
    variants.judgements_of(
        [name for name in images if "/" in name],
        found.paths["judgements"],
        classes,
        "the validation split",
    )


def _check_people(found: Found, names: Sequence[str]) -> None:
    from vit22b_transfer.experiments import humans

    humans.checked(
        _images(found.paths["stimuli"]),
        (names, len(names)),
        humans=found.paths.get("humans"),
        sixteen=found.paths.get("sixteen"),
    )


def _images(folder: str) -> list[str]:
    """Paths of all images below a folder, as its task names them."""
    from vit22b_transfer.data.sources import IMAGE_SUFFIXES

    found = []
    for place, _, files in os.walk(folder):
        inside = os.path.relpath(place, folder)
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("._"):
                path = os.path.normpath(os.path.join(inside, name))
                found.append(os.fsencode(path).decode(errors="backslashreplace"))
    return sorted(found)


def _unknown(folders: Sequence[str], names: Sequence[str]) -> list[str]:
    """The folders that are no class of a list."""
    from vit22b_transfer.data import class_lists

    classes = class_lists.Classes(tuple(names), {})
    return [name for name in folders if classes.id_of(_text(name)) is None]


def _said(folders: Sequence[str], place: str) -> str:
    """How many folders and which first, as the beginning of a sentence."""
    shown = ", ".join(map(_brief, folders[:_SHOWN]))
    more = ", ..." if len(folders) > _SHOWN else ""
    word, verb = ("folder", "is") if len(folders) == 1 else ("folders", "are")
    where = os.path.basename(place)
    return f"{len(folders)} {word} of {where} ({shown}{more}) {verb}"


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(_text(name)[:200], names, n=1, cutoff=0.4)
    return f"nearest: {_brief(near[0])}" if near else "none is near"


def _text(name: str) -> str:
    """A name of a folder; of bytes that are no text with a mark in their place."""
    return os.fsencode(name).decode(errors="replace")


def _brief(name: str) -> str:
    return file_errors.brief(_text(name), 60)
