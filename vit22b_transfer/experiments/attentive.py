"""Attentive probe: attention pooling and a linear layer, learned on frozen tokens.

The head is the MAP head of the ViT family (Zhai et al. 2022) with a layer to classes,
learned by AdamW at several rates at once, each a head of its own over the same batches.
The rate is chosen on a held-out part of the training split. Tokens stay on disk and are
read a batch at a time. The protocol is this library's: published ones differ.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.experiments import heads as kept
from vit22b_transfer.experiments import linear
from vit22b_transfer.experiments.labelled import (
    check_labels,
    held_out,
    share_and_loss,
)
from vit22b_transfer.experiments.outcomes import Outcome
from vit22b_transfer.experiments.split_features import SplitFeatures
from vit22b_transfer.host import progress
from vit22b_transfer.models import attentive_head


@dataclasses.dataclass(frozen=True)
class AttentiveProbe:
    """Protocol of the attentive probe.

    rates: of AdamW at its first step; a cosine leads them to zero. weight_decay: times
      the rate. epochs: passes over the images. batch_size: of a smaller split all
      images. held_out: share of the training split that the rate is chosen on; the head
      that is judged is then learned anew from the whole split. seed: of the first
      weights and of the order of images.
    """

    rates: Sequence[float]
    weight_decay: float
    epochs: int
    batch_size: int
    held_out: float
    seed: int = 0

    def __post_init__(self):
        # What holds for SGD's rates, epochs and batches holds here.
        linear.Sgd(self.rates, 0.0, self.weight_decay, self.epochs, self.batch_size)

    def run(self, train: SplitFeatures, test: SplitFeatures) -> list[Outcome]:
        """One result, that of the chosen rate.

        Raises:
          UserError: if every rate diverges, a label is out of range or a token not
            finite.
        """
        check_labels(test.labels, test.num_classes, test.what)
        head = self.learned(train)
        return [head.outcome(head.logits(test.vectors, test.what), test.labels)]

    def learned(self, train: SplitFeatures) -> kept.Head:
        """The head of the chosen rate; errors as of `run`."""
        check_labels(train.labels, train.num_classes, train.what)
        fitted, held = held_out(train.labels, self.held_out, self.seed, train.what)
        heads = self._learned(train, fitted, self.rates)
        found = self._logits(heads, train, held)
        judged = [share_and_loss(of_rate, train.labels[held]) for of_rate in found]
        tried: dict[str, float | None] = {}
        known = {}
        for rate, (share, loss) in zip(self.rates, judged, strict=True):
            tried[str(rate)] = None if np.isnan(share) else share
            if not np.isnan(share):
                known[str(rate)] = (share, -loss)
        if not known:
            raise UserError(
                f"every one of the learning rates {tuple(self.rates)} diverges on "
                "these tokens. Take smaller ones."
            )
        best = max(known, key=lambda rate: known[rate])
        heads = self._learned(train, np.arange(len(train.labels)), (float(best),))
        settings = {
            "rate": float(best),
            "held_out_accuracy": known[best][0],
            "tried": tried,
        }
        diverged = len(tried) - len(known)
        notes = {"diverged_rates": diverged} if diverged else {}
        arrays = kept.of_params(jax.tree.map(lambda x: x[0], heads))
        arrays["train_counts"] = np.bincount(train.labels, minlength=train.num_classes)
        facts = {"settings": settings, "notes": notes}
        return kept.Head(kept.ATTENTIVE, arrays, train.num_classes, (), None, facts)

    def _learned(
        self,
        data: SplitFeatures,
        rows: Int[np.ndarray, " rows"],
        rates: Sequence[float],
    ) -> Any:
        """Parameters of a head for each rate, stacked."""
        batch = min(self.batch_size, len(rows))
        steps = max(1, self.epochs * len(rows) // batch)
        head = head_of(data)
        optimizer = optax.chain(
            optax.scale_by_adam(), optax.add_decayed_weights(self.weight_decay)
        )
        tokens = jnp.zeros((1, *data.vectors.shape[-2:]), jnp.float32)
        variables: Any = jax.jit(head.init)(jax.random.key(self.seed), tokens)
        first = flax.core.unfreeze(variables["params"])

        def loss(params, x, y):
            logits: Any = head.apply({"params": params}, x)
            losses: Any = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return jnp.mean(losses)

        def step(params, state, x, y, rates):
            x = x.astype(jnp.float32)
            slopes = jax.vmap(jax.grad(loss), in_axes=(0, None, None))(params, x, y)
            updates, state = jax.vmap(optimizer.update)(slopes, state, params)

            def moved(param, update):
                by = rates.reshape(-1, *[1] * (param.ndim - 1))
                return param - by * update

            return jax.tree.map(moved, params, updates), state

        count = len(rates)
        params = jax.tree.map(lambda x: jnp.stack([x] * count), first)
        state = jax.jit(jax.vmap(optimizer.init))(params)
        jitted = jax.jit(step, donate_argnums=(0, 1))
        generator = np.random.default_rng(self.seed)
        batches = linear.batches_of(rows, generator, batch)
        label = f"{data.what}: {count} heads"
        with progress.Progress(
            progress.console(), label, total=steps, unit="steps"
        ) as bar:
            for number in range(steps):
                taken = next(batches)
                factor = 0.5 * (1 + np.cos(np.pi * number / steps))
                tokens = _finite(data, taken)
                jax.block_until_ready(params)  # else tokens pile up before the device
                params, state = jitted(
                    params,
                    state,
                    tokens,
                    data.labels[taken].astype(np.int32),
                    np.asarray(rates, np.float32) * np.float32(factor),
                )
                bar.show(number + 1)
        return params

    def _logits(
        self, params: Any, data: SplitFeatures, rows: np.ndarray
    ) -> Float[np.ndarray, "rates images classes"]:
        """Of each head, which may not be finite."""
        size = min(self.batch_size, len(rows))
        head = head_of(data)

        def logits(params, x):
            return head.apply({"params": params}, x.astype(jnp.float32))

        jitted = jax.jit(jax.vmap(logits, in_axes=(0, None)))
        parts = []
        for start in range(0, len(rows), size):
            taken = rows[start : start + size]
            filled = np.concatenate([taken, np.repeat(taken[:1], size - len(taken))])
            found = np.asarray(jitted(params, _finite(data, filled)))
            parts.append(found[:, : len(taken)])
        return np.concatenate(parts, axis=1)


def head_of(data: SplitFeatures) -> attentive_head.AttentiveHead:
    """The head for tokens of that width and the classes."""
    return attentive_head.AttentiveHead(data.vectors.shape[-1], data.num_classes)


def _finite(data, numbers):
    """The tokens of some images; UserError naming one that is not finite."""
    tokens = data.vectors[numbers]
    bad = ~np.isfinite(tokens.astype(np.float32)).all(axis=(1, 2))
    if bad.any():
        raise UserError(
            f"the tokens of image {int(numbers[np.argmax(bad)])} of {data.what} hold "
            "numbers that are not finite. The tower or its checkpoint is broken, or "
            "its dtype too narrow: try float32."
        )
    return tokens
