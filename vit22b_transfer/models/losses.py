"""Token losses as (sum, weight) pairs, divided once by whoever holds the batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenTerms(NamedTuple):
    """What token losses, scores and accuracies are made of, [B, T] each.

    log_z: logarithm of the normaliser; picked: logit of the target; total: sum of all
    logits; best: token with the largest logit, the first of equal ones.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    log_z: Any
    picked: Any
    total: Any
    best: Any


def terms_of_logits(
    logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"]
) -> TokenTerms:
    """The terms of whole logits; `vocabulary_pieces` has those of pieces."""
    is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    return TokenTerms(
        jax.nn.logsumexp(logits, axis=-1),
        jnp.sum(jnp.where(is_target, logits, jnp.zeros_like(logits)), axis=-1),
        jnp.sum(logits, axis=-1),
        jnp.argmax(logits, axis=-1),
    )


def token_cross_entropy(
    terms: TokenTerms,
    weights: Float[Array, "batch length"],
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of cross entropy and of the z-loss, and the sum of the weights.

    With smoothing s the target distribution is 1 - s on the target and s spread evenly
    over the other V - 1 tokens; its entropy is subtracted, so that a perfect prediction
    costs nothing (T5X's convention). The z-loss is `z_loss * log(Z)^2` and is part of
    the first sum. vocab_size: V, of the logits.
    """
    loss = terms.log_z - terms.picked
    if label_smoothing:
        low = label_smoothing / (vocab_size - 1)
        high = 1.0 - label_smoothing
        spread = terms.total - terms.picked
        entropy = -(
            high * jnp.log(high) + (vocab_size - 1) * low * jnp.log(low + 1e-20)
        )
        loss = terms.log_z - high * terms.picked - low * spread - entropy
    penalty = z_loss * jnp.square(terms.log_z)
    weight = jnp.sum(weights)
    return jnp.sum((loss + penalty) * weights), jnp.sum(penalty * weights), weight


def softmax_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Cross entropy in nats of softmax against `targets`, which sum to 1 in a row."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def sigmoid_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Binary cross entropy in nats, summed over all classes.

    targets: in [0, 1], any number of them above 0.
    """
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.sum(targets * yes + (1.0 - targets) * no, axis=-1)
