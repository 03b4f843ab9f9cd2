"""Tasks and converter driven as T5X drives them, without T5X.

As `t5x.utils.get_dataset` and `get_training_eval_datasets`, `t5x.infer` and
`t5x.eval` do at cc342d4, in our own words.
"""

import json

import jax
import numpy as np
import pytest
import seqio
import t5x_driver
import tensorflow as tf
import tiny_captions
import tiny_models
from seqio.evaluation import Evaluator

import tasks.scenes  # noqa: F401
from vit22b_transfer.data import task_metrics, vocabularies
from vit22b_transfer.demo import scenes
from vit22b_transfer.inference import decoding

LENGTHS = {"images": 16, "inputs": 48, "targets": 64}
SPLIT = "validation"
SCENES = ("scenes_captioning", "scenes_vqa")
SKIPPING = "t5x_contract_skips_bad_images"  # the task of `tiny_captions`
TASKS = (*SCENES, SKIPPING)
MODEL_SHAPES = {
    "encoder_input_images": (16, 16, 3),
    "encoder_input_tokens": (48,),
    "decoder_target_tokens": (64,),
    "decoder_input_tokens": (64,),
    "decoder_loss_weights": (64,),
}
MODEL = tiny_captions.model(decoding.greedy, max_decode_length=4)


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """Six drawn scenes per split, and a folder in which an image is truncated."""
    directory = tmp_path_factory.mktemp("data")
    scenes.write_scenes(directory / "scenes", sizes=dict.fromkeys(scenes.SPLITS, 6))
    folder = directory / "folder"
    folder.mkdir()
    tiny_captions.write_folder(folder)
    tiny_captions.register(SKIPPING, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT22B_DATA_DIR", str(directory / "scenes"))
        yield directory
    seqio.TaskRegistry.remove(SKIPPING)


def split_of(name):
    return "test" if name == SKIPPING else SPLIT


def training_dataset(name, *, pack=False, shard=(0, 1), batch_size=4, epochs=None):
    """What T5X trains on, for one of `shard[1]` hosts."""
    return seqio.get_dataset(
        mixture_or_task_name=seqio.get_mixture_or_task(name),
        task_feature_lengths=LENGTHS,
        dataset_split=split_of(name),
        shuffle=True,
        num_epochs=epochs,
        feature_converter=MODEL.FEATURE_CONVERTER_CLS(
            pack=pack, use_custom_packing_ops=False
        ),
        shard_info=seqio.ShardInfo(*shard),
        use_cached=False,
        seed=7,
        trim_output_features=True,
        batch_size=batch_size,
    )


def inference_dataset(name, chunk):
    """Numbered chunks of (task examples, model features), each padded to a batch."""
    task = seqio.get_mixture_or_task(name)
    examples = task.get_dataset(
        sequence_length=LENGTHS,
        split=split_of(name),
        shuffle=False,
        num_epochs=1,
        shard_info=seqio.ShardInfo(0, 1),
        use_cached=False,
        seed=7,
    )
    features = MODEL.FEATURE_CONVERTER_CLS(pack=False)(examples, LENGTHS)
    pairs = tf.data.Dataset.zip((examples, features))
    return pairs.padded_batch(chunk, drop_remainder=False).enumerate()


def json_lines(examples, predictions, scores, vocabulary):
    """One line per example: what ends in `_pretokenized`, the text and its score."""
    lines = []
    for row, tokens in enumerate(predictions):
        inputs = {
            name: value[row].decode()
            if isinstance(value[row], bytes)
            else np.asarray(value[row]).tolist()
            for name, value in examples.items()
            if name.endswith("_pretokenized")
        }
        text = vocabulary.decode_tf(tf.constant(tokens)).numpy().decode()
        line = {"inputs": inputs, "prediction": text, "aux": {"scores": scores[row]}}
        lines.append(json.dumps(line))
    return lines


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


# Training


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TASKS, "scenes_mixture"])
def test_training_batches_have_the_shapes_that_initialise_the_model(name):
    if name == "scenes_mixture":
        dataset = seqio.get_mixture_or_task(name)
        assert set(dataset.splits) >= {SPLIT}
    dataset = training_dataset(name)
    spec = dataset.element_spec
    assert {k: tuple(s.shape[1:]) for k, s in spec.items()} == MODEL_SHAPES
    types = {k: s.dtype.as_numpy_dtype for k, s in spec.items()}
    assert set(types.values()) == {np.uint8, np.int32}
    shapes = {k: (4, *s.shape[1:]) for k, s in spec.items()}
    others, params, _ = jax.eval_shape(
        lambda rng: t5x_driver.initialize(MODEL, shapes, rng, types),
        jax.random.PRNGKey(0),
    )
    batch = next(dataset.as_numpy_iterator())
    loss, _ = jax.eval_shape(MODEL.loss_fn, params, batch, jax.random.PRNGKey(0))
    assert not others and loss.shape == ()


