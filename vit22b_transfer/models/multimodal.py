"""Image tower + text model = the model both runtimes train, evaluate and decode.

PaLI-X's pattern (arXiv 2305.18565): patch tokens before pooling go through one linear
projection and stand before the text embeddings at the encoder's input; the decoder
cross-attends and generates. `ImageTextModel` satisfies T5X's model contract by duck
typing; the names of its methods and arguments are T5X's. The decoder-only counterpart
of the module here is `prefix_lm.PrefixLMModule`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vit22b_transfer.models import (
    freezing,
    layers,
    losses,
    prefix_lm,
    stacking,
    t5,
    vit,
)
from vit22b_transfer.models import lora as low_rank

Batch = Mapping[str, jax.Array | np.ndarray]
EOS_ID = prefix_lm.EOS_ID
# In place of `encoder_input_images`: the tower's tokens [B, L, E], from a cache.
FEATURES = "encoder_input_features"
_INPUT_TYPES = {
    "encoder_input_images": jnp.uint8,
    FEATURES: jnp.float32,
    "encoder_input_tokens": jnp.int32,
    "decoder_input_tokens": jnp.int32,
}


@flax.struct.dataclass
class Encoded:
    """Encoder result [B, L, E] and which of its positions are real [B, 1, 1, L]."""

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    encodings: Any
    mask: Any


class ImageTextEncoder(nn.Module):
    """Tower, projection and text encoder under T5X's top scope `encoder`."""

    tower_config: vit.ViTConfig | None
    text_config: t5.T5Config

    def setup(self):
        tower, text = self.tower_config, self.text_config
        if tower is not None:
            self.tower = vit.VisionTower(tower)
            self.projection = layers.Dense(
                tower.width,
                text.width,
                ("mlp", "embed"),
                dtype=text.dtype,
                param_dtype=text.param_dtype,
                kernel_init=layers.fan_in_normal,
            )
        self.text = t5.TextEncoder(text)

    def __call__(self, images, embedded_text, text_mask, *, train: bool) -> Encoded:
        x, mask = embedded_text, text_mask
        if self.tower_config is not None:
            tokens = self.projection(vit.image_tokens(self.tower, images))
            x = jnp.concatenate([tokens, x], axis=1)
            mask = jnp.concatenate([jnp.ones(tokens.shape[:2], bool), mask], axis=1)
        mask = mask[:, None, None]
        return Encoded(self.text(x, mask, train=train), mask)


