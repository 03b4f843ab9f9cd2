"""One image tower shared by a text decoder, a classifier and a text tower for pairs.

A run on a mixture of captions, labels and pairs: each row of a batch has one objective
or several, and masks that say so; the loss is a weighted sum of the objectives' own.
`MixedModel` is made of the models of one objective, whose losses, metrics and
predictions are used as they are, and satisfies T5X's model contract as they do. The
parameters stand under the names that they have there: what a mixed run has trained
starts a run of one objective, and the other way round.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from jaxtyping import Array, Bool

from vit22b_transfer import UserError
from vit22b_transfer.models import (
    classifier,
    freezing,
    mixed_module,
    multimodal,
    towers,
)
from vit22b_transfer.models import contrastive as pairs

Batch = Mapping[str, jax.Array | np.ndarray]
# In the order of a model's parts. Captioning is all that is learned by writing text,
# answers to questions as well.
OBJECTIVES = mixed_module.OBJECTIVES


@flax.struct.dataclass
class WeightedMeans(clu_metrics.Metric):
    """Sum over the objectives of weight * mean, where the means are over all batches.

    totals, counts, weights: float32 [objectives]. Objectives that nothing had are left
    out; `count` is 0 if that is all of them.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    totals: Any
    counts: Any
    weights: Any

    @property
    def count(self) -> Any:
        """Of tokens, examples and pairs together."""
        return self.counts.sum()

    def merge(self, other: "WeightedMeans") -> "WeightedMeans":
        """That of both."""
        return self.replace(
            totals=self.totals + other.totals, counts=self.counts + other.counts
        )

    def compute(self) -> Any:
        """The sum."""
        return (self.weights * _means(self.totals, self.counts)).sum()


