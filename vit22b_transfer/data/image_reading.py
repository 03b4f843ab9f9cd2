"""The images of several examples in one call, in whichever form a source gives them."""

import dataclasses
import logging
import os

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.data.decoded_images import SMALL_SETS, WHOLE_IMAGES
from vit22b_transfer.data.images import prepare
from vit22b_transfer.data.records import OWN_TASK, Tally, half_character, quoted
from vit22b_transfer.models.preparation import OWN, Preparation

# Feature of a source -> the images of one example: encoded bytes, pixels or a path.
FORMS = {
    "image": lambda image: [image],
    "image_path": lambda path: [os.fsdecode(path)],
    "image_paths": lambda paths: list(map(os.fsdecode, paths)),
}


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """How images are read, and what is done about bad ones.

    form: a name in `FORMS`. count: of the images of an example. size: (height, width)
    that they are made into as `how` says; None leaves them as they are, for crops.
    on_bad_image: as of `preprocessors.ReadingOptions`.
    """

    form: str
    count: int
    size: tuple[int, int] | None
    how: Preparation
    on_bad_image: str
    tally: Tally

    def read(
        self, values: np.ndarray, image_ids: np.ndarray, problems: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """For each of `count` uint8 [examples, height, width, 3]; errors; stops.

        values: of the feature `form`, by example. problems: what the source knows of
        each, "" of good ones. errors: why an image of an example that is skipped cannot
        be read. stops: with what reading is to end at this example. Both are "" of good
        ones.
        """
        pixels, errors, stops = [], [], []
        for value, image_id, problem in zip(values, image_ids, problems, strict=True):
            error = stop = ""
            images = [np.zeros((*self._blank, 3), np.uint8)] * self.count
            name = shown(image_id)
            given = FORMS[self.form](value)
            if len(given) != self.count:
                stop = (
                    f"example {name} has {len(given)} images, but the feature length "
                    f"'images' asks for {self.count}; make them equal."
                )
            else:
                try:
                    if problem:
                        raise UserError(problem.decode())
                    images = [self._pixels(one, f"image {name}") for one in given]
                except ValueError as e:
                    if self.on_bad_image == "error":
                        stop = self._refusal(name, e)
                    else:
                        error = str(e)
                        self._skip(name, error)
            pixels.append(images)
            errors.append(error.encode(errors="backslashreplace"))
            stops.append(stop.encode(errors="backslashreplace"))
        stacked = map(np.stack, zip(*pixels, strict=True))
        return *stacked, np.array(errors, object), np.array(stops, object)

    @property
    def _blank(self):
        """(height, width) of what stands for an image that cannot be read."""
        if self.size is not None and self.how.fit in OWN:
            return self.how.patch, self.how.patch
        return self.size or (1, 1)

    def _pixels(self, image, name):
        if isinstance(image, np.ndarray):
            return image if self.size is None else prepare(image, self.size, self.how)
        if image == "":  # the text of a class has none
            return np.zeros((*(self.size or (1, 1)), 3), np.uint8)
        if isinstance(image, str) and half_character(image):
            file = os.fsencode(os.path.basename(image))
            file = file.decode(errors="backslashreplace")
            raise UserError(f"the file name is no UTF-8 text: {file}; rename the file")
        if self.size is None:
            return WHOLE_IMAGES.read(image, name=name)
        return SMALL_SETS.read(image, self.size, self.how, name=name)

    def _refusal(self, name, error):
        return (
            f"image {name}: {error}. Remove it, or register the task with "
            f"on_bad_image='skip' ({OWN_TASK}) to leave out bad images and count them."
        )

    def _skip(self, name, error):
        if self.tally.add("bad image", f"{name}: {error}"):
            logging.getLogger(__name__).warning(
                "skipping image %s: %s (later ones are only counted)", name, error
            )


def shown(text: bytes) -> str:
    """A text of a source as messages show it."""
    return quoted(text.decode(errors="backslashreplace"))
