"""Models of image-text pairs: the losses they train, what is locked, bad input."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_models
import tiny_pairs
from array_tasks import ArraySource
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from tiny_pairs import TEXT_LENGTH

from tasks import contrastive as tasks
from vit22b_transfer import UserError, cli
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.data import batches, sources
from vit22b_transfer.data.pair_converters import PairFeatureConverter
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.models import contrastive, text_towers
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.inputs import EvalData, TrainData
from vit22b_transfer.training.train import Periods, fine_tune

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

ONE_DEVICE = Partitioning(data=1, model=1)
EIGHT = Partitioning(data=4, model=2)


def gradients(model, params, batch, partitioning):
    with partitioning.activate():
        function = jax.value_and_grad(lambda p: model.loss_fn(p, batch, None)[0])
        return tiny_models.jit(function)(params)


def test_chunked_and_whole_losses_train_alike_on_one_device_and_on_eight():
    module = tiny_pairs.module(first_bias=None)
    batch = tiny_pairs.batch(8, missing=[3])
    models = {
        chunking: tiny_pairs.model(module_of=module, loss="softmax", chunking=chunking)
        for chunking in ("none", "recomputed")
    }
    params = tiny_pairs.params(models["none"])
    expected = gradients(models["none"], params, batch, ONE_DEVICE)
    found = gradients(models["recomputed"], params, batch, EIGHT)
    assert tiny_models.relative_difference(found, expected) <= 1e-5
    # The row that is no pair has no say, whatever lies in it.
    other = {name: array.copy() for name, array in batch.items()}
    other[contrastive.IMAGES][3], other[contrastive.TEXTS][3] = 7, 7
    assert gradients(models["none"], params, other, ONE_DEVICE)[0] == expected[0]


def test_the_accuracies_of_a_batch_are_those_of_the_whole_matrix_on_eight_devices():
    batch = tiny_pairs.batch(16, missing=[0, 9])
    model = tiny_pairs.model()
    params = tiny_pairs.params(model)
    with EIGHT.activate():
        _, metrics = tiny_models.jit(model.eval_fn)(params, batch)
    images, aux = tiny_models.jit(model.predict_batch_with_aux)(params, batch)
    texts = aux["text_embeddings"]
    real = batch[contrastive.WEIGHTS][:, 0] > 0
    table = np.asarray(images @ texts.T)[real][:, real]
    own = np.arange(len(table))
    for axis, name in ((1, "image_to_text"), (0, "text_to_image")):
        expected = np.mean(np.argmax(table, axis=axis) == own)
        assert metrics[f"{name}_accuracy"].compute() == pytest.approx(expected)
    assert metrics["pair_share"].compute() == 14 / 16


def test_scores_are_the_logits_of_the_pairs():
    model, batch = tiny_pairs.model(), tiny_pairs.batch(4)
    params = tiny_pairs.params(model)
    images, aux = tiny_models.jit(model.predict_batch_with_aux)(params, batch)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    logits = aux["scores"]
    similarity = np.sum(np.asarray(images) * np.asarray(aux["text_embeddings"]), axis=1)
    bias = float(params["logit_bias"]["value"])
    np.testing.assert_allclose(logits, 10 * similarity + bias, rtol=1e-4)


# --- Text towers ---


def embedded(text, tokens, seed=0):
    tower = text.build()
    params = tiny_models.random_params(tower, tokens, seed=seed)
    return params, run_tower(text, params, tokens)


def run_tower(text, params, tokens):
    return tiny_models.jit(text.build().apply)({"params": params}, jnp.asarray(tokens))


def test_scanned_and_rematerialised_text_towers_compute_the_same():
    tokens = jnp.asarray(tiny_pairs.batch(3)[contrastive.TEXTS])
    for causal in (False, True):
        plain = tiny_pairs.text_config(causal=causal)
        params, expected = embedded(plain, tokens)
        scanned = tiny_pairs.text_config(causal=causal, scan_layers=True, remat="block")
        found = run_tower(scanned, tiny_models.stack_layers(params), tokens)
        tiny_models.assert_within(1e-5, found, expected, f"scanned, causal {causal}")


def test_a_text_is_the_same_however_far_it_is_padded():
    tokens = np.array([[5, 9, 1, 0, 0, 0], [7, 1, 0, 0, 0, 0]], np.int32)
    for pooling, causal in (("last", False), ("end", True), ("mean", True)):
        text = tiny_pairs.text_config(pooling=pooling, causal=causal, pad_id=3)
        params, expected = embedded(text, jnp.asarray(tokens))
        short = run_tower(text, params, tokens[:, :3])
        tiny_models.assert_within(1e-6, short, expected, pooling)


def test_an_end_of_its_own_is_found_first_and_leaves_token_zero_a_token():
    text = tiny_pairs.text_config(
        pooling="end", causal=True, start_id=60, end_id=61, max_length=8
    )
    one = jnp.asarray([[0, 4, 61, 0, 0]], jnp.int32)
    params, vector = embedded(text, one)

    def of(*tokens):
        return run_tower(text, params, np.array([tokens], np.int32))

    np.testing.assert_array_equal(of(0, 4, 61, 9, 61), vector)
    assert not np.allclose(of(1, 4, 61, 0, 0), vector)
    # What stands behind the end is not of the text.
    text = dataclasses.replace(text, pooling="mean")
    tiny_models.assert_within(1e-6, of(0, 4, 61, 9, 61), of(0, 4, 61), "mean to an end")


def test_the_mean_of_a_t5_is_over_the_tokens_of_the_text():
    text = text_towers.PooledT5Config(
        t5=tiny_models.text_config(), embed_dim=32, projection_bias=False
    )
    tokens = jnp.asarray([[5, 9, 1, 0, 0], [0, 0, 0, 0, 0]], jnp.int32)
    params, vectors = embedded(text, tokens)
    alone = run_tower(text, params, tokens[:1, :3])
    tiny_models.assert_within(1e-6, vectors[:1], alone, "mean of T5")
    assert not np.any(vectors[1])
    model = tiny_pairs.model(module_of=tiny_pairs.module(text=text))
    loss, _ = tiny_models.jit(model.eval_fn)(
        tiny_pairs.params(model), tiny_pairs.batch(4)
    )
    assert np.isfinite(loss)


# --- What cannot be ---


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: tiny_pairs.text_config(pooling="first"),
            "pooling is 'first'; valid are last, end, mean",
        ),
        (
            lambda: tiny_pairs.text_config(start_id=64),
            "start_id is 64, but the token table has 64 rows",
        ),
        (
            lambda: text_towers.PooledT5Config(
                t5=tiny_models.text_config(num_encoder_layers=0), embed_dim=8
            ),
            "without encoder layers",
        ),
        (
            lambda: tiny_pairs.model(loss="triplet"),
            "loss is 'triplet'; valid are sigmoid, softmax",
        ),
        (
            lambda: tiny_pairs.model(chunking="some"),
            "chunking is 'some'; valid are recomputed, autodiff, none",
        ),
        (
            lambda: tiny_pairs.model(loss="softmax"),
            "first_bias is -10.0, but no bias changes a softmax loss",
        ),
        (
            lambda: tiny_pairs.model(vocabulary=tiny_models.Vocabulary(65)),
            "65 tokens but the text tower's table has 64 rows",
        ),
        (
            lambda: tiny_pairs.model(
                module_of=tiny_pairs.module(
                    text=tiny_pairs.text_config(vocab_size=320, end_id=300)
                ),
                vocabulary=seqio.ByteVocabulary(),
            ),
            "ends texts with token 300, the vocabulary with 1. CLIP's tokens",
        ),
        (
            lambda: tiny_pairs.params(
                tiny_pairs.model(
                    module_of=tiny_pairs.module(
                        text=tiny_pairs.text_config(embed_dim=16)
                    )
                )
            ),
            "embed_dim of the text tower is 16, but the image tower is 32 wide",
        ),
        (
            lambda: tiny_pairs.params(
                tiny_pairs.model(module_of=tiny_pairs.module(first_scale=0.0))
            ),
            "first_scale is 0.0; it must be positive",
        ),
        (
            lambda: tiny_pairs.params(
                tiny_pairs.model(
                    module_of=tiny_pairs.module(
                        tiny_models.tower_config(pooling="none")
                    )
                )
            ),
            "no pooled vector to compare with texts",
        ),
        (
            lambda: tiny_pairs.params(
                tiny_pairs.model(
                    module_of=tiny_pairs.module(
                        text=tiny_pairs.text_config(max_length=TEXT_LENGTH - 1)
                    )
                )
            ),
            f"texts of {TEXT_LENGTH} tokens, but the text tower has positions for 5",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_error(make, message):
    with tiny_models.without_type_checks(), pytest.raises(UserError, match=message):
        make()


# --- Runs ---

CLASSES = ["red", "green", "blue", "dark_grey"]
COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (50, 50, 50)]
RUN_LENGTHS = {"images": tiny_models.IMAGE_SIZE[0], "targets": 24}
NUM_IMAGES = 32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of noisy pictures in four colours, one broken, and their captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng, lines = np.random.default_rng(0), []
    for i in range(NUM_IMAGES):
        noise = rng.integers(-20, 20, (*tiny_models.IMAGE_SIZE, 3))
        pixels = np.clip(np.array(COLOURS[i % 4]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "caption": CLASSES[i % 4]})
    (folder / "30.png").write_bytes(b"none")
    text = "\n".join(map(json.dumps, lines))
    (folder / "classes.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def registered(pictures):
    """Names of a task of pairs and of one of zero-shot classification."""
    files = sources.CaptionFiles(pictures / "classes.jsonl", pictures)
    options = ReadingOptions(on_bad_image="skip")
    for name in ("tiny_pairs", "tiny_zero_shot"):
        seqio.TaskRegistry.remove(name)

    def source():
        return sources.CaptionFileSource({"train": files, "test": files})

    vocabulary = seqio.ByteVocabulary()
    common = dict(vocabulary=vocabulary, options=options)
    tasks.register_pairs("tiny_pairs", source(), **common)
    tasks.register_zero_shot("tiny_zero_shot", source(), CLASSES, **common)
    return "tiny_pairs", "tiny_zero_shot"


def byte_model(steps=40, **arguments):
    text = tiny_pairs.text_config(depth=1, vocab_size=320, max_length=24)
    module = tiny_pairs.module(text=text, first_bias=-2.71)
    schedule = optimizers.cosine(3e-3, total_steps=steps, warmup_steps=4)
    return tiny_pairs.model(
        optimizers.adamw(schedule),
        module_of=module,
        vocabulary=seqio.ByteVocabulary(),
        **arguments,
    )


def train(model, model_dir, total_steps, **arguments):
    return fine_tune(
        model,
        model_dir=str(model_dir),
        data=TrainData("tiny_pairs", "train", RUN_LENGTHS, 8),
        eval_data=EvalData(["tiny_pairs"], "test", RUN_LENGTHS, 8),
        total_steps=total_steps,
        partitioning=EIGHT,
        periods=Periods(log=10, evaluate=40, checkpoint=20),
        keep=None,
        **arguments,
    )


def saved(model_dir, step):
    """Every parameter of a checkpoint, by name."""
    path = f"{model_dir}/checkpoint_{step}"
    abstract = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=ONE_DEVICE.replicated
        )
        for name, leaf in reading.saved_arrays(path).items()
    }
    tree = reading.restore_tree(path, unflatten_dict(abstract, sep="/"))
    return {
        name: np.asarray(array)
        for name, array in flatten_dict(tree["target"], sep="/").items()
    }


@pytest.fixture(scope="module")
def run(registered, tmp_path_factory):
    """A model whose tower is locked, after forty steps: its directory and result."""
    folder = tmp_path_factory.mktemp("locked")
    return folder, train(byte_model(frozen_tower=True), folder, 40)


def test_a_locked_tower_stays_locked_to_the_bit_and_all_else_is_trained(run):
    folder, _ = run
    first, last = saved(folder, 20), saved(folder, 40)
    assert first.keys() == last.keys()
    for name, before in first.items():
        same = before.tobytes() == last[name].tobytes()
        assert same == name.startswith("encoder/tower/"), name


def test_pairs_are_learned_and_what_is_no_pair_is_counted(run):
    _, result = run
    metrics = result.metrics
    assert metrics["eval/tiny_pairs/loss"] < 5
    # Of 32 images one is broken, and nothing fills up the last batch.
    assert metrics["eval/tiny_pairs/pair_share"] == 31 / 32
    assert result.counters["skipped_images"] > 0


def test_zero_shot_classes_and_retrieval_of_a_checkpoint(run, registered, tmp_path):
    folder, _ = run
    results = evaluate.evaluate_checkpoint(
        byte_model(frozen_tower=True),
        partitioning=ONE_DEVICE,
        checkpoint=str(folder),
        tasks=registered,
        split="test",
        feature_lengths=RUN_LENGTHS,
        batch_size=8,
        output_dir=str(tmp_path),
    )
    zero_shot, pairs = results["tiny_zero_shot"], results["tiny_pairs"]
    assert zero_shot.metrics["classes"] == 4
    # 31 images and 16 prompts: four classes in four templates.
    assert (zero_shot.num_scored, zero_shot.num_bad_images) == (31 + 16, 1)
    assert zero_shot.metrics["top1"] > 60
    lines = [
        json.loads(line) for line in open(next(tmp_path.glob("tiny_pairs*.jsonl")))
    ]
    images, texts = (
        np.array([line[name] for line in lines if "error" not in line], np.float32)
        for name in ("prediction", "text_embeddings")
    )
    for name, table in (
        ("image_to_text", images @ texts.T),
        ("text_to_image", texts @ images.T),
    ):
        own = np.diag(table)[:, None]
        better = np.sum(table > own, axis=1)
        ties = np.sum(
            (table == own) & (np.arange(31)[None] < np.arange(31)[:, None]), 1
        )
        expected = 100 * np.mean(better + ties < 5)
        assert pairs.metrics[f"{name}_recall@5"] == pytest.approx(expected)


def test_a_run_of_pairs_is_resumed_to_the_bit(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder / "checkpoint_20", tmp_path / "checkpoint_20")
    train(byte_model(frozen_tower=True), tmp_path, 40)
    one, other = saved(folder, 40), saved(tmp_path, 40)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_microbatches_of_pairs_are_refused(registered, tmp_path):
    with pytest.raises(UserError, match="ContrastiveModel compares all examples"):
        train(byte_model(), tmp_path, 10, num_microbatches=2)
    assert not list(tmp_path.glob("checkpoint_*"))


def test_an_empty_text_and_a_missing_image_are_no_pair():
    def make(number):
        odd = number % 2 == 1
        return {
            "images": tf.fill([16, 16, 3], tf.cast(1 - number // 2, tf.uint8)),
            "targets": tf.cond(
                odd, lambda: tf.constant([1]), lambda: tf.constant([5, 1])
            ),
            "image_id": tf.strings.as_string(number),
        }

    seqio.TaskRegistry.remove("odd_pairs")
    seqio.TaskRegistry.add(
        "odd_pairs",
        source=ArraySource(4, make),
        preprocessors=[],
        output_features={
            "images": seqio.ContinuousFeature(dtype=tf.uint8, rank=3),
            "targets": seqio.Feature(seqio.ByteVocabulary()),
        },
    )
    with batches.eval_batches(
        "odd_pairs",
        "test",
        feature_lengths=tiny_pairs.LENGTHS,
        converter_cls=PairFeatureConverter,
        batch_size=8,
        partitioning=ONE_DEVICE,
    ) as rows:
        (batch,) = rows
    weights = np.asarray(batch.features[contrastive.WEIGHTS])[:, 0]
    # An image and a text; no text; no image; neither; and four rows that fill up.
    np.testing.assert_array_equal(weights, [1, 0, 0, 0, 0, 0, 0, 0])


def test_a_run_of_pairs_is_planned(capsys):
    arguments = ["plan", "--gin_file=gin_configs/recipes/lit.gin", "--gin.BATCH_SIZE=8"]
    assert cli.main([*arguments, "--device=h100", "--devices=8"]) == 0
    said = capsys.readouterr().out
    # The locked tower is not trained; a model of pairs decodes nothing.
    assert re.search(r"tower +[\d,]+ +0\n", said) and "decod" not in said