class MixedModel:
    """T5X's model contract over one tower and two or three objectives.

    captioning, classification, contrastive: the models of the objectives; None leaves
      one out. Their towers are the same, and run once. Their own settings (losses,
      smoothing, decoding, what is frozen) are kept; their optimizers are not used.
    optimizer_def: an optax transformation in our runtime, a T5X one under T5X.
    feature_converter_cls: of `data.mixed_converters`; it learns the objectives.
    weights: objective -> its weight in the loss, 0 or more; 1 for those not named.
    frozen: patterns of parameters that get no gradients and no optimizer state; what a
      part freezes is frozen as well.

    The loss of a batch is the sum over its objectives of weight * mean, each mean over
    the tokens, examples or pairs that have the objective: of rows that lack it nothing
    counts. An objective that no row has is 0. So a batch of one objective has the loss
    and the gradients of that model, times the weight. loss_fn returns that sum, and
    `metrics["loss"].count` is 1. Metrics of a part are called `METRIC/OBJECTIVE`, and
    `rows/OBJECTIVE` are the rows that have it.

    Predictions are those of the first part; of the other objectives `part` gives the
    model to ask.
    """

    # Means over the rows of a whole batch; pairs are compared with one another.
    loss_spans_batch = True
    # What the cache of a frozen tower holds is tokens before any pooling.
    reads_cached_features = False

    def __init__(
        self,
        captioning: multimodal.ImageTextModel | None = None,
        classification: classifier.ClassificationModel | None = None,
        contrastive: pairs.ContrastiveModel | None = None,
        optimizer_def: Any = None,
        feature_converter_cls: Callable[..., Any] | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        frozen: Sequence[str] = (),
    ):
        given = (captioning, classification, contrastive)
        parts = {n: m for n, m in zip(OBJECTIVES, given, strict=True) if m is not None}
        _check_parts(parts)
        modules = {name: model.module for name, model in parts.items()}
        tower = next(iter(modules.values())).tower
        _check_tower(tower, modules)
        self._parts = parts
        self.module = mixed_module.MixedModule(tower, **modules)
        self.optimizer_def = optimizer_def
        self.weights = {name: 1.0 for name in parts} | _checked(weights or {}, parts)
        patterns = [p for model in parts.values() for p in model.frozen]
        self.frozen = tuple(dict.fromkeys([*patterns, *frozen]))
        # What a run records of its settings.
        self.part_settings = {name: _settings(model) for name, model in parts.items()}
        texts = [m for n, m in parts.items() if n != "classification"]
        self.input_vocabulary = texts[0].input_vocabulary
        self.output_vocabulary = texts[0].output_vocabulary
        self.FEATURE_CONVERTER_CLS = None
        if feature_converter_cls is not None:
            self.FEATURE_CONVERTER_CLS = functools.partial(
                feature_converter_cls,
                objectives=self.objectives,
                num_classes=self.module.num_classes,
            )

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives, in the order of `OBJECTIVES`."""
        return tuple(self._parts)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Those of the classifier; None without one, or if nothing gives them."""
        return getattr(self._parts.get("classification"), "class_names", None)

    def part(self, objective: str) -> Any:
        """The model of one objective, which takes the same parameters.

        What it has no use for in them may stay there, or be left out.

        Raises:
          UserError: if there is none.
        """
        if objective not in self._parts:
            raise UserError(
                f"this model has no part for {objective!r}; it has "
                f"{', '.join(self._parts)}."
            )
        return self._parts[objective]

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Iterable[int]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Fresh `params` and their `params_axes`; dtypes are known, types unused."""
        del input_types

        def tokens(*names):
            return tuple(jnp.zeros(tuple(input_shapes[n]), jnp.int32) for n in names)

        inputs = {
            "captioning": ("encoder_input_tokens", "decoder_input_tokens"),
            "classification": (),
            "contrastive": (pairs.TEXTS,),
        }
        images = jnp.zeros(tuple(input_shapes["encoder_input_images"]), jnp.uint8)
        given = {name: tokens(*inputs[name]) for name in self._parts}
        return self.module.init(rng, images, given)

    def loss_fn(self, params: Any, batch: Batch, dropout_rng: jax.Array | None):
        """(weighted sum of the objectives' means, metrics): training mode."""
        # T5X keeps parameters in a FrozenDict.
        params = freezing.stop_frozen_gradients(flax.core.unfreeze(params), self.frozen)
        told = self._told(
            params, batch, lambda model, *given: model.loss_fn(*given, dropout_rng)
        )
        loss = self._loss(told).compute()
        one = jnp.ones((), jnp.float32)
        metrics = {"loss": clu_metrics.Average(total=loss, count=one)} | _joined(told)
        for name, has in rows_with(batch, self.objectives).items():
            rows = jnp.sum(has.astype(jnp.float32))
            metrics[f"rows/{name}"] = clu_metrics.Average(total=rows, count=one)
        return loss, metrics

    def eval_fn(self, params: Any, batch: Batch):
        """(as of `loss_fn`, metrics) without dropout.

        Merged over batches, `loss` is the weighted sum of the means over all of them.
        """
        params = flax.core.unfreeze(params)
        told = self._told(params, batch, lambda model, *given: model.eval_fn(*given))
        loss = self._loss(told)
        return loss.compute(), {"loss": loss} | _joined(told)

    def _told(self, params, batch, ask):
        """Metrics of each objective's own model, of which the tower ran once."""
        images = jnp.asarray(batch["encoder_input_images"])
        output = self.module.apply({"params": params}, images, part=mixed_module.TOWER)
        seen: Any = {**batch, towers.OUTPUT: output}
        told = {}
        for name, model in self._parts.items():
            model = copy.copy(model)
            model.module = mixed_module.Head(self.module, name)
            _, told[name] = ask(model, params, seen)
        return told

    def _loss(self, told) -> WeightedMeans:
        losses = [told[name]["loss"] for name in self._parts]
        weights = [self.weights[name] for name in self._parts]
        return WeightedMeans(
            totals=jnp.stack([loss.total for loss in losses]),
            counts=jnp.stack([loss.count for loss in losses]),
            weights=jnp.asarray(weights, jnp.float32),
        )

    def _first(self):
        return next(iter(self._parts.values()))

    def score_batch(
        self, params: Any, batch: Batch, return_intermediates: bool = False
    ):
        """What the first part says: see its own."""
        params = flax.core.unfreeze(params)
        return self._first().score_batch(params, batch, return_intermediates)

    def predict_batch(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> Array:
        """What the first part predicts: token ids, or classes."""
        return self._first().predict_batch(params, batch, rng=rng)

    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """What the first part predicts, and says of it."""
        return self._first().predict_batch_with_aux(params, batch, rng=rng)

    def prediction_record(
        self, prediction: np.ndarray, aux: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is told of one example's prediction by the first part."""
        return self._first().prediction_record(prediction, aux)


def rows_with(
    batch: Batch, objectives: Sequence[str]
) -> dict[str, Bool[Array, " batch"]]:
    """Of each objective, which rows of a batch have something to learn by it."""
    masks = {
        "captioning": "decoder_loss_weights",
        "classification": "label_weights",
        "contrastive": pairs.WEIGHTS,
    }
    return {
        name: jnp.any(jnp.asarray(batch[masks[name]]) > 0, axis=-1)
        for name in objectives
    }


def _means(totals, counts):
    """totals / counts, and 0 where nothing was counted."""
    numpy = jnp if isinstance(totals, jax.Array) else np
    return totals / numpy.where(counts > 0, counts, numpy.ones_like(counts))


def _joined(told):
    """The parts' metrics, by their names; those of a part that no row has count 0."""
    joined = {}
    for name, own in told.items():
        has = (own["loss"].count > 0).astype(jnp.float32)
        for metric, x in own.items():
            x = x.replace(total=x.total * has, count=x.count * has)
            joined[f"{metric}/{name}"] = x
    return joined


def _settings(model):
    """What a part was told, but for what it decodes with and what is not used."""
    kinds = bool | int | float | str
    return {
        name: value
        for name, value in sorted(vars(model).items())
        if isinstance(value, kinds) and name[0] != "_" and name != "max_decode_length"
    }


def _check_parts(parts):
    if len(parts) < 2:
        raise UserError(
            f"a mixed model needs two objectives of {', '.join(OBJECTIVES)} or all "
            f"three, but got {', '.join(parts) or 'none'}. For one objective take its "
            "own model."
        )
    for name, model in parts.items():
        for setting, why in (
            ("lora", "low-rank updates of a shared tower are not there yet"),
            ("mixup", "the other objectives would see its mixed images"),
            ("distillation", "its teacher sees images that no other objective does"),
        ):
            if getattr(model, setting, None) is not None:
                raise UserError(
                    f"{setting} is set for {name}, but in a mixed model {why}. Leave "
                    f"it out, or train {name} alone."
                )
    writer, matcher = parts.get("captioning"), parts.get("contrastive")
    if writer is None or matcher is None:
        return
    if matcher.module.image_projection:
        raise UserError(
            "image_projection=True has its layer where that of captioning is "
            "(encoder/projection). Set ContrastiveModule.image_projection=False, and "
            "the text tower's embed_dim to the width of the image tower."
        )
    if writer.output_vocabulary != matcher.output_vocabulary:
        raise UserError(
            "captions and texts of pairs are one feature of the tasks, so they have "
            "one vocabulary, but captioning and contrastive have two."
        )


def _check_tower(tower, modules):
    for name, module in modules.items():
        if module.tower is None:
            raise UserError(f"{name} has no tower, so there is nothing to share.")
        if module.tower != tower:
            raise UserError(
                f"the tower of {name} is another than that of {next(iter(modules))}, "
                f"but they share one: {module.tower} and {tower}."
            )
    plain = tower.without_pooling()
    if getattr(tower, "has_class_token", False) and not plain.has_class_token:
        raise UserError(
            "this tower has a class token for pooling='cls' alone, which captioning "
            "by itself would not have. Set class_token=True."
        )


def _checked(weights, parts):
    for name, weight in weights.items():
        if name not in parts:
            raise UserError(
                f"weights names {name!r}, but the objectives of this model are "
                f"{', '.join(parts)}."
            )
        if not 0 <= weight < float("inf"):
            raise UserError(f"the weight of {name} is {weight}; it must be 0 or more.")
    if weights and not any(weights.get(name, 1.0) for name in parts):
        raise UserError("all weights are 0, so that nothing would be learned.")
    return {name: float(weight) for name, weight in weights.items()}