def test_packing_is_refused_saying_where_t5x_sets_it():
    with pytest.raises(ValueError, match="images cannot be packed.*DatasetConfig.pack"):
        training_dataset(SCENES[0], pack=True)


def test_hosts_read_different_examples_and_together_all_of_them():
    def images(shard):
        dataset = training_dataset(
            SCENES[0], shard=shard, batch_size=1, epochs=1
        ).as_numpy_iterator()
        return [
            (b["encoder_input_images"].tobytes(), b["decoder_target_tokens"].tobytes())
            for b in dataset
        ]

    whole = images((0, 1))
    parts = [images((host, 2)) for host in (0, 1)]
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert len(whole) == seqio.TaskRegistry.get(SCENES[0]).num_input_examples(SPLIT)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCENES, "scenes_mixture"])
def test_the_position_in_the_training_data_can_be_saved(name, tmp_path):
    """T5X's save_dataset; a source that keeps state in Python cannot do it."""
    iterator = iter(training_dataset(name))
    for _ in range(3):
        next(iterator)
    path = tf.train.Checkpoint(ds=iterator).write(str(tmp_path / "position"))
    expected = [jax.tree.map(np.asarray, next(iterator)) for _ in range(3)]
    resumed = iter(training_dataset(name))
    tf.train.Checkpoint(ds=resumed).read(path).assert_consumed()
    for batch in expected:
        assert equal(jax.tree.map(np.asarray, next(resumed)), batch)


def test_evaluation_while_training_repeats_rebatches_and_caches():
    dataset = (
        training_dataset(SCENES[0], batch_size=1, epochs=8)
        .unbatch()
        .repeat()
        .shard(2, 1)
        .batch(4, drop_remainder=True)
        .take(3)
        .cache()
    )
    first, again = (list(dataset.as_numpy_iterator()) for _ in range(2))
    assert len(first) == 3 and equal(first, again)
    assert first[0]["encoder_input_images"].shape == (4, 16, 16, 3)


# Inference


@pytest.mark.parametrize("name", TASKS)
def test_what_inference_writes_down_is_text(name):
    task = seqio.TaskRegistry.get(name)
    examples = task.get_dataset(LENGTHS, split_of(name), shuffle=False)
    spec = examples.element_spec
    written = {key: s for key, s in spec.items() if key.endswith("_pretokenized")}
    assert set(written) == {"inputs_pretokenized", "targets_pretokenized"}
    for key, tensor in written.items():
        assert tensor.dtype == tf.string and tensor.shape == (), key


