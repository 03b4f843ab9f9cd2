"""The sixteen everyday classes that models are compared with humans on.

The classes and the ImageNet classes that each stands for are those of Geirhos et al.
2018 (arXiv 1808.08750, 16-class-ImageNet), 207 of the 1000, as the public
model-vs-human benchmark (Geirhos et al. 2021, arXiv 2106.07411) uses them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_probabilities, class_subsets

# Alphabetical; class ids of ILSVRC-2012 in their usual order, from 0.
IMAGENET: Mapping[str, tuple[int, ...]] = {
    name: class_subsets.numbers(text)
    for name, text in {
        "airplane": "404",
        "bear": "294-297",
        "bicycle": "444 671",
        "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
        "boat": "472 554 625 814 914",
        "bottle": "440 720 737 898-899 901 907",
        "car": "436 511 817",
        "cat": "281-286",
        "chair": "423 559 765 857",
        "clock": "409 530 892",
        "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
        "elephant": "385-386",
        "keyboard": "508 878",
        "knife": "499",
        "oven": "766",
        "truck": "555 569 656 675 717 734 864 867",
    }.items()
}
NAMES = tuple(IMAGENET)


def decisions(
    probabilities: Float[np.ndarray, "examples classes"],
    indices: Mapping[str, Sequence[int]] = IMAGENET,
) -> tuple[str, ...]:
    """For each example the one of the sixteen classes that a model decides for.

    It is the class with the largest mean probability of its `indices`: the mean, not
    the sum, so that the 109 dogs have no advantage. Of equal means the later class in
    the order of `indices` is taken, as in the public benchmark. A model with other
    classes than ImageNet's brings its own indices.

    Raises:
      UserError: if the probabilities are none; if a class is no class of the model, or
        stands for nothing.
    """
    probabilities = class_probabilities.checked(probabilities)
    classes = probabilities.shape[1]
    for name, numbers in indices.items():
        if not numbers or min(numbers) < 0 or max(numbers) >= classes:
            raise UserError(
                f"{name!r} stands for the classes {list(numbers)[:8]}, but the model "
                f"has the classes 0 to {classes - 1}; give a map of its own classes."
            )
    means = [probabilities[:, list(own)].mean(axis=1) for own in indices.values()]
    # From the last to the first, so that of equal ones the last is found.
    best = np.argmax(np.stack(means[::-1], axis=1), axis=1)
    names = list(indices)[::-1]
    return tuple(names[number] for number in best)
