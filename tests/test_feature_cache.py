"""Tokens of a frozen tower on disk: as live ones, resumable, refused when stale."""

import dataclasses
import functools
import os
import shutil
from pathlib import Path

import full_disks
import gin
import jax
import numpy as np
import optax
import pytest
import seqio
import tensorflow as tf
import tiny_captions
import tiny_models
import tiny_processes
import tiny_runs
from array_tasks import ArraySource, add_task
from flax.traverse_util import flatten_dict
from tiny_captions import BATCH_SIZE, LENGTHS, ONE_DEVICE
from tiny_models import assert_within

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.data import batches, chunks, feature_cache, sources
from vit22b_transfer.data.converters import ImageTextFeatureConverter
from vit22b_transfer.data.feature_shards import STORAGES, Shard, TokenFormat
from vit22b_transfer.demo import scenes
from vit22b_transfer.evaluation import training_scores
from vit22b_transfer.host import locks
from vit22b_transfer.inference import cache_features, infer
from vit22b_transfer.models import lora, multimodal
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.recipes import loading
from vit22b_transfer.training import inputs, logs
from vit22b_transfer.training.inputs import EvalData, TrainData
from vit22b_transfer.training.train import InitialCheckpoint, Periods, fine_tune

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TASK = "feature_cache_test"
FROZEN = ("encoder/tower/.*",)
# 15 captions of 10 images, one of which cannot be read; the test split shows each once.
NUM_TRAIN, NUM_IMAGES = 15, 10
NUM_STEPS = 3
TASK_ARGUMENTS = dict(feature_lengths=LENGTHS, batch_size=BATCH_SIZE)


# SGD compiles fastest.
model = functools.partial(
    tiny_captions.model, num_encoder_layers=0, optimizer_def=optax.sgd(1e-2)
)


def write_checkpoint(model_dir, seed=0):
    return tiny_captions.write_checkpoint(model_dir, model(), seed=seed)


def write(cache, the_model=None, *, task=TASK, partitioning=ONE_DEVICE, **arguments):
    data = TrainData(task, "train", **TASK_ARGUMENTS, cache=cache)
    arguments = dict(examples_per_shard=4) | arguments
    return cache_features.cache_features(
        the_model or model(), partitioning=partitioning, data=data, **arguments
    )


def reading_from(cache, the_model=None, *, task=TASK, split="train"):
    """Arguments to read batches from the cache with."""
    return inputs.batch_arguments(cache, the_model or model(), task, split, LENGTHS)


def train_batch(arguments, step=0, task=TASK):
    with batches.train_batches(
        task,
        "train",
        **arguments,
        batch_size=BATCH_SIZE,
        seed=1,
        partitioning=ONE_DEVICE,
        start_step=step,
    ) as stream:
        return jax.tree.map(np.asarray, dict(next(stream)))


def contents(directory):
    return {
        name: (Path(directory) / name).read_bytes()
        for name in sorted(os.listdir(directory))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    tiny_captions.write_folder(path)
    return path


def letters(targets, predictions):
    texts = zip(targets, predictions, strict=True)
    return {"letters": float(sum(hash(str(pair)) % 1000 for pair in texts))}


@pytest.fixture(scope="module", autouse=True)
def task(folder):
    tiny_captions.register(TASK, folder, metric_fns=[letters])
    yield
    seqio.TaskRegistry.remove(TASK)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, checkpoint):
    return feature_cache.FeatureCache(str(tmp_path_factory.mktemp("cache")), checkpoint)


@pytest.fixture(scope="module")
def written(cache):
    eval_data = EvalData([TASK], "test", **TASK_ARGUMENTS, cache=cache)
    return write(cache, eval_data=eval_data)


def test_each_image_is_encoded_once_and_no_example_is_lost(written):
    train, test = written
    assert (train.num_examples, test.num_examples) == (NUM_TRAIN, NUM_IMAGES)
    assert train.num_encoded == test.num_encoded == NUM_IMAGES
    assert (train.num_shards, train.num_kept) == (4, 0)
    paths = sorted(Path(train.directory).glob("*.array_record"))
    shards = [Shard(str(path)) for path in paths]
    assert sum(len(shard.examples) for shard in shards) == NUM_TRAIN
    assert sum(len(shard.rows) for shard in shards) == NUM_IMAGES


LIVE = dict(feature_lengths=LENGTHS, converter_cls=ImageTextFeatureConverter)


