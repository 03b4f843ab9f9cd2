"""Image tower + one linear layer to classes: the model that gives labels.

ViT-22B was trained so (Dehghani et al. 2023): the pooled vector, one linear layer whose
kernel starts at zero and whose bias at -10, and a sigmoid for each class, of which an
image may have several. Fine-tuning takes a softmax. `ClassificationModel` satisfies
T5X's model contract by duck typing, as `multimodal.ImageTextModel` does.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.models import distillation as distilling
from vit22b_transfer.models import freezing, layers, losses, token_distances, towers
from vit22b_transfer.models import lora as low_rank
from vit22b_transfer.models import mixup as mixing

Batch = Mapping[str, jax.Array | np.ndarray]
Loss = Literal["softmax", "sigmoid"]
# How many of the best classes are told of a prediction, and count as a hit.
TOP = 5
_HEAD = "head/.*"


class PooledEncoder(nn.Module):
    """A tower with its pooling, under the top scope `encoder`."""

    tower_config: towers.TowerConfig

    def setup(self):
        self.tower = self.tower_config.build()

    def __call__(
        self,
        images: UInt8[Array, "batch height width 3"] | towers.TowerOutput,
        intermediates: tuple[str, ...] = (),
    ) -> towers.TowerOutput:
        """What the tower returns, `pooled` too."""
        output = towers.output_of(self.tower, images, intermediates)
        if output.pooled is None:
            raise UserError(
                "a classifier needs the pooled vector of its tower, and this tower has "
                "none. Give it pooling='map', 'gap' or 'cls'."
            )
        return output


class ClassifierModule(nn.Module):
    """The network.

    head_bias: what the bias of every class starts at. With a sigmoid -10 makes all
      classes improbable at first, so that many of them do not drown the first steps.
    """

    tower: towers.TowerConfig
    num_classes: int
    head_bias: float = 0.0

    def setup(self):
        self.encoder = PooledEncoder(self.tower)
        self.head = layers.Dense(
            self.tower.width,
            self.num_classes,
            ("embed", "classes"),
            kernel_init=nn.initializers.zeros_init(),
            bias_value=self.head_bias,
        )

    def __call__(
        self, images: UInt8[Array, "batch height width 3"] | towers.TowerOutput
    ) -> Float[Array, "batch classes"]:
        """Logits in float32, whatever the tower computes in."""
        return self.head(self.encoder(images).pooled.astype(jnp.float32))

    def with_tokens(
        self, images: UInt8[Array, "batch height width 3"], layer: str | None
    ) -> tuple[Float[Array, "batch classes"], Float[Array, "batch length embed"]]:
        """Logits, and the tower's tokens at a layer (`token_distances.tokens_of`)."""
        output = self.encoder(images, () if layer is None else (layer,))
        logits = self.head(output.pooled.astype(jnp.float32))
        return logits, token_distances.tokens_of(output, layer)


