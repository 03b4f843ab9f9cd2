"""The features and labels of a split, as probes read them: vectors, or all tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vit22b_transfer.experiments.labelled import Labelled


@dataclasses.dataclass(frozen=True)
class Tokens:
    """All tokens of a split's images, on disk: `[numbers]` reads those of some images.

    shape: length and width of an image's tokens.
    """

    source: Any
    rows: Int[np.ndarray, " images"]
    shape: tuple[int, int]

    def __getitem__(
        self, numbers: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, "some length width"]:
        return np.stack([self.source.row(int(row)) for row in self.rows[numbers]])


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """Features and labels of the images of a split that have both.

    vectors: [images, names, width], or all tokens on disk. labels: -1 where nothing is
    told of them. notes: images that were left out, by reason. rows: numbers of the
    images among all examples of the split. ids: names of the images, in their order;
    every_id: of those that were left out as well.
    """

    vectors: Float[np.ndarray, "images names width"] | Tokens
    names: tuple[str, ...]
    labels: Int[np.ndarray, " images"]
    num_classes: int
    what: str
    notes: Mapping[str, Any]
    rows: Int[np.ndarray, " images"]
    ids: tuple[str, ...] = ()
    every_id: tuple[str, ...] = ()

    def joined(self, names: Sequence[str]) -> Labelled:
        """The vectors of those names, one behind the other, with the labels."""
        return Labelled(self.flat(names), self.labels, self.num_classes, self.what)

    def flat(self, names: Sequence[str]) -> Float[np.ndarray, "images width"]:
        """The vectors of those names, one behind the other, in memory once more."""
        assert not isinstance(self.vectors, Tokens)
        places = [self.names.index(name) for name in names]
        if places == list(range(len(self.names))):
            chosen = self.vectors  # all of them, in order: no copy
        else:
            chosen = self.vectors[:, places]
        return chosen.reshape(len(chosen), -1)
