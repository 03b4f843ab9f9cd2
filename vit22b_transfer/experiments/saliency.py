"""What a frozen tower looks at: maps over an image, drawn over it.

Three of them: the gradient of a score by the pixels (Simonyan et al. 2013), the weights
of the tower's attention pooling, and attention rollout through all blocks (Abnar &
Zuidema 2020). The tower is run as it is: attention weights are computed a second time
beside it, from its queries and keys, for these few images alone.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.experiments import heads, measure_pictures, measured
from vit22b_transfer.experiments import vectors as named
from vit22b_transfer.experiments.features import FeatureSource, Split
from vit22b_transfer.host import whole_files
from vit22b_transfer.models import attention, multi_head_attention, stacking

METHODS = ("gradient", "map_attention", "rollout")
_MOST_IMAGES = 256


def overlays(
    *,
    source: FeatureSource,
    images: Split,
    methods: Sequence[str],
    count: int,
    output_dir: str,
    head: str | None = None,
) -> list[dict]:
    """Writes each map over the first images of a split, as PNG files.

    Beside each other stand the image, the map, and both mixed, one image below the
    other. Of each method a number is told: the mean `evenness` of its maps, their
    entropy over that of an even map, in (0, 1].

    methods: of `METHODS`. `gradient` is the largest |slope| of a pixel's channels.
      `map_attention` is the mean over the heads of the attention pooling. `rollout`
      starts at what is read of the last block: the class token, or the patches by the
      pooling's weights, or all alike.
    head: a kept linear or zero-shot head whose best logit the gradient is of; without
      one it is half the squared length of the pooled vector.

    Raises:
      UserError: for an unknown method, one that the tower has not, a head of another
        width, or more than 256 images.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or not 0 < count <= _MOST_IMAGES:
        raise UserError(
            f"methods={tuple(methods)} of {count} images: valid are "
            f"{', '.join(METHODS)}, and up to {_MOST_IMAGES} images."
        )
    if head is not None and "gradient" not in methods:
        raise UserError("a head is for the method 'gradient'; leave it out.")
    kept = None if head is None else heads.read(head)
    pixels, names = source.pictures(images.task, images.split, count)
    run = _Run(source, pixels.shape[1:])
    folder = whole_files.writable_directory(output_dir, "output directory")
    findings, pictures = [], []
    for method in methods:
        if method == "gradient":
            maps = run.gradients(pixels, kept)
        elif method == "map_attention":
            maps = run.pooling_weights(pixels)
        else:
            maps = run.rollout(pixels)
        findings.append(
            measured.Finding(
                "evenness", float(_evennesses(maps)[0]), settings={"method": method}
            )
            if len(maps) < 2
            else measured.mean("evenness", _evennesses(maps), {"method": method})
        )
        path = os.path.join(folder, f"saliency-{images.task}-{method}.png")
        pictures.append(measure_pictures.save_overlays(path, pixels, maps))
    return measured.report(
        "saliency",
        findings,
        protocol={"methods": list(methods), "of": "pooled" if head is None else head},
        facts={
            "features": source.facts(),
            "images": {"task": images.task, "split": images.split, "names": names},
        },
        notes={"images": len(names), "images_left_out": count - len(names)},
        output_dir=output_dir,
        pictures=pictures,
    )


