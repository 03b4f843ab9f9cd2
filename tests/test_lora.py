"""Low-rank updates: what they change, what they leave alone, how they train."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gemma
import tiny_models
import tiny_runs
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import assert_within, image_text_model, jit

from vit22b_transfer.checkpoints import identity, reading, restoring, writing
from vit22b_transfer.inference import decoding
from vit22b_transfer.models import (
    encoder_decoder,
    freezing,
    layers,
    lora,
    multimodal,
    t5,
    vit,
)
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, state
from vit22b_transfer.training.train import InitialCheckpoint
from vit22b_transfer.weights.adapters import merging
from vit22b_transfer.weights.files.stored_tensors import StoredTensor

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

QUERY_VALUE = (".*attention/(query|value)/kernel",)
EVERY_KERNEL = (".*(attention|mlp)/[^/]*/kernel",)
CONFIG = lora.LoraConfig(rank=3, alpha=1.5, patterns=EVERY_KERNEL)
BATCH = tiny_models.batch(4)
ONE_DEVICE = tiny_runs.ONE_DEVICE


def t5_model(config, *, scan=False, param_dtype="float32", sizes=None, **arguments):
    types = dict(scan_layers=scan, param_dtype=param_dtype)
    tower = tiny_models.tower_config(**types, **tiny_models.TWO_BLOCKS)
    text = tiny_models.text_config(**(tiny_models.TWO_LAYERS | types | (sizes or {})))
    return image_text_model(tower, text, lora=config, **arguments)


def gemma_model(config, *, family="gemma2", scan=False, **arguments):
    tower = tiny_models.tower_config(fused_projections=True)
    module = tiny_gemma.prefix_lm_module(family, tower, scan_layers=scan)
    return tiny_gemma.prefix_lm_model(module, lora=config, **arguments)


MODELS = {
    "T5": t5_model,
    "T5, scanned": functools.partial(t5_model, scan=True),
    "Gemma": gemma_model,
    "Gemma, scanned": functools.partial(gemma_model, scan=True),
}
every_model = pytest.mark.parametrize("name", MODELS)
some_models = pytest.mark.parametrize("name", ["T5", "Gemma, scanned"])


@functools.cache
def trained(name):
    """The model and random parameters, as if its updates had been trained."""
    model = MODELS[name](CONFIG)
    return model, tiny_models.model_params(model)


@functools.cache
def logits_of(name, config=CONFIG):
    model = MODELS[name](config)
    return jit(lambda params: model.score_batch(params, BATCH, True)[1]["logits"])


def without_updates(params):
    flat = flatten_dict(params)
    return unflatten_dict({k: v for k, v in flat.items() if "lora_" not in k[-1]})


def with_zeros(params):
    """The parameters with updates as they are at first."""
    flat = flatten_dict(params)
    fresh = {k: 0.0 * v if k[-1] == "lora_b" else v for k, v in flat.items()}
    return unflatten_dict(fresh)


# The model


@some_models
def test_updates_of_zero_leave_the_outputs_unchanged_to_the_bit(name):
    actual = logits_of(name)(with_zeros(trained(name)[1]))
    expected = logits_of(name, None)(without_updates(trained(name)[1]))
    tiny_runs.assert_same_bits(actual, expected)


def test_updates_start_at_zero_with_factors_as_in_peft():
    layer = layers.Dense(64, 32, ("embed", "mlp"), lora=CONFIG)
    config = dataclasses.replace(CONFIG, patterns=("kernel",))
    layer = layer.clone(lora=config)
    params = jit(layer.init)(jax.random.key(0), jnp.ones((1, 64)))["params"]
    assert params["lora_a"].shape == (64, 3) and params["lora_b"].shape == (3, 32)
    assert 0.9 < np.max(np.abs(params["lora_a"])) * math.sqrt(64) <= 1.0
    assert not np.any(params["lora_b"])
    plain = jit(layer.clone(lora=None).init)(jax.random.key(0), jnp.ones((1, 64)))
    tiny_runs.assert_same_bits(params["kernel"], plain["params"]["kernel"])


@every_model
def test_kernels_of_attention_and_mlps_can_be_chosen(name):
    params = flatten_dict(trained(name)[1], sep="/")
    others = ("encoder/projection", "encoder/tower/patch_embedding", "logits_dense")
    for path in params:
        if path.endswith("/kernel"):
            chosen = path.removesuffix("kernel") + "lora_a" in params
            assert chosen != any(other in path for other in others), path


def merged(params):
    """The parameters with their updates added, as an export writes them."""
    arrays = flatten_dict(params, sep="/")
    stored = {
        name: StoredTensor(array.shape, np.dtype(array.dtype), "", array.__array__)
        for name, array in arrays.items()
    }
    read = {
        n: tensor.read() for n, tensor in merging.merged(stored, CONFIG.alpha).items()
    }
    return unflatten_dict(read, sep="/")


@some_models
def test_merged_parameters_compute_the_same(name):
    params = trained(name)[1]
    plain = merged(params)
    assert not any("lora" in path[-1] for path in flatten_dict(plain))
    expected = logits_of(name)(params)
    scale = max(1.0, float(np.max(np.abs(expected))))
    assert_within(1e-5 * scale, logits_of(name, None)(plain), expected, name)
    without = logits_of(name, None)(without_updates(params))
    assert np.max(np.abs(expected - without)) > 0.1, "the updates do something"


def test_a_merge_rounds_only_once():
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.standard_normal(s) for s in [(2, 8, 6), (2, 8, 3), (2, 3, 6)])
    kernel = jnp.asarray(kernel, jnp.bfloat16)
    merged = lora.merged_kernel(kernel, np.float32(a), np.float32(b), alpha=6.0)
    expected = np.float64(kernel) + 2.0 * (np.float32(a) @ np.float32(b))
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.asarray(expected, jnp.bfloat16))
    with pytest.raises(ValueError, match="stored as int8"):
        lora.merged_kernel(np.int8(kernel), np.float32(a), np.float32(b), alpha=6.0)


def test_scanned_layers_compute_what_unrolled_ones_do():
    params = trained("T5")[1]
    stacked = {name: tiny_models.stack_layers(part) for name, part in params.items()}
    scanned = logits_of("T5, scanned")
    assert_within(1e-5, scanned(stacked), logits_of("T5")(params))


@pytest.mark.parametrize("make", [t5_model, gemma_model], ids=["T5", "Gemma"])
def test_cached_decoding_scores_as_the_full_forward_over_scanned_layers(make):
    """Decoding unrolls the layers, so the paths are not those of the patterns."""
    patterns = ("decoder/layers/self_attention/value/kernel",)
    config = dataclasses.replace(CONFIG, patterns=patterns)
    model = make(config, scan=True, decode_fn=decoding.greedy, max_decode_length=6)
    params = tiny_models.model_params(model)
    predict = jit(lambda params: model.predict_batch_with_aux(params, BATCH))
    tokens, aux = predict(params)
    shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    batch = BATCH | dict(decoder_target_tokens=tokens, decoder_input_tokens=shifted)
    batch |= dict(decoder_loss_weights=np.int32(tokens > 0))
    full = jit(lambda params: model.score_batch(params, batch))
    assert_within(1e-5, aux["scores"], full(params))
    assert np.max(np.abs(full(params) - full(with_zeros(params)))) > 1e-3


def test_a_tower_alone_takes_updates_too():
    tower = vit.VisionTower(tiny_models.tower_config(lora=CONFIG))
    images = tiny_models.images(2, *tiny_models.IMAGE_SIZE, 3)
    params = tiny_models.random_params(tower, images)
    assert "lora_a" in params["map"]["attention"]["query"]
    plain = vit.VisionTower(tiny_models.tower_config())
    outputs = (
        jit(module.apply)({"params": tree}, images).pooled
        for module, tree in (
            (tower, params),
            (plain, merged(params)),
        )
    )
    assert_within(1e-5, *outputs)


def test_a_pattern_that_chooses_nothing_is_refused():
    for pattern in (".*/atention/query/kernel", "encoder/projection/kernel"):
        config = dataclasses.replace(CONFIG, patterns=(*EVERY_KERNEL, pattern))
        with pytest.raises(ValueError, match="(?s)chooses no kernel.*Nearest.*kernel"):
            state.abstract_variables(t5_model(config), ONE_DEVICE, BATCH)


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="rank is 0"):
        dataclasses.replace(CONFIG, rank=0)
    with pytest.raises(ValueError, match="no patterns"):
        dataclasses.replace(CONFIG, patterns=())
    other = dataclasses.replace(CONFIG, rank=2)
    text = tiny_models.text_config(lora=other)
    with pytest.raises(ValueError, match="the text has .*rank=2"):
        image_text_model(text=text, lora=CONFIG)


# Shardings


def test_every_parameter_has_logical_axes_that_have_rules():
    partitioning = Partitioning(data=2, model=2, parameter_partitioning_dims=2)
    for name in MODELS:
        model = MODELS[name](CONFIG)
        params = state.abstract_variables(model, partitioning, BATCH)
        flat = flatten_dict(params, sep="/")
        for path, leaf in flat.items():
            if path.endswith(("/lora_a", "/lora_b")):
                kernel = flat[path[: -len("lora_a")] + "kernel"].sharding.spec
                kept = (*kernel[:-1], None) if path.endswith("a") else None
                kept = kept or (*kernel[:-2], None, kernel[-1])
                assert tuple(leaf.sharding.spec) == kept, path


@pytest.mark.parametrize("name", ["Gemma, scanned"])
def test_sharded_updates_train_as_unsharded_ones(name):
    model, params = trained(name)
    updates, base = freezing.split_frozen(params, model.frozen)
    assert {path[-1] for path in flatten_dict(updates)} == {"lora_a", "lora_b"}

    def step(updates):
        def loss(updates):
            params = freezing.merge_frozen(updates, base)
            return model.loss_fn(params, BATCH, None)[0]

        return jax.value_and_grad(loss)(updates)

    expected = jit(step)(updates)
    mesh = Partitioning(data=2, model=2, parameter_partitioning_dims=2)
    abstract = state.abstract_variables(model, mesh, BATCH)
    shardings = state.shardings_of(freezing.split_frozen(abstract, model.frozen)[0])
    with mesh.activate():
        actual = jit(step)(jax.device_put(updates, shardings))
    assert tiny_models.relative_difference(actual, expected) < 1e-4


# Training


def bfloat16_model(config=CONFIG, **arguments):
    """A small one, as its training step has to be compiled."""
    sizes = dict(num_encoder_layers=0, num_decoder_layers=1)
    defaults = dict(scan=True, param_dtype="bfloat16", sizes=sizes)
    return t5_model(config, **(defaults | arguments))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of a bfloat16 model without updates, and its parameters."""
    model = bfloat16_model(None)
    params = tiny_models.model_params(model)
    folder = str(tmp_path_factory.mktemp("base"))
    return write_checkpoint(folder, model, params), params


