"""A head of videos: a transformer over one vector of each frame, and classes.

ViViT's factorised encoder (Arnab et al. 2021, model 2) behind a tower that has seen
each frame by itself: a class token, learned positions of frames, sequential blocks, a
norm, a linear layer on the class token.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import linen as nn
from jaxtyping import Array, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import layers, vit_blocks

_small = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class TemporalHead:
    """The form of the transformer; ViViT-B's is the default.

    depth: of blocks. head_dim: width of an attention head, which divides that of the
      vectors. mlp_ratio: width of the MLP, times that.
    """

    depth: int = 4
    head_dim: int = 64
    mlp_ratio: int = 4

    def config(self, width: int) -> vit_blocks.BlockConfig:
        """Of its blocks, for vectors of that width.

        Raises:
          UserError: if the heads do not divide it, or a number is below 1.
        """
        if min(self.depth, self.head_dim, self.mlp_ratio) < 1:
            raise UserError(f"{self}: each must be positive.")
        if width % self.head_dim:
            fits = max(n for n in range(1, self.head_dim) if not width % n)
            raise UserError(
                f"the tower's vectors have {width} numbers, which attention heads of "
                f"head_dim={self.head_dim} do not divide. Set TemporalHead.head_dim "
                f"to a divisor, such as {fits}."
            )
        return vit_blocks.BlockConfig(
            width=width,
            depth=self.depth,
            mlp_dim=self.mlp_ratio * width,
            num_heads=width // self.head_dim,
            parallel=False,
            qk_norm=False,
            qkv_bias=True,
            norm_centering=True,
            norm_bias=True,
            attention_form="einsum",
        )


class VideoNetwork(nn.Module):
    """The network, in float32, for clips of `frames` frames."""

    config: vit_blocks.BlockConfig
    frames: int
    num_classes: int

    def setup(self):
        cfg = self.config
        token = layers.LearnedTable((1, 1, cfg.width), (None, None, "embed"), _small)
        self.cls = token
        self.positions = layers.LearnedTable(
            (self.frames + 1, cfg.width), ("abspos_buckets", "embed"), _small
        )
        self.blocks = [vit_blocks.Block(cfg) for _ in range(cfg.depth)]
        self.norm = vit_blocks.norm(cfg)
        self.head = layers.Dense(
            cfg.width,
            self.num_classes,
            ("embed", "classes"),
            kernel_init=nn.initializers.zeros_init(),
        )

    def __call__(
        self, vectors: Float[Array, "batch frames width"]
    ) -> Float[Array, "batch classes"]:
        """Logits of the clips."""
        batch, frames, width = vectors.shape
        if frames != self.frames:
            raise UserError(
                f"a clip has {frames} frames, the head takes {self.frames}."
            )
        token = jnp.broadcast_to(self.cls(), (batch, 1, width))
        x = jnp.concatenate([token, vectors], axis=1) + self.positions()[None]
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x)[:, 0])


class VideoModel:
    """The model contract over a `VideoNetwork`, as far as a training needs it.

    A batch has `frames` [B, F, E], vectors of a tower, and `labels` [B]. The tower is
    no part of it. loss_fn returns the sum of softmax cross-entropies.
    """

    FEATURE_CONVERTER_CLS = None
    reads_cached_features = False
    loss_spans_batch = False
    loss_per = "example"
    frozen = ()
    given = ()

    def __init__(
        self,
        head: TemporalHead,
        *,
        width: int,
        frames: int,
        num_classes: int,
        optimizer_def: Any = None,
    ):
        self.module = VideoNetwork(head.config(width), frames, num_classes)
        self.optimizer_def = optimizer_def

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Iterable[int]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Fresh `params` and their `params_axes`; types are known, and unused."""
        del input_types
        frames = jnp.zeros(tuple(input_shapes["frames"]), jnp.float32)
        return flax.core.unfreeze(self.module.init(rng, frames))

    def loss_fn(
        self, params: Any, batch: Mapping[str, Any], dropout_rng: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, clu_metrics.Metric]]:
        """(sum of the losses, metrics); nothing is drawn."""
        del dropout_rng
        labels = jnp.asarray(batch["labels"])
        logits: Any = self.predict(params, jnp.asarray(batch["frames"]))
        of_class = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        loss = jnp.sum(jax.nn.logsumexp(logits, axis=1) - of_class)
        count = jnp.asarray(len(labels), jnp.float32)
        return loss, {"loss": clu_metrics.Average(total=loss, count=count)}

    def predict(
        self, params: Any, frames: Float[Array, "batch frames width"]
    ) -> Float[Array, "batch classes"]:
        """Logits."""
        logits: Any = self.module.apply({"params": params}, frames)
        return logits
