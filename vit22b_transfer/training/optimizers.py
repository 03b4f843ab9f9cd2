"""Optimizers, learning-rate schedules and freezing, composed from optax parts.

Every optimizer here is gradient clipping, then the method's own scaling, then decoupled
weight decay, then the schedule: `p -= schedule(step) * (scaled_gradient + decay * p)`.
A learning rate that is a number is a constant schedule.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.models import freezing

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

KERNELS = (r"(.*/)?(kernel|lora_[ab])",)
_MACROS = "Recipes set them by the macros WARMUP_STEPS and TRAIN_STEPS."


@dataclasses.dataclass(frozen=True, eq=False)
class NamedSchedule:
    """A schedule that tells what it was made of, under `name` and its arguments."""

    settings: Mapping[str, Any]
    rate: Schedule

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The learning rate of a step, from 0."""
        return self.rate(jnp.asarray(step))


class ScheduledOptimizer(optax.GradientTransformation):
    """An optax transformation that carries the schedule it applies.

    The training loop logs `learning_rate(step)`, so the logged rate is the used one.
    settings: the optimizer's `name` and all of its arguments but the schedule.
    """

    learning_rate: Schedule
    settings: Mapping[str, Any]

    def __new__(cls, transformation, learning_rate, settings):
        """The same two functions, the schedule they apply, and the settings."""
        self = super().__new__(cls, *transformation)
        self.learning_rate = learning_rate
        self.settings = settings
        return self


# --- Schedules ---


def constant(
    peak: float,
    *,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    cooldown_steps: int = 0,
) -> Schedule:
    """`peak` after a linear warmup; 0 at `total_steps` after a linear cooldown.

    With `cooldown_steps = total_steps - warmup_steps` it is the linear decay.
    """
    _check_steps(warmup_steps, total_steps, cooldown_steps)

    def schedule(step):
        return peak * _ramps(step, warmup_steps, total_steps, cooldown_steps)

    settings = {
        "name": "constant",
        "peak": peak,
        "warmup_steps": warmup_steps,
        "total_steps": total_steps,
        "cooldown_steps": cooldown_steps,
    }
    return NamedSchedule(settings, schedule)


