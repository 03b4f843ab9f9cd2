"""A tiny contrastive model, batches of pairs as their converter makes them."""

import jax.numpy as jnp
import numpy as np
import tiny_models

from vit22b_transfer.data.pair_converters import PairFeatureConverter
from vit22b_transfer.models import contrastive, text_towers

TEXT_LENGTH = 6
LENGTHS = {"images": tiny_models.IMAGE_SIZE[0], "targets": TEXT_LENGTH}
CLASSIC = dict(
    parallel=False, qk_norm=False, qkv_bias=True, norm_centering=True, norm_bias=True
)


def text_config(**overrides):
    """A text tower of two SigLIP blocks; overrides are TransformerConfig fields."""
    sizes = dict(width=24, depth=2, mlp_dim=48, num_heads=4, max_length=TEXT_LENGTH)
    sizes |= dict(vocab_size=tiny_models.VOCAB_SIZE, embed_dim=32)
    return text_towers.TransformerConfig(**(sizes | CLASSIC | overrides))


def module(tower=None, text=None, **fields):
    tower = tower or tiny_models.tower_config(depth=1)
    return contrastive.ContrastiveModule(tower, text or text_config(depth=1), **fields)


def model(optimizer_def=None, *, module_of=None, vocabulary=None, **arguments):
    """A `ContrastiveModel`; arguments are the constructor's."""
    return contrastive.ContrastiveModel(
        module_of or module(),
        vocabulary or tiny_models.Vocabulary(),
        optimizer_def,
        PairFeatureConverter,
        **arguments,
    )


def batch(size=8, seed=0, *, missing=()):
    """Pairs of all text lengths; rows that are `missing` are no pairs."""
    drawn = tiny_models.batch(size, targets=TEXT_LENGTH, seed=seed)
    weights = np.ones((size, 1), np.float32)
    weights[list(missing)] = 0
    return {
        contrastive.IMAGES: drawn["encoder_input_images"],
        contrastive.TEXTS: drawn["decoder_target_tokens"],
        contrastive.WEIGHTS: weights,
    }


def params(model, seed=0):
    """Random parameters of a model."""
    drawn = batch(1)
    made = tiny_models.random_params(
        model.module,
        jnp.asarray(drawn[contrastive.IMAGES]),
        jnp.asarray(drawn[contrastive.TEXTS]),
        seed=seed,
    )
    made["logit_scale"]["value"] = jnp.float32(np.log(10.0))
    return made
