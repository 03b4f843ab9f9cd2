"""Image tower + text model = the model both runtimes train, evaluate and decode.

PaLI-X's pattern (arXiv 2305.18565): patch tokens before pooling go through one linear
projection and stand before the text embeddings at the encoder's input; the decoder
cross-attends and generates. `ImageTextModel` satisfies T5X's model contract by duck
typing; the names of its methods and arguments are T5X's. The decoder-only counterpart
of the module here is `prefix_lm.PrefixLMModule`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from jaxtyping import Array, Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.models import (
    attention,
    encoder_decoder,
    freezing,
    losses,
    prefix_lm,
    towers,
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


def _inputs(batch: Batch) -> tuple[Any, jax.Array]:
    """Images, or what the tower made of them, and prompt tokens of a batch."""
    tokens = jnp.asarray(batch["encoder_input_tokens"], jnp.int32)
    if FEATURES in batch:
        return towers.TowerOutput(jnp.asarray(batch[FEATURES]), None, {}), tokens
    return towers.images_of(batch), tokens


def _targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Target tokens of a batch and their loss weights in float32."""
    weights = jnp.asarray(batch["decoder_loss_weights"], jnp.float32)
    return jnp.asarray(batch["decoder_target_tokens"], jnp.int32), weights


def _with_int8_tower(module):
    if module.tower is None:
        raise UserError("int8_tower is set, but the model has no tower.")
    tower = towers.changed(module.tower, "int8_tower", int8_kernels=True)
    return module.clone(tower=tower)


class ImageTextModel:
    """T5X's model contract over an `ImageTextModule` or a `PrefixLMModule`.

    optimizer_def: an optax transformation in our runtime, a T5X one under T5X.
    decode_fn: one of `inference.decoding`, its options bound.
    frozen: patterns of parameters that get no gradients and no optimizer state; what
      the next three freeze comes to these.
    frozen_tower: the tower stays as it is, and gets no low-rank updates.
    lora: low-rank updates of kernels in the tower and in the text model; all else is
      frozen, except for what its `trained` names.
    int8_tower: the tower's kernels as int8 (`models.int8`); all of it but low-rank
      updates is frozen.
    loss_fn returns the SUM of the token losses: gradients are divided by
    `metrics["loss"].count` once, after all microbatches.
    """

    def __init__(
        self,
        module: encoder_decoder.ImageTextModule | prefix_lm.PrefixLMModule,
        input_vocabulary: Any,
        output_vocabulary: Any,
        optimizer_def: Any = None,
        decode_fn: Callable[..., Any] | None = None,
        feature_converter_cls: Callable[..., Any] | None = None,
        *,
        frozen: Sequence[str] = (),
        frozen_tower: bool = False,
        lora: low_rank.LoraConfig | None = None,
        int8_tower: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        max_decode_length: int | None = None,
    ):
        if int8_tower:
            module = _with_int8_tower(module)
        if lora is not None:
            module = low_rank.with_lora(module, lora, in_tower=not frozen_tower)
        self.module = module
        self.lora = lora
        self.frozen_tower = frozen_tower
        self.frozen = freezing.frozen_patterns(
            frozen, tower=frozen_tower, int8_tower=int8_tower, lora=lora
        )
        self.input_vocabulary = input_vocabulary
        self.output_vocabulary = output_vocabulary
        self.optimizer_def = optimizer_def
        self.decode_fn = decode_fn
        self.FEATURE_CONVERTER_CLS = feature_converter_cls
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.max_decode_length = max_decode_length
        for name, vocabulary in (
            ("input", input_vocabulary),
            ("output", output_vocabulary),
        ):
            if vocabulary.vocab_size > module.text.vocab_size:
                raise UserError(
                    f"the {name} vocabulary has {vocabulary.vocab_size} tokens but the "
                    f"text model's table has {module.text.vocab_size} rows; set its "
                    "vocab_size to at least the vocabulary's size."
                )

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Iterable[int]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Fresh `params` and their `params_axes`; dtypes are known, types unused.

        For inputs with `encoder_input_features` there are none of the tower.
        """
        del input_types
        if FEATURES in input_shapes and self.module.tower is None:
            raise UserError("training on cached features needs a model with a tower.")
        batch = {
            name: jnp.zeros(tuple(shape), _INPUT_TYPES[name])
            for name, shape in input_shapes.items()
            if name in _INPUT_TYPES
        }
        targets = batch["decoder_input_tokens"]
        variables = self.module.init(rng, *_inputs(batch), targets)
        variables = flax.core.unfreeze(variables)
        if self.lora is not None:
            params, in_tower = variables["params"], not self.frozen_tower
            low_rank.check_patterns(self.lora, params, in_tower=in_tower)
            freezing.check_trained(self.lora, params, self.frozen)
            if FEATURES in input_shapes and in_tower:
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
        targets, weights = _targets(batch)
        terms = self._apply(params, batch, dropout_rng, targets, method="token_terms")
        loss, penalty, weight = losses.token_cross_entropy(
            terms,
            weights,
            vocab_size=self.module.text.vocab_size,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        hits = (terms.best == targets).astype(jnp.float32) * weights
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

    def _apply(self, params, batch, dropout_rng=None, *targets, method=None):
        return self.module.apply(
            {"params": params},
            *_inputs(batch),
            jnp.asarray(batch["decoder_input_tokens"], jnp.int32),
            *targets,
            train=dropout_rng is not None,
            rngs={} if dropout_rng is None else {"dropout": dropout_rng},
            method=method,
        )

    def score_batch(
        self, params: Any, batch: Batch, return_intermediates: bool = False
    ):
        """Log-probability [B] of the target sequence; also the logits if asked."""
        targets, weights = _targets(batch)
        if return_intermediates:
            logits = self._apply(params, batch)
            terms = losses.terms_of_logits(logits, targets)
            kept = {"logits": logits}
        else:
            terms = self._apply(params, batch, None, targets, method="token_terms")
            kept = {}
        scores = jnp.sum((terms.picked - terms.log_z) * weights, axis=-1)
        return (scores, kept) if return_intermediates else scores

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
            raise UserError(
                "this model has no decode_fn; pass one of inference.decoding "
                "(greedy, sample, beam_search) to predict."
            )
        images, tokens = _inputs(batch)
        time = self.max_decode_length or batch["decoder_target_tokens"].shape[1]
        # T5X keeps parameters in a FrozenDict.
        params = flax.core.unfreeze(params)
        init_cache, step_fn = self.module.start_decoding(params, images, tokens, time)
        step_fn = self._within_vocabulary(step_fn)
        decoded = self.decode_fn(
            init_cache,
            step_fn,
            batch_size=tokens.shape[0],
            max_decode_length=time,
            eos_id=EOS_ID,
            rng=rng,
        )
        return decoded.tokens, {"scores": decoded.scores}

    def _within_vocabulary(self, step_fn):
        """The decoding step without the rows of the table that no token has."""
        size = self.output_vocabulary.vocab_size
        if size >= self.module.text.vocab_size:
            return step_fn

        def step(*arguments):
            logits, cache = step_fn(*arguments)
            ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
            return jnp.where(ids < size, logits, attention.MASKED_LOGIT), cache

        return step

    def prediction_record(
        self, tokens: np.ndarray, aux: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is told of one example's prediction: its text and score.

        tokens, aux: one row of what `predict_batch_with_aux` returns.
        """
        text = self.output_vocabulary.decode(tokens.tolist())
        return {"prediction": text, "score": aux["scores"]}
