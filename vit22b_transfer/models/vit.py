"""Image towers of the ViT family, from tiny to ViT-22B, in one module.

The default block is ViT-22B's (Dehghani et al. 2023, section 2): attention and MLP in
parallel behind one norm, QK-normalisation, no biases on QKV and norms. `classic` gives
the sequential pre-LN block of public ViTs (Dosovitskiy et al. 2021).
"""

import dataclasses
import difflib
import functools
from typing import Any, Literal

import flax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from vit22b_transfer.models import layers, stacking


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes of one row of the published tables."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


# Zhai et al. 2022 (arXiv 2106.04560) table 2; So400m: Alabdulmohsin et al. 2023;
# e: Chen et al. 2022 (PaLI); 22B: Dehghani et al. 2023 table 1.
VARIANTS = {
    "Ti": Variant(192, 12, 768, 3),
    "S": Variant(384, 12, 1536, 6),
    "B": Variant(768, 12, 3072, 12),
    "L": Variant(1024, 24, 4096, 16),
    "So400m": Variant(1152, 27, 4304, 16),
    "H": Variant(1280, 32, 5120, 16),
    "g": Variant(1408, 40, 6144, 16),
    "G": Variant(1664, 48, 8192, 16),
    "e": Variant(1792, 56, 15360, 16),
    "22B": Variant(6144, 48, 24576, 48),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """One tower. The defaults are the ViT-22B form; sizes have no defaults.

    `image_size` (height, width) is the resolution the position table belongs to; other
    sizes that are multiples of `patch_size` resample it. `fused_projections` computes
    the in- and the out-projections of a parallel block as one matmul each: faster on
    accelerators, slower on CPUs. Parameters do not depend on it.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    image_size: tuple[int, int] = (224, 224)
    parallel: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = True
    norm_centering: bool = False
    norm_bias: bool = False
    norm_epsilon: float = 1e-6
    gelu_approximate: bool = True
    pooling: Literal["map", "gap", "cls", "none"] = "map"
    fused_projections: bool = False
    scan_layers: bool = False
    remat: Literal["none", "dots", "block"] = "none"
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}; "
                "every head needs the same head_dim."
            )
        self.grid_of(*self.image_size)
        for name, valid in (
            ("pooling", ("map", "gap", "cls", "none")),
            ("remat", ("none", "dots", "block")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; valid are {', '.join(valid)}."
                )
        if self.fused_projections and not self.parallel:
            raise ValueError(
                "fused_projections needs the parallel block: in a sequential block the "
                "MLP starts from the attention's result. Set one of the two."
            )
        if self.fused_projections and self.mlp_dim % self.num_heads:
            raise ValueError(
                f"fused_projections interleaves the MLP with the heads, but mlp_dim "
                f"{self.mlp_dim} is not divisible by num_heads {self.num_heads}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; an uneven division is an error."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image is {height}x{width} but patch_size {self.patch_size} needs "
                f"both sides to be multiples of {self.patch_size}; resize in the task."
            )
        return height // self.patch_size, width // self.patch_size


def parse_variant(name: str) -> dict[str, int]:
    """Sizes for a name such as "B/16": width, depth, mlp_dim, num_heads, patch_size."""
    size, _, patch = name.partition("/")
    if size not in VARIANTS or not (patch.isdecimal() and int(patch)):
        near = difflib.get_close_matches(size, VARIANTS, n=3, cutoff=0.0)
        raise ValueError(
            f"unknown ViT variant {name!r}: write SIZE/PATCH, for example 'B/16'. "
            f"Nearest sizes: {', '.join(near)}; all: {', '.join(VARIANTS)}."
        )
    return dataclasses.asdict(VARIANTS[size]) | {"patch_size": int(patch)}


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


@flax.struct.dataclass
class TowerOutput:
    """What a tower returns.

    tokens: every patch token after the final norm, [B, n*k, E] for n images of k
      patches; the class token is not among them.
    pooled: [B, E] for [B, H, W, 3] images, [B, n, E] for [B, n, H, W, 3]; None without
      pooling.
    intermediates: what was asked for by name, with the n images folded into the batch.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    tokens: Any
    pooled: Any
    intermediates: dict[str, Any]


def resample_position_embeddings(
    table: Float[Array, "positions embed"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
) -> Float[Array, "resampled embed"]:
    """The position table of another grid, bilinear with corners aligned.

    Equals `scipy.ndimage.zoom(order=1)`, which public JAX ViTs use for a resolution
    change; rows and columns are independent, so any aspect ratio works.
    """
    if old_grid == new_grid:
        return table
    grid = table.reshape(*old_grid, -1)
    rows, columns = (
        jnp.asarray(_interpolation(old, new), table.dtype)
        for old, new in zip(old_grid, new_grid, strict=True)
    )
    grid = jnp.einsum("hH,wW,HWE->hwE", rows, columns, grid)
    return grid.reshape(-1, table.shape[-1])


def _interpolation(old: int, new: int) -> np.ndarray:
    """Linear interpolation as a [new, old] matrix, first and last points kept."""
    at = np.linspace(0.0, old - 1, new)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)[None]))


