"""Stacks of equal blocks: scanned or unrolled, rematerialised or not."""

from collections.abc import Sequence

import jax
from flax import linen as nn
from flax.linen.partitioning import scan_with_axes

from vit22b_transfer.models import instruments, products, projections


def unstack_layers(params: dict) -> dict:
    """Parameters of scanned layers as those of unrolled ones.

    Every `layers` subtree, stacked on axis 0, becomes `layers_0`, `layers_1`, ...
    """
    out = {}
    for name, child in params.items():
        if not isinstance(child, dict):
            out[name] = child
        elif name == "layers":
            depth = jax.tree.leaves(child)[0].shape[0]
            for i in range(depth):
                layer = jax.tree.map(lambda x, i=i: x[i], child)
                out[f"layers_{i}"] = layer
        else:
            out[name] = unstack_layers(child)
    return out


def scan_blocks(
    block: type[nn.Module], length: int, num_broadcast: int, num_scanned: int = 0
):
    """`block` applied `length` times with parameters stacked on axis 0.

    `block.__call__(carry, *scanned, *broadcast)` must return `(carry, output)`; it gets
    row i of what is scanned the i-th time; outputs are stacked. The stacked axis is
    named `layers`.
    """
    return scan_with_axes(
        block,
        variable_axes={"params": 0, instruments.COLLECTION: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0,) * num_scanned + (nn.broadcast,) * num_broadcast,
        length=length,
        axis_name="layers",
    )


def remat_block(
    block: type[nn.Module], policy: str, *, scanned: bool, static: Sequence[int] = ()
) -> type[nn.Module]:
    """`block` with rematerialisation: `none`, `dots` or `block`.

    `dots` keeps the results of matmuls with parameters, and of cuDNN's attention;
    `block` keeps the block's input alone.
    """
    if policy == "none":
        return block
    saveable = jax.checkpoint_policies
    policies = {
        "dots": saveable.save_from_both_policies(
            saveable.save_from_both_policies(
                saveable.dots_with_no_batch_dims_saveable, _flash_attention
            ),
            # This may be the sum of many products, which are not kept.
            saveable.save_only_these_names(projections.NAME, products.NAME),
        ),
        "block": saveable.nothing_saveable,
    }
    return nn.remat(
        block,
        policy=policies[policy],
        prevent_cse=not scanned,
        static_argnums=tuple(static),
    )


def _flash_attention(primitive, *_, **__) -> bool:
    """Whether a result is of attention that forms no logits: small, dear to make."""
    return primitive.name.startswith("dot_product_attention_fwd")
