"""The feature length of images: how large they are, and how they are made.

All that SeqIO hands from a run to the preprocessors of a task is feature lengths. So
that of `images` carries the preparation of the run's tower, under both runtimes: ours
gives it to every task it reads, and `t5x_adapter.feature_lengths` gives it to T5X.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from vit22b_transfer.models import preparation
from vit22b_transfer.models.preparation import Preparation


class PreparedImages(tuple):
    """Sizes as of a plain feature length, such as (height, width), and a preparation.

    Equal to another of equal sizes and preparation, and to no plain tuple.
    """

    how: Preparation

    def __new__(cls, sizes: tuple[int, ...], how: Preparation) -> "PreparedImages":
        """Sizes that a plain feature length of images could be."""
        made = super().__new__(cls, sizes)
        made.how = how
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PreparedImages):
            return False
        return self.how == other.how and tuple(self) == tuple(other)

    def __ne__(self, other: object) -> bool:  # a tuple has its own
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), self.how))

    def __reduce__(self):
        return PreparedImages, (tuple(self), self.how)

    def __repr__(self) -> str:
        return f"{tuple(self)} ({self.how})"


def preparation_of(length: Any) -> Preparation | None:
    """The preparation in a feature length; None if it says nothing of it."""
    return length.how if isinstance(length, PreparedImages) else None


def prepared(lengths: Mapping[str, Any], how: Preparation | None) -> Mapping[str, Any]:
    """The feature lengths with the preparation in that of `images`, if there is one."""
    length = lengths.get("images")
    if how is None or length is None:
        return lengths
    sizes = (length, length) if isinstance(length, int) else tuple(length)
    return {**lengths, "images": PreparedImages(sizes, how)}


def converter_of(model: Any) -> Callable[..., Any]:
    """The model's feature converter, which knows the preparation of its tower."""
    how = preparation.of_model(model)
    if how is None:
        return model.FEATURE_CONVERTER_CLS
    return functools.partial(model.FEATURE_CONVERTER_CLS, preparation=how)


def described(lengths: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The feature lengths of a run of the model, as JSON values that tell all of it."""
    found = dict(prepared(lengths, preparation.of_model(model)))
    how = preparation_of(found.get("images"))
    return found if how is None else found | {"images": repr(found["images"])}
