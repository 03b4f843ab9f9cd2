"""Image tower and T5-family encoder-decoder: PaLI-X's network."""

import dataclasses
from typing import Any

import flax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vit22b_transfer.models import (
    layers,
    losses,
    stacking,
    t5,
    towers,
    vocabulary_pieces,
)
from vit22b_transfer.models.t5_caches import CrossKeyValues, SelfCache, empty_cache


@flax.struct.dataclass
class Encoded:
    """Encoder result [B, L, E] and which of its positions are real [B, 1, 1, L]."""

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    encodings: Any
    mask: Any


class ImageTextEncoder(towers.ImageEncoder):
    """Tower, projection and text encoder under T5X's top scope `encoder`."""

    def setup(self):
        super().setup()
        self.text = t5.TextEncoder(self.text_config)

    def __call__(self, images, embedded_text, text_mask, *, train: bool) -> Encoded:
        x, mask = self.with_image(images, embedded_text, text_mask)
        mask = mask[:, None, None]
        return Encoded(self.text(x, mask, train=train), mask)


class ImageTextModule(nn.Module):
    """The network. `tower=None` leaves the text model alone (the blind baseline)."""

    tower: towers.TowerConfig | None
    text: t5.T5Config

    def setup(self):
        cfg = self.text
        self.token_embedder = layers.Embedding(
            cfg.vocab_size,
            cfg.width,
            cfg.dtype,
            cfg.param_dtype,
            scaled_logits=cfg.scaled_logits,
        )
        self.encoder = ImageTextEncoder(self.tower, cfg)
        self.decoder = t5.TextDecoder(cfg)

    def encode(self, images, tokens: Int[Array, "batch length"], *, train=False):
        """`Encoded` images (or their `towers.TowerOutput`) and prompt (0 = padding)."""
        return self.encoder(
            images, self.token_embedder(tokens), tokens > 0, train=train
        )

    def decode(
        self,
        encoded: Encoded,
        tokens: Int[Array, "batch targets"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch targets vocab"]:
        """Logits (float32) of every next token, teacher-forced."""
        return self._logits(self._states(encoded, tokens, train))

    def __call__(self, images, encoder_tokens, decoder_tokens, *, train: bool = False):
        """Logits [B, T, V] in float32 for shifted target tokens."""
        encoded = self.encode(images, encoder_tokens, train=train)
        return self.decode(encoded, decoder_tokens, train=train)

    def token_terms(
        self,
        images,
        encoder_tokens,
        decoder_tokens,
        targets: Int[Array, "batch targets"],
        *,
        train: bool = False,
    ) -> losses.TokenTerms:
        """What losses and scores of `targets` need; large vocabularies in pieces."""
        encoded = self.encode(images, encoder_tokens, train=train)
        x = self._states(encoded, decoder_tokens, train)
        if self.text.vocab_size <= vocabulary_pieces.PIECE:
            return losses.terms_of_logits(self._logits(x), targets)
        if self.text.tied_logits:
            head = vocabulary_pieces.Head(self.token_embedder.embedding, 0)
            x = self.token_embedder.before_logits(x)
        else:
            head = vocabulary_pieces.Head(self.decoder.logits_dense.kernel, 1)
        piece = vocabulary_pieces.PIECE
        return vocabulary_pieces.token_terms(x, head, targets, piece=piece)

    def _states(self, encoded, tokens, train):
        x = self.token_embedder(tokens)
        return self.decoder(x, encoded.encodings, encoded.mask, train=train)

    def cross_key_values(self, encoded: Encoded):
        """Cross-attention keys and values of every decoder layer."""
        return self.decoder.cross_key_values(encoded.encodings)

    def decode_step(
        self,
        tokens: Int[Array, "batch beams"],
        cache: tuple[SelfCache, ...],
        cross: tuple[CrossKeyValues, ...],
        encoded_mask: Bool[Array, "batch 1 1 length"],
        index: Int[Array, ""],
        ancestry: Bool[Array, "batch beams beams time"],
    ):
        """Logits [B, K, V] after position `index`, and the cache with it written."""
        x = self.token_embedder(tokens)
        x, cache = self.decoder.decode_step(
            x, cache, cross, encoded_mask, index, ancestry
        )
        return self._logits(x), cache

    def _logits(self, x):
        if self.text.tied_logits:
            return self.token_embedder.attend(x)
        return self.decoder.logits(x)

    @nn.nowrap
    def start_decoding(self, params: Any, images, tokens, max_decode_length: int):
        """(init_cache, step_fn) for a function of `inference.decoding`.

        The image and the prompt are encoded here, once. Layers are unrolled: reading a
        stacked array layer by layer inside the decoding loop costs a copy of the layer
        at every token.
        """
        encoded = self.apply({"params": params}, images, tokens, method="encode")
        text = dataclasses.replace(self.text, scan_layers=False)
        module = self.clone(text=text)
        decoder = stacking.unstack_layers(params["decoder"])
        variables = {"token_embedder": params["token_embedder"], "decoder": decoder}
        variables = {"params": variables}
        cross = module.apply(variables, encoded, method="cross_key_values")

        def init_cache(num_beams: int):
            batch = encoded.mask.shape[0]
            return empty_cache(text, batch, num_beams, max_decode_length)

        def step_fn(tokens, cache, index, ancestry):
            arguments = tokens, cache, cross, encoded.mask, index, ancestry
            return module.apply(variables, *arguments, method="decode_step")

        return init_cache, step_fn
