"""Optimizers, learning-rate schedules and freezing, composed from optax parts.

Every optimizer here is gradient clipping, then the method's own scaling, then decoupled
weight decay, then the schedule: `p -= schedule(step) * (scaled_gradient + decay * p)`.
A learning rate that is a number is a constant schedule.

What all of them take beside their own settings:
  weight_decay: at least 0, in units of the learning rate.
  decay_patterns: regular expressions over whole paths of what decays.
  decay_factors: (pattern, factor) of what decays more or less: the first pattern that
    matches decides, before `decay_patterns`, whose factor is 1.
  clip_norm: the largest global norm of the trained gradients; None: any.
  layer_decay: between 0 and 1: the learning rate of the tower, with its weight decay,
    is that times lower with each block from its end (`parameter_rules.layer_depths`;
    BEiT, MAE). None: one rate everywhere. The logged rate is that of all else.
  ema_decay: between 0 and 1: an average of the weights is kept for evaluation
    (`weight_average`). None: none.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.models import freezing
from vit22b_transfer.training import weight_average
from vit22b_transfer.training.parameter_rules import ParameterRules

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
    rules: ParameterRules
    ema_decay: float | None

    def __new__(
        cls, transformation, learning_rate, settings, rules=None, ema_decay=None
    ):
        """The same two functions, their schedule, its targets, and the settings."""
        self = super().__new__(cls, *transformation)
        self.learning_rate = learning_rate
        self.settings = settings
        self.rules = rules or ParameterRules()
        self.ema_decay = ema_decay
        return self


# --- Schedules ---
#
# A phase is a whole number of steps, or a fraction of total_steps below 1.


def constant(
    peak: float,
    *,
    warmup_steps: int | float = 0,
    total_steps: int | None = None,
    cooldown_steps: int | float = 0,
) -> Schedule:
    """`peak` after a linear warmup; 0 at `total_steps` after a linear cooldown.

    With `cooldown_steps = total_steps - warmup_steps` it is the linear decay.
    """
    warmup_steps = _steps("warmup_steps", warmup_steps, total_steps)
    cooldown_steps = _steps("cooldown_steps", cooldown_steps, total_steps)
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


def cosine(peak: float, *, total_steps: int, warmup_steps: int | float = 0) -> Schedule:
    """Half a cosine from `peak` to 0 at `total_steps`, after a linear warmup."""
    warmup_steps = _steps("warmup_steps", warmup_steps, total_steps)
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
    warmup_steps: int | float = 0,
    cooldown_steps: int | float = 0,
    timescale: int | float = 10_000,
) -> Schedule:
    """Reciprocal square root of the steps since warmup (Zhai et al. 2021, ViT-G).

    `peak / sqrt(1 + (step - warmup_steps) / timescale)` after a linear warmup, times a
    linear cooldown to 0 at `total_steps`.
    """
    warmup_steps = _steps("warmup_steps", warmup_steps, total_steps)
    cooldown_steps = _steps("cooldown_steps", cooldown_steps, total_steps)
    timescale = _steps("timescale", timescale, total_steps)
    if timescale < 1:
        raise UserError(f"timescale={timescale} must be at least 1 step.")
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


def _steps(name: str, value: int | float, total_steps: int | None) -> int:
    """A phase in steps: `value`, or that fraction of all; at least 1, but for 0."""
    if isinstance(value, int) or value == 0:
        return int(value)
    if not 0.0 < value < 1.0:
        raise UserError(
            f"{name}={value} must be a whole number of steps, or a fraction of "
            "total_steps between 0 and 1."
        )
    if total_steps is None:
        raise UserError(f"{name}={value} is a fraction and needs total_steps.")
    return max(1, round(value * total_steps))


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
    decay_factors: Sequence[tuple[str, float]] = (),
    clip_norm: float | None = 1.0,
    layer_decay: float | None = None,
    ema_decay: float | None = None,
) -> ScheduledOptimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    rules = ParameterRules(weight_decay, decay_factors, decay_patterns, layer_decay)
    own = {"name": "adamw", "b1": b1, "b2": b2, "eps": eps}
    return _compose(scale, learning_rate, rules, clip_norm, ema_decay, own)


def adafactor(
    learning_rate: Schedule | float,
    *,
    beta2_cap: float = 0.999,
    weight_decay: float = 0.0,
    decay_patterns: Sequence[str] = KERNELS,
    decay_factors: Sequence[tuple[str, float]] = (),
    clip_norm: float | None = 1.0,
    layer_decay: float | None = None,
    ema_decay: float | None = None,
) -> ScheduledOptimizer:
    """Adafactor as used for ViT-G (Zhai et al. 2021, section 3.4; big_vision).

    The second moment is factored where two dimensions are at least 32 long, and decays
    by `min(beta2_cap, 1 - t ** -0.8)`, t from 1; the momentum, 0.9, is an average of
    updates without a correction of its start, stored in bfloat16. No clipping of the
    update's RMS, no scaling by the parameter. big_vision's `wd` is `weight_decay *
    peak` here, because the schedule multiplies the decay.

    The two dimensions are the largest ones of an array, stacked layers among them:
    biases and norms of 32 stacked layers or more are factored over the layers.
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
    rules = ParameterRules(weight_decay, decay_factors, decay_patterns, layer_decay)
    own = {"name": "adafactor", "beta2_cap": beta2_cap}
    return _compose(scale, learning_rate, rules, clip_norm, ema_decay, own)