def cosine(peak: float, *, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Half a cosine from `peak` to 0 at `total_steps`, after a linear warmup."""
    _check_steps(warmup_steps, total_steps, 0)

    def schedule(step):
        past = jnp.asarray(step, jnp.float32) - warmup_steps
        progress = jnp.clip(past / (total_steps - warmup_steps), 0.0, 1.0)
        decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return peak * decay * _ramps(step, warmup_steps, total_steps, 0)

    settings = {
        "name": "cosine",
        "peak": peak,
        "total_steps": total_steps,
        "warmup_steps": warmup_steps,
    }
    return NamedSchedule(settings, schedule)


def rsqrt(
    peak: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    timescale: int = 10_000,
) -> Schedule:
    """Reciprocal square root of the steps since warmup (Zhai et al. 2021, ViT-G).

    `peak / sqrt(1 + (step - warmup_steps) / timescale)` after a linear warmup, times a
    linear cooldown to 0 at `total_steps`.
    """
    _check_steps(warmup_steps, total_steps, cooldown_steps)

    def schedule(step):
        past = jnp.maximum(jnp.asarray(step, jnp.float32) - warmup_steps, 0.0)
        decay = 1.0 / jnp.sqrt(1.0 + past / timescale)
        return peak * decay * _ramps(step, warmup_steps, total_steps, cooldown_steps)

    settings = {
        "name": "rsqrt",
        "peak": peak,
        "total_steps": total_steps,
        "warmup_steps": warmup_steps,
        "cooldown_steps": cooldown_steps,
        "timescale": timescale,
    }
    return NamedSchedule(settings, schedule)


def _ramps(step, warmup_steps, total_steps, cooldown_steps):
    step = jnp.asarray(step, jnp.float32)
    factor = jnp.ones_like(step)
    if warmup_steps:
        factor = factor * jnp.minimum(1.0, step / warmup_steps)
    if cooldown_steps:
        factor = factor * jnp.clip((total_steps - step) / cooldown_steps, 0.0, 1.0)
    return factor


def _check_steps(warmup_steps, total_steps, cooldown_steps):
    if warmup_steps < 0 or cooldown_steps < 0:
        raise UserError(
            f"warmup_steps={warmup_steps} and cooldown_steps={cooldown_steps} must not "
            "be negative."
        )
    if cooldown_steps and total_steps is None:
        raise UserError(f"cooldown_steps={cooldown_steps} needs total_steps.")
    if total_steps is not None and warmup_steps + cooldown_steps > total_steps:
        raise UserError(
            f"warmup_steps={warmup_steps} and cooldown_steps={cooldown_steps} do not "
            f"fit into total_steps={total_steps}. {_MACROS}"
        )
    if total_steps is not None and warmup_steps == total_steps:
        raise UserError(
            f"warmup_steps={warmup_steps} leaves no step of total_steps={total_steps}. "
            f"{_MACROS}"
        )


# --- Optimizers ---


def adamw(
    learning_rate: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_patterns: Sequence[str] = KERNELS,
    clip_norm: float | None = 1.0,
) -> ScheduledOptimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return _compose(
        scale,
        learning_rate,
        weight_decay,
        decay_patterns,
        clip_norm,
        {"name": "adamw", "b1": b1, "b2": b2, "eps": eps},
    )


def adafactor(
    learning_rate: Schedule | float,
    *,
    beta2_cap: float = 0.999,
    weight_decay: float = 0.0,
    decay_patterns: Sequence[str] = KERNELS,
    clip_norm: float | None = 1.0,
) -> ScheduledOptimizer:
    """Adafactor as used for ViT-G (Zhai et al. 2021, section 3.4; big_vision).

    The second moment is factored where two dimensions are at least 32 long, and decays
    by `min(beta2_cap, 1 - t ** -0.8)`; the momentum, 0.9, is stored in bfloat16.
    No clipping of the update's RMS, no scaling by the parameter. big_vision's `wd` is
    `weight_decay * peak` here, because the schedule multiplies the decay.
    """

    def second_moment_decay(step, exponent):
        t = jnp.asarray(step).astype(jnp.float32) + 1.0
        return jnp.minimum(beta2_cap, 1.0 - t**-exponent)

    scale = optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=0.8,
            min_dim_size_to_factor=32,
            decay_rate_fn=second_moment_decay,
        ),
        optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16),
    )
    return _compose(
        scale,
        learning_rate,
        weight_decay,
        decay_patterns,
        clip_norm,
        {"name": "adafactor", "beta2_cap": beta2_cap},
    )


def sgd(
    learning_rate: Schedule | float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    decay_patterns: Sequence[str] = KERNELS,
    clip_norm: float | None = 1.0,
) -> ScheduledOptimizer:
    """Stochastic gradient descent with momentum (`m = momentum * m + g`)."""
    scale = optax.trace(decay=momentum)
    return _compose(
        scale,
        learning_rate,
        weight_decay,
        decay_patterns,
        clip_norm,
        {"name": "sgd", "momentum": momentum},
    )


def _compose(scale, learning_rate, weight_decay, decay_patterns, clip_norm, own):
    if not callable(learning_rate):
        learning_rate = constant(learning_rate)
    parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    parts.append(scale)
    if weight_decay:
        mask = _mask_from(decay_patterns)
        parts.append(optax.add_decayed_weights(weight_decay, mask))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    settings = own | {
        "weight_decay": weight_decay,
        "decay_patterns": tuple(decay_patterns),
        "clip_norm": clip_norm,
    }
    return ScheduledOptimizer(optax.chain(*parts), learning_rate, settings)


def _mask_from(patterns):
    """Function from parameters to a tree that is True where a pattern matches."""

    def mask(params):
        def matches(path, _):
            name = "/".join(str(entry.key) for entry in path)
            return any(re.fullmatch(pattern, name) for pattern in patterns)

        tree = jax.tree_util.tree_map_with_path(matches, params)
        if not any(jax.tree.leaves(tree)):
            raise UserError(
                f"decay_patterns {list(patterns)} match no trained parameter; patterns "
                "are regular expressions over whole paths. For no weight decay set "
                "weight_decay=0."
            )
        return tree

    return mask


def freeze(
    optimizer: optax.GradientTransformation,
    params: Mapping[str, Any],
    patterns: Sequence[str],
) -> optax.GradientTransformation:
    """`optimizer` for the parameters that no pattern matches, zero for the others.

    Frozen parameters have no optimizer state, and are left out of the global norm that
    `optimizer` clips. Without patterns it is `optimizer` itself.

    Raises:
      UserError: if a pattern matches nothing, nothing is left to train, or something
        that cannot be: kernels in int8.
    """
    mask = freezing.frozen_mask(params, patterns)
    trained, _ = freezing.split_frozen(params, patterns)
    for path, leaf in traverse_util.flatten_dict(trained, sep="/").items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(
                f"{path} is stored as {leaf.dtype} and cannot be trained. Freeze it, "
                "as gin_configs/models/int8_tower.gin does, or leave int8_tower out."
            )
    if not patterns:
        return optimizer
    if all(jax.tree.leaves(mask)):
        raise UserError(
            f"the frozen patterns {list(patterns)} match every parameter, so nothing "
            "is left to train."
        )
    labels = jax.tree.map(lambda frozen: "frozen" if frozen else "train", mask)
    return optax.multi_transform(
        {"train": optimizer, "frozen": optax.set_to_zero()}, labels
    )
