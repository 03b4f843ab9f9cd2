"""Attention without parameters: softmax(query key^T) value, and rotary positions."""

import functools
import sys
from typing import Literal, get_args

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import products
from vit22b_transfer.models.segments import (
    Segments,
    attend_in_blocks,
    runs_in_blocks,
)

MASKED_LOGIT = -1e10
Form = Literal["auto", "einsum", "cudnn"]
FORMS: tuple[str, ...] = get_args(Form)
# Keys from which on cuDNN's is faster, on an H200: benchmarks/attention_forms.py.
SHORT = 96


def attend(
    query: Float[Array, "batch queries heads kv"],
    key: Float[Array, "batch keys kv_heads kv"],
    value: Float[Array, "batch keys kv_heads kv"],
    *,
    mask: Bool[Array, "#batch 1 #queries keys"] | Segments | None = None,
    bias: Float[Array, "1 heads #queries keys"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    form: Form = "auto",
) -> Float[Array, "batch queries heads kv"]:
    """softmax(scale * query key^T + bias) value; mask True = may attend.

    kv_heads divides heads: a group of query heads shares a key head.
    mask: of `Segments` each token attends to those of its own number, and on a CPU
      `auto` forms no logits between others.
    softcap: bounds the logits: softcap * tanh(logits / softcap).
    form: `einsum` forms the logits, [B, N, Q, K] in float32, and beats every other form
      that was tried on a CPU. `cudnn` is cuDNN's flash attention, which forms none.
      `auto` takes cuDNN's where `cudnn_refuses` has nothing against it.

    The softmax runs in float32 in both.

    Raises:
      UserError: if `cudnn` is asked for where it refuses, or `form` is no form.
    """
    if form not in FORMS:
        raise UserError(f"attention_form is {form!r}; valid are {', '.join(FORMS)}.")
    if isinstance(mask, Segments):
        plain = bias is None and softcap is None and key.shape == query.shape
        if form == "auto" and plain and runs_in_blocks():
            return attend_in_blocks(query, key, value, mask, scale=scale)
        mask = mask.mask
    if form != "einsum":
        why_not = cudnn_refuses(query, key, mask=mask, bias=bias, softcap=softcap)
        if why_not is None:
            _say_once(f"attention: cuDNN's, {query.dtype}, heads of {query.shape[-1]}")
            return _attend_cudnn(query, key, value, mask, bias, scale)
        if form == "cudnn":
            raise UserError(
                f"attention_form is 'cudnn', but {why_not}. Set it to 'auto'."
            )
        if _on_cuda():
            _say_once(f"attention: einsum, since {why_not}")
    batch, queries, heads, _ = query.shape
    kv_heads = key.shape[2]
    query = query * jnp.asarray(scale, query.dtype)
    # In these orders of operands XLA's CPU fusion is 2.5 times faster than in others.
    if kv_heads == heads:
        logits = products.einsum("BQNH,BKNH->BNQK", query, key)
        weights = attention_weights(logits, mask, bias, softcap).astype(value.dtype)
        return products.einsum("BKNH,BNQK->BQNH", value, weights)
    query = query.reshape(batch, queries, kv_heads, heads // kv_heads, -1)
    logits = products.einsum("BQKGH,BSKH->BKGQS", query, key)
    weights = attention_weights(logits, mask, bias, softcap).astype(value.dtype)
    y = products.einsum("BSKH,BKGQS->BQKGH", value, weights)
    return y.reshape(batch, queries, heads, -1)


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
    scaled = query.swapaxes(1, 2) * jnp.asarray(scale, query.dtype)
    logits = products.einsum("BNQH,BNHK->BNQK", scaled.astype(key.dtype), key)
    weights = attention_weights(logits, mask, bias).astype(value.dtype)
    y = products.einsum("BNQK,BNKH->BNQH", weights, value)
    return y.swapaxes(1, 2).astype(query.dtype)


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


def attention_weights(
    logits: Float[Array, "batch *heads queries keys"],
    mask: Bool[Array, "#batch 1 #queries keys"] | None,
    bias: Float[Array, "1 all_heads #queries keys"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "batch *heads queries keys"]:
    """Softmax over the keys in float32, of query heads or of groups of them."""
    logits = logits.astype(jnp.float32)
    if bias is not None:
        bias = bias.astype(jnp.float32)
        logits = logits + bias.reshape(1, *logits.shape[1:-2], *bias.shape[2:])
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if mask is not None:
        mask = mask if logits.ndim == 4 else mask[:, :, None]
        logits = jnp.where(mask, logits, jnp.float32(MASKED_LOGIT))
    return jax.nn.softmax(logits, axis=-1)


def cudnn_refuses(
    query: Float[Array, "batch queries heads kv"],
    key: Float[Array, "batch keys kv_heads kv"],
    *,
    mask: Bool[Array, "#batch 1 #queries keys"] | None = None,
    bias: Float[Array, "1 heads #queries keys"] | None = None,
    softcap: float | None = None,
) -> str | None:
    """Why cuDNN's attention cannot run here or is slower; None if it is taken."""
    dtype, head_dim = jnp.dtype(query.dtype), query.shape[-1]
    if not _on_cuda():
        return f"this process computes on {jax.default_backend()}, not on CUDA"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's takes bfloat16 and float16, not {dtype.name}"
    if head_dim % 8 or head_dim > _largest_head():
        return (
            f"cuDNN's takes heads of multiples of 8 up to {_largest_head()} here, "
            f"not of {head_dim}"
        )
    if softcap is not None:
        return "cuDNN's has no soft bound of its logits"
    if query.shape[1] == 1 or key.shape[1] < SHORT:
        return "for so few queries or keys einsum is faster"
    if mask is not None and head_dim > 128:
        return "with a mask and heads above 128 einsum is faster than cuDNN's"
    if mask is not None and mask.shape[0] > 1 and bias is not None:
        return "each example's own mask and a bias of heads are one array of all pairs"
    odd = query.shape[1] % 2 or key.shape[1] % 2
    if odd and (mask is not None or bias is not None):
        return "cuDNN's takes no odd lengths with a mask or a bias"
    return None


def _on_cuda() -> bool:
    return (
        jax.default_backend() == "gpu"
        and "cuda" in jax.extend.backend.get_backend().platform_version
    )


def _largest_head() -> int:
    """256 from Hopper (9.0) on, 128 before."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return 256 if float(capability) >= 9 else 128


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _attend_cudnn(query, key, value, mask, bias, scale):
    """cuDNN's wants its bias whole in queries and keys, and in the dtype of both.

    Its gradient wants even lengths: what is added is hidden by the lengths given.
    """
    batch, queries = query.shape[:2]
    keys = key.shape[1]
    if queries % 2 or keys % 2:
        out = jax.nn.dot_product_attention(
            _even(query),
            _even(key),
            _even(value),
            scale=scale,
            query_seq_lengths=jnp.full((batch,), queries, jnp.int32),
            key_value_seq_lengths=jnp.full((batch,), keys, jnp.int32),
            implementation="cudnn",
        )
        return out[:, :queries]
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], queries, keys))
        bias = bias.astype(query.dtype)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], queries, keys))
    return jax.nn.dot_product_attention(
        query, key, value, bias, mask, scale=scale, implementation="cudnn"
    )


def _even(x):
    """x with one more position, of zeros, if it has an odd number."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
