"""An image that several questions of a batch are about goes through the tower once.

VQAv2 asks about five questions of each image, one behind the other. The images that
differ are encoded a tenth of a batch at a time, so that few of them cost little and one
compiled program serves any number; each question then takes its image's tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vit22b_transfer.inference import predicting
from vit22b_transfer.models import multimodal
from vit22b_transfer.partitioning.rules import Partitioning

IMAGES = "encoder_input_images"
# Parts of a batch that are encoded one by one.
_PARTS = 10


class SharedImages:
    """Predictions of batches whose images repeat, by an `ImageTextModel` with a tower.

    The tokens are those that `predicting.make_predict` computes, but for rounding: of
    a smaller batch, and of another program.
    """

    def __init__(self, model: multimodal.ImageTextModel, partitioning: Partitioning):
        self._model, self._partitioning = model, partitioning
        tower = model.module.tower
        assert tower is not None
        self._tower = tower.without_pooling().build()

    def pays(self, batch: Any) -> bool:
        """Whether half of a batch's images at least are repeated.

        batch: of `data.batches.eval_batches`. Of several processes each sees its own
        rows only: there every image is encoded.
        """
        if len(batch.repeated) < 2 or jax.process_count() > 1:
            return False
        # Of several images per example each would be a row of its own.
        if batch.features[IMAGES].ndim != 4:
            return False
        return 2 * int(batch.repeated.sum()) >= len(batch.repeated)

    def __call__(
        self, params: Any, batch: Any, seed: np.uint32, number: np.uint32
    ) -> tuple[Any, Any]:
        """As a `predicting.Predict`, of a batch with its `repeated`."""
        features = dict(batch.features)
        images, rows = features.pop(IMAGES), len(batch.repeated)
        firsts = np.flatnonzero(~batch.repeated).astype(np.int32)
        size = self._part(rows)
        tokens = None
        for start in range(0, len(firsts), size):
            part = np.resize(firsts[start : start + size], size)
            tokens = self._encode(params, images, part, np.int32(start), tokens)
        of_row = (np.cumsum(~batch.repeated) - 1).astype(np.int32)
        return self._predict(params, features, tokens, of_row, seed, number)

    def _part(self, rows: int) -> int:
        """Images that are encoded at a time: as many on each device."""
        devices = self._partitioning.mesh.shape["data"]
        return -(-rows // _PARTS // devices) * devices

    @functools.cached_property
    def _encode(self):
        """The jitted (params, images, rows, place, tokens so far) -> tokens."""
        sharding = self._partitioning.batch_sharding

        @functools.partial(jax.jit, donate_argnums=4)
        def encode(params, images, rows, start, tokens):
            taken = lax.with_sharding_constraint(images[rows], sharding(images.ndim))
            tower = {"params": params["encoder"]["tower"]}
            output: Any = self._tower.apply(tower, taken)
            if tokens is None:
                places = -(-images.shape[0] // len(rows)) * len(rows)
                tokens = jnp.zeros(
                    (places, *output.tokens.shape[1:]), output.tokens.dtype
                )
            start = (start, jnp.int32(0), jnp.int32(0))
            return lax.dynamic_update_slice(tokens, output.tokens, start)

        return encode

    @functools.cached_property
    def _predict(self):
        """The jitted function of the batch without its images, and their tokens."""
        sharding = self._partitioning.batch_sharding

        def predict(params, features, tokens, of_row, seed, number):
            mine = lax.with_sharding_constraint(tokens[of_row], sharding(3))
            batch = features | {multimodal.FEATURES: mine}
            rng = predicting.example_keys(seed, number, batch)
            return self._model.predict_batch_with_aux(params, batch, rng=rng)

        return jax.jit(predict, out_shardings=self._partitioning.replicated)
