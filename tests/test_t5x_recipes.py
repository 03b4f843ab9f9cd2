"""Every shipped recipe and file in both runtimes: trained, frozen, restored.

Needs T5X beside the project; `test_t5x_options.py` needs none. With `-s` it prints the
table of all of them.
"""

import contextlib
import re
import shutil
import types

import gin
import gin_files
import jax
import numpy as np
import pytest
import seqio
import tiny_runs
from flax.core import unfreeze

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading, writing
from vit22b_transfer.data import batches
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.inference import infer
from vit22b_transfer.models import freezing
from vit22b_transfer.recipes import loading
from vit22b_transfer.training import optimizers, resuming, state, train

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
t5x_adapter = pytest.importorskip("vit22b_transfer.t5x_adapter", reason=_REASON)

import t5x_gin  # noqa: E402


@pytest.fixture(autouse=True)
def settings_of_t5x():
    """JAX's default promotion, as T5X adds arrays of different types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


CONFIGS = gin_files.CONFIGS
T5_RECIPE, GEMMA_RECIPE = (
    CONFIGS / f"recipes/{name}.gin" for name in ("scenes_vqa", "scenes_paligemma")
)
CLASS_RECIPE = CONFIGS / "recipes/image_folder.gin"
# A head, which the T5 of the recipes lacks, has the strong decay.
OF_CLASSES = {
    *("classifier", "class_names", "mixup", "multi_label", "optimizer_vit22b"),
    *("distill", "distill_cached", "distill_tokens", "distill_tokens_cosine"),
}
PAIRS_RECIPE = CONFIGS / "recipes/my_pairs.gin"
OF_PAIRS = {"contrastive", "contrastive_softmax", "text_tower", "text_tower_t5"}
# Of published sizes: a layer or two in place of all.
SMALL = {
    "VIT": "'Ti/16'",
    "T5": "'small'",
    "vit.vit22b_config": ("depth",),
    "vit.classic_config": ("depth",),
    "t5.t5_config": ("num_encoder_layers", "num_decoder_layers"),
    "gemma.gemma_config": ("depth",),
}
ROWS = 8


@pytest.fixture(autouse=True)
def bytes_as_vocabulary(monkeypatch):
    monkeypatch.setenv("VIT22B_VOCABULARY", "bytes")


def bindings_of(paths, *more):
    """What the command line sets: what the files leave open, and small sizes."""
    read = gin_files.read_recipe(paths[0], behind=paths[1:])
    set_there = {o.partition("=")[0]: o for o in read.overrides}
    names = {
        name.rpartition("vit22b_transfer.models.")[2] for name in read.configurables
    }
    for name, value in SMALL.items():
        if name in read.macros:
            set_there[name] = f"{name}={value}"
        elif name in names:
            set_there |= {f"{name}.{p}": f"{name}.{p}=1" for p in value}
    set_there |= {o.partition("=")[0]: o for o in more}
    return list(set_there.values())


def names_of(paths):
    return [path.relative_to(gin_files.ROOT).as_posix() for path in paths]


def in_ours(root, paths, *more):
    """What our runtime calls `root` with."""
    try:
        read = loading.read(
            names_of(paths), bindings_of(paths, *more), [str(gin_files.ROOT)]
        )
        return loading.arguments(read, root, [str(gin_files.ROOT)])
    finally:
        gin.clear_config()


@contextlib.contextmanager
def in_t5x(job, paths, *more):
    """What T5X's launcher of a job calls T5X with."""
    set_there = bindings_of(paths, *more)
    with t5x_gin.parsed(job, names_of(paths), set_there) as launched:
        yield gin.get_bindings(launched)


def batch_of(model, lengths):
    shapes, types = batches.batch_shapes(model.FEATURE_CONVERTER_CLS, lengths, ROWS)
    return {n: jax.ShapeDtypeStruct(shape, types[n]) for n, shape in shapes.items()}


def described(params, opt_state_names, frozen, initial):
    """What there is of a train state: two of these are equal or the runtimes differ."""
    flat = reading.flatten(unfreeze(params))
    return {
        "parameters": {n: (leaf.shape, str(leaf.dtype)) for n, leaf in flat.items()},
        "frozen": {n for n, mask in frozen.items() if mask},
        "optimizer": opt_state_names,
        "initial": initial,
    }


def ours(paths, *more):
    """Of our runtime."""
    made = in_ours(train.fine_tune, paths, *more)
    model, partitioning = made["model"], tiny_runs.ONE_DEVICE
    batch = batch_of(model, made["data"].feature_lengths)
    params = state.abstract_variables(model, partitioning, batch)
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    tree = state.to_checkpoint_tree(
        state.abstract_state(params, optimizer, partitioning)
    )
    return described(
        params,
        set(reading.flatten(tree["state"])),
        reading.flatten(freezing.frozen_mask(params, model.frozen)),
        made.get("initial"),
    )


