"""Linear probe: one layer on frozen features, learned by SGD at many rates at once.

The form is DINOv2's (eval/linear.py): softmax cross-entropy, momentum, a cosine to
zero, weights that start at N(0, 0.01). All rates see the same batches, and are the
columns of one matrix, so that a step reads its features once. The rate, and which of
the sets of features, are chosen on a held-out part of the training split, never on the
test split.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.experiments import heads
from vit22b_transfer.experiments.labelled import Labelled, Sets, check_alike, held_out
from vit22b_transfer.experiments.outcomes import Outcome

# Deviation of the weights before training; biases start at zero.
_FIRST = 0.01
# Rates are given for batches of so many images (Goyal et al. 2017).
_RATES_FOR = 256
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
        best, tried, diverged = (-1.0, (), 0.0), {}, 0
        for name, data in train.items():
            data.constant()  # which says if nothing can be told
            fitted, held = held_out(
                data.labels, self.held_out, self.sgd.seed, data.what
            )
            some = learn(data, self.sgd, rows=fitted)
            found = accuracies(some, data, held)
            tried["+".join(name)] = dict(
                zip(map(str, self.sgd.rates), found, strict=True)
            )
            diverged += sum(value is None for value in found)
            for rate, value in zip(self.sgd.rates, found, strict=True):
                if value is not None and value > best[0]:
                    best = (value, name, rate)
        value, name, rate = best
        if not name:
            raise UserError(
                f"every one of the learning rates {tuple(self.sgd.rates)} diverges on "
                "these features. Take smaller ones."
            )
        data = train[name]
        found = learn(data, dataclasses.replace(self.sgd, rates=(rate,)))
        settings = {"rate": rate, "held_out_accuracy": value, "tried": tried}
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
    data: Labelled, sgd: Sgd, *, rows: Int[np.ndarray, " rows"] | None = None
) -> Heads:
    """Heads for all rates, learned together on the images `rows`, or on all.

    Features are read in the order of training, a part at a time, and may lie on disk.
    The same arguments give the same bits on the same device.
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
    per_call = max(1, min(steps, _CALL_BYTES // size))
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
            features,
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


@functools.partial(jax.jit, donate_argnums=(0,))
def _several_steps(
    state,
    features: Float[Array, "steps batch width"],
    labels: Int[Array, "steps batch"],
    rates: Float[Array, "steps rates"],
    constants: Float[Array, "2"],
):
    momentum, decay = constants

    def step(state, inputs):
        kernel, bias, kernel_speed, bias_speed = state
        x, y, rate = inputs
        x = x.astype(jnp.float32)
        error = jax.nn.softmax(_logits(kernel, bias, x), axis=-1)
        error = error - jax.nn.one_hot(y, error.shape[-1], dtype=jnp.float32)[:, None]
        error = error / len(x)
        flat = error.reshape(len(x), -1)
        slope = jnp.matmul(x.T, flat, precision="highest").reshape(kernel.shape)
        slope = slope + decay * kernel
        kernel_speed = momentum * kernel_speed + slope
        bias_speed = momentum * bias_speed + jnp.sum(error, axis=0)
        kernel = kernel - rate[None, :, None] * kernel_speed
        bias = bias - rate[:, None] * bias_speed
        return (kernel, bias, kernel_speed, bias_speed), None

    return jax.lax.scan(step, state, (features, labels, rates))[0]


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


def accuracies(
    heads: Heads, data: Labelled, rows: Int[np.ndarray, " rows"]
) -> list[float | None]:
    """Share of the images `rows` that each head gets right; None if it diverged."""
    found = logits(heads, data, rows)
    hits = np.argmax(found, axis=-1) == data.labels[rows, None]
    finite = np.atleast_1d(np.isfinite(found).all(axis=(0, 2)))
    return [
        float(hits[:, number].mean()) if ok else None
        for number, ok in enumerate(finite)
    ]