@pytest.mark.parametrize("step", [0, 5])
def test_cached_batches_are_the_live_ones_with_tokens_for_pixels(cache, written, step):
    live, cached = train_batch(LIVE, step), train_batch(reading_from(cache), step)
    images = live.pop("encoder_input_images")
    tokens = cached.pop("encoder_input_features")
    assert tokens.shape == (len(images), 4, 32) and tokens.dtype == np.float32
    tiny_runs.assert_same_bits(cached, live)


def test_evaluation_reads_the_same_examples_in_order(cache, written):
    found = []
    for tokens in (None, cache):
        data = EvalData([TASK], "test", **TASK_ARGUMENTS, cache=tokens)
        with data.batches(TASK, model(), ONE_DEVICE) as rows:
            found.append([example for batch in rows for example in batch.examples])
            assert rows.counters.lost["skipped_images"] == 1
    assert found[0] == found[1] and len(found[0]) == NUM_IMAGES


def test_scores_while_training_are_the_same_on_cached_features(
    cache, written, checkpoint, tmp_path
):
    the_model, found = model(), []
    log = logs.RunLog(str(tmp_path), total_steps=1)
    restored = infer.restore(the_model, ONE_DEVICE, checkpoint, LENGTHS, BATCH_SIZE)
    params = dict(restored.params)
    for tokens in (None, cache):
        data = EvalData([TASK], "test", **TASK_ARGUMENTS, cache=tokens)
        scorer = training_scores.TrainingScores(data, 1).start(the_model, ONE_DEVICE)
        with ONE_DEVICE.activate():
            found.append(scorer(params, lambda: False, log))
        # Such a training has no tower.
        kept = {k: v for k, v in params["encoder"].items() if k != "tower"}
        params = params | {"encoder": kept}
    assert found[0] == found[1]


def with_dtype(dtype):
    """The model with activations in `dtype`."""
    changed = model()
    parts = {"tower": changed.module.tower, "text": changed.module.text}
    parts = {k: dataclasses.replace(part, dtype=dtype) for k, part in parts.items()}
    changed.module = changed.module.clone(**parts)
    return changed


@functools.cache
def mean_loss(dtype):
    the_model = with_dtype(dtype)

    @tiny_models.jit
    def mean_loss(params, batch):
        loss, metrics = the_model.eval_fn(params, batch)
        return loss / metrics["loss"].count

    return mean_loss


@pytest.mark.parametrize(
    "dtype, storage, tolerance",
    [
        ("float32", "exact", 1e-5),
        # Per token of a loss of about 6; bfloat16 has 8 bits.
        ("bfloat16", "exact", 2e-2),
        ("float32", "int8", 2e-2),
    ],
)
def test_the_loss_is_that_of_live_features(
    checkpoint, cache, written, tmp_path, dtype, storage, tolerance
):
    the_model = with_dtype(dtype)
    if (dtype, storage) != ("float32", "exact"):
        cache = feature_cache.FeatureCache(str(tmp_path), checkpoint, storage)
        write(cache, the_model)
    params = tiny_models.model_params(model(), seed=0)
    live = mean_loss(dtype)(params, train_batch(LIVE))
    without = dict(params, encoder=dict(params["encoder"], tower={}))
    cached = mean_loss(dtype)(without, train_batch(reading_from(cache, the_model)))
    assert_within(tolerance, cached, live, f"{dtype} {storage}")


def test_int8_takes_a_quarter_of_the_space():
    exact, rounded = (
        TokenFormat(196, 768, "float32", storage).num_bytes for storage in STORAGES
    )
    assert exact == 196 * 768 * 4
    assert rounded == 196 * (768 + 4)


# --- Stopped, cut off, damaged ---


class DyingSource(sources.CaptionFileSource):
    """Record 9 can be read twice, to see that it stays the same, and then no more."""

    reads = 0

    def records(self, split, order):
        def alive(number):
            self.reads += number == 9
            if self.reads > 2:
                raise ValueError("the disk is gone")
            return number

        def checked(number):
            return tf.ensure_shape(tf.numpy_function(alive, [number], tf.int64), [])

        return super().records(split, order.map(checked))


