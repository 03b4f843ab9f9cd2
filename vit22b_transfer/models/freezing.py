"""Which parameters are frozen: patterns over '/'-joined parameter paths.

Whoever asks for something to be frozen is heard: all patterns are united.
"""

import difflib
import re
from collections.abc import Collection, Sequence

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from vit22b_transfer import UserError
from vit22b_transfer.models import lora as low_rank

TOWER = "encoder/tower/.*"


def frozen_patterns(
    own: Sequence[str] = (),
    *,
    tower: bool = False,
    int8_tower: bool = False,
    lora: low_rank.LoraConfig | None = None,
) -> tuple[str, ...]:
    """The patterns of a model: its `own` and those that its other settings imply.

    LoRA freezes all but its updates and what it trains besides; `tower` all of the
    tower; `int8_tower` all of it but low-rank updates, which are floats.
    """
    patterns = [] if lora is None else [lora.frozen]
    if tower or (int8_tower and lora is None):
        patterns.append(TOWER)
    elif int8_tower:
        patterns.append(rf"encoder/tower/(?!{low_rank.UPDATES}$).*")
    return tuple(dict.fromkeys([*patterns, *own]))


def check_trained(
    lora: low_rank.LoraConfig, params: dict, patterns: Sequence[str]
) -> None:
    """Raises UserError if LoRA's `trained` spares nothing, or is frozen itself."""
    if not any(
        re.fullmatch(lora.frozen, path) for path in flatten_dict(params, sep="/")
    ):
        raise UserError(
            f"LoRA's trained patterns {list(lora.trained)} match every parameter. To "
            "train the whole model leave LoRA out."
        )
    mask = flatten_dict(frozen_mask(params, patterns), sep="/")
    for pattern in lora.trained:
        chosen = matched(pattern, mask, "LoRA's trained")
        if chosen and all(mask[path] for path in chosen):
            by = [p for p in patterns if any(re.fullmatch(p, path) for path in chosen)]
            raise UserError(
                f"LoRA is to train {pattern!r} as well (LoraConfig.trained), but all "
                f"that it matches is frozen by {', '.join(map(repr, by))}. Leave one "
                "of the two out."
            )


def matched(pattern: str, paths: Collection[str], what: str) -> list[str]:
    """The paths that a pattern matches; UserError if it should and does not."""
    try:
        found = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise UserError(
            f"{what} pattern {pattern!r} is no regular expression: {error}."
        ) from error
    has_tower = any(path.startswith("encoder/tower/") for path in paths)
    # The blind model has no tower, and training on cached features holds none.
    if found or ("tower" in pattern and not has_tower):
        return found
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    raise UserError(
        f"{what} pattern {pattern!r} matches no parameter; patterns are regular "
        f"expressions over whole paths. Nearest paths: {', '.join(near)}."
    )


def frozen_mask(params: dict, patterns: Sequence[str]) -> dict:
    """Tree of bool: True where a pattern matches the whole path of the parameter.

    Patterns are regular expressions such as `encoder/tower/.*`. One that matches
    nothing raises UserError with the nearest paths, unless it is of a tower and there
    is none.
    """
    flat = flatten_dict(params, sep="/")
    frozen = {path for p in patterns for path in matched(p, flat, "frozen")}
    return unflatten_dict({path: path in frozen for path in flat}, sep="/")


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