def write_checkpoint(folder, model, params):
    writer = writing.CheckpointWriter(folder)
    tree = {"target": params, "state": {"step": jnp.int32(1)}}
    writer.save(1, tree, {"lora": identity.lora_record(model)})
    writer.close()
    return reading.checkpoint_path(folder, 1)


def test_a_run_from_a_plain_checkpoint_trains_the_updates_and_nothing_else(
    base, tmp_path, capsys
):
    path, params = base
    config = dataclasses.replace(CONFIG, patterns=QUERY_VALUE)
    tx = optimizers.adamw(1e-2, weight_decay=0.1)
    model = bfloat16_model(config, optimizer_def=tx)
    initial = InitialCheckpoint(path, (("encoder/(.*)", r"encoder/\1"),))
    result = tiny_runs.run(
        tmp_path, model, initial=initial, total_steps=3, eval_data=None
    )
    said = capsys.readouterr().out
    assert "decoder/layers/self_attention/value/lora_a" in said.partition("kept: ")[2]
    trained = flatten_dict(tiny_runs.saved_params(tmp_path, model), sep="/")
    base = flatten_dict(params, sep="/")
    for name, value in trained.items():
        if name.endswith("lora_b"):
            assert np.any(value), name
        elif not name.endswith("lora_a"):
            assert value.dtype == jnp.bfloat16
            assert value.tobytes() == np.asarray(base[name]).tobytes(), name
    moments = reading.saved_arrays(result.checkpoint).keys() - {
        f"target/{name}" for name in trained
    }
    assert all("lora_" in name or "count" in name or "step" in name for name in moments)
    assert sum("lora_" in name for name in moments) == 2 * (len(trained) - len(base))


