"""An image tower's forward pass over images that are packed into rows."""

from typing import Any

import jax.numpy as jnp

from vit22b_transfer import UserError
from vit22b_transfer.models import layers, towers, vit_blocks, vit_positions
from vit22b_transfer.models.packing import PackedImages
from vit22b_transfer.models.vit_pooling import MapPooling


def output(
    tower: Any, packed: PackedImages, intermediates: tuple[str, ...]
) -> towers.TowerOutput:
    """What a `vit.VisionTower` makes of packed images, within its `__call__`."""
    cfg = tower.config
    cfg.check_packable()
    tower.check(packed.patches, intermediates)
    patches, grids = jnp.asarray(packed.patches), jnp.asarray(packed.grids)
    if patches.shape[-1] != 3 * cfg.patch_size**2:
        raise UserError(
            f"packed patches have {patches.shape[-1]} values, but the tower's, of "
            f"{cfg.patch_size}x{cfg.patch_size} pixels, have "
            f"{3 * cfg.patch_size**2}."
        )
    x = tower.project(tower.normalized(patches.reshape(*patches.shape[:2], -1, 3)))
    if cfg.positions == "learned":
        positions = vit_positions.positions_at(
            tower.position_table(),
            cfg.grid_of(*cfg.image_size),
            packed.places,
            grids,
            cfg.position_resampling,
        )
        x = x + positions.astype(x.dtype)
    x = layers.with_sharding_constraint(x, ("batch", "length", "embed"))
    kept = {"stem": x} if "stem" in intermediates else {}
    if cfg.stem_norm:
        x = vit_blocks.norm(cfg, name="stem_norm")(x)
    angles = None
    if cfg.positions == "rotary":
        places = jnp.asarray(packed.places)
        angles = vit_positions.rotary_angles_at(places, grids, cfg.head_dim)
    x = tower.blocks(x, (angles, packed.same_image), intermediates, kept)
    norm = vit_blocks.norm(cfg, name="encoder_norm")
    if cfg.final_norm == "all":
        x = norm(x)
    pooled = None
    if cfg.pooling == "map":
        pooled = MapPooling(cfg, name="map")(x, packed.members)
    elif cfg.pooling == "gap":
        pooled = packed.mean(x)
    if pooled is not None and cfg.final_norm == "pooled":
        pooled = norm(pooled)
    if pooled is not None:
        pooled = packed.of_images(pooled)
    return towers.TowerOutput(x, pooled, kept)
