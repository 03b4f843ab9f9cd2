"""Heads that say something of every point of an image, from a tower's patch tokens.

Each is a frozen dataclass that builds its network; `features` names what it reads of
the tower: `tokens` (behind the final norm) or `block_N` (the residual stream behind
block N, numbered from 0). All compute in float32 and begin with the maps
[B, rows, columns, width] of those, without class token and registers.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import convolutions, towers
from vit22b_transfer.models.convolutions import Conv, NormedConv

TOKENS = "tokens"
# Sides of the levels of a pyramid, in patches, from the finest.
LEVELS = (4.0, 2.0, 1.0, 0.5)
_small = nn.initializers.normal(0.01)
Map = Float[Array, "batch rows columns width"]


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """Batch normalisation and one linear layer on each patch (DINOv2, DINOv3).

    features: joined where there are several. dropout: of whole channels, in training.
    """

    features: Sequence[str] = (TOKENS,)
    dropout: float = 0.1

    def __post_init__(self):
        _check_features(self.features)
        _check_dropout(self.dropout)

    def build(self, width: int, outputs: int) -> nn.Module:
        """The network for maps of that width."""
        return LinearNetwork(width * len(self.features), outputs, self.dropout)


@dataclasses.dataclass(frozen=True)
class UperNet:
    """UPerNet (Xiao et al. 2018): a pyramid pooled at the top, summed from there down.

    features: four, from the finest level to the coarsest: resized bilinearly to 4, 2, 1
      and 1/2 points per patch side; None: of blocks evenly over the tower.
    channels: of every convolution. pools: the top level is pooled to so many points a
      side.
    """

    features: Sequence[str] | None = None
    channels: int = 512
    pools: Sequence[int] = (1, 2, 3, 6)
    dropout: float = 0.1

    def __post_init__(self):
        _check_features(self.features, len(LEVELS))
        _check_dropout(self.dropout)
        _check_positive(channels=self.channels, pools=self.pools)

    def build(self, width: int, outputs: int) -> nn.Module:
        """The network for maps of that width."""
        levels = (width,) * len(LEVELS)
        pools = tuple(self.pools)
        return UperNetwork(levels, self.channels, pools, outputs, self.dropout)


@dataclasses.dataclass(frozen=True)
class Dpt:
    """DPT (Ranftl et al. 2021): maps made a pyramid by learned layers, fused upwards.

    features: four, from the finest level to the coarsest; None: of blocks evenly over
      the tower. channels: of each level. fused: channels of the fusion.

    The readout token is left out ("ignore").
    """

    features: Sequence[str] | None = None
    channels: Sequence[int] = (96, 192, 384, 768)
    fused: int = 256

    def __post_init__(self):
        _check_features(self.features, len(LEVELS))
        _check_positive(channels=self.channels, fused=self.fused)
        if len(self.channels) != len(LEVELS):
            raise UserError(
                f"channels={tuple(self.channels)} of the DPT head: one number for each "
                f"of its {len(LEVELS)} levels."
            )

    def build(self, width: int, outputs: int) -> nn.Module:
        """The network for maps of that width."""
        return DptNetwork(width, tuple(self.channels), self.fused, outputs)


Head = LinearHead | UperNet | Dpt


class LinearNetwork(nn.Module):
    """The network of a `LinearHead`; outputs at one point per patch."""

    width: int
    outputs: int
    dropout: float

    def setup(self):
        self.norm = convolutions.BatchNorm(self.width)
        self.drop = _dropout(self.dropout)
        self.classifier = _classifier(self.width, self.outputs)

    def __call__(
        self, maps: Sequence[Map], *, train: bool
    ) -> Float[Array, "batch high wide outputs"]:
        x = self.norm(jnp.concatenate(maps, axis=-1), train=train)
        return self.classifier(self.drop(x, deterministic=_is_fixed(self)))


class UperNetwork(nn.Module):
    """The network of an `UperNet`; outputs at the points of its finest level."""

    widths: tuple[int, ...]
    channels: int
    pools: tuple[int, ...]
    outputs: int
    dropout: float

    def setup(self):
        channels, top = self.channels, self.widths[-1]
        self.pooled = [NormedConv(top, channels) for _ in self.pools]
        joined = top + len(self.pools) * channels
        self.bottleneck = NormedConv(joined, channels, 3)
        self.laterals = [NormedConv(width, channels) for width in self.widths[:-1]]
        self.smoothing = [NormedConv(channels, channels, 3) for _ in self.laterals]
        self.fusion = NormedConv(len(self.widths) * channels, channels, 3)
        self.drop = _dropout(self.dropout)
        self.classifier = _classifier(channels, self.outputs)

    def __call__(
        self, maps: Sequence[Map], *, train: bool
    ) -> Float[Array, "batch high wide outputs"]:
        grid = maps[0].shape[1:3]
        sizes = [_scaled(grid, factor) for factor in LEVELS]
        levels = map(convolutions.resized, maps, sizes)
        return self.of_levels(list(levels), train=train)

    def of_levels(
        self, levels: Sequence[Float[Array, "batch _ _ _"]], *, train: bool
    ) -> Float[Array, "batch high wide outputs"]:
        """The outputs for maps that are a pyramid already."""
        top = levels[-1]
        parts = [top]
        for size, conv in zip(self.pools, self.pooled, strict=True):
            part = conv(convolutions.pooled(top, size), train=train)
            parts.append(convolutions.resized(part, top.shape[1:3]))
        sums = [self.bottleneck(jnp.concatenate(parts, axis=-1), train=train)]
        for level, lateral in zip(levels[-2::-1], self.laterals[::-1], strict=True):
            above = convolutions.resized(sums[0], level.shape[1:3])
            sums.insert(0, lateral(level, train=train) + above)
        smooth = [
            conv(x, train=train) for x, conv in zip(sums, self.smoothing, strict=False)
        ]
        size = sums[0].shape[1:3]
        whole = [convolutions.resized(x, size) for x in (*smooth, sums[-1])]
        x = self.fusion(jnp.concatenate(whole, axis=-1), train=train)
        return self.classifier(self.drop(x, deterministic=_is_fixed(self)))


class DptNetwork(nn.Module):
    """The network of a `Dpt`; outputs at 16 points per patch side at most.

    Each of four fusions and the output doubles the side.
    """

    width: int
    channels: tuple[int, ...]
    fused: int
    outputs: int

    def setup(self):
        self.projections = [Conv(self.width, channels) for channels in self.channels]
        first, second, _, last = self.channels
        self.resizing = [
            convolutions.Enlarging(first, 4),
            convolutions.Enlarging(second, 2),
            None,
            Conv(last, last, 3, stride=2),
        ]
        self.levels = [Conv(n, self.fused, 3, use_bias=False) for n in self.channels]
        self.fusions = [
            Fusion(self.fused, two=number > 0) for number in range(len(self.channels))
        ]
        half = self.fused // 2
        self.head_1 = Conv(self.fused, half, 3)
        self.head_2 = Conv(half, 32, 3)
        self.head_3 = Conv(32, self.outputs, axes=("patch", "classes"))

    def __call__(
        self, maps: Sequence[Map], *, train: bool
    ) -> Float[Array, "batch high wide outputs"]:
        del train  # nothing in it is random or normalised by batches
        levels = []
        for x, project, resize, level in zip(
            maps, self.projections, self.resizing, self.levels, strict=True
        ):
            y = project(x)
            levels.append(level(y if resize is None else resize(y)))
        x = None
        for level, fusion in zip(levels[::-1], self.fusions, strict=True):
            x = fusion(level, x)
        x = self.head_2(convolutions.doubled(self.head_1(x)))
        return self.head_3(nn.relu(x))


class Fusion(nn.Module):
    """One step of DPT's fusion: a level added to what is above it, at twice the size.

    two: whether there is something above it.
    """

    channels: int
    two: bool

    def setup(self):
        self.project = Conv(self.channels, self.channels)
        if self.two:
            self.lower = Residual(self.channels)
        self.whole = Residual(self.channels)

    def __call__(
        self,
        level: Float[Array, "batch height width channels"],
        above: Float[Array, "batch rows columns channels"] | None,
    ) -> Float[Array, "batch doubled_rows doubled_columns channels"]:
        x = level
        if above is not None:
            level = convolutions.resized(level, above.shape[1:3])
            x = above + self.lower(level)
        return self.project(convolutions.doubled(self.whole(x)))


class Residual(nn.Module):
    """ReLU and a 3x3 convolution, twice, added to what went in."""

    channels: int

    def setup(self):
        self.first = Conv(self.channels, self.channels, 3)
        self.second = Conv(self.channels, self.channels, 3)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        return x + self.second(nn.relu(self.first(nn.relu(x))))


def feature_maps(
    output: towers.TowerOutput, names: Sequence[str], grid: tuple[int, int]
) -> list[Map]:
    """What a head reads of a tower's output, as maps in float32.

    grid: rows and columns of patches. Tokens before the patches are dropped.
    """
    rows, columns = grid
    maps = []
    for name in names:
        tokens = output.tokens if name == TOKENS else output.intermediates[name]
        patches = tokens[:, -rows * columns :].astype(jnp.float32)
        maps.append(patches.reshape(len(patches), rows, columns, -1))
    return maps


def of_tower(head: Head, tower: Any) -> Head:
    """The head with the names of its features, which are the tower's.

    Four evenly over 12 blocks are block_2, block_5, block_8 and block_11, as in DPT.

    Raises:
      UserError: for a feature that the tower does not have, or if it has fewer than
        four blocks and the head names none.
    """
    depth = getattr(tower, "depth", 0)
    if head.features is None:
        if depth < len(LEVELS):
            raise UserError(
                f"the tower has {depth} blocks, too few for {len(LEVELS)} levels of a "
                f"{type(head).__name__}. Name its features: one may stand twice."
            )
        ends = [depth * n // len(LEVELS) for n in range(1, len(LEVELS) + 1)]
        names = tuple(f"block_{end - 1}" for end in ends)
        return dataclasses.replace(head, features=names)
    valid = [TOKENS, *(f"block_{n}" for n in range(depth))]
    for name in head.features:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.0)
            raise UserError(
                f"the tower has no feature {str(name)[:200]!r}; nearest: "
                f"{', '.join(near)}."
            )
    return head


def _classifier(width, outputs):
    axes = ("patch", "classes")
    return Conv(width, outputs, kernel_init=_small, axes=axes)


def _dropout(rate):
    return nn.Dropout(rate, broadcast_dims=(1, 2))


def _is_fixed(module: nn.Module) -> bool:
    """Whether nothing is drawn: no random numbers are given."""
    return not module.has_rng("dropout")


def _scaled(grid, factor):
    return tuple(max(1, int(side * factor)) for side in grid)


def _check_features(names, count=None):
    if names is None and count is not None:
        return
    wrong = isinstance(names, str) or not names
    if wrong or (count is not None and len(names) != count):
        wanted = "one name or more" if count is None else f"{count} names"
        raise UserError(
            f"features={names!r} of the head: it takes a tuple of {wanted}, such as "
            "('block_11',)."
        )


def _check_dropout(rate):
    if not 0 <= rate < 1:
        raise UserError(f"dropout={rate} must be at least 0 and below 1.")


def _check_positive(**fields):
    for name, value in fields.items():
        numbers = [value] if isinstance(value, int) else list(value)
        if not numbers or min(numbers) < 1:
            raise UserError(f"{name}={value} must be positive.")
