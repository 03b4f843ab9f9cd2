"""Image towers of the ViT family, from tiny to ViT-22B, and the public ones.

The default is ViT-22B's form (Dehghani et al. 2023, section 2): attention and MLP in
parallel behind one norm, QK-normalisation, no biases on QKV and norms. `classic_config`
gives the sequential pre-LN form of public ViTs (Dosovitskiy et al. 2021). What other
towers do differently is a field each of `BlockConfig` and `ViTConfig`.
"""

import dataclasses
import difflib
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.models import (
    layers,
    packed_tower,
    stacking,
    towers,
    vit_blocks,
    vit_positions,
)
from vit22b_transfer.models.packing import PackedImages
from vit22b_transfer.models.preparation import OWN, Preparation
from vit22b_transfer.models.vit_pooling import MapPooling
from vit22b_transfer.models.vit_positions import RESAMPLINGS, Resampling
from vit22b_transfer.models.vit_variants import parse_variant

Pooling = Literal["map", "gap", "cls", "none"]
FinalNorm = Literal["all", "pooled", "none"]
Positions = Literal["learned", "rotary"]
Remat = Literal["none", "dots", "block"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(vit_blocks.BlockConfig):
    """One tower. The defaults are the ViT-22B form; sizes have no defaults.

    image_size: (height, width) of the resolution that the position table belongs to;
      for other multiples of `patch_size` it is resampled, by `position_resampling`.
    positions: `rotary` turns queries and keys by row and column instead (DINOv3).
    class_token: one token before the patches, which `pooling="cls"` implies; with
      `class_position` it has a position of its own.
    num_registers: further learned tokens after the class token (DINOv2, DINOv3).
    stem_norm: a norm before the first block (CLIP).
    final_norm: of `all` tokens, of the `pooled` vector only (CLIP), or `none`
      (InternViT).
    pooling: of the patch tokens after the final norm, or `cls`: the class token.
    pixel_scale: of pixels from 0 to 255, before the mean is taken off and the deviation
      divided by.
    preparation: how files become pixels of the run's size, which tasks then have to do;
      None leaves it to the tasks.
    """

    patch_size: int
    image_size: tuple[int, int] = (224, 224)
    patch_bias: bool = True
    positions: Positions = "learned"
    position_resampling: Resampling = "bilinear_corners"
    class_token: bool = False
    class_position: bool = False
    num_registers: int = 0
    stem_norm: bool = False
    final_norm: FinalNorm = "all"
    pooling: Pooling = "map"
    scan_layers: bool = False
    remat: Remat = "none"
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_scale: float = 1 / 255
    preparation: Preparation | None = None

    def __post_init__(self):
        super().__post_init__()
        self.grid_of(*self.image_size)
        for name, valid in (
            ("positions", get_args(Positions)),
            ("position_resampling", RESAMPLINGS),
            ("final_norm", get_args(FinalNorm)),
            ("pooling", get_args(Pooling)),
            ("remat", get_args(Remat)),
        ):
            vit_blocks.check_choice(name, getattr(self, name), valid)
        if self.class_position and not (
            self.has_class_token and self.positions == "learned"
        ):
            raise UserError(
                "class_position needs a class token and learned positions. Set "
                "class_token=True, or class_position=False."
            )
        if self.preparation is not None and self.preparation.fit in OWN:
            raise UserError(
                f"the tower's preparation has fit={self.preparation.fit!r}, but what a "
                "tower is given is of one size. Images of their own shapes are packed: "
                "gin_configs/runs/probe_own_shapes.gin, with `vit22b probe`."
            )
        if self.positions == "rotary" and self.head_dim % 4:
            raise UserError(
                f"rotary positions share each head between rows and columns, in pairs, "
                f"but head_dim {self.head_dim} is not divisible by 4."
            )

    @property
    def has_class_token(self) -> bool:
        """Whether a class token stands before the patches."""
        return self.class_token or self.pooling == "cls"

    def build(self) -> "VisionTower":
        """The tower."""
        return VisionTower(self)

    def without_pooling(self) -> "ViTConfig":
        """The same tower without a pooled vector."""
        return dataclasses.replace(self, pooling="none")

    def num_tokens(self, height: int, width: int) -> int:
        """Number of patches of an image."""
        return math.prod(self.grid_of(height, width))

    def token_settings(self) -> dict[str, str]:
        """What decides the tokens beside the weights: see `towers.TowerConfig`."""
        config = dataclasses.replace(
            self,
            pooling="none",
            lora=None,
            scan_layers=False,
            remat="none",
            attention_form="auto",
        )
        settings = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name.endswith("dtype"):  # by name, or as a class
                settings[field.name] = np.dtype(value).name
            elif value != field.default:
                settings[field.name] = str(value)
        return settings

    def check_packable(self) -> None:
        """Raises UserError if the tower cannot take `packing.PackedImages`."""
        if self.has_class_token or self.num_registers:
            raise UserError(
                "the tower has a class token or registers, of which packed images have "
                "none: a row holds patches alone. Give it images of one size, or take "
                "a tower that pools its patches (SigLIP, SigLIP 2 NaFlex)."
            )

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; an uneven division is an error."""
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"image is {height}x{width} but patch_size {self.patch_size} needs "
                f"both sides to be multiples of {self.patch_size}; resize in the task."
            )
        return height // self.patch_size, width // self.patch_size


def vit22b_config(variant: str = "22B/14", **overrides: Any) -> ViTConfig:
    """The ViT-22B form at the size of `variant`; overrides are ViTConfig fields."""
    return ViTConfig(**(parse_variant(variant) | overrides))


def classic_config(variant: str, **overrides: Any) -> ViTConfig:
    """The sequential pre-LN ViT with biases everywhere at the size of `variant`."""
    classic = dict(
        parallel=False,
        qk_norm=False,
        qkv_bias=True,
        norm_centering=True,
        norm_bias=True,
    )
    return ViTConfig(**(parse_variant(variant) | classic | overrides))


class VisionTower(nn.Module):
    """Images to tokens. Pixels are uint8 and are normalised here, on the device."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        images: UInt8[Array, "batch *images height width 3"] | PackedImages,
        *,
        intermediates: tuple[str, ...] = (),
    ) -> towers.TowerOutput:
        """Tokens, pooled vector and the named intermediates.

        Intermediates: `stem` (patches with positions) and `block_0` ... (the residual
        stream after that block, class token and registers first).

        Of `PackedImages` tokens and intermediates are those of the rows, [rows, tokens,
        E], which say nothing where a row is empty; the pooled vectors are [rows,
        images_per_row, E], 0 where there is no image. The parameters are the same.

        Raises:
          UserError: for images that the tower cannot take, packed ones if it has a
            class token or registers, and for unknown intermediates.
        """
        cfg = self.config
        if isinstance(images, PackedImages):
            return packed_tower.output(self, images, intermediates)
        self.check(images, intermediates)
        batch, several = images.shape[0], images.ndim == 5
        images = images.reshape(-1, *images.shape[-3:])
        grid = cfg.grid_of(*images.shape[1:3])
        x = self._embed(images, grid)
        kept = {"stem": x} if "stem" in intermediates else {}
        prefix = self._prefix(x)
        x = jnp.concatenate([*prefix, x], axis=1)
        first = x.shape[1] - grid[0] * grid[1]
        if cfg.stem_norm:
            x = vit_blocks.norm(cfg, name="stem_norm")(x)
        angles = ()
        if cfg.positions == "rotary":
            angles = (
                jnp.asarray(vit_positions.rotary_angles(grid, cfg.head_dim, first)),
            )
        x = self.blocks(x, angles, intermediates, kept)
        norm = vit_blocks.norm(cfg, name="encoder_norm")
        if cfg.final_norm == "all":
            x = norm(x)
        pooled = None
        if cfg.pooling == "cls":
            pooled = x[:, 0]
        x = x[:, first:]
        if cfg.pooling == "map":
            pooled = MapPooling(cfg, name="map")(x)
        elif cfg.pooling == "gap":
            pooled = jnp.mean(x, axis=1)
        if pooled is not None and cfg.final_norm == "pooled":
            pooled = norm(pooled)
        if several and pooled is not None:
            pooled = pooled.reshape(batch, -1, cfg.width)
        return towers.TowerOutput(x.reshape(batch, -1, cfg.width), pooled, kept)

    def check(self, images: Any, intermediates: tuple[str, ...]) -> None:
        """Raises UserError for images that are no uint8, and unknown intermediates."""
        if images.dtype != jnp.uint8:
            raise UserError(
                f"images have dtype {images.dtype}; the tower takes uint8 pixels "
                "(0..255) and normalises them itself."
            )
        valid = ["stem"] + [f"block_{i}" for i in range(self.config.depth)]
        for name in intermediates:
            if name not in valid:
                near = difflib.get_close_matches(name, valid, n=3, cutoff=0.0)
                raise UserError(
                    f"no intermediate {name!r}; nearest: {', '.join(near)}."
                )

    def _table(self, name, shape, axes):
        init = nn.initializers.normal(self.config.width**-0.5)
        param_dtype = self.config.param_dtype
        return layers.LearnedTable(shape, axes, init, param_dtype, name=name)()

    def _embed(self, images: UInt8[Array, "images height width 3"], grid):
        """Normalised pixels to patch embeddings with positions, [n, k, E]."""
        cfg = self.config
        p, (rows, columns) = cfg.patch_size, grid
        pixels = self.normalized(images)
        patches = pixels.reshape(-1, rows, p, columns, p, 3).swapaxes(2, 3)
        x = self.project(patches.reshape(-1, rows * columns, p * p * 3))
        if cfg.positions == "learned":
            table = vit_positions.resample_position_embeddings(
                self.position_table(),
                cfg.grid_of(*cfg.image_size),
                grid,
                cfg.position_resampling,
            )
            x = x + table.astype(x.dtype)[None]
        return layers.with_sharding_constraint(x, ("batch", "length", "embed"))

    def normalized(self, pixels: UInt8[Array, "*pixels 3"]) -> jax.Array:
        """(x * scale - mean) / std with one multiplication and one subtraction."""
        cfg = self.config
        scale = 1.0 / (1 / cfg.pixel_scale * np.asarray(cfg.pixel_std, np.float32))
        shift = np.asarray(cfg.pixel_mean, np.float32) / np.asarray(
            cfg.pixel_std, np.float32
        )
        channels = (1,) * (pixels.ndim - 1) + (3,)
        scale = scale.astype(np.float32).reshape(channels)
        return pixels.astype(jnp.float32) * scale - shift.reshape(channels)

    def project(self, patches: Float[Array, "batch length *patch"]) -> jax.Array:
        """Normalised patches to their embeddings."""
        cfg = self.config
        values = 3 * cfg.patch_size**2
        return layers.Dense(
            values,
            cfg.width,
            ("patch", "embed"),
            use_bias=cfg.patch_bias,
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            kernel_init=nn.initializers.lecun_normal(),
            int8_kernel=cfg.int8_kernels,
            name="patch_embedding",
        )(patches.reshape(*patches.shape[:2], values))

    def position_table(self) -> Float[Array, "positions embed"]:
        """The table of positions, of the tower's own grid."""
        rows, columns = self.config.grid_of(*self.config.image_size)
        shape, axes = (rows * columns, self.config.width), ("abspos_buckets", "embed")
        return self._table("position_embedding", shape, axes)

    def _prefix(self, x) -> list[jax.Array]:
        """The class token and the registers for every image, where there are any."""
        cfg, axes = self.config, (None, None, "embed")
        tokens = []
        if cfg.has_class_token:
            token = self._table("cls", (1, 1, cfg.width), axes)
            if cfg.class_position:
                shape, names = (1, cfg.width), ("abspos_buckets", "embed")
                token = token + self._table("cls_position", shape, names)[None]
            tokens.append(token)
        if cfg.num_registers:
            shape = (1, cfg.num_registers, cfg.width)
            tokens.append(self._table("registers", shape, axes))
        return [
            jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], *token.shape[1:]))
            for token in tokens
        ]

    def blocks(
        self, x: Any, broadcast: tuple, intermediates: tuple[str, ...], kept: dict
    ) -> Any:
        """All blocks; puts the residual streams that are asked for into `kept`.

        broadcast: what each block gets beside x: the angles, and then the mask.
        """
        cfg = self.config
        keep = any(name != "stem" for name in intermediates)
        block = stacking.remat_block(
            vit_blocks.Block, cfg.remat, scanned=cfg.scan_layers
        )
        if cfg.scan_layers:
            stack = stacking.scan_blocks(block, cfg.depth, len(broadcast))
            x, blocks = stack(cfg, keep, name="layers")(x, *broadcast)
        else:
            blocks = []
            for i in range(cfg.depth):
                x, output = block(cfg, keep, name=f"layers_{i}")(x, *broadcast)
                blocks.append(output)
        kept |= {n: blocks[int(n[6:])] for n in intermediates if n != "stem"}
        return x