class _Block(nn.Module):
    """One transformer block in either form; returns (x, x if `keep` else None)."""

    config: ViTConfig
    keep: bool = False

    def setup(self):
        cfg = self.config
        self.norm = _norm(cfg)
        self.attention = _attention(cfg, qk_norm=cfg.qk_norm)
        self.mlp = _mlp(cfg)
        if not cfg.parallel:
            self.mlp_norm = _norm(cfg)

    def __call__(self, x: Float[Array, "batch length embed"]):
        if not self.config.parallel:
            y = self.norm(x)
            x = x + self.attention(y, y)
            x = x + self.mlp(self.mlp_norm(x))
        elif self.config.fused_projections:
            x = x + self._fused(self.norm(x))
        else:
            y = self.norm(x)
            x = x + (self.attention(y, y) + self.mlp(y))
        x = layers.with_sharding_constraint(x, ("batch", "length", "embed"))
        return x, (x if self.keep else None)

    def _fused(self, y: Float[Array, "batch length embed"]):
        """Both branches with one in- and one out-projection.

        Columns are grouped head by head as [query, key, value, mlp / num_heads], so a
        model axis that shards the heads shards the MLP with them and concatenating
        moves nothing between devices.
        """
        cfg, attention, mlp = self.config, self.attention, self.mlp
        heads, dtype = cfg.num_heads, jnp.dtype(cfg.dtype)
        parts = (attention.query, attention.key, attention.value, mlp.wi)

        def by_head(array):
            return array.astype(dtype).reshape(*array.shape[:-1], heads, -1)

        kernel = jnp.concatenate([by_head(part.kernel) for part in parts], axis=-1)
        z = layers.linear(y.astype(dtype), kernel.reshape(cfg.width, -1))
        z = z.reshape(*y.shape[:2], heads, -1)
        cuts = np.cumsum([cfg.head_dim] * 3)
        query, key, value, hidden = jnp.split(z, cuts, axis=-1)
        query, key, value, hidden = (
            branch if part.bias is None else branch + by_head(part.bias)[None, None]
            for branch, part in zip((query, key, value, hidden), parts, strict=True)
        )
        query, key = attention.normalize(query, key)
        weighted = layers.attend(query, key, value, scale=attention.attention_scale)
        hidden = mlp.activation(hidden)
        joined = jnp.concatenate([weighted, hidden], axis=-1)
        out = jnp.concatenate(
            [
                part.kernel.astype(dtype).reshape(heads, -1, cfg.width)
                for part in (attention.out, mlp.wo)
            ],
            axis=1,
        )
        result = layers.linear(
            joined.reshape(*y.shape[:2], -1), out.reshape(-1, cfg.width)
        )
        for part in (attention.out, mlp.wo):
            if part.bias is not None:
                result = layers.add_bias(result, part.bias)
        return result


def _norm(cfg: ViTConfig, name: str | None = None) -> layers.Norm:
    return layers.Norm(
        cfg.width,
        cfg.norm_centering,
        cfg.norm_bias,
        cfg.norm_epsilon,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        name=name,
    )


def _attention(
    cfg: ViTConfig, *, qk_norm: bool, name: str | None = None
) -> layers.MultiHeadAttention:
    return layers.MultiHeadAttention(
        cfg.width,
        cfg.num_heads,
        cfg.head_dim,
        qkv_bias=cfg.qkv_bias,
        out_bias=cfg.out_bias,
        qk_norm=qk_norm,
        norm_centering=cfg.norm_centering,
        norm_epsilon=cfg.norm_epsilon,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        name=name,
    )


def _mlp(cfg: ViTConfig, name: str | None = None) -> layers.Mlp:
    return layers.Mlp(
        cfg.width,
        cfg.mlp_dim,
        functools.partial(nn.gelu, approximate=cfg.gelu_approximate),
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        name=name,
    )


class MapPooling(nn.Module):
    """Multi-head attention pooling: a learned probe attends all tokens, then an MLP.

    As in Zhai et al. 2022, without QK-norm; biases and norm follow the tower.
    """

    config: ViTConfig

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch embed"]:
        cfg = self.config
        probe = layers.LearnedTable(
            (1, 1, cfg.width),
            (None, None, "embed"),
            layers.xavier_uniform,
            cfg.param_dtype,
            name="probe",
        )()
        probe = jnp.broadcast_to(probe, (tokens.shape[0], 1, cfg.width))
        attention = _attention(cfg, qk_norm=False, name="attention")
        x = attention(probe.astype(tokens.dtype), tokens)
        x = x + _mlp(cfg, name="mlp")(_norm(cfg, name="norm")(x))
        return x[:, 0]


