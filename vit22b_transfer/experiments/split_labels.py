"""The labels of a split whose features are cached: one of each image, or none."""

from typing import Any

import numpy as np
from jaxtyping import Int

from vit22b_transfer import UserError


def check_single(source: Any, split: str, what: str) -> None:
    """Raises UserError, before the tower is run, for an image with several labels."""
    from vit22b_transfer.data.labelled_sources import LabelledSource

    if isinstance(source, LabelledSource):
        for number in range(source.num_records(split)):
            record = source.record(split, number)
            if len(record.labels) > 1:
                raise _several_labels(record.image_id, what, len(record.labels))


def _several_labels(name: str, what: str, count: int) -> UserError:
    return UserError(
        f"image {name[:200]!r} of {what} has {count} labels; a probe tells one class "
        "of each image from the others. Take a task with one label per image (without "
        "a hierarchy)."
    )


def read(
    source: Any, what: str, labelled: bool
) -> tuple[
    list[str],
    Int[np.ndarray, " images"],
    Int[np.ndarray, " images"],
    dict[str, Any],
]:
    """Names of all examples, numbers of those that are used, their labels, the rest.

    Used are those with an image and, if `labelled`, with a label; else all of them have
    the label -1.

    Raises:
      UserError: for an image with several labels, if `labelled`.
    """
    from vit22b_transfer.data import streams

    ids, rows, labels = [], [], []
    unreadable = unlabelled = 0
    for number, example in enumerate(streams.as_numpy(source.without_tokens())):
        name = bytes(example.get("image_id", b"")).decode(errors="backslashreplace")
        ids.append(name)
        found = np.unique(example["labels"]) if labelled else np.array([-1])
        if example.get("image_error", b""):
            unreadable += 1
        elif not len(found):
            unlabelled += 1
        elif len(found) > 1:
            raise _several_labels(name, what, len(found))
        else:
            rows.append(number)
            labels.append(int(found[0]))
    notes = {"unreadable_images": unreadable, "images_without_label": unlabelled}
    notes = {f"{what}: {name}": count for name, count in notes.items() if count}
    return ids, np.asarray(rows, np.int64), np.asarray(labels, np.int64), notes
