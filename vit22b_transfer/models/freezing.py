"""Which parameters are frozen: patterns over '/'-joined parameter paths."""

import difflib
import re
from collections.abc import Sequence

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from vit22b_transfer import UserError


def frozen_mask(params: dict, patterns: Sequence[str]) -> dict:
    """Tree of bool: True where a pattern matches the whole path of the parameter.

    Patterns are regular expressions such as `encoder/tower/.*`. One that matches
    nothing raises UserError with the nearest paths.
    """
    flat = flatten_dict(params, sep="/")
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in flat):
            near = difflib.get_close_matches(pattern, flat, n=3, cutoff=0.0)
            raise UserError(
                f"frozen pattern {pattern!r} matches no parameter; patterns are "
                "regular expressions over whole paths. Nearest paths: "
                f"{', '.join(near)}."
            )
    mask = {
        path: any(re.fullmatch(pattern, path) for pattern in patterns) for path in flat
    }
    return unflatten_dict(mask, sep="/")


def split_frozen(params: dict, patterns: Sequence[str]) -> tuple[dict, dict]:
    """(trainable, frozen) subtrees; empty branches are left out."""
    mask = flatten_dict(frozen_mask(params, patterns))
    parts: tuple[dict, dict] = ({}, {})
    for path, value in flatten_dict(params).items():
        parts[mask[path]][path] = value
    return unflatten_dict(parts[False]), unflatten_dict(parts[True])


def merge_frozen(trainable: dict, frozen: dict) -> dict:
    """The inverse of `split_frozen`."""
    return unflatten_dict(flatten_dict(trainable) | flatten_dict(frozen))


def stop_frozen_gradients(params: dict, patterns: Sequence[str]) -> dict:
    """`params` with a stop-gradient on the frozen ones.

    For runtimes that differentiate all parameters: whatever they do with the gradients,
    those of a frozen tower are known to be zero and are not computed.
    """
    if not patterns:
        return params
    mask = frozen_mask(params, patterns)
    return jax.tree.map(
        lambda x, stop: jax.lax.stop_gradient(x) if stop else x, params, mask
    )
