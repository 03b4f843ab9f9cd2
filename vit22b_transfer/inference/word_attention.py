"""Which patches of an image the text model attends as it writes each token.

The tokens that were decoded are fed again, all at once, and the weights are computed a
second time beside the model, from its queries and keys: decoding itself keeps none. In
an encoder-decoder they are those of the cross-attention over the encoder's places of
the image, in a prefix-LM those of the self-attention over the image's tokens. Both have
seen the rest of the image before, so a map says where a token looked, not why.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int32, UInt8

from vit22b_transfer.models import (
    attention,
    encoder_decoder,
    grouped_attention,
    multi_head_attention,
    multimodal,
    prefix_lm,
    products,
    stacking,
)

# The name that every decoder block of `models.t5` gives it.
_CROSS = "encoder_decoder_attention"


def grid_of(
    model: multimodal.ImageTextModel, height: int, width: int
) -> tuple[int, int] | None:
    """Rows and columns of patches of an image; None if the tower has no such grid."""
    find = getattr(model.module.tower, "grid_of", None)
    return None if find is None else find(height, width)


class WordAttention:
    """The weights of each decoded token over the patches, of a tower with a grid."""

    def __init__(self, model: multimodal.ImageTextModel):
        self._module = model.module

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self._weights)

    def __call__(
        self,
        params: Any,
        images: UInt8[Any, "batch height width 3"],
        prompts: Int32[Any, "batch length"],
        tokens: Int32[Any, "batch targets"],
    ) -> Float32[Array, "batch targets patches"]:
        """Weights from 0 to 1, the mean over heads and layers.

        prompts: with EOS, 0 behind it. tokens: decoded ones. The weights of a token add
        up to the share that the image has beside prompt and text, at most 1.
        """
        return self._jitted(params, images, prompts, tokens)

    def _weights(self, params, images, prompts, tokens):
        height, width = images.shape[1:3]
        tower = self._module.tower
        assert tower is not None
        patches = tower.num_tokens(height, width)
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        if isinstance(self._module, prefix_lm.PrefixLMModule):
            found = _of_prefix_lm(
                self._module, params, images, prompts, before, patches
            )
        else:
            found = _of_encoder_decoder(self._module, params, images, prompts, before)
        layers = [weights[:, :, :patches] for weights in found]
        return sum(layers[1:], layers[0]) / len(layers)


def _unrolled(module: Any, params: Any) -> tuple[Any, Any]:
    """The module with layers that can be looked into, and its parameters."""
    text = dataclasses.replace(module.text, scan_layers=False, remat="none")
    decoder = stacking.unstack_layers(params["decoder"])
    return module.clone(text=text), {"params": {**params, "decoder": decoder}}


def _of_encoder_decoder(
    module: encoder_decoder.ImageTextModule, params, images, prompts, before
) -> list[Float[Array, "batch targets keys"]]:
    """Of each layer the weights over the encoder's places, the mean over the heads."""
    found = []

    def look(call, args, kwargs, context):
        asked = context.module
        if isinstance(asked, multi_head_attention.MultiHeadAttention) and (
            asked.name,
            context.method_name,
        ) == (_CROSS, "record"):
            query, key = args
            query = query * jnp.asarray(asked.attention_scale, query.dtype)
            logits = products.einsum("BQNH,BKNH->BNQK", query, key)
            weights = attention.attention_weights(logits, kwargs["mask"])
            found.append(jnp.mean(weights, axis=1))
        return call(*args, **kwargs)

    encoded = module.apply({"params": params}, images, prompts, method="encode")
    module, variables = _unrolled(module, params)
    with nn.intercept_methods(look):
        module.apply(variables, encoded, before, method="decode")
    return found


def _of_prefix_lm(
    module: prefix_lm.PrefixLMModule, params, images, prompts, before, patches: int
) -> list[Float[Array, "batch targets keys"]]:
    """Of each layer the weights of the places that predict a token."""
    framed = prefix_lm.frame_prompt(prompts, module.bos_id, module.separator_id)
    # The last place of the prefix predicts the first token, the fed ones the others.
    last = patches + jnp.sum(framed > 0, axis=1, keepdims=True, dtype=jnp.int32) - 1
    fed = patches + framed.shape[1] + jnp.arange(before.shape[1] - 1, dtype=jnp.int32)
    fed = jnp.broadcast_to(fed[None], (len(last), fed.shape[0]))
    places = jnp.concatenate([last, fed], axis=1)
    found = []

    def look(call, args, kwargs, context):
        asked = context.module
        if (
            isinstance(asked, grouped_attention.GroupedQueryAttention)
            and context.method_name == "__call__"
        ):
            x, view = args
            query, key, _ = asked.project(x, view)
            query = jnp.take_along_axis(query, places[:, :, None, None], axis=1)
            query = query * jnp.asarray(asked.scale, query.dtype)
            query = query.reshape(
                *query.shape[:2], asked.num_kv_heads, -1, asked.head_dim
            )
            logits = products.einsum("BQKGH,BSKH->BKGQS", query, key)
            mask = jnp.take_along_axis(view.mask, places[:, None, :, None], axis=2)
            weights = attention.attention_weights(logits, mask, softcap=asked.softcap)
            found.append(jnp.mean(weights, axis=(1, 2)))
        return call(*args, **kwargs)

    module, variables = _unrolled(module, params)
    with nn.intercept_methods(look):
        module.apply(variables, images, prompts, before)
    return found


def words_of(vocabulary: Any, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
    """(word, places of its tokens) of a decoded text, words being what blanks divide.

    vocabulary: SeqIO's. tokens: without EOS. Tokens that make no text of their own are
    those of the word that comes next, or of the last one.
    """
    words = str(vocabulary.decode(list(tokens))).split()
    found: list[tuple[str, list[int]]] = [(word, []) for word in words]
    for place in range(len(tokens) if words else 0):
        begun = str(vocabulary.decode(list(tokens[: place + 1]))).split()
        found[min(max(len(begun), 1), len(words)) - 1][1].append(place)
    return found
