"""The feature length of images: how large they are, and how they are made.

All that SeqIO hands from a run to the preprocessors of a task is feature lengths. So
that of `images` carries the preparation of the run's tower, under both runtimes: ours
gives it to every task it reads, and `t5x_adapter.feature_lengths` gives it to T5X. In
training it carries what is drawn at random, too (`augmentation.train_lengths`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit22b_transfer.models import preparation
from vit22b_transfer.models.preparation import Preparation


class PreparedImages(tuple):
    """Sizes as of a plain feature length, such as (height, width), and a preparation.

    how: None if the tower does not say. augmentation: an `augmentation.Augmentation`,
    None for images as they are. Equal to another in which all is, and to no plain
    tuple.
    """

    how: Preparation | None
    augmentation: Any

    def __new__(
        cls,
        sizes: tuple[int, ...],
        how: Preparation | None,
        augmentation: Any = None,
    ) -> "PreparedImages":
        """Sizes that a plain feature length of images could be."""
        made = super().__new__(cls, sizes)
        made.how, made.augmentation = how, augmentation
        return made

    def _all(self) -> tuple[Any, ...]:
        return tuple(self), self.how, self.augmentation

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PreparedImages) and self._all() == other._all()

    def __ne__(self, other: object) -> bool:  # a tuple has its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self._all())

    def __reduce__(self):
        return PreparedImages, self._all()

    def __repr__(self) -> str:
        said = [str(x) for x in (self.how, self.augmentation) if x is not None]
        return f"{tuple(self)} ({'; '.join(said)})"


def preparation_of(length: Any) -> Preparation | None:
    """The preparation in a feature length; None if it says nothing of it."""
    return length.how if isinstance(length, PreparedImages) else None


def augmentation_of(length: Any) -> Any:
    """The `Augmentation` in a feature length; None if images are as they are."""
    return length.augmentation if isinstance(length, PreparedImages) else None


def prepared(lengths: Mapping[str, Any], how: Preparation | None) -> Mapping[str, Any]:
    """The feature lengths with the preparation in that of `images`, if there is one."""
    length = lengths.get("images")
    if how is None or length is None:
        return lengths
    made = PreparedImages(_sizes(length), how, augmentation_of(length))
    return {**lengths, "images": made}


def augmented(lengths: Mapping[str, Any], augmentation: Any) -> Mapping[str, Any]:
    """The feature lengths with an augmentation, or None, in that of `images`."""
    length = lengths.get("images")
    if augmentation is None or length is None:
        return lengths
    made = PreparedImages(_sizes(length), preparation_of(length), augmentation)
    return {**lengths, "images": made}


def of_one_image(length: Sequence[int]) -> tuple[int, ...]:
    """(height, width) of (number, height, width), with all that it carries."""
    if not isinstance(length, PreparedImages):
        return tuple(length[1:])
    return PreparedImages(tuple(length[1:]), length.how, length.augmentation)


def _sizes(length: Any) -> tuple[int, ...]:
    return (length, length) if isinstance(length, int) else tuple(length)


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
