"""A tower of random weights in a checkpoint, to compare trained ones with."""

import hashlib
import os
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from vit22b_transfer.checkpoints import reading
from vit22b_transfer.checkpoints.writing import CheckpointWriter
from vit22b_transfer.host import locks, whole_files


def checkpoint(tower: Any, directory: str, *, seed: int = 0) -> str:
    """The checkpoint of a `towers.TowerConfig` with fresh weights; made if need be.

    It lies in `directory`, in a folder for the configuration and the seed.
    """
    name = hashlib.sha256(f"{tower!r} {seed}".encode()).hexdigest()[:12]
    folder = whole_files.writable_directory(os.path.join(directory, name), "directory")
    with locks.held(folder):
        if reading.latest_step(folder) is None:
            images = jnp.zeros((1, *tower.image_size, 3), jnp.uint8)
            variables = jax.jit(tower.build().init)(jax.random.key(seed), images)
            params = jax.tree.map(np.asarray, flax.core.unfreeze(variables["params"]))
            target = {"encoder": {"tower": params}}
            writer = CheckpointWriter(folder)
            tree = {"target": target, "state": {"step": np.int64(0)}}
            writer.save(0, tree, {})
            writer.close()
    return folder