def test_all_but_the_updates_must_be_in_the_checkpoint(base):
    path, params = base
    abstract = tiny_runs.abstract_params(bfloat16_model())
    kept = restoring.restore_partial(path, abstract).kept
    assert kept and all(name.endswith(("/lora_a", "/lora_b")) for name in kept)
    without = tiny_runs.abstract_params(bfloat16_model(None, param_dtype="float32"))
    with pytest.raises(ValueError, match="dtype bfloat16 in the checkpoint"):
        restoring.restore_partial(path, without)
    wider = bfloat16_model(sizes=dict(num_decoder_layers=1, mlp_dim=64))
    with pytest.raises(ValueError, match=r"wi_0/kernel: shape \(1, 24, 48\) in the c"):
        restoring.restore_partial(path, tiny_runs.abstract_params(wider))


def test_what_is_neither_loaded_nor_trained_is_named(base, tmp_path):
    initial = InitialCheckpoint(base[0], (("encoder/projection/.*", None),))
    model = bfloat16_model(optimizer_def=optimizers.adamw(1e-2))
    with pytest.raises(ValueError, match="projection.*one of 2. is neither load"):
        tiny_runs.run(tmp_path, model, initial=initial, total_steps=3)


def test_updates_of_another_rank_or_factor_are_refused(tmp_path):
    model = bfloat16_model()
    path = write_checkpoint(str(tmp_path), model, tiny_models.model_params(model))
    other = bfloat16_model(dataclasses.replace(CONFIG, rank=2))
    with pytest.raises(ValueError, match=r"lora_a: shape .*3\) in .*2\) in the model"):
        tiny_runs.saved_params(path, other)
    other = bfloat16_model(dataclasses.replace(CONFIG, alpha=3.0))
    abstract = tiny_runs.abstract_params(other)
    with pytest.raises(ValueError, match="alpha 3.0, but .* trained with 1.5"):
        restoring.restore_partial(path, abstract, model=other)
    with pytest.raises(ValueError, match="set LoraConfig.alpha = 1.5"):
        shardings = state.shardings_of(abstract)
        restoring.restore_params(path, abstract, shardings, model=other)


