"""Blocks of image towers, parallel or sequential, and attention pooling.

The default block is ViT-22B's (Dehghani et al. 2023, section 2); every other field of
`BlockConfig` is what some public tower does differently.
"""

import dataclasses
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import (
    attention,
    instruments,
    layers,
    multi_head_attention,
    projections,
)
from vit22b_transfer.models.activations import ACTIVATIONS, Activation
from vit22b_transfer.models.lora import LoraConfig
from vit22b_transfer.models.segments import Segments


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block. The defaults are the ViT-22B form; sizes have no defaults.

    qk_norm_per_head: False normalises the heads together (InternViT).
    key_bias: False leaves keys without the bias of `qkv_bias` (DINOv3).
    norm_centering: LayerNorm; False is RMSNorm, of queries and keys too.
    activation: `quick_gelu` is CLIP's; `silu` with `gated_mlp` is SwiGLU.
    layer_scale: factors on what each branch adds (DINOv2, DINOv3, InternViT).
    fused_projections: the in- and the out-projections of a parallel block as one matmul
      each: faster on accelerators, slower on CPUs. Parameters do not depend on it.
    int8_kernels: kernels stored as `models.int8` says; they cannot be trained.
    attention_form: `form` of `attention.attend`; `auto` is the fastest where it runs.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    parallel: bool = True
    qk_norm: bool = True
    qk_norm_per_head: bool = True
    qkv_bias: bool = False
    key_bias: bool = True
    out_bias: bool = True
    norm_centering: bool = False
    norm_bias: bool = False
    norm_epsilon: float = 1e-6
    activation: Activation = "gelu_tanh"
    gated_mlp: bool = False
    layer_scale: bool = False
    fused_projections: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    lora: LoraConfig | None = None
    int8_kernels: bool = False
    attention_form: attention.Form = "auto"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise UserError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}; "
                "every head needs the same head_dim."
            )
        check_choice("activation", self.activation, get_args(Activation))
        if not self.fused_projections:
            return
        if not self.parallel:
            raise UserError(
                "fused_projections needs the parallel block: in a sequential block the "
                "MLP starts from the attention's result. Set one of the two."
            )
        if self.gated_mlp:
            raise UserError("fused_projections has no gated_mlp. Set one of the two.")
        if self.mlp_dim % self.num_heads:
            raise UserError(
                f"fused_projections interleaves the MLP with the heads, but mlp_dim "
                f"{self.mlp_dim} is not divisible by num_heads {self.num_heads}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads


def check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Raises UserError if `value` is none of the valid ones."""
    if value not in valid:
        raise UserError(f"{name} is {value!r}; valid are {', '.join(valid)}.")


class Block(nn.Module):
    """One transformer block in either form; returns (x, x if `keep` else None).

    angles: rotary positions of queries and keys, as `vit_positions.rotary_angles`.
    mask: True where a query may attend to a key; without one everywhere.
    """

    config: BlockConfig
    keep: bool = False

    def setup(self):
        cfg = self.config
        self.norm = norm(cfg)
        self.attention = block_attention(cfg, qk_norm=cfg.qk_norm)
        self.mlp = block_mlp(cfg)
        if not cfg.parallel:
            self.mlp_norm = norm(cfg)
        if cfg.layer_scale:
            self.layer_scale = layers.LayerScale(cfg.width, cfg.param_dtype)
            if not cfg.parallel:
                self.mlp_layer_scale = layers.LayerScale(cfg.width, cfg.param_dtype)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        angles: Float[Array, "*#batch length half"] | None = None,
        mask: Bool[Array, "#batch 1 length length"] | Segments | None = None,
    ):
        scaled = self.config.layer_scale
        if not self.config.fused_projections:
            projections.refuse_separate()
        y = self.norm(x)
        if not self.config.parallel:
            y = self.attention(y, y, angles=angles, mask=mask)
            x = x + (self.layer_scale(y) if scaled else y)
            y = self.mlp(self.mlp_norm(x))
            x = x + (self.mlp_layer_scale(y) if scaled else y)
        else:
            if self.config.fused_projections:
                y = self._fused(y, angles, mask)
            else:
                y = self.attention(y, y, angles=angles, mask=mask) + self.mlp(y)
            x = x + (self.layer_scale(y) if scaled else y)
        x = layers.with_sharding_constraint(x, ("batch", "length", "embed"))
        instruments.record_rms(self, instruments.RESIDUAL, x)
        return x, (x if self.keep else None)

    def _fused(self, y: Float[Array, "batch length embed"], angles, mask):
        """Both branches with one in- and one out-projection.

        Columns are grouped head by head as [query, key, value, mlp / num_heads], so a
        model axis that shards the heads shards the MLP with them and concatenating
        moves nothing between devices.
        """
        cfg, mha, mlp = self.config, self.attention, self.mlp
        heads, dtype = cfg.num_heads, jnp.dtype(cfg.dtype)
        parts = (mha.query, mha.key, mha.value, mlp.wi)

        def by_head(array):
            return array.reshape(*array.shape[:-1], heads, -1)

        kernel = jnp.concatenate([by_head(part.weights) for part in parts], axis=-1)
        z = projections.projection(y.astype(dtype), kernel.reshape(cfg.width, -1))
        z = z.reshape(*y.shape[:2], heads, -1)
        cuts = np.cumsum([cfg.head_dim] * 3)
        query, key, value, hidden = jnp.split(z, cuts, axis=-1)
        query, key, value, hidden = (
            part.complete(branch.reshape(*y.shape[:2], -1), y).reshape(branch.shape)
            for branch, part in zip((query, key, value, hidden), parts, strict=True)
        )
        query, key = mha.normalize(query, key)
        if angles is not None:
            query, key = (attention.rotate(x, angles) for x in (query, key))
        mha.record(query, key, mask=mask)
        weighted = mha.attend(query, key, value, mask=mask)
        hidden = mlp.activation(hidden)
        joined = jnp.concatenate([weighted, hidden], axis=-1)
        out = jnp.concatenate(
            [part.weights.reshape(heads, -1, cfg.width) for part in (mha.out, mlp.wo)],
            axis=1,
        )
        result = projections.projection(
            joined.reshape(*y.shape[:2], -1), out.reshape(-1, cfg.width)
        )
        for part, branch in ((mha.out, weighted), (mlp.wo, hidden)):
            result = part.complete(result, branch.reshape(*y.shape[:2], -1))
        return result


def norm(cfg: BlockConfig, name: str | None = None) -> layers.Norm:
    """The tower's norm over the width."""
    return layers.Norm(
        cfg.width,
        cfg.norm_centering,
        cfg.norm_bias,
        cfg.norm_epsilon,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        name=name,
    )


def block_attention(
    cfg: BlockConfig, *, qk_norm: bool, name: str | None = None
) -> multi_head_attention.MultiHeadAttention:
    """The attention of a tower's blocks, or of its pooling."""
    return multi_head_attention.MultiHeadAttention(
        cfg.width,
        cfg.num_heads,
        cfg.head_dim,
        qkv_bias=cfg.qkv_bias,
        key_bias=cfg.key_bias,
        out_bias=cfg.out_bias,
        qk_norm=qk_norm,
        qk_norm_per_head=cfg.qk_norm_per_head,
        norm_centering=cfg.norm_centering,
        norm_epsilon=cfg.norm_epsilon,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        lora=cfg.lora,
        int8_kernels=cfg.int8_kernels,
        form=cfg.attention_form,
        name=name,
    )


def block_mlp(cfg: BlockConfig, name: str | None = None) -> layers.Mlp:
    """The MLP of a tower's blocks, or of its pooling."""
    return layers.Mlp(
        cfg.width,
        cfg.mlp_dim,
        ACTIVATIONS[cfg.activation],
        gated=cfg.gated_mlp,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        lora=cfg.lora,
        int8_kernels=cfg.int8_kernels,
        name=name,
    )