def test_a_run_that_dies_goes_on_and_ends_with_the_same_bytes(
    folder, checkpoint, tmp_path, written, monkeypatch
):
    # Of the examples that are read in one call with the failing one, none comes out.
    monkeypatch.setattr(chunks, "MOST_EXAMPLES", 1)
    cache = feature_cache.FeatureCache(str(tmp_path), checkpoint)
    files = sources.CaptionFiles(folder / "captions.jsonl", folder)
    dying = DyingSource({"train": files, "test": files})
    tiny_captions.register(TASK, folder, source=dying)
    try:
        with pytest.raises(ValueError, match="the disk is gone"):
            write(cache)
        with pytest.raises(ValueError, match="lack 2 of 4 shards.* Run .*it goes on"):
            reading_from(cache)
    finally:
        tiny_captions.register(TASK, folder)
    [result] = write(cache)
    assert result.num_kept == 2
    assert 0 < result.num_encoded < NUM_IMAGES
    expected = contents(written[0].directory)
    assert os.path.basename(result.directory) == os.path.basename(written[0].directory)
    assert contents(result.directory) == expected
    # What is finished is not written again.
    [again] = write(cache)
    assert (again.num_kept, again.num_encoded) == (4, 0)


@pytest.fixture
def copied(cache, written, tmp_path):
    """(cache, directory of its training split), to be damaged."""
    copy = dataclasses.replace(cache, directory=str(tmp_path))
    directory = tmp_path / os.path.basename(written[0].directory)
    shutil.copytree(written[0].directory, directory)
    return copy, directory


def test_a_shard_that_was_cut_off_is_refused_and_made_anew(copied):
    cache, directory = copied
    before = contents(directory)
    path = directory / "00001-of-00004.array_record"
    for rest in (path.read_bytes()[:-1000], b""):
        path.write_bytes(rest)
        with pytest.raises(ValueError, match=f"{path} .* is cut off or damaged"):
            reading_from(cache)
    assert write(cache)[0].num_kept == 3
    assert contents(directory) == before


def test_a_second_start_on_a_split_is_refused_and_deletes_nothing(copied):
    cache, directory = copied
    left = directory / "00001-of-00004.array_record.unfinished"
    left.write_bytes(b"as if the first were writing it")
    with locks.held(str(directory)):
        with pytest.raises(UserError, match=f"{directory} is in use: process"):
            write(cache)
        assert left.exists()
    assert write(cache)[0].num_kept == 4
    assert not left.exists()


def test_a_full_disk_keeps_the_shards_and_the_same_command_goes_on(copied, capfd):
    cache, directory = copied
    before = contents(directory)
    for number in (1, 2, 3):
        (directory / f"0000{number}-of-00004.array_record").unlink()
    with full_disks.full_disk() as fill:
        fill(1000)
        kept = "1 of 4 shards are kept"
        with full_disks.refused(capfd, str(directory), full_disks.FULL, kept):
            write(cache)
    [result] = write(cache)
    assert result.num_kept == 1
    assert contents(directory) == before


def test_a_changed_byte_is_an_error_that_names_the_file(copied):
    cache, directory = copied
    path = directory / "00000-of-00004.array_record"
    whole = bytearray(path.read_bytes())
    row = Shard(str(path)).row(1)
    whole[whole.index(row[100:140])] ^= 1
    path.write_bytes(whole)
    arguments = reading_from(cache)
    with pytest.raises(ValueError, match=f"of {path} is damaged"):
        for step in range(5):
            train_batch(arguments, step)


# --- Refused ---


def refused(cache, message, **arguments):
    with pytest.raises(ValueError, match=message):
        reading_from(cache, **arguments)


def test_a_cache_that_is_not_there_says_how_to_write_it(tmp_path, checkpoint):
    cache = feature_cache.FeatureCache(str(tmp_path), checkpoint)
    refused(cache, "there are no cached features of task .* `vit22b cache-features`")


def test_a_cache_of_another_tower_is_stale(cache, written, tmp_path):
    other = write_checkpoint(tmp_path, seed=1)
    stale = dataclasses.replace(cache, tower=other)
    refused(stale, r"stale: .*\n.*: weights \(.* there, .* here\)\nWrite them anew")
    wider = model()
    tower = dataclasses.replace(wider.module.tower, norm_epsilon=1e-3)
    wider.module = wider.module.clone(tower=tower)
    refused(
        cache, r"stale.*\n.*: tower.norm_epsilon \(None there, '0.001'", the_model=wider
    )


def test_how_the_tower_is_computed_does_not_make_a_cache_stale(cache, written):
    other = model()
    tower = dataclasses.replace(other.module.tower, remat="block", pooling="gap")
    other.module = other.module.clone(tower=tower)
    reading_from(cache, other)