class ImageTextModule(nn.Module):
    """The network. `tower=None` leaves the text model alone (the blind baseline)."""

    tower: vit.ViTConfig | None
    text: t5.T5Config

    def setup(self):
        cfg = self.text
        self.token_embedder = layers.Embedding(
            cfg.vocab_size, cfg.width, cfg.dtype, cfg.param_dtype
        )
        # Pooling would create parameters that nothing trains.
        tower = self.tower and dataclasses.replace(self.tower, pooling="none")
        self.encoder = ImageTextEncoder(tower, cfg)
        self.decoder = t5.TextDecoder(cfg)

    def encode(self, images, tokens: Int[Array, "batch length"], *, train=False):
        """Images, or their `vit.TowerOutput`, and prompt (0 = padding) to `Encoded`."""
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
        x = self.token_embedder(tokens)
        x = self.decoder(x, encoded.encodings, encoded.mask, train=train)
        return self._logits(x)

    def __call__(self, images, encoder_tokens, decoder_tokens, *, train: bool = False):
        """Logits [B, T, V] in float32 for shifted target tokens."""
        encoded = self.encode(images, encoder_tokens, train=train)
        return self.decode(encoded, decoder_tokens, train=train)

    def cross_key_values(self, encoded: Encoded):
        """Cross-attention keys and values of every decoder layer."""
        return self.decoder.cross_key_values(encoded.encodings)

    def decode_step(
        self,
        tokens: Int[Array, "batch beams"],
        cache: tuple[t5.SelfCache, ...],
        cross: tuple[t5.CrossKeyValues, ...],
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
            return t5.empty_cache(text, batch, num_beams, max_decode_length)

        def step_fn(tokens, cache, index, ancestry):
            arguments = tokens, cache, cross, encoded.mask, index, ancestry
            return module.apply(variables, *arguments, method="decode_step")

        return init_cache, step_fn


def _inputs(batch: Batch) -> tuple[Any, jax.Array]:
    """Images, or what the tower made of them, and prompt tokens of a batch."""
    tokens = jnp.asarray(batch["encoder_input_tokens"], jnp.int32)
    if FEATURES in batch:
        return vit.TowerOutput(jnp.asarray(batch[FEATURES]), None, {}), tokens
    return jnp.asarray(batch["encoder_input_images"]), tokens


def _targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Target tokens of a batch and their loss weights in float32."""
    weights = jnp.asarray(batch["decoder_loss_weights"], jnp.float32)
    return jnp.asarray(batch["decoder_target_tokens"], jnp.int32), weights


def _with_int8_tower(module):
    if module.tower is None:
        raise ValueError("int8_tower is set, but the model has no tower.")
    tower = dataclasses.replace(module.tower, int8_kernels=True)
    return module.clone(tower=tower)


class ImageTextModel:
    """T5X's model contract over an `ImageTextModule` or a `PrefixLMModule`.

    optimizer_def: an optax transformation in our runtime, a T5X one under T5X.
    decode_fn: one of `inference.decoding`, its options bound.
    lora: low-rank updates of kernels in the tower and in the text model.
    int8_tower: the tower's kernels as int8 (`models.int8`); it has to be frozen.
    frozen: patterns of parameters that get no gradients and no optimizer state; by
      default none, or with `lora` all but its updates.
    loss_fn returns the SUM of the token losses: gradients are divided by
    `metrics["loss"].count` once, after all microbatches.
    """

    def __init__(
        self,
        module: ImageTextModule | prefix_lm.PrefixLMModule,
        input_vocabulary: Any,
        output_vocabulary: Any,
        optimizer_def: Any = None,
        decode_fn: Callable[..., Any] | None = None,
        feature_converter_cls: Callable[..., Any] | None = None,
        *,
        frozen: Sequence[str] | None = None,
        lora: low_rank.LoraConfig | None = None,
        int8_tower: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        max_decode_length: int | None = None,
    ):
        if int8_tower:
            module = _with_int8_tower(module)
        self.module = module if lora is None else low_rank.with_lora(module, lora)
        self.lora = lora
        self.input_vocabulary = input_vocabulary
        self.output_vocabulary = output_vocabulary
        self.optimizer_def = optimizer_def
        self.decode_fn = decode_fn
        self.FEATURE_CONVERTER_CLS = feature_converter_cls
        if frozen is None:
            frozen = () if lora is None else low_rank.ALL_BUT_LORA
        self.frozen = tuple(frozen)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.max_decode_length = max_decode_length
        for name, vocabulary in (
            ("input", input_vocabulary),
            ("output", output_vocabulary),
        ):
            if vocabulary.vocab_size > module.text.vocab_size:
                raise ValueError(
                    f"the {name} vocabulary has {vocabulary.vocab_size} tokens but the "
                    f"text model's table has {module.text.vocab_size} rows; set its "
                    "vocab_size to at least the vocabulary's size."
                )

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Sequence[int]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Fresh `params` and their `params_axes`; dtypes are known, types unused.

        For inputs with `encoder_input_features` there are none of the tower.
        """
        del input_types
        batch = {
            name: jnp.zeros(tuple(shape), _INPUT_TYPES[name])
            for name, shape in input_shapes.items()
            if name in _INPUT_TYPES
        }
        targets = batch["decoder_input_tokens"]
        variables = self.module.init(rng, *_inputs(batch), targets)
        variables = flax.core.unfreeze(variables)
        if self.lora is not None:
            low_rank.check_patterns(self.lora, variables["params"])
            if FEATURES in input_shapes:
                low_rank.check_no_tower(self.lora, self.module)
        return variables

    def loss_fn(self, params: Any, batch: Batch, dropout_rng: jax.Array | None):
        """(sum of token losses, metrics): training mode."""
        # T5X keeps parameters in a FrozenDict.
        params = freezing.stop_frozen_gradients(flax.core.unfreeze(params), self.frozen)
        return self._loss(params, batch, dropout_rng)

    def eval_fn(self, params: Any, batch: Batch):
        """(sum of token losses, metrics) without dropout."""
        return self._loss(params, batch, None)

    def _loss(self, params, batch, dropout_rng):
        logits = self._logits(params, batch, dropout_rng)
        targets, weights = _targets(batch)
        loss, penalty, weight = losses.token_cross_entropy(
            logits,
            targets,
            weights,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32) * weights
        real = (jnp.max(weights, axis=-1) > 0).astype(jnp.float32)
        wrong = jnp.sum(weights, axis=-1) - jnp.sum(hits, axis=-1)
        exact = jnp.sum((wrong < 0.5).astype(jnp.float32) * real)
        metrics = {
            "loss": clu_metrics.Average(total=loss, count=weight),
            "z_loss": clu_metrics.Average(total=penalty, count=weight),
            "accuracy": clu_metrics.Average(total=jnp.sum(hits), count=weight),
            "sequence_accuracy": clu_metrics.Average(total=exact, count=jnp.sum(real)),
        }
        return loss, metrics

    def _logits(self, params, batch, dropout_rng=None):
        return self.module.apply(
            {"params": params},
            *_inputs(batch),
            jnp.asarray(batch["decoder_input_tokens"], jnp.int32),
            train=dropout_rng is not None,
            rngs={} if dropout_rng is None else {"dropout": dropout_rng},
        )

    def score_batch(
        self, params: Any, batch: Batch, return_intermediates: bool = False
    ):
        """Log-probability [B] of the target sequence; also the logits if asked."""
        logits = self._logits(params, batch)
        targets, weights = _targets(batch)
        scores = losses.token_log_probabilities(logits, targets)
        scores = jnp.sum(scores * weights, axis=-1)
        return (scores, {"logits": logits}) if return_intermediates else scores

    def predict_batch(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> Int[Array, "batch length"]:
        """Decoded token ids, 0 after the end-of-sequence id."""
        return self.predict_batch_with_aux(params, batch, rng=rng)[0]

    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[Int[Array, "batch length"], dict[str, Float[Array, " batch"]]]:
        """Decoded token ids and their `scores`, by the model's `decode_fn`."""
        if self.decode_fn is None:
            raise ValueError(
                "this model has no decode_fn; pass one of inference.decoding "
                "(greedy, sample, beam_search) to predict."
            )
        images, tokens = _inputs(batch)
        time = self.max_decode_length or batch["decoder_target_tokens"].shape[1]
        # T5X keeps parameters in a FrozenDict.
        params = flax.core.unfreeze(params)
        init_cache, step_fn = self.module.start_decoding(params, images, tokens, time)
        decoded = self.decode_fn(
            init_cache,
            step_fn,
            batch_size=tokens.shape[0],
            max_decode_length=time,
            eos_id=EOS_ID,
            rng=rng,
        )
        return decoded.tokens, {"scores": decoded.scores}
