"""Images of various sizes in one array: their patches, laid one image behind another.

A row holds the patches of several images. A token attends to those of its own image
alone, so that each image is what it is alone (NaViT, Dehghani et al. 2023; SigLIP 2
NaFlex, Tschannen et al. 2025, pads one image to a row instead).
`data.image_packing` lays them.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vit22b_transfer.models.segments import Segments


@flax.struct.dataclass
class PackedImages:
    """Rows of patches, each row of the same number of tokens.

    patches: uint8 [rows, tokens, p*p*3]: an image's pixels (0..255) patch by patch, by
      rows, each by rows with the channels last.
    segments: int32 [rows, tokens], which image of its row a token is of, from 1; 0 is
      an empty token.
    places: int32 [rows, tokens, 2], row and column of the patch in its image.
    grids: int32 [rows, tokens, 2], rows and columns of patches that the image has, at
      least 1 of empty tokens too.
    images_per_row: the most images that a row may have, a number of the program.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    patches: Any
    segments: Any
    places: Any
    grids: Any
    images_per_row: int = flax.struct.field(pytree_node=False)

    @property
    def same_image(self) -> Segments:
        """Which token may attend to which. Empty ones attend to empty ones."""
        return Segments(jnp.asarray(self.segments))

    @property
    def members(self) -> Bool[Array, "rows images tokens"]:
        """Which tokens each of the images has that a row may have."""
        numbers = jnp.arange(1, self.images_per_row + 1)
        return jnp.asarray(self.segments)[:, None] == numbers[None, :, None]

    def mean(
        self, tokens: Float[Array, "rows tokens embed"]
    ) -> Float[Array, "rows images embed"]:
        """The mean of each image's tokens, taken in float32; 0 where there is none."""
        members = self.members.astype(jnp.float32)
        counts = jnp.maximum(members.sum(axis=-1, keepdims=True), 1.0)
        total = jnp.einsum(
            "rnt,rte->rne",
            members,
            tokens.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return (total / counts).astype(tokens.dtype)

    def of_images(
        self, vectors: Float[Array, "rows images embed"]
    ) -> Float[Array, "rows images embed"]:
        """The vectors with 0 in place of those of images that are not there."""
        there = self.members.any(axis=-1)[..., None]
        return jnp.where(there, vectors, jnp.zeros((), vectors.dtype))


def no_images(rows: int, tokens: int, patch: int, images_per_row: int) -> PackedImages:
    """Rows of empty tokens, as NumPy's arrays, to be filled; patch: side in pixels."""
    size = (rows, tokens)
    return PackedImages(
        np.zeros((*size, 3 * patch**2), np.uint8),
        np.zeros(size, np.int32),
        np.zeros((*size, 2), np.int32),
        np.ones((*size, 2), np.int32),
        images_per_row,
    )
