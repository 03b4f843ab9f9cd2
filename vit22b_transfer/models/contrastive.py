"""Image tower + text tower, trained on pairs: T5X's model contract over embeddings.

SigLIP and CLIP are this model, and so is LiT: an image tower that is locked. What a
batch holds are pairs; a prediction is the embedding of an image, beside that of its
text and the logit of the two.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.models import (
    contrastive_losses,
    freezing,
    layers,
    text_towers,
    towers,
    vit_blocks,
)

Batch = Mapping[str, jax.Array | np.ndarray]
IMAGES = "encoder_input_images"
TEXTS = "text_tokens"
# 1 for a pair; 0 if its image or text is missing, and of rows that fill up a batch.
WEIGHTS = "pair_weights"

# How the loss of a batch is computed: see `contrastive_losses.chunked_loss`.
Chunking = Literal["recomputed", "autodiff", "none"]


class _ImageSide(nn.Module):
    """Image tower and, if it has one, its projection: T5X's top scope `encoder`."""

    tower_config: towers.TowerConfig
    embed_dim: int
    projected: bool

    def setup(self):
        cfg = self.tower_config
        self.tower = cfg.build()
        if self.projected:
            self.projection = _projection(cfg, self.embed_dim, use_bias=False)

    def __call__(self, images):
        pooled = towers.output_of(self.tower, images).pooled
        return self.projection(pooled) if self.projected else pooled


class _TextSide(nn.Module):
    """Text tower and projection, under the top scope `text`."""

    tower_config: text_towers.TextTowerConfig

    def setup(self):
        cfg = self.tower_config
        self.tower = cfg.build()
        self.projection = _projection(cfg, cfg.embed_dim, use_bias=cfg.projection_bias)

    def __call__(self, tokens, *, train: bool):
        return self.projection(self.tower(tokens, train=train))


def _projection(cfg, embed_dim: int, *, use_bias: bool) -> layers.Dense:
    return layers.Dense(
        cfg.width,
        embed_dim,
        ("mlp", "embed"),
        use_bias=use_bias,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        kernel_init=layers.fan_in_normal,
    )


class ContrastiveModule(nn.Module):
    """The network.

    image_projection: a linear layer without bias from the image tower to embeddings
      as wide as those of texts (CLIP); without it they are what the tower pools, as
      wide as the tower (SigLIP, LiT).
    first_scale: what similarities are multiplied by before training; SigLIP's 10.
    first_bias: what is added to them before training: SigLIP's -10, LiT's -2.71; None
      for a loss without a bias (softmax).
    """

    tower: towers.TowerConfig
    text: text_towers.TextTowerConfig
    image_projection: bool = False
    first_scale: float = 10.0
    first_bias: float | None = -10.0

    def setup(self):
        embed_dim, text = self.text.embed_dim, self.text
        if not self.image_projection and embed_dim != self.tower.width:
            raise UserError(
                f"embed_dim of the text tower is {embed_dim}, but the image tower is "
                f"{self.tower.width} wide and image_projection is False. Set "
                f"embed_dim={self.tower.width}, or image_projection=True."
            )
        if self.first_scale <= 0:
            raise UserError(
                f"first_scale is {self.first_scale}; it must be positive: its "
                "logarithm is learned."
            )
        if getattr(self.tower, "pooling", "") == "none":
            raise UserError(
                "the image tower has no pooled vector to compare with texts. Set its "
                "pooling to map, gap or cls."
            )
        self.encoder = _ImageSide(self.tower, embed_dim, self.image_projection)
        self.text_encoder = _TextSide(text, name="text")
        first, dtype = float(np.log(self.first_scale)), text.param_dtype
        self.logit_scale = layers.LearnedNumber(first, dtype)
        if self.first_bias is not None:
            self.logit_bias = layers.LearnedNumber(self.first_bias, dtype)

    def embed_images(self, images) -> Float[Array, "batch embed"]:
        """Embeddings of uint8 images [B, H, W, 3], of length one, in float32.

        `images` may be the `towers.TowerOutput` of them.
        """
        return contrastive_losses.normalized(self.encoder(images))

    def embed_texts(
        self, tokens: Int[Array, "batch length"], *, train: bool = False
    ) -> Float[Array, "batch embed"]:
        """Embeddings of texts (0 behind them), of length one, in float32."""
        return contrastive_losses.normalized(self.text_encoder(tokens, train=train))

    def scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """What a similarity is multiplied by, and what is added to it."""
        scale = jnp.exp(self.logit_scale())
        return scale, jnp.zeros_like(scale) if self.first_bias is None else (
            self.logit_bias()
        )

    def __call__(self, images, tokens, *, train: bool = False):
        """Embeddings of images and of texts, scale and bias."""
        return (
            self.embed_images(images),
            self.embed_texts(tokens, train=train),
            *self.scale_and_bias(),
        )


