"""How an image file becomes the pixels that a tower was trained on, in plain words.

A tower's configuration has it as `preparation`; `data.images` does what it says, and
`data.image_lengths` carries it to the tasks of a run.
"""

import dataclasses
from typing import Any, Literal, get_args

from vit22b_transfer import UserError

Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Fit = Literal["squash", "shorter_side", "own_shape", "own_size"]
# In which images keep their shapes, and so have various sizes.
OWN: tuple[Fit, ...] = ("own_shape", "own_size")
Halves = Literal["down", "even"]
Jpegs = Literal["whole", "scaled"]
FILTERS = get_args(Filter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to an image, whatever its shape, until it has the run's size.

    filter: of the resizing, Pillow's, which smooths what becomes smaller.
    fit: `squash` resizes both sides to the tower's, whatever becomes of the shape;
      `shorter_side` resizes that one, keeps the shape, and cuts off what is too long.
      The others give images of various sizes, in whole patches, each of no more patches
      than the run's size has: `own_shape` as large as that allows (SigLIP 2 NaFlex),
      `own_size` made smaller where it has to, and never larger but for the last patch.
    resized, cropped, kept: sides in pixels, from 1: an image is resized to the first,
      of which the second is cut from the centre, of which the third is kept from the
      top left corner. Where `kept` is not the run's longer side, all are in proportion.
    halves: where half a pixel of the centre goes: `down` (Hugging Face), or to the
      nearest `even` number (torchvision, timm).
    patch: side of the patches of those two, in pixels; 1 with the others.
    jpegs: `whole`, or `scaled`: at 1/2, 1/4 or 1/8 of their size, which the discrete
      cosine transform gives for less, if that is as large as what they are resized to.

    Raises:
      UserError: for other names, or sides that grow.
    """

    filter: Filter = "bilinear"
    fit: Fit = "squash"
    resized: int = 1
    cropped: int = 1
    kept: int = 1
    halves: Halves = "down"
    jpegs: Jpegs = "whole"
    patch: int = 1

    def __post_init__(self):
        for name, valid in (
            ("filter", FILTERS),
            ("fit", get_args(Fit)),
            ("halves", get_args(Halves)),
            ("jpegs", get_args(Jpegs)),
        ):
            if getattr(self, name) not in valid:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}; valid are {', '.join(valid)}."
                )
        if not 1 <= self.kept <= self.cropped <= self.resized:
            raise UserError(
                f"images are resized to {self.resized}, cropped to {self.cropped} and "
                f"{self.kept} of that are kept; each must be at least 1 and not more "
                "than the one before."
            )
        if self.fit in OWN and (self.patch < 2 or self.resized > 1):
            raise UserError(
                f"fit={self.fit!r} takes the side of the tower's patches, from 2, and "
                f"cuts nothing off; got patch={self.patch}, resized={self.resized}."
            )
        if self.fit not in OWN and self.patch != 1:
            raise UserError(
                f"patch={self.patch} goes with fit={' or '.join(map(repr, OWN))}, not "
                f"with {self.fit!r}; leave it out."
            )

    def __str__(self) -> str:
        text = f"{self.filter}, "
        if self.fit == "squash":
            text += "squashed"
        elif self.fit in OWN:
            made = "as large as" if self.fit == "own_shape" else "no larger than"
            text += f"in their own shapes, in patches of {self.patch}, {made} fits"
        else:
            text += "the shorter side resized, what is longer cut off"
        if self.resized > self.cropped:
            text += f", the centre ({self.cropped} of {self.resized}) cut out"
        if self.cropped > self.kept:
            text += f", its top left ({self.kept} of {self.cropped}) kept"
        if self.jpegs == "scaled":
            text += ", JPEGs decoded at a scale"
        return text


def of_model(model: Any) -> Preparation | None:
    """That of a model's tower; None if it has none, or does not say."""
    tower = getattr(getattr(model, "module", None), "tower", None)
    return getattr(tower, "preparation", None)