def trained_paths(model):
    params = state.abstract_variables(model, ONE_DEVICE, BATCH)
    trained, _ = freezing.split_frozen(params, model.frozen)
    return set(flatten_dict(trained, sep="/"))


PROJECTION = {"encoder/projection/kernel", "encoder/projection/bias"}


def test_what_is_trained_beside_the_updates_is_named_in_the_config():
    """As PEFT's modules_to_save."""
    updates = trained_paths(t5_model(CONFIG))
    assert updates and all("/lora_" in path for path in updates)
    config = dataclasses.replace(CONFIG, trained=("encoder/projection/.*",))
    assert trained_paths(t5_model(config)) == updates | PROJECTION
    # In whatever else is frozen.
    model = t5_model(config, frozen=("encoder/text/.*", "encoder/projection/bias"))
    others = {path for path in updates if not path.startswith("encoder/text/")}
    assert trained_paths(model) == others | {"encoder/projection/kernel"}


def test_a_frozen_tower_gets_no_updates():
    updates = trained_paths(t5_model(CONFIG))
    model = t5_model(CONFIG, frozen_tower=True)
    assert trained_paths(model) == {path for path in updates if "tower" not in path}
    assert model.module.tower.lora is None
    tower_alone = dataclasses.replace(CONFIG, patterns=("encoder/tower/.*/kernel",))
    with pytest.raises(ValueError, match="The tower is frozen, so it gets no updates"):
        trained_paths(t5_model(tower_alone, frozen_tower=True))


def test_updates_of_an_int8_tower_are_all_that_is_trained_of_it():
    config = dataclasses.replace(CONFIG, trained=(".*/scale",))
    trained = trained_paths(t5_model(config, int8_tower=True))
    of_tower = {path for path in trained if path.startswith("encoder/tower/")}
    assert of_tower and all("/lora_" in path for path in of_tower)
    assert any(path.endswith("/scale") for path in trained)


@pytest.mark.parametrize(
    "trained, arguments, message",
    [
        ("encoder/projction/.*", {}, "LoRA's trained pattern .* Nearest paths"),
        (".*", {}, "match every parameter. To train the whole model leave LoRA out"),
        ("encoder/tower/.*", dict(frozen_tower=True), "frozen by 'encoder/tower/"),
        ("encoder/projection/.*", dict(frozen=(".*bias", ".*l")), "by '.*bias', '.*l'"),
    ],
)
def test_what_cannot_be_trained_besides_is_refused(trained, arguments, message):
    config = dataclasses.replace(CONFIG, trained=(trained,))
    with pytest.raises(ValueError, match=message):
        trained_paths(t5_model(config, **arguments))


def test_the_optimizer_state_is_below_two_percent_of_that_of_full_fine_tuning():
    """A B/16 tower and a text model of T5 v1.1 small's size, all in float32."""
    tower = vit.vit22b_config("B/16", scan_layers=True)
    text = t5.t5_config("small", vocab_size=32128, scan_layers=True)
    images = tiny_models.images(1, 224, 224, 3)
    batch = dict(tiny_models.batch(1), encoder_input_images=images)
    sizes = {}
    for config in (None, lora.LoraConfig(16, 32.0, QUERY_VALUE)):
        module = encoder_decoder.ImageTextModule(tower, text)
        model = multimodal.ImageTextModel(
            module, tiny_models.Vocabulary(), tiny_models.Vocabulary(), lora=config
        )
        params = state.abstract_variables(model, ONE_DEVICE, batch)
        tx = optimizers.freeze(optimizers.adamw(1e-3), params, model.frozen)
        opt_state = jax.eval_shape(tx.init, params)
        sizes[config] = sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(opt_state)
        )
    full, low_rank = sizes.values()
    print(f"optimizer state: full {full:,}, LoRA {low_rank:,}, {low_rank / full:.2%}")
    assert low_rank < 0.02 * full