class ContrastiveModel:
    """T5X's model contract over a `ContrastiveModule`.

    vocabulary: of the texts.
    optimizer_def: an optax transformation in our runtime, a T5X one under T5X.
    loss: `sigmoid` (SigLIP) or `softmax` (CLIP, LiT).
    chunking: how the matrix of a batch's logits is kept from existing where the batch
      is split over devices: `recomputed`, `autodiff` (`contrastive_losses.chunked_loss`
      says what each keeps), or `none`, the whole matrix. T5X's own evaluation, which
      tells models no mesh, has the whole matrix; its training has not.
    frozen: patterns of parameters that get no gradients and no optimizer state.
    frozen_tower: the image tower is locked.

    loss_fn returns the SUM over the pairs of a batch of their losses: gradients are
    divided by `metrics["loss"].count`, the number of pairs, once.
    """

    # A pair's loss depends on the others of its batch: microbatches are refused.
    loss_spans_batch = True

    def __init__(
        self,
        module: ContrastiveModule,
        vocabulary: Any,
        optimizer_def: Any = None,
        feature_converter_cls: Callable[..., Any] | None = None,
        *,
        loss: contrastive_losses.Form = "sigmoid",
        chunking: Chunking = "recomputed",
        frozen: Sequence[str] = (),
        frozen_tower: bool = False,
    ):
        vit_blocks.check_choice("loss", loss, contrastive_losses.FORMS)
        vit_blocks.check_choice("chunking", chunking, get_args(Chunking))
        if loss == "softmax" and module.first_bias is not None:
            raise UserError(
                f"first_bias is {module.first_bias}, but no bias changes a softmax "
                "loss. Set ContrastiveModule.first_bias=None, or loss='sigmoid'."
            )
        self.module = module
        # T5X asks every model for two.
        self.input_vocabulary = self.output_vocabulary = vocabulary
        self.optimizer_def = optimizer_def
        self.FEATURE_CONVERTER_CLS = feature_converter_cls
        self.loss = loss
        self.chunking = chunking
        self.frozen = freezing.frozen_patterns(frozen, tower=frozen_tower)
        self._check_vocabulary(vocabulary)

    def _check_vocabulary(self, vocabulary):
        text = self.module.text
        if vocabulary.vocab_size > text.vocab_size:
            raise UserError(
                f"the vocabulary has {vocabulary.vocab_size} tokens but the text "
                f"tower's table has {text.vocab_size} rows; set its vocab_size to at "
                "least the vocabulary's size."
            )
        end_id = getattr(vocabulary, "eos_id", text.end_id)
        if end_id != text.end_id:
            raise UserError(
                f"the text tower ends texts with token {text.end_id}, the vocabulary "
                f"with {end_id}. CLIP's tokens (vocab.json, merges.txt) cannot be read "
                "here: tune its image tower with a text tower of your own, or take a "
                "SigLIP, whose SentencePiece file can."
            )

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Iterable[int]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Fresh `params` and their `params_axes`; dtypes are known, types unused."""
        del input_types
        images = jnp.zeros(tuple(input_shapes[IMAGES]), jnp.uint8)
        tokens = jnp.zeros(tuple(input_shapes[TEXTS]), jnp.int32)
        return flax.core.unfreeze(self.module.init(rng, images, tokens))

    def loss_fn(self, params: Any, batch: Batch, dropout_rng: jax.Array | None):
        """(sum of the pairs' losses, metrics): training mode."""
        # T5X keeps parameters in a FrozenDict.
        params = freezing.stop_frozen_gradients(flax.core.unfreeze(params), self.frozen)
        loss, metrics, _ = self._loss(params, batch, dropout_rng)
        return loss, metrics

    def eval_fn(self, params: Any, batch: Batch):
        """(sum of the pairs' losses, metrics) without dropout.

        Beside those of `loss_fn`: how often an image is more like its own text than
        like any other of the batch, and a text likewise.
        """
        loss, metrics, embedded = self._loss(params, batch, None)
        weights = _weights(batch)
        chunked = self.chunking != "none"
        hits = contrastive_losses.nearest_own(*embedded, weights, chunked=chunked)
        count = jnp.sum(weights)
        names = ("image_to_text_accuracy", "text_to_image_accuracy")
        for name, total in zip(names, hits, strict=True):
            metrics[name] = clu_metrics.Average(total=total, count=count)
        return loss, metrics

    def _loss(self, params, batch, dropout_rng):
        images, texts, scale, bias = self._apply(params, batch, dropout_rng)
        weights = _weights(batch)
        arguments = images, texts, scale, bias, weights
        if self.chunking == "none":
            loss = contrastive_losses.whole_loss(*arguments, form=self.loss)
        else:
            loss = contrastive_losses.chunked_loss(
                *arguments, form=self.loss, gradient=self.chunking
            )
        one = jnp.ones((), jnp.float32)
        pairs, rows = jnp.sum(weights), jnp.float32(len(weights))
        metrics = {
            "loss": clu_metrics.Average(total=loss, count=pairs),
            "pair_share": clu_metrics.Average(total=pairs, count=rows),
            "logit_scale": clu_metrics.Average(total=scale, count=one),
        }
        if self.module.first_bias is not None:
            metrics["logit_bias"] = clu_metrics.Average(total=bias, count=one)
        return loss, metrics, (images, texts)

    def _apply(self, params, batch, dropout_rng=None) -> Any:
        return self.module.apply(
            {"params": flax.core.unfreeze(params)},
            towers.images_of(batch),
            jnp.asarray(batch[TEXTS], jnp.int32),
            train=dropout_rng is not None,
            rngs={} if dropout_rng is None else {"dropout": dropout_rng},
        )

    def score_batch(
        self, params: Any, batch: Batch, return_intermediates: bool = False
    ):
        """Logit [B] of each image with its own text; also the embeddings if asked."""
        images, texts, scale, bias = self._apply(params, batch)
        scores = jnp.sum(images * texts, axis=-1) * scale.reshape(1) + bias.reshape(1)
        if not return_intermediates:
            return scores
        return scores, {"image_embeddings": images, "text_embeddings": texts}

    def predict_batch(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> Float[Array, "batch embed"]:
        """Embeddings of the images, of length one."""
        return self.predict_batch_with_aux(params, batch, rng=rng)[0]

    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[Float[Array, "batch embed"], dict[str, Array]]:
        """Embeddings of the images; `scores` of the pairs, and all embeddings again.

        Beside them, since SeqIO's own evaluator takes predictions for token ids.
        """
        del rng
        scores, embeddings = self.score_batch(params, batch, return_intermediates=True)
        return embeddings["image_embeddings"], {"scores": scores, **embeddings}

    def prediction_record(
        self, embedding: np.ndarray, aux: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is told of one example: both embeddings, and the logit of the pair."""
        return {
            "prediction": embedding,
            "score": aux["scores"],
            "text_embeddings": aux["text_embeddings"],
        }


def _weights(batch: Batch) -> jax.Array:
    return jnp.asarray(batch[WEIGHTS], jnp.float32)[:, 0]
