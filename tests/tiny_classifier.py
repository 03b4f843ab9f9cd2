"""A model that gives labels, its converter and a task: nothing in them is text."""

import flax
import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
import tiny_models
from array_tasks import ArraySource
from clu import metrics as clu_metrics
from flax import linen as nn

from vit22b_transfer.data import converters
from vit22b_transfer.models import freezing, layers, losses

SIZE = tiny_models.IMAGE_SIZE[0]
NUM_CLASSES = 4
LENGTHS = {"images": SIZE, "labels": 1}


class LabelConverter(converters.ImageFeatureConverter):
    """Converter for one image and at most one label per example."""

    TASK_FEATURES = {
        "images": converters.Spec(dtype=tf.uint8, rank=3),
        "labels": converters.Spec(dtype=tf.int32),
    }
    MODEL_FEATURES = {
        "encoder_input_images": converters.Spec(dtype=tf.uint8, rank=3),
        "labels": converters.Spec(dtype=tf.int32),
        "label_weights": converters.Spec(dtype=tf.float32),
    }
    TARGETS = ("labels",)

    def get_model_feature_lengths(self, task_feature_lengths):
        return {
            self.IMAGES: self.image_shape(task_feature_lengths["images"])[0],
            "labels": 1,
            "label_weights": 1,
        } | {name: task_feature_lengths[name] for name in self._passthrough_features}

    def _convert_features(self, ds, task_feature_lengths):
        images = self.converted_images(ds, task_feature_lengths["images"])

        def convert(example):
            given = tf.cast(tf.shape(example["labels"]) > 0, tf.float32)
            return {
                self.IMAGES: images(example),
                "labels": converters.padded(example, "labels", 1),
                "label_weights": given,
            } | {name: example[name] for name in self._passthrough_features}

        return converters.map_examples(ds, convert)


class ClassifierModule(nn.Module):
    tower: object
    num_classes: int = NUM_CLASSES

    def setup(self):
        self.encoder = Encoder(self.tower)
        self.head = layers.Dense(
            self.tower.width, self.num_classes, ("embed", "vocab"), use_bias=False
        )

    def __call__(self, images):
        return self.head(self.encoder(images).pooled)


class Encoder(nn.Module):
    tower_config: object

    def setup(self):
        self.tower = self.tower_config.build()

    def __call__(self, images):
        return self.tower(images)


class Classifier:
    """T5X's model contract over `ClassifierModule`."""

    FEATURE_CONVERTER_CLS = LabelConverter

    def __init__(self, tower, optimizer_def=None, frozen=()):
        self.module = ClassifierModule(tower)
        self.optimizer_def = optimizer_def
        self.frozen = tuple(frozen)

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        images = jnp.zeros(input_shapes["encoder_input_images"], jnp.uint8)
        return flax.core.unfreeze(self.module.init(rng, images))

    def _logits(self, params, batch):
        params = flax.core.unfreeze(params)
        return self.module.apply({"params": params}, batch["encoder_input_images"])

    def eval_fn(self, params, batch):
        logits = self._logits(params, batch)
        labels, weights = batch["labels"], batch["label_weights"]
        loss, _, weight = losses.token_cross_entropy(logits[:, None], labels, weights)
        hits = (jnp.argmax(logits, axis=-1) == labels[:, 0]).astype(jnp.float32)
        return loss, {
            "loss": clu_metrics.Average(total=loss, count=weight),
            "accuracy": clu_metrics.Average(
                total=jnp.sum(hits * weights[:, 0]), count=weight
            ),
        }

    def loss_fn(self, params, batch, dropout_rng):
        params = freezing.stop_frozen_gradients(flax.core.unfreeze(params), self.frozen)
        return self.eval_fn(params, batch)

    def score_batch(self, params, batch, return_intermediates=False):
        logits = self._logits(params, batch)[:, None]
        return losses.token_log_probabilities(logits, batch["labels"])[:, 0]

    def predict_batch(self, params, batch, rng=None):
        return self.predict_batch_with_aux(params, batch, rng)[0]

    def predict_batch_with_aux(self, params, batch, rng=None):
        logits = self._logits(params, batch)
        scores = nn.log_softmax(logits)
        best = jnp.argmax(logits, axis=-1)
        return best, {"scores": jnp.max(scores, axis=-1), "all_scores": scores}

    def prediction_record(self, label, aux):
        return {
            "prediction": label,
            "score": aux["scores"],
            "all_scores": aux["all_scores"],
        }


def example(number):
    """Example `number`: a picture in one of four greys, and which of them it is."""
    label = tf.cast(number % NUM_CLASSES, tf.int32)
    return {
        "images": tf.fill([SIZE, SIZE, 3], tf.cast(60 * label, tf.uint8)),
        "labels": label[None],
        "true_label": label,
        "image_id": tf.strings.as_string(number),
        "image_error": tf.constant(""),
    }


def true_label(prediction, *, example=None, is_target=False):
    """The example's label as the target: postprocessors see the example."""
    return int(example["true_label"]) if is_target else prediction


def accuracy(targets, predictions):
    return {"accuracy": float(np.mean(np.equal(targets, predictions)))}


def mean_likelihood(targets, predictions, aux_values):
    """Probability of the true label: a metric that needs more than the prediction."""
    rows = np.arange(len(targets))
    return {"likelihood": float(np.exp(aux_values["all_scores"][rows, targets]).mean())}


def register(name, size=21, *, features=("images", "labels"), make=example):
    """A task whose features are none of a text task's."""
    every = {
        "images": seqio.ContinuousFeature(dtype=tf.uint8, rank=3),
        "labels": seqio.Feature(
            seqio.PassThroughVocabulary(NUM_CLASSES), add_eos=False
        ),
    }
    seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=ArraySource(size, make),
        preprocessors=[],
        output_features={feature: every[feature] for feature in features},
        postprocess_fn=true_label,
        metric_fns=(accuracy, mean_likelihood),
    )
