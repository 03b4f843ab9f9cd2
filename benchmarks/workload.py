"""What the benchmarks run: a B/16-wide tower, a text model of T5-v1.1-base width."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from vit22b_transfer.models import encoder_decoder, multimodal, t5, vit

SIDE, VOCABULARY, TARGETS, PROMPT = 256, 32128, 32, 16


def build_text(dtype, layers):
    """A decoder of T5-v1.1-base's sizes with `layers` layers, no encoder, untied."""
    return t5.T5Config(
        vocab_size=VOCABULARY,
        width=768,
        num_encoder_layers=0,
        num_decoder_layers=layers,
        num_heads=12,
        head_dim=64,
        mlp_dim=2048,
        dtype=dtype,
    )


def build_model(dtype, tower_layers, text_layers, **options):
    """An ImageTextModel of B/16 and T5-v1.1-base widths."""
    tower = vit.vit22b_config(
        "B/16", depth=tower_layers, image_size=(SIDE, SIDE), dtype=dtype
    )
    module = encoder_decoder.ImageTextModule(tower, build_text(dtype, text_layers))
    vocabulary = types.SimpleNamespace(vocab_size=VOCABULARY)
    return multimodal.ImageTextModel(module, vocabulary, vocabulary, **options)


def build_batch(batch_size):
    """Random images, prompts and targets as device arrays."""
    random = np.random.default_rng(0)
    tokens = random.integers(2, VOCABULARY, (batch_size, TARGETS + PROMPT))
    tokens = tokens.astype(np.int32)
    targets = tokens[:, :TARGETS]
    batch = {
        "encoder_input_images": random.integers(
            0, 256, (batch_size, SIDE, SIDE, 3), dtype=np.uint8
        ),
        "encoder_input_tokens": tokens[:, TARGETS:],
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": np.ones((batch_size, TARGETS), np.int32),
    }
    return jax.tree.map(jnp.asarray, batch)


def initial_params(model, batch):
    shapes = {name: feature.shape for name, feature in batch.items()}
    init = jax.jit(lambda rng: model.get_initial_variables(rng, shapes)["params"])
    return init(jax.random.key(0))
