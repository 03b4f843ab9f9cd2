"""A tower's tokens to one vector, by a learned probe that attends to them."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vit22b_transfer.models import layers, vit_blocks


class MapPooling(nn.Module):
    """Multi-head attention pooling: a learned probe attends all tokens, then an MLP.

    As in Zhai et al. 2022, without QK-norm; biases and norm follow the tower.
    members: of rows that hold several images the tokens of each; it is then one vector
    for each image.
    """

    config: vit_blocks.BlockConfig

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch length embed"],
        members: Bool[Array, "batch images length"] | None = None,
    ) -> Float[Array, "batch *images embed"]:
        cfg = self.config
        probe = layers.LearnedTable(
            (1, 1, cfg.width),
            (None, None, "embed"),
            layers.xavier_uniform,
            cfg.param_dtype,
            name="probe",
        )()
        images = 1 if members is None else members.shape[1]
        probe = jnp.broadcast_to(probe, (tokens.shape[0], images, cfg.width))
        x = vit_blocks.block_attention(cfg, qk_norm=False, name="attention")(
            probe.astype(tokens.dtype),
            tokens,
            mask=None if members is None else members[:, None],
        )
        x = x + vit_blocks.block_mlp(cfg, name="mlp")(
            vit_blocks.norm(cfg, name="norm")(x)
        )
        return x[:, 0] if members is None else x