class ClassificationModel:
    """T5X's model contract over a `ClassifierModule`.

    feature_converter_cls: of `data.label_converters`; it learns the number of classes.
    loss: `softmax` over classes, several labels of an image sharing the probability; or
      `sigmoid`, in which each class is a question of its own.
    mixup: blends the images and labels of a training batch in pairs, by a share from
      Beta(mixup, mixup) that the step's random key decides (`models.mixup`); None does
      not. A hit is then one of the image's own labels, which weigh more.
    distillation: the loss compares with a teacher, which sees the same mixed images, in
      place of the labels or beside them (`models.distillation`); predictions are those
      of the student.
    label_smoothing: s in [0, 1): targets become (1 - s) * target + s / classes.
    class_names: gives the names of all classes, by id; predictions then have them.
    all_scores: predictions tell the score of every class, as mean average precision
      needs; else of the best `TOP`.
    optimizer_def, frozen, frozen_tower, lora, int8_tower: as in `ImageTextModel`; with
      LoRA the head is trained as well, since it starts at zero.

    A batch has `encoder_input_images`, `labels` [B, L] (ids, those without weight are
    padding) and `label_weights` [B, L] in [0, 1]. An image none of whose labels has a
    weight is no example: it counts in no loss and no metric. loss_fn returns the SUM of
    the losses; `metrics["loss"].count` is the number of examples.
    """

    # What the cache of a frozen tower holds is tokens before any pooling.
    reads_cached_features = False
    # What the loss is a mean over.
    loss_per = "example"

    def __init__(
        self,
        module: ClassifierModule,
        optimizer_def: Any = None,
        feature_converter_cls: Callable[..., Any] | None = None,
        *,
        loss: Loss = "softmax",
        label_smoothing: float = 0.0,
        mixup: float | None = None,
        distillation: distilling.Distillation | None = None,
        class_names: Callable[[], Sequence[str]] | None = None,
        all_scores: bool = False,
        frozen: Sequence[str] = (),
        frozen_tower: bool = False,
        lora: low_rank.LoraConfig | None = None,
        int8_tower: bool = False,
    ):
        _check(module, loss, label_smoothing)
        if mixup is not None:
            mixing.check_alpha(mixup)
        if distillation is not None:
            distillation.check_student(module.tower, loss, label_smoothing, mixup)
        if int8_tower:
            tower = towers.changed(module.tower, "int8_tower", int8_kernels=True)
            module = module.clone(tower=tower)
        if lora is not None:
            beside = () if distillation is None else distillation.trained(module.tower)
            trained = tuple(dict.fromkeys((*lora.trained, _HEAD, *beside)))
            lora = dataclasses.replace(lora, trained=trained)
            module = low_rank.with_lora(module, lora, in_tower=not frozen_tower)
        self.module = module
        self.optimizer_def = optimizer_def
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.distillation = distillation
        self.all_scores = all_scores
        self.lora = lora
        self.frozen_tower = frozen_tower
        self.frozen = freezing.frozen_patterns(
            frozen, tower=frozen_tower, int8_tower=int8_tower, lora=lora
        )
        if self._runs_teacher:
            self.frozen = (*self.frozen, distilling.PARAMETERS)
        self._class_names = class_names
        self.FEATURE_CONVERTER_CLS = None
        if feature_converter_cls is not None:
            self.FEATURE_CONVERTER_CLS = functools.partial(
                feature_converter_cls, num_classes=module.num_classes
            )

    @property
    def teacher(self) -> ClassifierModule | None:
        """The network of the teacher, live or cached; None without a distillation."""
        if self.distillation is None:
            return None
        return ClassifierModule(self.distillation.teacher, self.module.num_classes)

    @property
    def _runs_teacher(self):
        return self.distillation is not None and not self.distillation.cached

    @property
    def loss_spans_batch(self) -> bool:
        """Whether the loss of an image depends on the others of its batch."""
        return self.mixup is not None

    @property
    def given(self) -> tuple[str, ...]:
        """Patterns of the parameters that a training has from a checkpoint only."""
        return (distilling.PARAMETERS,) if self._runs_teacher else ()

    @property
    def prediction_settings(self) -> dict[str, Any]:
        """What predictions depend on beside the module and its parameters."""
        return {"loss": self.loss, "all_scores": self.all_scores}

    @functools.cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of all classes; None if nothing gives them.

        Raises:
          UserError: if there are not as many as classes.
        """
        if self._class_names is None:
            return None
        names = tuple(self._class_names())
        if len(names) != self.module.num_classes:
            raise UserError(
                f"the class list has {len(names)} names, but the model has "
                f"{self.module.num_classes} classes. Set NUM_CLASSES to the length of "
                "the list that the model was trained with."
            )
        return names

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Iterable[int]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Fresh `params` and their `params_axes`; types are known, and unused."""
        del input_types
        if "encoder_input_images" not in input_shapes:
            raise UserError(
                "a classifier pools what its tower says of images, but the batch has "
                f"{', '.join(sorted(input_shapes))}: cached features are tokens before "
                "any pooling. Leave gin_configs/runs/cached_features.gin out."
            )
        images = jnp.zeros(tuple(input_shapes["encoder_input_images"]), jnp.uint8)
        variables = flax.core.unfreeze(self.module.init(rng, images))
        params, in_tower = variables["params"], not self.frozen_tower
        if self.lora is not None:
            low_rank.check_patterns(self.lora, params, in_tower=in_tower)
        lesson = self.distillation
        if lesson is not None and not lesson.cached:
            beside = lesson.init(rng, self.module, self.teacher, params, images)
            for scope, part in beside.items():
                for collection, values in flax.core.unfreeze(part).items():
                    variables[collection][scope] = values
        if self.lora is not None:
            freezing.check_trained(self.lora, params, self.frozen)
        return variables

    def loss_fn(self, params: Any, batch: Batch, dropout_rng: jax.Array | None):
        """(sum of losses, metrics): training mode. Nothing is dropped out.

        Without a random key nothing is mixed, either.
        """
        # T5X keeps parameters in a FrozenDict.
        params = freezing.stop_frozen_gradients(flax.core.unfreeze(params), self.frozen)
        key = dropout_rng if self.mixup is not None else None
        loss, metrics, _ = self._loss(params, batch, key)
        return loss, metrics

    def eval_fn(self, params: Any, batch: Batch):
        """(sum of losses, metrics), with the hits among the best five classes."""
        loss, metrics, (logits, targets, real) = self._loss(params, batch)
        if self.module.num_classes > TOP:
            _, best = jax.lax.top_k(logits, TOP)
            hit = jnp.max(jnp.take_along_axis(targets, best, axis=-1), axis=-1) > 0
            hits = jnp.sum(hit.astype(jnp.float32) * real)
            metrics["accuracy_top_5"] = clu_metrics.Average(
                total=hits, count=jnp.sum(real)
            )
        return loss, metrics

    def _loss(self, params, batch, mixup_key=None):
        targets = label_targets(batch, self.module.num_classes)
        learned = targets
        if mixup_key is not None:
            images = jnp.asarray(batch["encoder_input_images"])
            images, learned = mixing.mixup(mixup_key, images, targets, alpha=self.mixup)
            batch = {**batch, "encoder_input_images": images}
        lesson, both, params = self.distillation, None, flax.core.unfreeze(params)
        if lesson is None:
            logits = self._logits(params, batch)
        else:
            both = lesson.both(self.module, self.teacher, params, batch)
            logits = both[0].logits
        real = (jnp.max(targets, axis=-1) > 0).astype(jnp.float32)
        each = self._cross_entropy(logits, learned, self.label_smoothing)
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        hit = jnp.take_along_axis(targets, best, axis=-1)[:, 0] > 0
        values = {"accuracy": hit.astype(jnp.float32)}
        if lesson is not None:
            token_map = params.get(token_distances.SCOPE)
            each, told = lesson.loss(*both, each, token_map)
            values |= told
        values = {"loss": each} | values
        count = jnp.sum(real)
        metrics = {
            name: clu_metrics.Average(total=jnp.sum(value * real), count=count)
            for name, value in values.items()
        }
        loss = metrics["loss"].total
        return loss, metrics, (logits, targets, real)

    def _cross_entropy(self, logits, targets, smoothing):
        if self.loss == "softmax":
            total = jnp.sum(targets, axis=-1, keepdims=True)
            targets = targets / jnp.where(total > 0, total, jnp.ones_like(total))
        if smoothing:
            targets = (1.0 - smoothing) * targets + smoothing / targets.shape[-1]
        if self.loss == "softmax":
            return losses.softmax_cross_entropy(logits, targets)
        return losses.sigmoid_cross_entropy(logits, targets)

    def _logits(self, params, batch):
        params = flax.core.unfreeze(params)
        return self.module.apply({"params": params}, towers.images_of(batch))

    def score_batch(
        self, params: Any, batch: Batch, return_intermediates: bool = False
    ):
        """Log-probability [B] of the labels; also the logits if asked.

        softmax: the mean over the labels of their log-probabilities. sigmoid: that of
        just these labels and no others. 0 for an image without labels.
        """
        logits = self._logits(params, batch)
        targets = label_targets(batch, self.module.num_classes)
        real = (jnp.max(targets, axis=-1) > 0).astype(jnp.float32)
        scores = -self._cross_entropy(logits, targets, 0.0) * real
        return (scores, {"logits": logits}) if return_intermediates else scores

    def predict_batch(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> Int[Array, " batch"]:
        """The id of the best class of each image."""
        return self.predict_batch_with_aux(params, batch, rng=rng)[0]

    def predict_batch_with_aux(
        self, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Best classes [B], and log-probabilities.

        `scores` [B] of those, `top_classes` and `top_scores` [B, k] of the best five or
        fewer, best first, and `all_scores` [B, classes] if the model is to tell them.
        """
        del rng
        logits = self._logits(params, batch)
        if self.loss == "softmax":
            scores = jax.nn.log_softmax(logits, axis=-1)
        else:
            scores = jax.nn.log_sigmoid(logits)
        top, best = jax.lax.top_k(logits, min(TOP, self.module.num_classes))
        del top  # a sigmoid near 1 rounds scores to one value, logits not
        aux = {
            "scores": jnp.take_along_axis(scores, best[:, :1], axis=-1)[:, 0],
            "top_classes": best,
            "top_scores": jnp.take_along_axis(scores, best, axis=-1),
        }
        if self.all_scores:
            aux["all_scores"] = scores
        return best[:, 0], aux

    def prediction_record(
        self, label: np.integer | np.ndarray, aux: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is told of one image: the best class, its score, and the next best.

        label, aux: one row of what `predict_batch_with_aux` returns.
        """
        record = {"prediction": label, "score": aux["scores"]}
        if self.class_names is not None:
            record["class_name"] = self.class_names[int(label)]
        return record | {name: aux[name] for name in aux if name != "scores"}


def label_targets(batch: Batch, num_classes: int) -> Float[Array, "batch classes"]:
    """How much of each class an image is, in [0, 1]: its labels by their weights.

    Weights between 0 and 1 are those of an image mixed of several. Ids without weight
    are padding; those of no class (a converter refuses them) are none of the classes.
    """
    labels = jnp.asarray(batch["labels"], jnp.int32)
    weights = jnp.asarray(batch["label_weights"], jnp.float32)
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return jnp.clip(jnp.einsum("blc,bl->bc", one_hot, weights), 0.0, 1.0)


def _check(module: ClassifierModule, loss: str, label_smoothing: float) -> None:
    known = get_args(Loss)
    if loss not in known:
        near = difflib.get_close_matches(str(loss), known, n=1, cutoff=0.0)
        raise UserError(
            f"loss is {loss!r}; it must be one of {', '.join(known)}. Nearest: "
            f"{near[0]}."
        )
    if module.num_classes < 2:
        raise UserError(
            f"num_classes is {module.num_classes}: with fewer than 2 classes there is "
            "nothing to tell apart. A yes or no is two classes."
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(
            f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1."
        )
    if loss == "softmax" and module.head_bias:
        raise UserError(
            f"head_bias is {module.head_bias}, but the loss is softmax, which does not "
            "see what is added to all classes alike. Set head_bias=0, or "
            "loss='sigmoid'."
        )
