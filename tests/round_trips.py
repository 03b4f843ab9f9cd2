"""Imported parameters, moved as training moves them, and exported again."""

import jax
import jax.numpy as jnp
import numpy as np

from vit22b_transfer import cli
from vit22b_transfer.checkpoints import writing


def moved(params):
    """The parameters with another small step for each, drawn by their order."""
    rng = np.random.default_rng(0)

    def step(x):
        by = 0.02 * rng.standard_normal(x.shape, np.float32)
        return (x.astype(jnp.float32) + by).astype(x.dtype)

    return jax.tree.map(step, params)


def exported(params, folder, family, config):
    """The directory of an export of a run's checkpoint, by a directory's config."""
    folder.mkdir(exist_ok=True)
    writer = writing.CheckpointWriter(str(folder))
    writer.save(7, {"target": params, "state": {"step": jnp.int32(7)}}, {})
    writer.close()
    out = str(folder / "exported")
    arguments = ["export", str(folder), "--format", family, "--config", str(config)]
    assert cli.main([*arguments, "--out", out]) == 0
    return out
