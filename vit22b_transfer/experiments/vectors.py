"""Vectors of a tower by name: what it pools, means of its tokens, those of blocks."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from vit22b_transfer import UserError
from vit22b_transfer.models import towers
from vit22b_transfer.models.packing import PackedImages

# Names of a tower's vectors, beside those of its blocks:
#   pooled         what its pooling makes of an image
#   mean           the mean of its patch tokens
#   block_7_mean   the mean of the patch tokens behind block 7
#   block_7_first  the first token behind block 7: the class token
VECTORS = ("pooled", "mean", "block_0_mean", "block_0_first")
_OF_BLOCK = re.compile(r"(block_\d+)_(mean|first)")


def check(names: Sequence[str], tower: Any) -> None:
    """Raises UserError for a name that is no vector of the tower, or stands twice."""
    depth = getattr(tower, "depth", 0)
    valid = ["pooled", "mean"]
    valid += [f"block_{n}_{kind}" for n in range(depth) for kind in ("mean", "first")]
    for name in names:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.0)
            raise UserError(
                f"the tower has no vector {str(name)[:200]!r}; nearest: "
                f"{', '.join(near)}."
            )
    if not names or len({*names}) < len(names):
        raise UserError(
            f"features={tuple(names)}: name at least one vector, and each once."
        )
    if "pooled" in names and getattr(tower, "pooling", "") == "none":
        raise UserError(
            "the tower has no pooled vector. Give it pooling='map', 'gap' or 'cls', "
            "or take another of its vectors, such as 'mean'."
        )


def stacked(
    output: towers.TowerOutput, *, names: tuple[str, ...], patches: int
) -> Float[jax.Array, "batch names width"]:
    """The named vectors of what a tower returns, for images of so many patches.

    Means are taken in float32.
    """
    found = []
    for name in names:
        block = _OF_BLOCK.fullmatch(name)
        tokens = output.intermediates[block[1]] if block else output.tokens
        if name == "pooled":
            found.append(output.pooled)
        elif name.endswith("mean"):
            # Class token and registers stand before the patches.
            mean = jnp.mean(tokens[:, -patches:].astype(jnp.float32), axis=1)
            found.append(mean.astype(tokens.dtype))
        elif tokens.shape[1] == patches:
            raise _no_class_token(name)
        else:
            found.append(tokens[:, 0])
    return jnp.stack(found, axis=1)


def stacked_of_rows(
    output: towers.TowerOutput, packed: PackedImages, *, names: tuple[str, ...]
) -> Float[jax.Array, "rows images names width"]:
    """The named vectors of each image of packed rows; 0 where there is no image.

    Means are taken in float32.

    Raises:
      UserError: for a first token, since there are patches alone.
    """
    found = []
    for name in names:
        block = _OF_BLOCK.fullmatch(name)
        if name == "pooled":
            found.append(output.pooled)
        elif name.endswith("mean"):
            tokens = output.intermediates[block[1]] if block else output.tokens
            found.append(packed.mean(tokens))
        else:
            raise _no_class_token(name)
    return jnp.stack(found, axis=2)


def _no_class_token(name: str) -> UserError:
    return UserError(
        f"{name} is the class token, but the tower has none: its first token is a "
        f"patch. Take {name.removesuffix('first')}mean."
    )


def blocks_of(names: Sequence[str]) -> tuple[str, ...]:
    """The intermediates that a tower is asked for, to have the named vectors."""
    blocks = [match[1] for name in names if (match := _OF_BLOCK.fullmatch(name))]
    return tuple(dict.fromkeys(blocks))
