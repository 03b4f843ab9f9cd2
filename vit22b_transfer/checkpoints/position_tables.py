"""Position tables of a checkpoint, resampled to those of images of another size."""

from collections.abc import Mapping
from typing import Any

import jax

from vit22b_transfer import UserError
from vit22b_transfer.models.vit_positions import resample_position_embeddings

# The tower's, in every model.
TABLE = "encoder/tower/position_embedding/embedding"


def as_of(
    abstract: Mapping[str, Any], model: Any, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Abstract parameters by path, the tower's table as images of that size have it.

    image_size: (height, width) in pixels that a checkpoint was trained with.

    Raises:
      UserError: if there is no table, or it belongs to images of that size already.
    """
    tower: Any = getattr(model.module, "tower", None)
    if TABLE not in abstract:
        raise UserError(
            f"the initial checkpoint's image_size={tuple(image_size)} has no effect: "
            f"the model has no {TABLE}. Leave it out."
        )
    if tuple(image_size) == tuple(tower.image_size):
        raise UserError(
            f"the initial checkpoint's image_size={tuple(image_size)} has no effect: "
            "the model's is the same. Leave it out, or set IMAGE_SIZE to the new size."
        )
    table = abstract[TABLE]
    rows, columns = tower.grid_of(*image_size)
    smaller = jax.ShapeDtypeStruct(
        (rows * columns, table.shape[1]), table.dtype, sharding=table.sharding
    )
    return {**abstract, TABLE: smaller}


def resampled(
    table: jax.Array, abstract: Any, model: Any, image_size: tuple[int, int]
) -> jax.Array:
    """The table [positions, width] of images of that size as the model has it.

    abstract: the model's. By the tower's own way of resampling, in float32.
    """
    tower = model.module.tower
    grids = tower.grid_of(*image_size), tower.grid_of(*tower.image_size)

    def resample(table):
        wide = table.astype("float32")
        new = resample_position_embeddings(wide, *grids, tower.position_resampling)
        return new.astype(table.dtype)

    return jax.jit(resample, out_shardings=abstract.sharding)(table)
