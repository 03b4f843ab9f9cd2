"""A tiny mixed model, and batches whose rows have the objectives that are asked for."""

import jax
import numpy as np
import tiny_classifier
import tiny_models
import tiny_pairs

from vit22b_transfer.data.converters import ImageTextFeatureConverter
from vit22b_transfer.data.mixed_converters import MixedFeatureConverter
from vit22b_transfer.models import contrastive, encoder_decoder, mixed, multimodal

NAMES = mixed.OBJECTIVES


def tower(**overrides):
    return tiny_models.tower_config(**(dict(depth=1, pooling="gap") | overrides))


def parts(
    vocabulary=None,
    *,
    image_tower=None,
    decode_fn=None,
    num_classes=tiny_classifier.NUM_CLASSES,
    all_scores=False,
    **of_pairs,
):
    """The models of the three objectives by name, with one tower."""
    image_tower = image_tower or tower()
    vocabulary = vocabulary or tiny_models.Vocabulary()
    size = max(vocabulary.vocab_size, tiny_models.VOCAB_SIZE)
    text = tiny_models.text_config(
        num_encoder_layers=1, num_decoder_layers=1, vocab_size=size
    )
    pair_text = tiny_pairs.text_config(depth=1, vocab_size=size)
    if of_pairs.get("loss") == "softmax":
        of_pairs_module = tiny_pairs.module(image_tower, pair_text, first_bias=None)
    else:
        of_pairs_module = tiny_pairs.module(image_tower, pair_text)
    return {
        "captioning": multimodal.ImageTextModel(
            encoder_decoder.ImageTextModule(image_tower, text),
            vocabulary,
            vocabulary,
            decode_fn=decode_fn,
            feature_converter_cls=ImageTextFeatureConverter,
            z_loss=1e-3,
        ),
        "classification": tiny_classifier.classifier(
            image_tower, num_classes=num_classes, all_scores=all_scores
        ),
        "contrastive": tiny_pairs.model(
            module_of=of_pairs_module, vocabulary=vocabulary, **of_pairs
        ),
    }


def model(optimizer_def=None, *, objectives=NAMES, weights=None, frozen=(), **options):
    """A `MixedModel` of some objectives; options are those of `parts`."""
    made = parts(**options)
    return mixed.MixedModel(
        **{name: made[name] for name in objectives},
        optimizer_def=optimizer_def,
        feature_converter_cls=MixedFeatureConverter,
        weights=weights,
        frozen=frozen,
    )


def batch(rows, seed=0):
    """A batch whose row i has the objectives rows[i], as the converter makes it."""
    size = len(rows)
    made = tiny_models.batch(size, seed=seed)
    made |= {contrastive.TEXTS: tiny_pairs.batch(size, seed + 1)[contrastive.TEXTS]}
    rng = np.random.default_rng(seed + 2)
    made["labels"] = rng.integers(0, tiny_classifier.NUM_CLASSES, (size, 2), np.int32)
    made["label_weights"] = np.ones((size, 2), np.float32)
    made[contrastive.WEIGHTS] = np.ones((size, 1), np.float32)
    of = {
        "captioning": [n for n in made if "tokens" in n or "loss_weights" in n],
        "classification": ["labels", "label_weights"],
        "contrastive": [contrastive.TEXTS, contrastive.WEIGHTS],
    }
    of["captioning"].remove(contrastive.TEXTS)
    for name, features in of.items():
        has = np.array([name in row for row in rows])
        for feature in features:
            made[feature] = made[feature] * has[:, None].astype(made[feature].dtype)
    return made


def rows_of(batch, has):
    """The rows of a batch that `has` is true of."""
    return {name: array[np.asarray(has)] for name, array in batch.items()}


def params(model, seed=0):
    """Random parameters of a mixed model, and so of each of its parts."""
    made = batch([NAMES])
    shapes = {name: array.shape for name, array in made.items()}
    abstract = jax.eval_shape(
        lambda: model.get_initial_variables(jax.random.key(0), shapes)["params"]
    )
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        kernel = "kernel" in str(path[-1])
        value *= 0.7 / np.sqrt(leaf.shape[-2]) if kernel else 0.3
        return value + np.asarray("scale" in str(path[-1]), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)
