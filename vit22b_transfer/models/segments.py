"""Attention within segments of a row: between the tokens of one image, and no others.

On a CPU the logits are formed block by block and never kept (online softmax, Milakov
and Gimelshein 2018), and no block of two that have no segment in common: a row of many
images costs little more than the images apart.
"""

import flax
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from vit22b_transfer.models import products

# Tokens of a block, of queries and of keys: of 64 to 512 the fastest, or close to it,
# at rows of 256 to 4096 tokens.
BLOCK = 128
# Numbers behind those of all segments: of empty tokens, and of what fills a block up.
_EMPTY, _BEYOND = 2**31 - 2, 2**31 - 1
_MASKED = -1e10
_BEFORE_ANY = -1e30


@flax.struct.dataclass
class Segments:
    """A mask that says of every token which segment it is of.

    numbers: int32 [rows, tokens]. A token may attend to those of its own number.
    """

    numbers: Int[Array, "rows tokens"]

    @property
    def mask(self) -> Bool[Array, "rows 1 tokens tokens"]:
        """The same as a mask of all pairs."""
        numbers = jnp.asarray(self.numbers)
        return numbers[:, None, :, None] == numbers[:, None, None, :]


def runs_in_blocks() -> bool:
    """Whether `attend_in_blocks` is the faster form here: on one CPU device.

    It goes through rows and blocks one by one, which would gather rows that are shared
    out among devices, and leave an accelerator idle.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() == "cpu" and mesh.size <= 1


def attend_in_blocks(
    query: Float[Array, "rows tokens heads kv"],
    key: Float[Array, "rows tokens heads kv"],
    value: Float[Array, "rows tokens heads kv"],
    segments: Segments,
    *,
    scale: float = 1.0,
    block: int = BLOCK,
) -> Float[Array, "rows tokens heads kv"]:
    """softmax(scale * query key^T) value within segments, the softmax in float32.

    Right for segments in any order; fast where the tokens of one lie together, and
    those of the number 0 last, which are then empty ones. block: tokens of one.
    """
    rows, tokens, heads, width = query.shape
    block = min(block, tokens)
    blocks = -(-tokens // block)

    def in_blocks(x, fill=0):
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, blocks * block - tokens)
        x = jnp.pad(x, pad, constant_values=fill)
        return x.reshape(rows, blocks, block, *x.shape[2:])

    # Empty tokens last, so that a block of them and of an image spans no others.
    numbers = jnp.where(segments.numbers == 0, _EMPTY, segments.numbers)
    numbers = in_blocks(numbers, _BEYOND)
    query = in_blocks(query * jnp.asarray(scale, query.dtype))
    key, value = in_blocks(key), in_blocks(value)
    least, most = numbers.min(axis=-1), numbers.max(axis=-1)
    meet = (least[:, :, None] <= most[:, None]) & (least[:, None] <= most[:, :, None])

    def attended(place):
        row, mine = place
        own_query, own_numbers = query[row, mine], numbers[row, mine]

        def add(state, other):
            best, total, sums = state
            logits = products.einsum("QNH,KNH->NQK", own_query, key[row, other])
            same = own_numbers[:, None] == numbers[row, other][None]
            masked = jnp.float32(_MASKED)
            logits = jnp.where(same[None], logits.astype(jnp.float32), masked)
            # Any number does as a shift; its gradient would cancel out.
            shift = lax.stop_gradient(jnp.maximum(best, logits.max(axis=-1)))
            weights, kept = jnp.exp(logits - shift[..., None]), jnp.exp(best - shift)
            product = jnp.einsum(
                "NQK,KNH->NQH",
                weights.astype(value.dtype),
                value[row, other],
                preferred_element_type=jnp.float32,
            )
            total = total * kept + weights.sum(axis=-1)
            return shift, total, sums * kept[..., None] + product

        def step(state, other):
            added = lax.cond(meet[row, mine, other], add, lambda s, _: s, state, other)
            return added, None

        nothing = (
            jnp.full((heads, block), _BEFORE_ANY, jnp.float32),
            jnp.zeros((heads, block), jnp.float32),
            jnp.zeros((heads, block, width), jnp.float32),
        )
        (_, total, sums), _ = lax.scan(step, nothing, jnp.arange(blocks))
        return (sums / total[..., None]).swapaxes(0, 1).astype(value.dtype)

    places = jnp.indices((rows, blocks)).reshape(2, -1)
    found = lax.map(attended, (places[0], places[1]))
    return found.reshape(rows, blocks * block, heads, width)[:, :tokens]