def test_a_cache_of_other_texts_or_preprocessing_is_stale(cache, written, folder):
    try:
        tiny_captions.register(TASK, folder, vocabulary=seqio.ByteVocabulary(3))
        refused(cache, r"stale.*\n.*: preprocessing \(")
        lines = (folder / "captions.jsonl").read_text(encoding="utf-8")
        (folder / "fewer.jsonl").write_text("\n".join(lines.splitlines()[1:]))
        files = sources.CaptionFiles(folder / "fewer.jsonl", folder)
        source = sources.CaptionFileSource({"train": files, "test": files})
        tiny_captions.register(TASK, folder, source=source)
        refused(cache, r"stale.*\n.*: records \(")
    finally:
        tiny_captions.register(TASK, folder)
    with pytest.raises(ValueError, match=r"stale.*\n.*: feature_lengths.targets \("):
        inputs.batch_arguments(cache, model(), TASK, "train", LENGTHS | {"targets": 5})
    int8 = dataclasses.replace(cache, storage="int8")
    refused(int8, r"storage \('exact' there, 'int8' here\)")


@seqio.map_over_dataset(num_seeds=1)
def seeded_flip(example, seed):
    flip = tf.random.stateless_uniform([], seed) < 0.5
    images = example["images"]
    return example | {"images": tf.where(flip, images[:, ::-1], images)}


def unseeded_noise(dataset):
    def add(example):
        noise = tf.random.uniform([16, 16, 3], 0, 9, tf.int32)
        return example | {"images": example["images"] + tf.cast(noise, tf.uint8)}

    return dataset.map(add)


def picture(number):
    digits = tf.strings.as_string(number)
    images = tf.fill([16, 16, 3], tf.cast(number, tf.uint8))
    return {"images": images, "inputs": digits, "targets": digits}


@pytest.mark.parametrize("augment", [seeded_flip, unseeded_noise])
def test_random_augmentation_is_refused(cache, augment):
    name = f"feature_cache_{augment.__name__}"
    add_task(name, ArraySource(6, picture), [augment])
    with pytest.raises(
        ValueError, match="draws random numbers .* Train with the tower"
    ):
        write(cache, task=name)
    seqio.TaskRegistry.remove(name)


def drop_odd(dataset):
    return dataset.filter(lambda example: example["images"][0, 0, 0] % 2 == 0)


def test_a_task_that_drops_examples_is_cached_without_them(cache):
    name = "feature_cache_dropping"
    add_task(name, ArraySource(9, picture), [drop_odd])
    assert write(cache, task=name)[0].num_examples == 5
    arguments = reading_from(cache, task=name)
    rows = batches.eval_batches(
        name, "train", **arguments, batch_size=8, partitioning=ONE_DEVICE
    )
    with rows:
        targets = next(rows).features["decoder_target_tokens"]
    decoded = [seqio.ByteVocabulary().decode(row.tolist()) for row in targets[:5]]
    assert decoded == ["0", "2", "4", "6", "8"]
    seqio.TaskRegistry.remove(name)


def test_low_rank_updates_of_the_tower_are_refused(cache, written):
    batch = train_batch(reading_from(cache))
    shapes = {name: rows.shape for name, rows in batch.items()}

    def initialise(pattern):
        with_lora = model(lora=lora.LoraConfig(2, 4.0, (pattern,)))
        return jax.eval_shape(
            lambda rng: with_lora.get_initial_variables(rng, shapes), jax.random.key(0)
        )

    with pytest.raises(ValueError, match="encoder/tower/.*lora_a.*does not run it"):
        initialise(".*attention/query/kernel")
    params = initialise("(?!encoder/tower/).*attention/query/kernel")["params"]
    assert "tower" not in params["encoder"]


def test_a_batch_on_several_devices_gives_the_same_shards(
    checkpoint, tmp_path, written
):
    cache = feature_cache.FeatureCache(str(tmp_path), checkpoint)
    [result] = write(cache, partitioning=Partitioning(data=2, model=2))
    layout = feature_cache.Layout.read(result.directory)
    for path, other in zip(
        layout.paths(result.directory), layout.paths(written[0].directory), strict=True
    ):
        ours, theirs = Shard(path), Shard(other)
        assert (ours.rows, ours.examples) == (theirs.rows, theirs.examples)
        for row in range(len(ours.rows)):
            tokens = (np.frombuffer(x.row(row), np.float32) for x in (ours, theirs))
            np.testing.assert_allclose(*tokens, rtol=0, atol=1e-5)