class VisionTower(nn.Module):
    """Images to tokens. Pixels are uint8 and are normalised here, on the device."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        images: UInt8[Array, "batch *images height width 3"],
        *,
        intermediates: tuple[str, ...] = (),
    ) -> TowerOutput:
        """Tokens, pooled vector and the named intermediates.

        Intermediates: `stem` (patches with positions) and `block_0` ... (the residual
        stream after that block).
        """
        cfg = self.config
        self._check(images, intermediates)
        batch, several = images.shape[0], images.ndim == 5
        x = self._embed(images.reshape(-1, *images.shape[-3:]))
        kept = {"stem": x} if "stem" in intermediates else {}
        if cfg.pooling == "cls":
            cls = self._table("cls", (1, 1, cfg.width), (None, None, "embed"))
            cls = jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, cfg.width))
            x = jnp.concatenate([cls, x], axis=1)
        x, blocks = self._blocks(x, any(n != "stem" for n in intermediates))
        kept |= {n: blocks[int(n[6:])] for n in intermediates if n != "stem"}
        x = _norm(cfg, name="encoder_norm")(x)
        pooled = None
        if cfg.pooling == "cls":
            pooled, x = x[:, 0], x[:, 1:]
        elif cfg.pooling == "map":
            pooled = MapPooling(cfg, name="map")(x)
        elif cfg.pooling == "gap":
            pooled = jnp.mean(x, axis=1)
        if several and pooled is not None:
            pooled = pooled.reshape(batch, -1, cfg.width)
        return TowerOutput(x.reshape(batch, -1, cfg.width), pooled, kept)

    def _check(self, images, intermediates):
        if images.dtype != jnp.uint8:
            raise ValueError(
                f"images have dtype {images.dtype}; the tower takes uint8 pixels "
                "(0..255) and normalises them itself."
            )
        valid = ["stem"] + [f"block_{i}" for i in range(self.config.depth)]
        for name in intermediates:
            if name not in valid:
                near = difflib.get_close_matches(name, valid, n=3, cutoff=0.0)
                raise ValueError(
                    f"no intermediate {name!r}; nearest: {', '.join(near)}."
                )

    def _table(self, name, shape, axes):
        init = nn.initializers.normal(self.config.width**-0.5)
        param_dtype = self.config.param_dtype
        return layers.LearnedTable(shape, axes, init, param_dtype, name=name)()

    def _embed(self, images: UInt8[Array, "images height width 3"]):
        """Normalised pixels to patch embeddings with positions, [n, k, E]."""
        cfg = self.config
        p, (rows, columns) = cfg.patch_size, cfg.grid_of(*images.shape[1:3])
        # (x / 255 - mean) / std with one multiplication and one subtraction
        scale = 1.0 / (255.0 * np.asarray(cfg.pixel_std, np.float32))
        shift = np.asarray(cfg.pixel_mean, np.float32) / np.asarray(
            cfg.pixel_std, np.float32
        )
        pixels = images.astype(jnp.float32) * scale.astype(np.float32)[
            None, None, None
        ] - shift.reshape(1, 1, 1, 3)
        patches = pixels.reshape(-1, rows, p, columns, p, 3).swapaxes(2, 3)
        x = layers.Dense(
            p * p * 3,
            cfg.width,
            ("patch", "embed"),
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            kernel_init=nn.initializers.lecun_normal(),
            name="patch_embedding",
        )(patches.reshape(-1, rows * columns, p * p * 3))
        grid = cfg.grid_of(*cfg.image_size)
        table = self._table(
            "position_embedding",
            (grid[0] * grid[1], cfg.width),
            ("abspos_buckets", "embed"),
        )
        table = resample_position_embeddings(table, grid, (rows, columns))
        x = x + table.astype(x.dtype)[None]
        return layers.with_sharding_constraint(x, ("batch", "length", "embed"))

    def _blocks(self, x, keep: bool):
        """All blocks; the second result indexes the kept residual streams by depth."""
        cfg = self.config
        block = stacking.remat_block(_Block, cfg.remat, scanned=cfg.scan_layers)
        if cfg.scan_layers:
            stack = stacking.scan_blocks(block, cfg.depth, num_broadcast=0)
            return stack(cfg, keep, name="layers")(x)
        kept = []
        for i in range(cfg.depth):
            x, output = block(cfg, keep, name=f"layers_{i}")(x)
            kept.append(output)
        return x, kept