@pytest.fixture(scope="module")
def predict():
    params = tiny_models.model_params(MODEL)
    step = t5x_driver.infer_step(MODEL.predict_batch_with_aux)

    def run(features, size=4):
        """Predictions and scores; the last rows of the last batch are discarded."""
        count = len(features["encoder_input_tokens"])
        rows = np.arange(-(-count // size) * size)
        rows = np.where(rows < count, rows, 0)
        results = []
        for part in np.split(rows, len(rows) // size):
            batch = {name: array[part] for name, array in features.items()}
            results.append(step(params, batch, None, part)[1])
        whole = jax.tree.map(lambda *x: np.concatenate(x)[:count].tolist(), *results)
        return whole[0], whole[1]["scores"]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_lines_of_inference_hold_texts_and_no_pixels(name, predict):
    task = seqio.TaskRegistry.get(name)
    vocabulary = task.output_features["targets"].vocabulary
    texts, lines = [], []
    for _, (examples, features) in inference_dataset(name, 4).as_numpy_iterator():
        lines += json_lines(examples, *predict(features), vocabulary)
        texts += examples["targets_pretokenized"].tolist()
    assert len(lines) == task.num_input_examples(split_of(name)) > 4
    for text, line in zip(texts, map(json.loads, lines), strict=True):
        assert set(line["inputs"]) == {"inputs_pretokenized", "targets_pretokenized"}
        assert line["inputs"]["targets_pretokenized"] == text.decode()
        assert isinstance(line["prediction"], str)
        assert np.isfinite(line["aux"]["scores"])
    assert max(map(len, lines)) < 400


def test_inference_resumes_from_the_position_that_it_saved(tmp_path):
    """infer.checkpoint_ds_iter, on by default."""
    # T5X prefetches behind this; what TensorFlow saves while it does is its own affair.
    iterator = iter(inference_dataset(SCENES[1], 4))
    next(iterator)
    path = tf.train.Checkpoint(ds=iterator).write(str(tmp_path / "input.ckpt"))
    resumed = iter(inference_dataset(SCENES[1], 4))
    tf.train.Checkpoint(ds=resumed).read(path).assert_consumed()
    expected, actual = ([int(i) for i, _ in it] for it in (iterator, resumed))
    assert actual == expected and actual[0] == 1


# Vocabularies


@pytest.mark.parametrize("name", [*TASKS, "scenes_mixture"])
def test_vocabularies_of_task_and_model_are_equal_as_objects(name):
    features = seqio.get_mixture_or_task(name).output_features
    assert features["inputs"].vocabulary == MODEL.input_vocabulary
    assert features["targets"].vocabulary == MODEL.output_vocabulary


def test_a_vocabulary_file_loaded_twice_is_equal_and_another_is_not(
    data, monkeypatch, tmp_path
):
    captions = scenes.scene_paths(data / "scenes", "train").captions
    one, other = tmp_path / "one.model", tmp_path / "other.model"
    for path in (one, other):
        vocabularies.train([captions], path, vocab_size=320)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT22B_VOCABULARY", "one.model")
    from_task = vocabularies.from_environment()
    assert from_task == vocabularies.load(one)
    assert from_task != vocabularies.load(other)
    assert from_task != seqio.ByteVocabulary()


# Evaluation


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [(SCENES[0], 16), (SCENES[1], (16, 16))])
def test_seqios_evaluator_computes_the_metrics_of_our_own_evaluation(name, size):
    evaluator = Evaluator(
        mixture_or_task_name=name,
        feature_converter=MODEL.FEATURE_CONVERTER_CLS(pack=False),
        eval_split=SPLIT,
        use_cached=False,
        seed=7,
        sequence_length=LENGTHS | {"images": size},
        use_memory_cache=False,
        logger_cls=(),
    )
    assert evaluator.model_feature_shapes == MODEL_SHAPES

    def predict(dataset):
        """The right tokens, padded, for two of three examples; in any order."""
        found = [
            (int(index), features["decoder_target_tokens"].tolist())
            for index, features in dataset.as_numpy_iterator()
        ]
        wrong = [ord("x") + 3, 1, *[0] * 62]
        return [(i, tokens if i % 3 else wrong) for i, tokens in found[::-1]]

    future, _ = evaluator.evaluate(compute_metrics=True, step=3, predict_fn=predict)
    measured = future.result()[name]
    evaluator.close()

    task = seqio.TaskRegistry.get(name)
    dataset = task.get_dataset(LENGTHS, SPLIT, shuffle=False)
    examples = list(dataset.as_numpy_iterator())
    texts = [
        example["targets_pretokenized"].decode() if index % 3 else "x"
        for index, example in enumerate(examples)
    ]
    expected = task_metrics.metrics(
        name, examples, texts, {"scores": [0.0] * len(texts)}
    )
    assert dict(measured) == expected
    assert any(0 < value for value in expected.values() if not isinstance(value, str))