def test_two_processes_share_the_shards_out_and_train_on_them(tmp_path):
    scenes.write_scenes(
        tmp_path / "data", seed=3, sizes={"train": 12, "validation": 4, "test": 4}
    )
    (tmp_path / "recipe.gin").write_text(tiny_processes.RECIPE)
    tower, cache, on_cache = (
        tmp_path / name for name in ("tower", "cache", "on_cache")
    )
    values = dict(
        CACHE_DIR=str(cache),
        TOWER_CHECKPOINT=str(tower),
        TRAIN_STEPS=2,
        cache_features__cache_features__examples_per_shard=7,
    )
    file = "gin_configs/runs/cached_features.gin"
    commands = [
        tiny_processes.train(tmp_path, tower, 1, 1),
        *(
            tiny_processes.command(name, tmp_path, on_cache, file, **values)
            for name in ("cache-features", "train")
        ),
    ]
    with tiny_processes.started(tmp_path, "two", 2, commands) as children:
        tiny_processes.finish(tmp_path, "two", children)
    [train] = cache.glob("*train*")
    shards = [Shard(str(path)) for path in sorted(train.glob("*.array_record"))]
    # Five captions of each of twelve images.
    assert [len(shard.examples) for shard in shards] == [7] * 8 + [4]
    rows, shown = (
        [image for shard in shards for image in getattr(shard, name)]
        for name in ("rows", "examples")
    )
    assert set(rows) == set(shown) and len(set(shown)) == 12
    assert reading.latest_step(str(on_cache)) == 2


# --- Training ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, written, checkpoint):
    """(live and frozen, cached): result and directory of the same training."""
    found = []
    for name, frozen, tokens in (("live", FROZEN, None), ("cached", (), cache)):
        model_dir = tmp_path_factory.mktemp(name)
        result = fine_tune(
            model(frozen=frozen),
            model_dir=str(model_dir),
            data=TrainData(TASK, "train", **TASK_ARGUMENTS, cache=tokens),
            total_steps=NUM_STEPS,
            partitioning=ONE_DEVICE,
            periods=Periods(log=1),
            initial=InitialCheckpoint(checkpoint),
        )
        found.append((result, model_dir))
    return found


def test_training_gives_the_losses_and_parameters_of_a_frozen_tower(runs):
    (live, live_dir), (cached, cached_dir) = runs
    for ours, theirs in zip(
        *map(tiny_runs.logged, (cached_dir, live_dir)), strict=True
    ):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    size, smaller = (
        sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())
        for path in (live.checkpoint, cached.checkpoint)
    )
    assert smaller < size
    names = [
        {name for name in reading.saved_arrays(run.checkpoint) if "target/" in name}
        for run in (live, cached)
    ]
    assert names[0] == names[1]


def test_inference_takes_the_tower_from_where_the_features_came(runs):
    (live, _), (cached, _) = runs
    restored = [
        infer.restore(model(), ONE_DEVICE, run.checkpoint, LENGTHS, BATCH_SIZE).params
        for run in (live, cached)
    ]
    ours, theirs = (flatten_dict(params, sep="/") for params in restored)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        tolerance = 0 if "tower" in name else 1e-4
        assert_within(tolerance, ours[name], value, name)


def test_a_tower_that_is_gone_or_another_is_an_error(runs, checkpoint, tmp_path):
    cached = runs[1][0]
    moved = tmp_path / "elsewhere"

    def restore():
        infer.restore(model(), ONE_DEVICE, cached.checkpoint, LENGTHS, BATCH_SIZE)

    os.rename(checkpoint, moved)
    try:
        with pytest.raises(ValueError, match="which is not there. Put it back"):
            restore()
        write_checkpoint(Path(checkpoint).parent, seed=5)
        with pytest.raises(ValueError, match="now there is another tower"):
            restore()
        os.rename(checkpoint, tmp_path / "other")
    finally:
        os.rename(moved, checkpoint)
    restore()


# --- gin ---


@pytest.mark.parametrize("name", ["scenes_vqa", "scenes_paligemma"])
@pytest.mark.parametrize(
    "root", [cache_features.cache_features, fine_tune], ids=lambda x: x.__name__
)
def test_one_gin_file_turns_a_recipe_to_its_cache(name, root):
    files = [f"gin_configs/recipes/{name}.gin", "gin_configs/runs/cached_features.gin"]
    overrides = ["CACHE_DIR='/c'", "TOWER_CHECKPOINT='/t'", "MODEL_DIR='/nowhere'"]
    try:
        recipe = loading.read(files, overrides, [str(ROOT)])
        assert callable(loading.install(recipe, root, [str(ROOT)]))
        data = gin.get_configurable(TrainData)()
        assert data.cache == feature_cache.FeatureCache("/c", "/t")
        assert gin.get_configurable(EvalData)().cache == data.cache
        assert gin.get_configurable(multimodal.ImageTextModel)().frozen == ()
    finally:
        gin.clear_config()
