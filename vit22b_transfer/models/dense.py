"""Image tower + head to a map: segmentation and depth, under the model contract.

A training batch has `encoder_input_images` (uint8 [B, H, W, 3]) and `labels` [B, H, W]:
classes from 0 with `NO_CLASS` where there is none, or depths in metres with 0 where
none is known. Losses are taken at that size: maps are resized bilinearly to it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.models import convolutions, dense_heads, freezing, towers

NO_CLASS = -1
# In a batch of depths: 1 in the first `WARM_UP_STEPS` steps, then 0.
WARM_UP = "warm_up"
WARM_UP_STEPS = 100
# Of SigLoss: added to depths in metres, and the share of the squared mean.
_ADDED, _SHARE = 1e-3, 0.15
_LEAST = 1e-12  # below a root, whose slope at 0 is infinite


class DenseEncoder(nn.Module):
    """A tower without pooling, under the top scope `encoder`."""

    tower_config: towers.TowerConfig

    def setup(self):
        self.tower = self.tower_config.without_pooling().build()

    def __call__(
        self, images: UInt8[Array, "batch height width 3"], names: tuple[str, ...]
    ) -> towers.TowerOutput:
        """Tokens and the named blocks."""
        return self.tower(images, intermediates=names)


class DenseModule(nn.Module):
    """The network: what a head says of the patches, at the size of the images."""

    tower: towers.TowerConfig
    head_config: dense_heads.Head
    outputs: int

    def setup(self):
        self.encoder = DenseEncoder(self.tower)
        width: int = self.tower.width  # pyright: ignore[reportAttributeAccessIssue]
        self.head = self.head_config.build(width, self.outputs)

    def __call__(
        self, images: UInt8[Array, "batch height width 3"], *, train: bool = False
    ) -> Float[Array, "batch height width outputs"]:
        """In float32. train: whether batches are normalised by themselves."""
        names = tuple(self.head_config.features or ())
        blocks = (name for name in names if name != dense_heads.TOKENS)
        output = self.encoder(images, tuple(dict.fromkeys(blocks)))
        size = images.shape[1:3]
        grid = self.tower.grid_of(*size)  # pyright: ignore[reportAttributeAccessIssue]
        maps = dense_heads.feature_maps(output, names, grid)
        return convolutions.resized(self.head(maps, train=train), size)


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """One of `num_classes` classes at each point; softmax cross-entropy."""

    num_classes: int

    @property
    def outputs(self) -> int:
        """Numbers at each point: logits."""
        return self.num_classes

    def predicted(
        self, maps: Float[Array, "batch height width outputs"]
    ) -> Float[Array, "batch height width outputs"]:
        """The logits."""
        return maps

    def loss(
        self, maps: Float[Array, "batch height width outputs"], batch: Mapping[str, Any]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(sum over the points that have a class, number of these, at least 1)."""
        labels: Int[Array, "batch height width"] = jnp.asarray(batch["labels"])
        known = labels != NO_CLASS
        chosen = jnp.where(known, labels, 0)[..., None]
        of_class = jnp.take_along_axis(maps, chosen, axis=-1)[..., 0]
        losses = jax.nn.logsumexp(maps, axis=-1) - of_class
        total = jnp.sum(jnp.where(known, losses, 0.0))
        return total, jnp.maximum(jnp.sum(known.astype(jnp.float32)), 1.0)


