"""What a probe finds: a score for each image, their mean, and how sure that is."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

# Of a normal distribution 95 % lie within so many deviations of its mean.
_DEVIATIONS = 1.959963984540054
INTERVAL = "Wilson, 95 %"
# A number of fewer examples says little, which tables and results tell.
FEW = 30


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One number of a probe, as shares of the test images.

    settings: what it was found with, such as the number of neighbours.
    scores: of each test image, in [0, 1]: 1 if it was classified rightly; a share where
      several fits are averaged.
    notes: what was counted on the way, such as classes without an image.
    metric: what the mean of the scores is called.
    """

    settings: Mapping[str, Any]
    scores: Float[np.ndarray, " images"]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metric: str = "accuracy"

    def with_features(self, names: Sequence[str]) -> "Outcome":
        """The same, its settings naming the vectors that it was found with."""
        settings = {"features": list(names), **self.settings}
        return dataclasses.replace(self, settings=settings)

    @property
    def value(self) -> float:
        """The mean score, in [0, 1]."""
        return float(np.mean(self.scores))

    @property
    def interval(self) -> tuple[float, float]:
        """As `wilson_interval` of the scores."""
        return wilson_interval(self.value, len(self.scores))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One number of an experiment that is no share of right images.

    interval: (low, high), of `interval_kind`, over `images` images (of videos: clips).
    settings, notes, metric: as in `Outcome`. pictures: paths of PNG files of some test
    images.
    """

    metric: str
    value: float
    interval: tuple[float, float]
    images: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: Sequence[str] = ()
    interval_kind: str = "bootstrap, 95 %"


def described(value: Any) -> Any:
    """A protocol as JSON values: dataclasses with their names, optimizers as told."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        settings = getattr(value, "settings", None)  # of a schedule
        if isinstance(settings, Mapping):
            return described(settings)
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **described(fields)}
    if isinstance(settings := getattr(value, "settings", None), Mapping):
        rate = getattr(value, "learning_rate", None)
        return {**described(settings), "learning_rate": described(rate)}
    if isinstance(value, Mapping):
        return {str(name): described(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` images (Wilson 1927).

    It is of the images: another test set from where this one comes. A mean of numbers
    in [0, 1] varies no more than a share of the same size, so that of scores that are
    averages over fits the interval is no narrower than it should be.
    """
    z = _DEVIATIONS
    shrink = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / shrink
    spread = share * (1 - share) / count + z * z / (4 * count * count)
    half = z * math.sqrt(spread) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)
