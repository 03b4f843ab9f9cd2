"""Random next tokens: temperature, the k most probable, the nucleus."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from vit22b_transfer import UserError


def sample_tokens(
    rng: Array,
    logits: Float[Array, "batch vocab"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Int32[Array, "batch"]:
    """One token per row, drawn as `decoding.sample` says.

    rng: [batch] keys, one for each row.
    """
    vocab_size = logits.shape[-1]
    if top_k > vocab_size:
        raise UserError(f"top_k is {top_k} but the vocabulary has {vocab_size}.")
    scaled = logits.astype(jnp.float32) / temperature
    if top_k == 0:
        return _draw(rng, scaled, top_p)
    scaled, ids = lax.top_k(scaled, top_k)
    drawn = _draw(rng, scaled, top_p)
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _draw(rng, logits, top_p):
    if top_p < 1.0:
        kept = nucleus(jax.nn.softmax(logits), top_p)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(rng, logits).astype(jnp.int32)


def nucleus(
    probs: Float32[Array, "batch vocab"], top_p: float
) -> Bool[Array, "batch vocab"]:
    """The smallest set of most probable tokens with a mass of at least top_p.

    Tokens as probable as the last one that is needed are all in it. The least
    probability that is kept is found by bisection over the bits of a float32 (ordered
    as the floats are, for floats above zero), as sorting a vocabulary costs more than
    a decoder layer.
    """
    bits = lax.bitcast_convert_type(probs, jnp.int32)
    above_one = 0x3F800001

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        mass = jnp.sum(jnp.where(bits >= middle[:, None], probs, 0.0), axis=-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(probs.shape[0], jnp.int32)
    low, _ = lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, above_one)))
    return bits >= low[:, None]