class _Run:
    """A tower whose blocks are not scanned, with its parameters."""

    def __init__(self, source: FeatureSource, shape: tuple[int, ...]):
        config = source.tower
        if not hasattr(config, "grid_of"):
            raise UserError(
                f"{type(config).__name__} has no grid of patches, which maps are drawn "
                "on. Take a tower of the ViT family."
            )
        params = source.parameters(config, shape)
        if config.scan_layers:
            params = stacking.unstack_layers(params)
        self.config = dataclasses.replace(config, scan_layers=False, remat="none")
        self.params, self.grid = params, config.grid_of(*shape[:2])
        self._tower = self.config.build()
        self._mesh = source.partitioning

    def gradients(
        self, pixels: UInt8[np.ndarray, "images height width 3"], head: Any
    ) -> Float[np.ndarray, "images height width"]:
        """The largest |slope| of each pixel's channels, by the normalised pixels."""
        patches = self.grid[0] * self.grid[1]
        side = self.config.patch_size
        names = ("pooled",) if head is None else head.features
        named.check(names or ("pooled",), self.config)
        if head is not None and head.kind == heads.ATTENTIVE:
            raise UserError(
                "the gradient of a head that reads all tokens is not drawn; give a "
                "linear or a zero-shot one, or none."
            )
        asked = named.blocks_of(names)

        def score(added, params, images):
            def add(call, args, kwargs, context):
                called = (context.module.name, context.method_name)
                if called == ("patch_embedding", "__call__"):
                    args = (args[0] + added, *args[1:])
                return call(*args, **kwargs)

            with nn.intercept_methods(add):
                output: Any = self._tower.apply(
                    {"params": params}, images, intermediates=asked
                )
            x = named.stacked(output, names=names, patches=patches)
            x = x.reshape(len(x), -1).astype(jnp.float32)
            if head is None:
                return jnp.sum(jnp.square(x)) / 2
            if x.shape[1] != head.width:
                raise UserError(
                    f"the tower's vectors have {x.shape[1]} numbers, the head reads "
                    f"{head.width}. Take the tower that it was learned on."
                )
            return jnp.sum(jnp.max(head.function()(x), axis=-1))

        slopes = jax.jit(jax.grad(score))
        found = []
        for image in pixels:  # one at a time: a large tower's activations are many
            zeros = jnp.zeros((1, patches, 3 * side**2), jnp.float32)
            with self._mesh.activate():
                slope = np.asarray(slopes(zeros, self.params, image[None]))
            slope = slope.reshape(*self.grid, side, side, 3).swapaxes(1, 2)
            slope = slope.reshape(*pixels.shape[1:3], 3)
            found.append(np.abs(slope).max(axis=-1))
        return _finite(np.stack(found))

    def pooling_weights(
        self, pixels: UInt8[np.ndarray, "images height width 3"]
    ) -> Float[np.ndarray, "images rows columns"]:
        """Weights of the attention pooling, the mean over its heads."""
        if self.config.pooling != "map":
            raise UserError(
                f"the tower has no attention pooling but {self.config.pooling!r}. "
                "Leave map_attention out, or take a tower with pooling='map'."
            )
        found = self._weights(pixels, lambda _, pooling: pooling)
        return found.reshape(len(pixels), *self.grid)

    def rollout(
        self, pixels: UInt8[np.ndarray, "images height width 3"]
    ) -> Float[np.ndarray, "images rows columns"]:
        """What is read of the last block, followed back to the patches."""
        patches = self.grid[0] * self.grid[1]

        def rolled(blocks, pooling):
            length = blocks[0].shape[-1]
            if self.config.pooling == "cls":
                read = jnp.zeros((1, length), jnp.float32).at[:, 0].set(1.0)
            else:
                read = jnp.zeros((1, length), jnp.float32)
                shares = 1.0 / patches if pooling is None else pooling
                read = read.at[:, -patches:].set(shares)
            for weights in blocks[::-1]:
                read = 0.5 * read + 0.5 * jnp.einsum("BK,BKL->BL", read, weights)
            return read[:, -patches:]

        found = self._weights(pixels, rolled)
        return found.reshape(len(pixels), *self.grid)

    def _weights(
        self, pixels: UInt8[np.ndarray, "images height width 3"], reduced: Callable
    ) -> Float[np.ndarray, "images patches"]:
        """What `reduced` makes of the blocks' weights and of the pooling's."""

        def told(params, images):
            blocks: list[Array] = []
            pooling: list[Array] = []

            def look(call, args, kwargs, context):
                module = context.module
                is_attention = isinstance(
                    module, multi_head_attention.MultiHeadAttention
                )
                if is_attention and context.method_name == "record":
                    weights = _attention_of(module, *args[:2])
                    if weights.shape[1] == 1:  # the one query of the pooling
                        pooling.append(weights[:, 0])
                    else:
                        blocks.append(weights)
                return call(*args, **kwargs)

            with nn.intercept_methods(look):
                self._tower.apply({"params": params}, images)
            return reduced(blocks, pooling[0] if pooling else None)

        jitted = jax.jit(told)
        found = []
        for image in pixels:
            with self._mesh.activate():
                found.append(np.asarray(jitted(self.params, image[None]))[0])
        return _finite(np.stack(found))


def _attention_of(
    module: multi_head_attention.MultiHeadAttention,
    query: Float[Array, "batch queries heads kv"],
    key: Float[Array, "batch keys heads kv"],
) -> Float[Array, "batch queries keys"]:
    """The weights that queries and keys make, the mean over the heads, in float32."""
    query = query * jnp.asarray(module.attention_scale, query.dtype)
    logits = jnp.einsum("BQNH,BKNH->BNQK", query, key)
    return jnp.mean(attention.attention_weights(logits, None), axis=1)


def _finite(maps: Float[np.ndarray, "images *shape"]):
    if not np.isfinite(maps).all():
        raise UserError(
            "maps of the tower hold numbers that are not finite. The tower or its "
            "checkpoint is broken, or its dtype too narrow: try float32."
        )
    return maps


def _evennesses(maps: Float[np.ndarray, "images *shape"]) -> np.ndarray:
    """Entropy of each map over that of an even one."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    flat = flat / np.maximum(flat.sum(axis=1, keepdims=True), 1e-300)
    logs = np.log(np.where(flat > 0, flat, 1.0))
    return -np.sum(flat * logs, axis=1) / np.log(flat.shape[1])
