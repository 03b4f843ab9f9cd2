"""The probes that have a model of their own: attention pooling, and class names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tiny_models
import tiny_pairs
from flax.traverse_util import unflatten_dict
from tiny_runs import ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints.writing import CheckpointWriter
from vit22b_transfer.data import class_prompts
from vit22b_transfer.evaluation import zero_shot as metrics
from vit22b_transfer.experiments import attentive, zero_shot
from vit22b_transfer.experiments import heads as kept
from vit22b_transfer.experiments.labelled import Labelled
from vit22b_transfer.experiments.split_features import SplitFeatures
from vit22b_transfer.models import attentive_head

# --- Attention pooling ---

PROBE = attentive.AttentiveProbe((1e-9, 1e-2), 0.0, 12, 16, 0.25)


def split(count, seed):
    """Each image has a marked token that tells its class; the mean is always zero."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    tokens = rng.normal(size=(count, 4, 8)).astype(np.float32)
    marked = np.arange(count), rng.integers(0, 4, count)
    tokens[*marked, 0] = np.where(labels, 3, -3)
    tokens[*marked, 1] = 6
    tokens -= tokens.mean(axis=1, keepdims=True)
    return SplitFeatures(tokens, (), labels, 2, "some", {}, np.arange(len(labels)))


@pytest.fixture(scope="module")
def splits():
    return split(64, 0), split(32, 1)


@pytest.mark.slow
def test_attention_pooling_finds_what_the_mean_of_tokens_hides(splits):
    (outcome,) = PROBE.run(*splits)
    assert outcome.value > 0.9
    assert outcome.settings["rate"] == 1e-2  # the other one learns nothing
    assert [*outcome.settings["tried"]] == ["1e-09", "0.01"]


@pytest.mark.slow
def test_a_kept_attentive_head_is_the_module_that_was_learned(splits, tmp_path):
    train, test = splits
    head = dataclasses.replace(PROBE, rates=(1e-2,), epochs=1).learned(train)
    head.write(str(tmp_path / "head.npz"))
    again = kept.read(str(tmp_path / "head.npz"))
    assert again.digest == head.digest and again.features == ()
    arrays = {n: x for n, x in head.arrays.items() if n != "train_counts"}
    module = attentive_head.AttentiveHead(8, 2)
    params = unflatten_dict(arrays, sep="/")
    expected = tiny_models.jit(module.apply)({"params": params}, test.vectors)
    found = again.logits(test.vectors, "some")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(UserError, match="vectors of 7 numbers, but the head reads 8"):
        again.logits(test.vectors[..., :7], "some")


def test_tokens_that_are_not_finite_and_rates_that_all_diverge_are_said(splits):
    train, test = splits
    broken = train.vectors.copy()
    broken[5, 2, 1] = np.nan
    with pytest.raises(UserError, match="tokens of image 5 of some .* not finite"):
        PROBE.run(dataclasses.replace(train, vectors=broken), test)
    probe = dataclasses.replace(PROBE, rates=(1e37, 1e38), epochs=3)
    with pytest.raises(UserError, match="every one of the learning rates"):
        probe.run(train, test)
    with pytest.raises(UserError, match="positive and different"):
        dataclasses.replace(PROBE, rates=())


def test_attention_heads_are_64_wide_where_that_divides_the_width():
    for width, heads in ((128, 2), (72, 1)):
        head = attentive_head.AttentiveHead(width, 3)
        tokens = jax.ShapeDtypeStruct((1, 2, width), jnp.float32)
        shapes = jax.eval_shape(head.init, jax.random.key(0), tokens)
        assert head.bind(shapes).pooling.config.num_heads == heads


# --- Class names ---