def initializer_of(made):
    lengths = made["train_dataset_cfg"].task_feature_lengths
    batch = batch_of(made["model"], lengths)
    return made["train_state_initializer_cls"](
        optimizer_def=made["model"].optimizer_def,
        init_fn=made["model"].get_initial_variables,
        input_shapes={name: leaf.shape for name, leaf in batch.items()},
        input_types={name: leaf.dtype.type for name, leaf in batch.items()},
        partitioner=made["partitioner"],
    )


ON_CPUS = "partitioning.PjitPartitioner.model_parallel_submesh=(1, 2, 1, 1)"


def theirs(paths, *more):
    with in_t5x("train", paths, ON_CPUS, *more) as made:
        initializer, model = initializer_of(made), made["model"]
    shapes = initializer.global_train_state_shape
    return described(
        shapes.params,
        set(reading.flatten(shapes.state_dict()["state"])),
        reading.flatten(freezing.frozen_mask(unfreeze(shapes.params), model.frozen)),
        initializer._initial,
    )


def cases():
    for path in gin_files.RECIPES:
        yield (path,)
    for path in gin_files.BEHIND:
        text = path.read_text()
        if path.stem == "mixed":  # alone it lacks a text tower: scenes_mixed is whole
            continue
        if path.stem in OF_CLASSES:
            yield (CLASS_RECIPE, path)
            continue
        if path.stem in OF_PAIRS:
            yield (PAIRS_RECIPE, path)
            continue
        of_gemma = "gemma" in text and "regularization" not in path.stem
        yield (
            GEMMA_RECIPE if of_gemma or path.stem == "prefix_lm" else T5_RECIPE,
            path,
        )
        if path.stem in ("frozen_tower", "int8_tower", "lora"):
            yield (GEMMA_RECIPE, path)
            yield (CLASS_RECIPE, path)
        if path.stem == "frozen_tower":
            yield (PAIRS_RECIPE, path)


# What T5X refuses of the shipped files, and with which words.
REFUSED = {
    "cached_features": "T5X reads images, not cached features",
    "distill_cached": "T5X reads images, not the cached logits of a teacher",
    "activations_2d": "standard_logical_axis_rules.activation_partitioning_dims",
    "activations_2d_async": "T5X has no such thing",
    "activations_2d_fsdp": "standard_logical_axis_rules.parameter_partitioning_dims",
    "fsdp": "standard_logical_axis_rules.parameter_partitioning_dims",
    "instruments": "T5X's step tells nothing of layers",
    "keep_best": "SaveBestCheckpointer",
    "qk_clip": "T5X's step clips no heads",
    "scenes_mixed": "each task has its own part",
    "spike_guard": "every step of T5X counts",
}


def line(paths, told):
    return f"{' + '.join(path.stem for path in paths):44} {told}"


@pytest.mark.slow
def test_shipped_files_train_freeze_and_restore_the_same_or_are_refused(capsys):
    table, wrong, refused = [], [], set()
    for paths in cases():
        name = paths[-1].stem
        try:
            expected = ours(paths)
        except UserError as error:
            expected = str(error)
        try:
            found = theirs(paths)
        except UserError as error:
            found = str(error)
        if isinstance(found, str):
            refused.add(name)
            words = re.sub(r"\s+", " ", found.partition("\n  ")[2] or found)
            table.append(line(paths, f"T5X refuses: {words[:150]}"))
            if name not in REFUSED or REFUSED[name] not in found:
                wrong.append((name, found))
            continue
        if found != expected:
            wrong.append((name, "differs", expected, found))
        frozen, there = len(found["frozen"]), len(found["parameters"])
        start = found["initial"].path if found["initial"] else "nothing"
        table.append(
            line(
                paths, f"both: {there - frozen} trained, {frozen} frozen, from {start}"
            )
        )
    with capsys.disabled():
        print("", *table, sep="\n")
    assert not wrong
    assert refused == set(REFUSED)


# --- Values ---

