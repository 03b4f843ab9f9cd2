"""Attention without parameters: softmax(query key^T) value, and rotary positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED_LOGIT = -1e10


def attend(
    query: Float[Array, "batch queries heads kv"],
    key: Float[Array, "batch keys heads kv"],
    value: Float[Array, "batch keys heads kv"],
    *,
    mask: Bool[Array, "#batch 1 #queries keys"] | None = None,
    bias: Float[Array, "1 heads #queries keys"] | None = None,
    scale: float = 1.0,
) -> Float[Array, "batch queries heads kv"]:
    """softmax(scale * query key^T + bias) value; mask True = may attend.

    The softmax runs in float32. Einsum form: on a CPU it beats every other form tried.
    """
    query = query * jnp.asarray(scale, query.dtype)
    logits = jnp.einsum("BQNH,BKNH->BNQK", query, key)
    weights = _attention_weights(logits, mask, bias).astype(value.dtype)
    # In this order of operands XLA's CPU fusion is 2.5 times faster than in the other.
    return jnp.einsum("BKNH,BNQK->BQNH", value, weights)


def attend_cached(
    query: Float[Array, "batch queries heads kv"],
    key: Float[Array, "batch heads kv keys"],
    value: Float[Array, "batch heads keys kv"],
    *,
    mask: Bool[Array, "#batch 1 #queries keys"] | None = None,
    bias: Float[Array, "1 heads #queries keys"] | None = None,
    scale: float = 1.0,
) -> Float[Array, "batch queries heads kv"]:
    """`attend` over keys and values that lie as the matmuls read them.

    In any other layout a decoding loop copies all of them at every step.
    """
    query = query.swapaxes(1, 2) * jnp.asarray(scale, query.dtype)
    logits = jnp.einsum("BNQH,BNHK->BNQK", query, key)
    weights = _attention_weights(logits, mask, bias).astype(value.dtype)
    return jnp.einsum("BNQK,BNKH->BNQH", weights, value).swapaxes(1, 2)


def rotate(
    x: Float[Array, "batch length heads kv"],
    angles: Float[Array, "*#batch #length half"],
) -> Float[Array, "batch length heads kv"]:
    """Rotary positions (Su et al. 2021): element i turns with element i + H/2.

    Angles may be those of all rows, or of each one.
    """
    angles = angles.reshape(-1, angles.shape[-2], 1, angles.shape[-1])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _attention_weights(logits, mask, bias):
    """Softmax over the keys in float32."""
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.float32(MASKED_LOGIT))
    return jax.nn.softmax(logits, axis=-1)
