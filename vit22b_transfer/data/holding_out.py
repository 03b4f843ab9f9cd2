"""A validation split of annotations that have none: whole images are held out."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit22b_transfer import UserError

# One image in ten, and no more than score a metric well.
_PART, _MOST = 10, 5_000


def held_out(image_ids: Iterable[Any]) -> set[Any]:
    """The ids of the images to validate on: a tenth, at least one, 5,000 at most.

    They are those of the smallest SHA-256 of the id, so that a set that grows keeps
    most of them, and the same file always gives the same.

    Raises:
      UserError: for fewer than two images.
    """
    ids = {str(image_id): image_id for image_id in image_ids}
    if len(ids) < 2:
        raise UserError(
            f"the annotations are of {len(ids)} image; two are the least to hold one "
            "out for validation."
        )
    ordered = sorted(ids, key=lambda one: hashlib.sha256(one.encode()).digest())
    count = max(1, min(_MOST, len(ids) // _PART))
    return {ids[one] for one in ordered[:count]}


def divided(
    content: Mapping[str, Any], keys: Mapping[str, str], out: set[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(content to train on, content to validate on) of an annotation file.

    keys: of its lists, such as `annotations`, and of the field of their entries that is
      the image's id. Entries without one stay in the first: its reading tells of them.
    """
    train, validation = dict(content), dict(content)
    for key, field in keys.items():
        entries: Sequence[Any] = content[key]
        is_out = [_id(entry, field) in out for entry in entries]
        train[key] = [e for e, o in zip(entries, is_out, strict=True) if not o]
        validation[key] = [e for e, o in zip(entries, is_out, strict=True) if o]
    return train, validation


def ids(entries: Sequence[Any], field: str = "image_id") -> set[Any]:
    """The image ids of a list of annotations."""
    return {_id(entry, field) for entry in entries} - {None}


def _id(entry: Any, field: str) -> Any:
    found = entry.get(field) if isinstance(entry, dict) else None
    return found if isinstance(found, int | str) and found is not True else None