# Files behind the recipe that starts from a checkpoint, the rules of its start, and
# what is then fresh: a pattern, or None for nothing.
STARTS = {
    "all": ((), "", None),
    "frozen tower": (("frozen_tower",), "", None),
    "lora": (("lora",), "", ".*/lora_[ab]"),
    "int8 tower": (("int8_tower",), "", None),
    "a fresh projection": (
        ("frozen_tower",),
        "(('encoder/projection/.*', None),)",
        "encoder/projection/.*",
    ),
}
FROM_CHECKPOINT = CONFIGS / "runs/from_checkpoint.gin"
TINY = [
    *(f"T5Config.num_{part}_layers=1" for part in ("encoder", "decoder")),
    "ViTConfig.depth=1",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the tiny recipe, with random parameters."""
    folder = tmp_path_factory.mktemp("source")
    made = in_ours(train.fine_tune, (T5_RECIPE,), *TINY)
    model, partitioning = made["model"], tiny_runs.ONE_DEVICE
    batch = batch_of(model, made["data"].feature_lengths)
    with jax.numpy_dtype_promotion("standard"):
        params = state.abstract_variables(model, partitioning, batch)
        params = state.init_params(
            model, jax.random.key(7), batch, params, partitioning
        )
        optimizer = optimizers.freeze(model.optimizer_def, params, ())
        abstract = state.abstract_state(params, optimizer, partitioning)
        whole = state.fresh_state(params, optimizer, abstract)
    writer = writing.CheckpointWriter(str(folder))
    writer.save(3, state.to_checkpoint_tree(whole), {})
    writer.close()
    return str(folder / "checkpoint_3")


@pytest.mark.parametrize("name", STARTS)
def test_t5x_starts_from_the_same_values_as_our_runtime(name, checkpoint):
    behind, rules, fresh = STARTS[name]
    paths = (T5_RECIPE, FROM_CHECKPOINT, *gin_files.model_files(*behind))
    more = [*TINY, f"INITIAL_CHECKPOINT={checkpoint!r}"]
    more += [f"InitialCheckpoint.rules={rules}"] * bool(rules)
    made = in_ours(train.fine_tune, paths, *more)
    model, partitioning = made["model"], tiny_runs.ONE_DEVICE
    batch = batch_of(model, made["data"].feature_lengths)
    abstract = state.abstract_variables(model, partitioning, batch)
    messages = []
    log = types.SimpleNamespace(message=messages.append)
    key, _ = train._keys(0, partitioning)
    expected = resuming.initial_params(
        model, made["initial"], key, batch, abstract, partitioning, log
    )
    with in_t5x("train", paths, ON_CPUS, *more) as made:
        initializer = initializer_of(made)
        key, _ = jax.random.split(jax.random.PRNGKey(0))
        found = initializer.from_scratch(key)
    assert int(found.step) == 0
    flat, wanted = (
        reading.flatten(jax.tree.map(np.asarray, unfreeze(tree)))
        for tree in (found.params, expected)
    )
    assert flat.keys() == wanted.keys()
    for path, value in wanted.items():
        assert flat[path].dtype == value.dtype
        if fresh and re.fullmatch(fresh, path):
            # Drawn from the same key; a sharded program may round otherwise.
            np.testing.assert_allclose(flat[path], value, rtol=1e-6, atol=1e-7)
        else:
            assert flat[path].tobytes() == value.tobytes(), path
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found.state_dict())
    planned = initializer.global_train_state_shape.state_dict()
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned)


@pytest.mark.parametrize(
    "more, message",
    [
        (["INITIAL_CHECKPOINT='/nowhere/checkpoint_1'"], "there is no directory"),
        (["InitialCheckpoint.rules=(('encoder/tower/.*', None),)"], "stay random"),
        (["InitialCheckpoint.rules=(('encoder/towre/.*', None),)"], "matches no param"),
        (["T5Config.mlp_dim=128"], "shape"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_the_first_step(
    more, message, checkpoint
):
    """The tower would stay random and frozen: the fault of `vqav2.gin`."""
    paths = (T5_RECIPE, FROM_CHECKPOINT, *gin_files.model_files("frozen_tower"))
    more = [*TINY, f"INITIAL_CHECKPOINT={checkpoint!r}", *more]
    with in_t5x("train", paths, ON_CPUS, *more) as made:
        initializer = initializer_of(made)
        with pytest.raises(UserError, match=message):
            initializer.from_scratch(jax.random.PRNGKey(0))


@pytest.mark.parametrize(
    "rules, refused",
    [
        ("(('state/.*', None),)", False),
        ("(('state/.*', None), ('target/encoder/tower/.*', None))", True),
        ("(('target/encoder/tower/(.*)', r'target/vit/\\1'),)", False),
    ],
)
def test_the_finetune_file_refuses_a_frozen_tower_that_nothing_is_loaded_for(
    rules, refused, checkpoint
):
    paths = (T5_RECIPE, *gin_files.model_files("frozen_tower"))
    more = [f"INITIAL_CHECKPOINT_PATH={checkpoint!r}", ON_CPUS, *TINY]
    more.append(f"utils.RestoreCheckpointConfig.assignment_map={rules}")
    with in_t5x("finetune", paths, *more) as made:
        initializer = initializer_of(made)
        ends = contextlib.nullcontext()
        if refused:
            ends = pytest.raises(UserError, match="stay random")
        with ends:
            initializer.from_scratch(jax.random.PRNGKey(0))


@pytest.mark.parametrize(
    "changed, message",
    [
        ("train.InitialCheckpoint.rules=()", None),
        ("train.InitialCheckpoint.rules=(('encoder/adapter/.*', None),)", None),
        (
            "train.InitialCheckpoint.rules=(('encoder/projection/.*', None),)",
            "by the rule",
        ),
        (
            "train.InitialCheckpoint.rules=(('decoder/(.*)', r'text/\\1'),)",
            "by the rule",
        ),
        ("train.InitialCheckpoint.cast=True", "T5X casts nothing"),
        ("train.InitialCheckpoint.image_size=(32, 32)", "T5X resamples nothing"),
        ("INITIAL_CHECKPOINT='{other}'", "but INITIAL_CHECKPOINT_PATH is"),
    ],
)
def test_the_finetune_file_takes_the_recipes_checkpoint_if_it_is_the_same(
    changed, message, checkpoint, tmp_path
):
    paths = (T5_RECIPE, gin_files.CONFIGS / "runs/from_checkpoint.gin")
    more = [f"INITIAL_CHECKPOINT={checkpoint!r}", ON_CPUS, *TINY]
    other = tmp_path / "checkpoint_3"
    shutil.copytree(checkpoint, other)
    more.append(changed.format(other=other))
    same = f"INITIAL_CHECKPOINT_PATH={checkpoint!r}"
    with in_t5x("finetune", paths, *more, same) as made:
        initializer = initializer_of(made)
        ends = contextlib.nullcontext()
        if message:
            ends = pytest.raises(UserError, match=message)
        with ends:
            initializer.from_scratch(jax.random.PRNGKey(0))


def test_parameters_of_t5x_itself_may_be_set_in_place_of_its_macros():
    more = ["INITIAL_CHECKPOINT_PATH='/nowhere'", ON_CPUS, *TINY]
    parameters = ["train.eval_period=2", "train.eval_steps=1", "train.random_seed=3"]
    parameters.append("seqio.Evaluator.num_examples=16")
    with in_t5x("finetune", (T5_RECIPE,), *more, *parameters) as made:
        assert made["eval_period"] == 2 and made["eval_steps"] == 1
    both = [*more, *parameters, "EVAL_STEPS=3"]
    with (
        pytest.raises(UserError, match="EVAL_STEPS = 3, which nothing uses"),
        in_t5x("finetune", (T5_RECIPE,), *both),
    ):
        pass


# --- What is evaluated and predicted ---


@pytest.mark.slow
@pytest.mark.parametrize("job", ["eval", "infer"])
def test_t5x_evaluates_and_predicts_what_our_runtime_does(job):
    """Tasks, split, lengths, batches, decoding: of every recipe."""
    root = {"eval": evaluate.evaluate_checkpoint, "infer": infer.infer_split}[job]
    for path in gin_files.RECIPES:
        if path.stem in REFUSED:
            continue
        made = in_ours(root, (path,))
        with in_t5x(job, (path,), "CHECKPOINT_PATH='/nowhere'", ON_CPUS) as launched:
            found, model = launched["dataset_cfg"], launched["model"]
        tasks = made["tasks"] if job == "eval" else [made["task"]]
        subtasks = seqio.get_subtasks(
            seqio.get_mixture_or_task(found.mixture_or_task_name)
        )
        expected = [name for task in tasks for name in subtask_names(task)]
        assert [task.name for task in subtasks] == expected
        assert found.split == made["split"]
        assert found.task_feature_lengths == made["feature_lengths"]
        assert found.batch_size == made["batch_size"]
        if path == CLASS_RECIPE:
            own = made["model"].prediction_settings
            assert model.prediction_settings == own
        if not hasattr(model, "decode_fn"):  # of labels or pairs
            continue
        assert infer.decode_settings(model.decode_fn) == infer.decode_settings(
            made["model"].decode_fn
        )
        assert model.max_decode_length == made["model"].max_decode_length


def subtask_names(name):
    return [task.name for task in seqio.get_subtasks(seqio.get_mixture_or_task(name))]


@pytest.mark.parametrize("job", ["train", "finetune", "eval", "infer"])
def test_every_gin_file_keeps_the_dtype_of_each_parameter(job):
    """Saved or restored as float32, a bfloat16 tower would be twice as wide."""
    places = {
        "train": ["MODEL_DIR='/nowhere'"],
        "finetune": ["INITIAL_CHECKPOINT_PATH='/nowhere'"],
    }.get(job, ["CHECKPOINT_PATH='/nowhere'"])
    with in_t5x(job, (T5_RECIPE,), ON_CPUS, *places) as made:
        if job in ("eval", "infer"):
            configs = [made["restore_checkpoint_cfg"]]
        else:
            configs = [made["checkpoint_cfg"].save, made["checkpoint_cfg"].restore]
    assert [config.dtype for config in configs] == [None] * len(configs)