def sgd(
    learning_rate: Schedule | float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    decay_patterns: Sequence[str] = KERNELS,
    decay_factors: Sequence[tuple[str, float]] = (),
    clip_norm: float | None = 1.0,
    layer_decay: float | None = None,
    ema_decay: float | None = None,
) -> ScheduledOptimizer:
    """Stochastic gradient descent with momentum (`m = momentum * m + g`)."""
    scale = optax.trace(decay=momentum)
    rules = ParameterRules(weight_decay, decay_factors, decay_patterns, layer_decay)
    own = {"name": "sgd", "momentum": momentum}
    return _compose(scale, learning_rate, rules, clip_norm, ema_decay, own)


def _compose(scale, learning_rate, rules, clip_norm, ema_decay, own):
    if not callable(learning_rate):
        learning_rate = constant(learning_rate)
    parts = []
    if clip_norm is not None:
        if not 0.0 < clip_norm < math.inf:
            raise UserError(
                f"clip_norm={clip_norm} must be greater than 0; for gradients of any "
                "norm set clip_norm=None."
            )
        parts.append(optax.clip_by_global_norm(clip_norm))
    parts += [scale, *rules.weight_decays(), *rules.rate_scales()]
    parts.append(optax.scale_by_learning_rate(learning_rate))
    if ema_decay is not None:
        parts.append(weight_average.average_weights(ema_decay))
    chain = optax.chain(*parts)

    def init(params):
        rules.check(params)
        return chain.init(params)

    transformation = optax.GradientTransformation(init, chain.update)
    settings = own | dataclasses.asdict(rules)
    settings |= {"clip_norm": clip_norm, "ema_decay": ema_decay}
    return ScheduledOptimizer(transformation, learning_rate, settings, rules, ema_decay)


def describe(
    optimizer: optax.GradientTransformation,
    params: Mapping[str, Any],
    patterns: Sequence[str],
) -> list[str]:
    """Lines on what of the trained parameters an optimizer decays, slows, averages.

    patterns: of the frozen parameters.
    """
    if not isinstance(optimizer, ScheduledOptimizer):
        return []
    lines = optimizer.rules.describe(_without_frozen(params, patterns))
    if optimizer.ema_decay is not None:
        lines.append(f"weights are averaged with a decay of {optimizer.ema_decay:g}")
    return lines


def _without_frozen(params, patterns):
    """`params` as optax hands them to the optimizer of those that are trained."""
    mask = freezing.frozen_mask(params, patterns)
    return jax.tree.map(
        lambda leaf, frozen: optax.MaskedNode() if frozen else leaf, params, mask
    )


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
        that cannot be: kernels in int8; if one of the optimizer's rules has no
        effect on what is trained.
    """
    mask = freezing.frozen_mask(params, patterns)
    trained, _ = freezing.split_frozen(params, patterns)
    for path, leaf in traverse_util.flatten_dict(trained, sep="/").items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(
                f"{path} is stored as {leaf.dtype} and cannot be trained. Freeze it, "
                "as gin_configs/models/int8_tower.gin does, or leave int8_tower out."
            )
    if patterns and all(jax.tree.leaves(mask)):
        raise UserError(
            f"the frozen patterns {list(patterns)} match every parameter, so nothing "
            "is left to train."
        )
    if isinstance(optimizer, ScheduledOptimizer):
        optimizer.rules.check(_without_frozen(params, patterns))
    if not patterns:
        return optimizer
    labels = jax.tree.map(lambda frozen: "frozen" if frozen else "train", mask)
    return optax.multi_transform(
        {"train": optimizer, "frozen": optax.set_to_zero()}, labels
    )
