"""Linear probe: one layer on frozen features, learned by SGD at many rates at once.

The form is DINOv2's (eval/linear.py): softmax cross-entropy, momentum, a cosine to
zero, weights that start at N(0, 0.01). All rates see the same batches, and are the
columns of one matrix, so that a step reads its features once. The rate, and which of
the sets of features, are chosen on a held-out part of the training split, never on the
test split; of equally accurate ones that of the least cross-entropy, as a tower that
tells classes well apart is right at rates by which its head has hardly begun to learn.
Rates are tried with products of bfloat16; the head is then learned anew in float32.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from vit22b_transfer import UserError
from vit22b_transfer.experiments import heads
from vit22b_transfer.experiments.labelled import (
    Labelled,
    Sets,
    check_alike,
    held_out,
    share_and_loss,
)
from vit22b_transfer.experiments.outcomes import Outcome

# Deviation of the weights before training; biases start at zero.
_FIRST = 0.01
# Rates are given for batches of so many images (Goyal et al. 2017).
_RATES_FOR = 256
# What the products of a sweep read: it chooses, and is not judged.
TRIED_IN, _WHOLE = jnp.dtype("bfloat16"), jnp.dtype("float32")
# Bytes of the features of several steps, which the device takes in one call.
_CALL_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Sgd:
    """How heads are learned.

    rates: learning rates at the first step, for batches of 256 images: they are
      multiplied by batch_size / 256. epochs: passes over the images; the last is left
      at a whole number of steps. batch_size: of a smaller split all images.
    weight_decay: times half the squared weights is added to the loss; not of biases.
    seed: of the first weights and of the order of images.
    """

    rates: Sequence[float]
    momentum: float
    weight_decay: float
    epochs: int
    batch_size: int
    seed: int = 0

    def __post_init__(self):
        if (
            not self.rates
            or min(self.rates) <= 0
            or len({*self.rates}) < len(self.rates)
        ):
            raise UserError(
                f"rates={tuple(self.rates)}: at least one learning rate is needed, and "
                "all are positive and different."
            )
        if min(self.epochs, self.batch_size) < 1:
            raise UserError(
                f"epochs={self.epochs} and batch_size={self.batch_size} must be at "
                "least 1."
            )
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise UserError(
                f"momentum={self.momentum} must be in [0, 1), weight_decay="
                f"{self.weight_decay} not negative."
            )

    def steps(self, images: int) -> tuple[int, int]:
        """Images of a batch and number of steps for so many images."""
        batch = min(self.batch_size, images)
        return batch, max(1, self.epochs * images // batch)


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Protocol of the linear probe.

    features: sets of the tower's vectors to choose from; a set's vectors are joined
      (`vectors.VECTORS`).
    held_out: share of the training split that rate and set are chosen on; the head that
      is judged is then learned anew from the whole split.
    """

    features: Sequence[Sequence[str]]
    sgd: Sgd
    held_out: float

    def run(self, train: Sets, test: Sets) -> list[Outcome]:
        """One result, that of the chosen rate and set.

        Raises:
          UserError: if every rate diverges.
        """
        for name, data in train.items():
            check_alike(data, test[name])
        head = self.learned(train)
        data = test[head.features]
        return [head.outcome(head.logits(data.features, data.what), data.labels)]

    def learned(self, train: Sets) -> heads.Head:
        """The head of the chosen rate and set; UserError if every rate diverges."""
        best, tried, diverged = (-1.0, 0.0, (), 0.0), {}, 0
        for name, data in train.items():
            data.constant()  # which says if nothing can be told
            fitted, held = held_out(
                data.labels, self.held_out, self.sgd.seed, data.what
            )
            some = learn(data, self.sgd, rows=fitted, dtype=TRIED_IN)
            accuracy, loss = judged(some, data, held)
            tried["+".join(name)] = dict(
                zip(map(str, self.sgd.rates), accuracy, strict=True)
            )
            diverged += sum(value is None for value in accuracy)
            for rate, value, less in zip(self.sgd.rates, accuracy, loss, strict=True):
                if value is not None and (value, -less) > best[:2]:
                    best = (value, -less, name, rate)
        value, negative, name, rate = best
        if not name:
            raise UserError(
                f"every one of the learning rates {tuple(self.sgd.rates)} diverges on "
                "these features. Take smaller ones."
            )
        data = train[name]
        found = learn(data, dataclasses.replace(self.sgd, rates=(rate,)))
        settings = {"rate": rate, "held_out_accuracy": value, "tried": tried}
        settings |= {"held_out_loss": -negative, "tried_in": TRIED_IN.name}
        notes: dict[str, Any] = {"diverged_rates": diverged} if diverged else {}
        batch, steps = self.sgd.steps(len(data))
        settings |= {"batch_size": batch, "steps": steps}
        if rate == max(self.sgd.rates) and len(self.sgd.rates) > 1:
            notes["chosen_rate"] = "the largest: a larger one may do better"
        kernel, bias = found.kernel[:, 0], found.bias[0]
        return heads.linear(data, name, kernel, bias, settings, notes)