@dataclasses.dataclass(frozen=True)
class Depth:
    """Metres at each point, between `least` and `most`; SigLoss.

    bins: depth is the mean of so many, evenly from least to most, weighted by what the
      head says of each (DINOv2's linear head); None: the head says the depth beyond
      the least, 0 if that is negative (DPT).
    """

    least: float
    most: float
    bins: int | None

    def __post_init__(self):
        if not 0 < self.least < self.most:
            raise UserError(
                f"depths from {self.least} to {self.most} metres: both must be above "
                "0, and the first below the second."
            )
        if self.bins is not None and self.bins < 2:
            raise UserError(f"bins={self.bins} must be at least 2, or None.")

    @property
    def outputs(self) -> int:
        """Numbers at each point."""
        return self.bins or 1

    def predicted(
        self, maps: Float[Array, "batch height width outputs"]
    ) -> Float[Array, "batch height width 1"]:
        """Metres."""
        if self.bins is None:
            return nn.relu(maps) + self.least
        centres = jnp.linspace(self.least, self.most, self.bins, dtype=maps.dtype)
        weights = nn.relu(maps) + 0.1
        mean = weights @ centres / jnp.sum(weights, axis=-1)
        return mean[..., None]

    def valid(
        self, depths: Float[Array, "batch height width"]
    ) -> Bool[Array, "batch height width"]:
        """Where a depth is known, above the least and below the most."""
        return (depths > self.least) & (depths < self.most)

    def loss(
        self, maps: Float[Array, "batch height width outputs"], batch: Mapping[str, Any]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(SigLoss of all valid points of the batch, 1); 0 of fewer than two points.

        sqrt(variance of g + 0.15 (mean of g)^2), where g is the difference of the
        logarithms; while the batch says `WARM_UP` of the second term alone (DINOv2).
        """
        depths = jnp.asarray(batch["labels"])
        valid = self.valid(depths)
        said = self.predicted(maps)[..., 0]
        known = jnp.where(valid, depths, 1.0)
        gap = jnp.where(valid, jnp.log(said + _ADDED) - jnp.log(known + _ADDED), 0.0)
        count = jnp.sum(valid.astype(jnp.float32))
        mean = jnp.sum(gap) / jnp.maximum(count, 1.0)
        apart = jnp.where(valid, jnp.square(gap - mean), 0.0)
        variance = jnp.sum(apart) / jnp.maximum(count - 1.0, 1.0)
        later = 1.0 - jnp.max(jnp.asarray(batch[WARM_UP]))
        inside = later * variance + _SHARE * jnp.square(mean)
        loss = jnp.sqrt(jnp.maximum(inside, _LEAST))
        return jnp.where(count > 1, loss, 0.0), jnp.ones((), jnp.float32)


class DenseModel:
    """The model contract over a `DenseModule`, as far as a training needs it.

    task: what is said of each point. optimizer_def: an optax transformation.
    train_trunk: whether the tower is trained with the head; else it is frozen.
    """

    FEATURE_CONVERTER_CLS = None
    reads_cached_features = False
    # Batches are normalised by themselves, and SigLoss is of a whole batch.
    loss_spans_batch = True
    given = ()

    def __init__(
        self,
        tower: towers.TowerConfig,
        head: dense_heads.Head,
        task: Segmentation | Depth,
        optimizer_def: Any = None,
        *,
        train_trunk: bool = False,
    ):
        head = dense_heads.of_tower(head, tower)
        self.module = DenseModule(tower, head, task.outputs)
        self.task = task
        self.optimizer_def = optimizer_def
        self.frozen: Sequence[str] = () if train_trunk else (freezing.TOWER,)

    @property
    def loss_per(self) -> str:
        """What the loss is a mean over."""
        return "pixel" if isinstance(self.task, Segmentation) else "batch"

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Iterable[int]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Fresh `params` and their `params_axes`; types are known, and unused."""
        del input_types
        images = jnp.zeros(tuple(input_shapes["encoder_input_images"]), jnp.uint8)
        return flax.core.unfreeze(self.module.init(rng, images))

    def loss_fn(
        self, params: Any, batch: Mapping[str, Any], dropout_rng: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, clu_metrics.Metric]]:
        """(loss as `task.loss`, metrics); in training if there is a random key."""
        train = dropout_rng is not None
        maps: Any = self.module.apply(
            {"params": params},
            jnp.asarray(batch["encoder_input_images"]),
            train=train,
            rngs={"dropout": dropout_rng} if train else {},
        )
        loss, count = self.task.loss(maps, batch)
        return loss, {"loss": clu_metrics.Average(total=loss, count=count)}

    def statistics(self, params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What batch normalisation tells of a training batch; nothing is drawn."""
        _, told = self.module.apply(
            {"params": params},
            jnp.asarray(batch["encoder_input_images"]),
            train=True,
            mutable=[convolutions.BATCH_STATISTICS],
        )
        return flax.core.unfreeze(told).get(convolutions.BATCH_STATISTICS, {})

    def predict(
        self, params: Any, images: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch height width said"]:
        """Logits, or metres, at every pixel."""
        maps: Any = self.module.apply({"params": params}, images)
        return self.task.predicted(maps)
