"""Token losses as (sum, weight) pairs, divided once by whoever holds the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_cross_entropy(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of cross entropy and of the z-loss, and the sum of the weights.

    With smoothing s the target distribution is 1 - s on the target and s spread evenly
    over the other V - 1 tokens; its entropy is subtracted, so that a perfect prediction
    costs nothing (T5X's convention). The z-loss is `z_loss * log(Z)^2` and is part of
    the first sum.
    """
    vocab = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    is_target = jnp.arange(vocab)[None, None] == targets[..., None]
    picked = jnp.sum(jnp.where(is_target, logits, jnp.zeros_like(logits)), axis=-1)
    loss = log_z - picked
    if label_smoothing:
        low = label_smoothing / (vocab - 1)
        high = 1.0 - label_smoothing
        spread = jnp.sum(logits, axis=-1) - picked
        entropy = -(high * jnp.log(high) + (vocab - 1) * low * jnp.log(low + 1e-20))
        loss = log_z - high * picked - low * spread - entropy
    penalty = z_loss * jnp.square(log_z)
    weight = jnp.sum(weights)
    return jnp.sum((loss + penalty) * weights), jnp.sum(penalty * weights), weight


def token_log_probabilities(
    logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """Natural-log probability of each target token."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


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
