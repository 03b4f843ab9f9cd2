"""A tiny tower with random weights in a checkpoint, as experiments read it."""

import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tiny_models
import tiny_pairs

from vit22b_transfer.checkpoints.writing import CheckpointWriter

SIZE = tiny_models.IMAGE_SIZE
TOWER = tiny_models.tower_config(depth=1)
# The same for a command; {folder} has the checkpoint.
GIN = (
    "from __gin__ import dynamic_registration\n"
    "from vit22b_transfer.models import vit\n"
    "TOWER = @vit.ViTConfig()\n"
    "vit.ViTConfig:\n  width = 32\n  depth = 1\n  mlp_dim = 64\n"
    "  num_heads = 4\n  patch_size = 8\n  image_size = %IMAGE_SIZE\n"
    f"IMAGE_SIZE = {SIZE}\n"
    "INITIAL_CHECKPOINT = '{folder}/tower'\n"
)


def pairs_model():
    """A model of pairs over the tower, its texts bytes."""
    text = tiny_pairs.text_config(depth=1, vocab_size=300, max_length=16)
    module = tiny_pairs.module(TOWER, text)
    return tiny_pairs.model(module_of=module, vocabulary=seqio.ByteVocabulary())


def write_tower(folder, seed=0):
    """A checkpoint of a model of pairs with random parameters; those of its tower."""
    images = jnp.asarray(tiny_models.images(1, *SIZE, 3))
    tokens = jnp.zeros((1, 16), jnp.int32)
    whole = tiny_models.random_params(pairs_model().module, images, tokens, seed=seed)
    params = whole["encoder"]["tower"]
    folder.mkdir()
    writer = CheckpointWriter(str(folder))
    target = jax.tree.map(np.asarray, whole)
    writer.save(0, {"state": {"step": np.int64(0)}, "target": target}, {})
    writer.wait()
    return params