@dataclasses.dataclass(frozen=True)
class Heads:
    """A linear layer for each rate: logits are features @ kernel + bias, in float32."""

    kernel: Float[np.ndarray, "width rates classes"]
    bias: Float[np.ndarray, "rates classes"]


def learn(
    data: Labelled,
    sgd: Sgd,
    *,
    rows: Int[np.ndarray, " rows"] | None = None,
    dtype: np.dtype = _WHOLE,
) -> Heads:
    """Heads for all rates, learned together on the images `rows`, or on all.

    Features are read in the order of training, a part at a time, and may lie on disk.
    The same arguments give the same bits on the same device.

    dtype: float32, or bfloat16 for the factors of matrix products alone: sums and
      weights are float32, and of features what is rounded is how far they are from
      the mean of their batch.
    """
    rows = np.arange(len(data)) if rows is None else rows
    batch, steps = sgd.steps(len(rows))
    shape = (data.width, len(sgd.rates), data.num_classes)
    generator = np.random.default_rng(sgd.seed)
    # One and the same start for all rates.
    first = generator.normal(0, _FIRST, (shape[0], 1, shape[2])).astype(np.float32)
    state = (
        jnp.broadcast_to(first, shape),
        jnp.zeros(shape[1:], jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape[1:], jnp.float32),
    )
    rates = np.asarray(sgd.rates, np.float32) * (batch / _RATES_FOR)
    constants = np.asarray([sgd.momentum, sgd.weight_decay], np.float32)
    size = batch * data.width * data.features.dtype.itemsize
    calls = -(-steps // max(1, _CALL_BYTES // size))
    per_call = -(-steps // calls)  # of equal size, as each step costs the same
    batches = batches_of(rows, generator, batch)
    for start in range(0, steps, per_call):
        part = np.arange(start, start + per_call)
        # Steps behind the last one change nothing.
        factors = 0.5 * (1 + np.cos(np.pi * np.minimum(part, steps) / steps))
        numbers = np.stack([next(batches) for _ in part])
        features = data.features[numbers]
        jax.block_until_ready(state)  # else features pile up before the device
        state = _several_steps(
            state,
            (features, None, None) if dtype == _WHOLE else _narrowed(features),
            data.labels[numbers].astype(np.int32),
            rates[None] * factors[:, None].astype(np.float32),
            constants,
        )
    return Heads(np.asarray(state[0]), np.asarray(state[1]))


def batches_of(
    rows: np.ndarray, generator: np.random.Generator, size: int
) -> Iterator[np.ndarray]:
    """Endless batches of image numbers: all rows in one order, then in another."""
    left = generator.permutation(rows)
    while True:
        while len(left) < size:
            left = np.concatenate([left, generator.permutation(rows)])
        yield left[:size]
        left = left[size:]


def _narrowed(features: Float[np.ndarray, "steps batch width"]):
    """Features less the mean of their batch, the same turned, and the mean.

    Turned by a call of its own, as a CPU is slow at products of bfloat16 that turn a
    factor, and at turning what it has yet to round.
    """
    near, middle = _about_the_mean(features)
    return near, _turned(near), middle


@jax.jit
def _about_the_mean(features):
    features = features.astype(jnp.float32)
    middle = jnp.mean(features, axis=1)
    return (features - middle[:, None]).astype(TRIED_IN), middle


@jax.jit
def _turned(near):
    return jnp.swapaxes(near, 1, 2)


@functools.partial(jax.jit, donate_argnums=(0,))
def _several_steps(
    state,
    batches: tuple[
        Shaped[Array, "steps batch width"],
        Shaped[Array, "steps width batch"] | None,
        Float[Array, "steps width"] | None,
    ],
    labels: Int[Array, "steps batch"],
    rates: Float[Array, "steps rates"],
    constants: Float[Array, "2"],
):
    momentum, decay = constants

    def step(state, inputs):
        kernel, bias, kernel_speed, bias_speed = state
        (x, turned, middle), y, rate = inputs
        if turned is None:
            x = x.astype(jnp.float32)
            scores = _logits(kernel, bias, x)
        else:
            flat = kernel.reshape(len(kernel), -1)
            common = jnp.matmul(middle[None], flat, precision="highest")
            scores = (common + _product(x, flat)).reshape(len(x), *bias.shape) + bias[
                None
            ]
        error = jax.nn.softmax(scores, axis=-1)
        error = error - jax.nn.one_hot(y, error.shape[-1], dtype=jnp.float32)[:, None]
        error = error / len(x)
        flat, bias_slope = error.reshape(len(x), -1), jnp.sum(error, axis=0)
        if turned is None:
            slope = jnp.matmul(x.T, flat, precision="highest")
        else:
            slope = _product(turned, flat) + jnp.outer(middle, bias_slope)
        slope = slope.reshape(kernel.shape) + decay * kernel
        kernel_speed = momentum * kernel_speed + slope
        bias_speed = momentum * bias_speed + bias_slope
        kernel = kernel - rate[None, :, None] * kernel_speed
        bias = bias - rate[:, None] * bias_speed
        return (kernel, bias, kernel_speed, bias_speed), None

    return jax.lax.scan(step, state, (batches, labels, rates))[0]


def _product(narrow, other):
    """narrow @ other, the latter rounded as the former is, summed in float32."""
    other = other.astype(narrow.dtype)
    return jnp.matmul(narrow, other, preferred_element_type=jnp.float32)


def _logits(kernel, bias, x):
    """Of all heads in one matmul: [batch, rates, classes]."""
    flat = kernel.reshape(kernel.shape[0], -1)
    found = jnp.matmul(x, flat, precision="highest")
    return found.reshape(len(x), *bias.shape) + bias[None]


_jitted_logits = jax.jit(_logits)


def logits(
    heads: Heads, data: Labelled, rows: Int[np.ndarray, " rows"] | None = None
) -> Float[np.ndarray, "images rates classes"]:
    """Logits of the images `rows`, or of all, by every head."""
    rows = np.arange(len(data)) if rows is None else rows
    size = 4 * max(data.width, heads.bias.size)
    count = min(len(rows), max(1, _CALL_BYTES // size))
    found = []
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        x = np.pad(data.features[part], [(0, count - len(part)), (0, 0)])
        x = x.astype(np.float32)
        found.append(
            np.asarray(_jitted_logits(heads.kernel, heads.bias, x))[: len(part)]
        )
    return np.concatenate(found)


def judged(
    heads: Heads, data: Labelled, rows: Int[np.ndarray, " rows"]
) -> tuple[list[float | None], list[float]]:
    """How each head does on the images `rows`: share that is right, and cross-entropy.

    The share is None, and the loss infinite, of one that diverged. Losses are means
    over images, in nats.
    """
    found = logits(heads, data, rows)
    each = [
        share_and_loss(found[:, number], data.labels[rows])
        for number in range(found.shape[1])
    ]
    shares = [None if np.isnan(share) else share for share, _ in each]
    losses = [loss for _, loss in each]
    return shares, losses