NAMES = ("Cat", "guinea_pig", "dog", "ox", "cow", "elk")
TEMPLATES = ("a {}", "{}")
LENGTH = 14


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A model with a checkpoint, its parameters, and 24 images."""
    text = tiny_pairs.text_config(
        depth=1, vocab_size=300, max_length=LENGTH, embed_dim=16
    )
    module = tiny_pairs.module(text=text, image_projection=True)
    model = tiny_pairs.model(module_of=module, vocabulary=seqio.ByteVocabulary())
    images = tiny_models.images(24, *tiny_models.IMAGE_SIZE, 3)
    params = tiny_models.random_params(
        module, jnp.asarray(images[:1]), jnp.zeros((1, LENGTH), jnp.int32)
    )
    folder = tmp_path_factory.mktemp("pairs")
    writer = CheckpointWriter(str(folder))
    target = jax.tree.map(np.asarray, params)
    writer.save(0, {"state": {"step": np.int64(0)}, "target": target}, {})
    writer.wait()
    return model, str(folder), params, jnp.asarray(images)


@pytest.mark.slow
def test_zero_shot_is_what_the_whole_model_says(pairs, tmp_path):
    model, folder, params, images = pairs
    module, labels = model.module, np.arange(24) % 6
    embed, embed_texts = (
        tiny_models.jit(functools.partial(module.apply, method=f"embed_{what}"))
        for what in ("images", "texts")
    )
    embedded = embed({"params": params}, images)
    tower = tiny_models.jit(module.tower.build().apply)
    pooled = tower({"params": params["encoder"]["tower"]}, images).pooled
    texts, owners = [], []
    for number, some in enumerate(class_prompts.prompts(NAMES, TEMPLATES)):
        for text in some:
            ids = [byte + 3 for byte in text.encode()] + [1]
            texts.append(ids + [0] * (LENGTH - len(ids)))
            owners.append(number)
    tokens = jnp.asarray(texts, jnp.int32)
    texts = embed_texts({"params": params}, tokens)
    classes = metrics.class_embeddings(np.asarray(texts), np.asarray(owners), 6)
    expected = metrics.accuracy(np.asarray(embedded), labels, classes)

    probe = zero_shot.ZeroShot(model, TEMPLATES)
    test = Labelled(np.asarray(pooled), labels, 6)
    first, fifth = probe.run(test, NAMES, folder, ONE_DEVICE, 5)
    assert 100 * first.value == pytest.approx(expected["top1"])
    assert 100 * fifth.value == pytest.approx(expected["top5"])
    assert fifth.metric == "accuracy_top_5" and fifth.settings["prompts"] == 12

    # Kept, it gives the cosines times the scale of the model.
    head = probe.head(NAMES, folder, ONE_DEVICE, 5)
    path = str(tmp_path / "head.npz")
    head.write(path)
    scale, _ = module.apply({"params": params}, method="scale_and_bias")
    logits = float(scale) * (np.asarray(embedded) @ classes.T)
    found = kept.read(path).logits(np.asarray(pooled), "some")
    np.testing.assert_allclose(found, logits, atol=1e-4)


def test_names_that_do_not_fit_are_said(pairs, tmp_path):
    model, folder, _, _ = pairs
    probe = zero_shot.ZeroShot(model, TEMPLATES)
    test = Labelled(np.eye(32), np.arange(32) % 2, 2)
    with pytest.raises(UserError, match="'a wolverines dog' has 17 tokens .* 14 pos"):
        probe.run(test, ("cat", "wolverine's dog"), folder, ONE_DEVICE, 5)
    with pytest.raises(UserError, match="has no class list, so that classes have no"):
        probe.names(None, 2)
    assert probe.names(("a", "b"), 2) == ("a", "b")
    path = tmp_path / "classes.txt"
    path.write_text("cat\ndog\nox\n")
    probe = dataclasses.replace(probe, class_list=str(path))
    assert probe.names(("n01", "n02", "n03"), 3) == ("cat", "dog", "ox")
    with pytest.raises(UserError, match="classes.txt has 3 names, but there are 2"):
        probe.names(None, 2)
