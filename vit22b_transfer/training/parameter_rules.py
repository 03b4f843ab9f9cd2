"""How strongly weight decay and learning rate act on each parameter.

Parameters are known by their '/'-joined paths. Where some are frozen, an
`optax.MaskedNode` stands in their place, as in the trees that optax hands to the
optimizer of the others.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from vit22b_transfer import UserError
from vit22b_transfer.models import freezing

_TOWER = freezing.TOWER.removesuffix(".*")
# What of a tower comes behind its blocks; all else but these comes before them.
_BEHIND_BLOCKS = ("encoder_norm", "map")
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class ParameterRules:
    """What an optimizer does to some parameters and not, or more strongly, to others.

    weight_decay: of a factor of 1, in units of the learning rate; at least 0.
    decay_factors: (regular expression over whole paths, factor of at least 0); the
      first that matches a parameter decides.
    decay_patterns: of what else decays, by a factor of 1; all other parameters do not.
    layer_decay: between 0 and 1; None for one learning rate everywhere.

    Raises:
      UserError: for a value out of its range, a pattern that is none, or factors
        without a weight decay.
    """

    weight_decay: float = 0.0
    decay_factors: Sequence[tuple[str, float]] = ()
    decay_patterns: Sequence[str] = ()
    layer_decay: float | None = None

    def __post_init__(self):
        if not 0.0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay={self.weight_decay} must be at least 0.")
        if self.layer_decay is not None and not 0.0 < self.layer_decay < 1.0:
            raise UserError(
                f"layer_decay={self.layer_decay} must lie between 0 and 1; for one "
                "learning rate everywhere leave it out."
            )
        if self.decay_factors and not self.weight_decay:
            raise UserError(
                f"decay_factors {list(self.decay_factors)} have no effect without a "
                "weight_decay, which is 0. Set it, or leave them out."
            )
        for pattern, factor in self._all_factors:
            if not 0.0 <= factor < math.inf:
                raise UserError(
                    f"decay_factors: the factor of {pattern!r} is {factor}; it must be "
                    "at least 0."
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"weight decay: {pattern!r} is no regular expression: {error}."
                ) from error

    def decay_factor(self, path: str) -> float:
        """The factor of one parameter's weight decay."""
        pairs = self._all_factors
        return next((f for p, f in pairs if re.fullmatch(p, path)), 0.0)

    @property
    def _all_factors(self) -> list[tuple[str, float]]:
        return [*self.decay_factors, *((p, 1.0) for p in self.decay_patterns)]

    def weight_decays(self) -> Iterator[optax.GradientTransformation]:
        """A part of an optax chain for each factor; none without a weight decay."""

        def mask_of(factor: float) -> Callable[[Any], Any]:
            return lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: self.decay_factor(_name(path)) == factor, params
            )

        if self.weight_decay:
            factors = dict.fromkeys(factor for _, factor in self._all_factors)
            for factor in factors:
                if factor:
                    yield optax.add_decayed_weights(
                        self.weight_decay * factor, mask_of(factor)
                    )

    def rate_scales(self) -> Iterator[optax.GradientTransformation]:
        """The part of an optax chain for `layer_decay`, if there is one."""
        decay = self.layer_decay
        if decay is None:
            return

        def scaled(updates, params):
            rates = layer_rates(params, decay)

            def scale(path, update):
                return update * jnp.asarray(rates[_name(path)], update.dtype)

            return jax.tree_util.tree_map_with_path(scale, updates)

        yield optax.stateless(scaled)

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises UserError for a rule that has no effect on these parameters.

        A pattern may be of frozen parameters alone, which `describe` tells, but some
        trained one must decay; and some block of the tower must be trained.
        """
        if not self.weight_decay and self.layer_decay is None:
            return
        flat = flatten_dict(params, sep="/")
        trained = {path for path in flat if _is_trained(flat[path])}
        if self.weight_decay:
            patterns = [pattern for pattern, _ in self._all_factors]
            if not any(self.decay_factor(path) for path in trained):
                raise UserError(
                    f"decay_patterns {patterns} match no trained parameter; patterns "
                    "are regular expressions over whole paths. For no weight decay set "
                    "weight_decay=0."
                )
            for pattern in self.decay_patterns:
                freezing.matched(pattern, flat, "weight decay's")
            left = set(flat)
            for pattern, _ in self.decay_factors:
                found = _matched_factor(pattern, flat)
                if found and left.isdisjoint(found):
                    raise UserError(
                        f"decay_factors: {pattern!r} has no effect: all that it "
                        f"matches, such as {found[0]}, is decided by a pattern before "
                        "it. Put it first, or leave it out."
                    )
                left -= set(found)
        if self.layer_decay is not None:
            depths = layer_depths(params)
            if not any(_is_block(path) and path in trained for path in depths):
                raise UserError(
                    f"layer_decay={self.layer_decay} slows the blocks of the tower, "
                    "but all of them are frozen. Leave out what freezes them, or "
                    "gin_configs/runs/layer_decay.gin."
                )

    def describe(self, params: Mapping[str, Any]) -> list[str]:
        """A line for each strength of weight decay and for the learning rates."""
        flat = flatten_dict(params, sep="/")
        trained = [path for path in flat if _is_trained(flat[path])]
        lines = []
        if self.weight_decay:
            by_factor = collections.defaultdict(list)
            for _, factor in self._all_factors:
                by_factor[factor] = []
            for path in trained:
                by_factor[self.decay_factor(path)].append(path)
            for factor in sorted(by_factor, reverse=True):
                strength = f"{self.weight_decay * factor:g}"
                lines.append(f"weight decay {strength}: {_listed(by_factor[factor])}")
        if self.layer_decay is not None:
            rates = {p: layer_rates(params, self.layer_decay)[p] for p in trained}
            blocks = [np.ravel(rate) for path, rate in rates.items() if _is_block(path)]
            low, high = np.min(np.concatenate(blocks)), np.max(np.concatenate(blocks))
            below = [
                path
                for path, rate in rates.items()
                if not _is_block(path) and np.ndim(rate) == 0 and rate < 1.0
            ]
            stem = f", {rates[below[0]]:.4g} before them" if below else ""
            lines.append(
                f"learning rate x {low:.4g} to {high:.4g} in the tower's blocks{stem}, "
                f"x 1 elsewhere"
            )
        return lines


def layer_depths(
    params: Mapping[str, Any],
) -> dict[str, int | Float[np.ndarray, "layers *ones"]]:
    """By how many layers a parameter lies below the end of the tower, by its path.

    0 behind the tower and its last block, 1 in the last of D blocks, D in the first
    one, D + 1 before it (patches, positions, class token): the numbers of BEiT and MAE,
    counted from the end. Of blocks stacked on axis 0 a column of them, of the rank of
    the parameter: [D, 1, ...].

    Raises:
      UserError: if there is no tower, or it has no blocks `layers_0`, `layers_1`, ...
        or, stacked, `layers`; or if all of those are frozen.
    """
    flat = flatten_dict(params, sep="/")
    if not any(path.startswith(_TOWER) for path in flat):
        raise UserError(
            f"layer_decay is of the tower, {_TOWER}..., and there is none (in a blind "
            "model, or in training on cached features). Leave "
            "gin_configs/runs/layer_decay.gin out."
        )
    blocks = [path for path in flat if _is_block(path)]
    numbers = [
        int(match[1])
        for path in blocks
        if (match := re.match(r"layers_(\d+)/", path.removeprefix(_TOWER)))
    ]
    stacked = [flat[path].shape[0] for path in blocks if _is_trained(flat[path])]
    if not blocks:
        raise UserError(
            "layer_decay needs a tower with the blocks layers_0, layers_1, ... or, "
            f"stacked, layers; it has {', '.join(_children(flat)[:_SHOWN])}."
        )
    if not numbers and not stacked:
        raise UserError(
            "layer_decay slows the blocks of the tower, but all of them are frozen. "
            "Leave out what freezes them, or gin_configs/runs/layer_decay.gin."
        )
    count = max(numbers) + 1 if numbers else stacked[0]

    def depth(path: str, leaf: Any) -> Any:
        if not path.startswith(_TOWER):
            return 0
        scope = path.removeprefix(_TOWER).partition("/")[0]
        if scope == "layers":
            rank = leaf.ndim if _is_trained(leaf) else 1
            column = np.arange(count, 0, -1)
            return column.reshape(count, *[1] * (rank - 1))
        if scope.startswith("layers_"):
            return count - int(scope.removeprefix("layers_"))
        return 0 if scope in _BEHIND_BLOCKS else count + 1

    return {path: depth(path, leaf) for path, leaf in flat.items()}


def layer_rates(
    params: Mapping[str, Any], layer_decay: float
) -> dict[str, float | Float[np.ndarray, "layers *ones"]]:
    """The factor of each parameter's learning rate: `layer_decay ** depth`.

    As `layer_depths`; 1 behind the tower's last block and outside of the tower.
    """
    return {path: layer_decay**depth for path, depth in layer_depths(params).items()}


def _matched_factor(pattern, flat):
    try:
        return freezing.matched(pattern, flat, "decay_factors:")
    except UserError as error:
        raise UserError(
            f"{error} A model whose logits are those of its token table has no head of "
            "its own: set decay_factors=()."
        ) from error


def _is_block(path):
    return re.match(rf"{_TOWER}layers(_\d+)?/", path) is not None


def _is_trained(leaf):
    return not isinstance(leaf, optax.MaskedNode)


def _children(flat):
    below = [path.removeprefix(_TOWER) for path in flat if path.startswith(_TOWER)]
    return list(dict.fromkeys(path.partition("/")[0] for path in below))


def _listed(names):
    """A count of names, and the first few."""
    if not names:
        return "0 parameters"
    more = ", ..." if len(names) > _SHOWN else ""
    noun = "parameter" if len(names) == 1 else "parameters"
    return f"{len(names)} {noun} ({', '.join(names[:_SHOWN])}{more})"


def _name(path):
    return "/".join(str(entry.key) for entry in path)
