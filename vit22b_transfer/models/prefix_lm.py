"""Image tower + decoder-only text model with prefix-LM masking (PaliGemma's pattern).

The sequence is [image tokens, prompt, target] (arXiv 2407.07726): image and prompt see
each other, the target is causal. It is a module of `multimodal.ImageTextModel`, so
batches, losses, metrics and loops are those of every image-text model.
"""

import dataclasses
from typing import Any

import flax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vit22b_transfer.models import (
    gemma,
    layers,
    losses,
    stacking,
    towers,
    vocabulary_pieces,
)
from vit22b_transfer.models.grouped_attention import KeyValues

EOS_ID = 1


@flax.struct.dataclass
class Prefix:
    """An image and a prompt, ready to be continued.

    key_values: every layer's `KeyValues`; valid: bool [B, P]; last: [B, E], the hidden
    state of the last valid position, which predicts the first token.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    key_values: Any
    valid: Any
    last: Any


def frame_prompt(
    tokens: Int[Array, "batch length"], bos_id: int | None, separator_id: int | None
) -> Int[Array, "batch framed"]:
    """`tokens` (0 = padding behind them) with BOS before and a separator after them.

    The separator takes the place of the EOS with which tasks end their prompts; without
    a separator the EOS stays. Either id may be None.
    """
    if separator_id is not None:
        tokens = jnp.where(tokens == EOS_ID, 0, tokens)
        length = jnp.sum(tokens > 0, axis=1, keepdims=True)
        tokens = jnp.pad(tokens, ((0, 0), (0, 1)))
        place = jnp.arange(tokens.shape[1])[None]
        tokens = jnp.where(place == length, separator_id, tokens)
    if bos_id is not None:
        tokens = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=bos_id)
    return tokens


class PrefixLMModule(nn.Module):
    """The network. `tower=None` leaves the text model alone (the blind baseline).

    bos_id, separator_id: what stands before and after the prompt, see `frame_prompt`;
      PaliGemma's are 2 and 108 (a line break).

    Logits are those of T5's decoder position by position: the first target token is
    predicted by the last valid position of the prefix, and the start token of
    `decoder_tokens` is dropped, as a decoder-only model has no use for it. Image tokens
    are taken as the projection gives them: Gemma scales only embeddings of tokens.
    """

    tower: towers.TowerConfig | None
    text: gemma.GemmaConfig
    bos_id: int | None = None
    separator_id: int | None = None

    def setup(self):
        cfg = self.text
        self.token_embedder = layers.Embedding(
            cfg.vocab_size, cfg.width, cfg.dtype, cfg.param_dtype, scaled_inputs=True
        )
        if self.tower is not None:
            self.encoder = towers.ImageEncoder(self.tower, cfg)
        self.decoder = gemma.TextDecoder(cfg)

    def embed_prefix(
        self, images, tokens: Int[Array, "batch length"]
    ) -> tuple[Float[Array, "batch prefix embed"], Bool[Array, "batch prefix"]]:
        """Image tokens and framed prompt (0 = padding), and which of them are real."""
        tokens = frame_prompt(tokens, self.bos_id, self.separator_id)
        x, valid = self.token_embedder(tokens), tokens > 0
        if self.tower is None:
            return x, valid
        return self.encoder.with_image(images, x, valid)

    def __call__(
        self,
        images,
        prompt_tokens: Int[Array, "batch length"],
        decoder_tokens: Int[Array, "batch targets"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch targets vocab"]:
        """Logits (float32) of every target token, for targets shifted right."""
        return self._logits(self._states(images, prompt_tokens, decoder_tokens, train))

    def token_terms(
        self,
        images,
        prompt_tokens: Int[Array, "batch length"],
        decoder_tokens: Int[Array, "batch targets"],
        targets: Int[Array, "batch targets"],
        *,
        train: bool = False,
    ) -> losses.TokenTerms:
        """What losses and scores of `targets` need; large vocabularies in pieces."""
        x = self._states(images, prompt_tokens, decoder_tokens, train)
        if self.text.vocab_size <= vocabulary_pieces.PIECE:
            return losses.terms_of_logits(self._logits(x), targets)
        table, cap = self.token_embedder.embedding, self.text.logit_softcap
        head = vocabulary_pieces.Head(table, 0, cap)
        before = self.token_embedder.before_logits(x)
        piece = vocabulary_pieces.PIECE
        return vocabulary_pieces.token_terms(before, head, targets, piece=piece)

    def _states(self, images, prompt_tokens, decoder_tokens, train):
        x, valid = self.embed_prefix(images, prompt_tokens)
        prefix_length = x.shape[1]
        suffix = self.token_embedder(decoder_tokens[:, 1:])
        x = jnp.concatenate([x, suffix], axis=1)
        seen = jnp.concatenate([valid, jnp.ones(suffix.shape[:2], bool)], axis=1)
        views = gemma.prefix_lm_views(self.text, seen, prefix_length)
        x = self.decoder(x, views, train=train)
        first = _at_last_valid(x[:, :prefix_length], valid)
        return jnp.concatenate([first, x[:, prefix_length:]], axis=1)

    def prefill(self, images, prompt_tokens: Int[Array, "batch length"]) -> Prefix:
        """The prefix, computed once per example."""
        x, valid = self.embed_prefix(images, prompt_tokens)
        views = gemma.prefix_lm_views(self.text, valid, x.shape[1])
        x, key_values = self.decoder.prefill(x, views)
        return Prefix(key_values, valid, _at_last_valid(x, valid)[:, 0])

    def decode_step(
        self,
        tokens: Int[Array, "batch beams"],
        cache: tuple[KeyValues, ...],
        prefix: Prefix,
        index: Int[Array, ""],
        ancestry: Bool[Array, "batch beams beams time"],
    ):
        """Logits [B, K, V] after step `index`, and the cache with it written.

        What step 0 feeds is not used: the prefix has predicted the first token.
        """
        views = gemma.decode_views(self.text, prefix.valid, index, ancestry)
        place = prefix.valid.shape[1] + index * tokens.shape[1]
        x = self.token_embedder(tokens)
        x, cache = self.decoder.decode_step(x, cache, views, place)
        x = jnp.where(index == 0, prefix.last[:, None], x)
        return self._logits(x), cache

    def _logits(self, x):
        logits, cap = self.token_embedder.attend(x), self.text.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @nn.nowrap
    def start_decoding(self, params: Any, images, tokens, max_decode_length: int):
        """(init_cache, step_fn) for a function of `inference.decoding`.

        The beams share the keys and values of the prefix, which is stored once.
        """
        text = dataclasses.replace(self.text, scan_layers=False)
        module = self.clone(text=text)
        decoder = stacking.unstack_layers(params["decoder"])
        variables = {"params": {**params, "decoder": decoder}}
        prefix = module.apply(variables, images, tokens, method="prefill")

        def init_cache(num_beams: int):
            places = num_beams * max_decode_length
            return gemma.extend_cache(prefix.key_values, places)

        def step_fn(tokens, cache, index, ancestry):
            arguments = tokens, cache, prefix, index, ancestry
            return module.apply(variables, *arguments, method="decode_step")

        return init_cache, step_fn


def _at_last_valid(
    x: Float[Array, "batch length embed"], valid: Bool[Array, "batch length"]
) -> Float[Array, "batch 1 embed"]:
    """x at the last valid position of each row, the first one if none is valid."""
    place = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1])[None], 0), axis=1)
    return jnp.take_along_axis(x, place[:, None, None], axis=1)
