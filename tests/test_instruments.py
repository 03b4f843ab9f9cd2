"""What network and gradients tell: against NumPy, in all forms, on meshes, in a run."""

import dataclasses
import functools
import glob
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gemma
import tiny_models
import tiny_runs
from clu import metrics as clu_metrics
from flax import linen as nn
from PIL import Image
from tiny_runs import ONE_DEVICE, LinearModel, logged, run

from vit22b_transfer import UserError
from vit22b_transfer.models import (
    grouped_attention,
    instruments,
    multi_head_attention,
    vit,
)
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import instrument_picture, optimizers, state, steps
from vit22b_transfer.training import instruments as readings
from vit22b_transfer.training.train import Periods

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

# --- One attention, against NumPy in double precision ---


def told_by(module, *inputs, **options):
    """{name: metric's value} of one module, with random parameters, and these."""
    inputs, options = jax.tree.map(jnp.asarray, (inputs, options))
    recorded = instruments.Recorded(module)
    params = tiny_models.random_params(module, *inputs, **options)
    recorded.apply({"params": params}, *inputs, **options)
    told = {name: np.asarray(m.compute()) for name, m in recorded.told.items()}
    return told, jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def attention_in_numpy(query, key, mask, bias, scale, softcap=None):
    """(largest logit [N], entropy [N], entropy of even weights), element by element."""
    batch, queries, heads, _ = query.shape
    largest, entropies, even = np.zeros(heads), np.zeros(heads), []
    for b in range(batch):
        for q in range(queries):
            seen = np.flatnonzero(mask[b, 0, q])
            if not len(seen):
                continue
            even.append(np.log(len(seen)))
            for n in range(heads):
                group = n // (heads // key.shape[2])
                logits = scale * key[b, seen, group] @ query[b, q, n]
                logits = logits + bias[0, n, q, seen]
                largest[n] = max(largest[n], np.max(np.abs(logits)))
                if softcap:
                    logits = softcap * np.tanh(logits / softcap)
                weights = np.exp(logits - logits.max())
                weights = weights / weights.sum()
                positive = weights[weights > 0]
                entropies[n] -= np.sum(positive * np.log(positive))
    return largest, entropies / len(even), np.mean(even)


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def assert_told(told, expected, query, key):
    for name, value in zip(
        (instruments.LARGEST_LOGIT, instruments.ENTROPY, instruments.EVEN_ENTROPY),
        expected,
        strict=True,
    ):
        np.testing.assert_allclose(told[name], value, rtol=1e-5, err_msg=name)
    for name, x in ((instruments.QUERY, query), (instruments.KEY, key)):
        np.testing.assert_allclose(told[name], np.mean(x * x), rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_an_attention_tells_what_numpy_computes(qk_norm):
    rng = np.random.default_rng(0)
    batch, queries, keys, heads = 3, 4, 5, 2
    x, y = (rng.standard_normal((batch, n, 6), np.float32) for n in (queries, keys))
    mask = rng.random((batch, 1, queries, keys)) < 0.6
    mask[0, 0, 1] = False  # a query that sees nothing does not count
    bias = 3 * rng.standard_normal((1, heads, queries, keys), np.float32)
    module = multi_head_attention.MultiHeadAttention(6, heads, 4, qk_norm=qk_norm)
    told, params = told_by(module, x, y, mask=mask, bias=bias)
    query = (x @ params["query"]["kernel"]).reshape(batch, queries, heads, 4)
    key = (y @ params["key"]["kernel"]).reshape(batch, keys, heads, 4)
    normed = query, key
    if qk_norm:
        normed = (
            rms_norm(x, params[f"{name}_norm"]["scale"])
            for name, x in (("query", query), ("key", key))
        )
    expected = attention_in_numpy(*normed, mask, bias, scale=0.5)
    assert_told(told, expected, query, key)


def test_grouped_attention_tells_logits_before_its_softcap_and_weights_behind_it():
    rng = np.random.default_rng(1)
    x = 4 * rng.standard_normal((2, 5, 6), np.float32)
    mask = np.tril(np.ones((1, 1, 5, 5), bool)).repeat(2, axis=0)
    mask[1, :, :, 0] = False
    module = grouped_attention.GroupedQueryAttention(6, 4, 2, 4, 0.5, softcap=2.0)
    view = grouped_attention.LayerView(mask, np.zeros((2, 5, 2), np.float32))
    told, params = told_by(module, x, view)
    query = (x @ params["query"]["kernel"]).reshape(2, 5, 4, 4)
    key = (x @ params["key"]["kernel"]).reshape(2, 5, 2, 4)
    none = np.zeros((1, 4, 5, 5))
    expected = attention_in_numpy(query, key, mask, none, 0.5, softcap=2.0)
    assert np.max(expected[0]) > 4.0  # the cap bites
    assert_told(told, expected, query, key)


def test_the_entropy_of_huge_logits_is_zero_and_the_head_is_dead():
    rng = np.random.default_rng(2)
    query = rng.standard_normal((2, 5, 3, 4), np.float32)
    query[:, :, 1] *= 1e6  # of three heads the second looks at one key per query
    probe = instruments.Recorded(Probe())
    probe.apply({}, query, rng.standard_normal((2, 5, 3, 4), np.float32))
    told = {name: np.asarray(m.compute()) for name, m in probe.told.items()}
    entropy = told[instruments.ENTROPY]
    assert 0.0 <= entropy[1] < 1e-3 and min(entropy[0], entropy[2]) > 0.1
    metrics = {
        f"instruments/x/{name}": clu_metrics.Average(total=value, count=1.0)
        for name, value in told.items()
        if name != instruments.LARGEST_LOGIT
    }
    values, of_heads = readings.readings(metrics)
    assert values["instruments/x/dead_heads"] == 1
    assert len(of_heads["instruments/x/entropy_of_heads"]) == 3


class Probe(nn.Module):
    """An attention of queries and keys alone."""

    @nn.compact
    def __call__(self, query, key):
        instruments.record_attention(self, jnp.asarray(query), jnp.asarray(key))


# --- Towers in all forms ---


@dataclasses.dataclass
class TowerModel:
    """A model of the contract over a tower: a sum over its tokens as a loss."""

    module: vit.VisionTower
    optimizer_def: object = None
    frozen: tuple[str, ...] = ()

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        return self.module.init(rng, jnp.zeros(input_shapes["images"], jnp.uint8))

    def loss_fn(self, params, batch, rng):
        tokens = self.module.apply({"params": params}, batch["images"]).tokens
        loss = jnp.sum(jnp.square(tokens.astype(jnp.float32)))
        count = jnp.float32(len(tokens))
        return loss, {"loss": clu_metrics.Average(total=loss, count=count)}


IMAGES = tiny_models.images(8, *tiny_models.IMAGE_SIZE, 3)
TWO = tiny_models.TWO_BLOCKS
CLASSIC = tiny_models.classic_tower_config(**TWO, pooling="none")
PARALLEL = tiny_models.tower_config(**TWO, pooling="none", num_heads=8)
# Large logits: what differs between heads and layers is seen.
SCALE = 3.0


@functools.cache
def params_of(config):
    """Random parameters of unrolled layers."""
    plain = dataclasses.replace(
        config, scan_layers=False, remat="none", fused_projections=False
    )
    params = tiny_models.random_params(plain.build(), IMAGES[:1])
    return jax.tree.map(lambda x: SCALE * x, params)


def told_by_tower(config):
    model = TowerModel(config.build())
    params = params_of(config)
    if config.scan_layers:
        params = tiny_models.stack_layers(params)
    loss = instruments.recorded_loss(model)

    def told(params, images):
        _, metrics = jax.grad(loss, has_aux=True)(params, {"images": images}, None)
        return metrics

    metrics = jax.device_get(tiny_models.jit(told)(params, IMAGES))
    return readings.readings(readings.split(metrics)[1])


@functools.cache
def told_unrolled(name):
    return told_by_tower({"classic": CLASSIC, "parallel": PARALLEL}[name])


def assert_same_told(actual, expected, rtol=1e-5):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys() and ours
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol, 1e-6, err_msg=name)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("classic", dict(scan_layers=True, remat="block")),
        ("parallel", dict(fused_projections=True)),
        ("parallel", dict(scan_layers=True, fused_projections=True, remat="dots")),
        ("parallel", dict(remat="block")),
    ],
    ids=str,
)
def test_all_forms_of_a_tower_tell_the_same(name, changes):
    config = {"classic": CLASSIC, "parallel": PARALLEL}[name]
    actual = told_by_tower(dataclasses.replace(config, **changes))
    assert_same_told(actual, told_unrolled(name))


def test_a_tower_tells_of_every_block_and_its_residual_stream_is_the_blocks_output():
    values, of_heads = told_unrolled("parallel")
    kept = PARALLEL.build().apply(
        {"params": params_of(PARALLEL)},
        jnp.asarray(IMAGES),
        intermediates=("block_0", "block_1"),
    )
    for i in range(2):
        block = np.asarray(kept.intermediates[f"block_{i}"], np.float64)
        name = f"instruments/layers_{i}"
        np.testing.assert_allclose(
            values[f"{name}/residual_rms"], np.sqrt(np.mean(block**2)), rtol=1e-5
        )
        heads = of_heads[f"{name}/attention/entropy_of_heads"]
        assert len(heads) == 8
        mean = values[f"{name}/attention/entropy"]
        np.testing.assert_allclose(mean, np.mean(heads), rtol=1e-5)
    # The scale of the norms multiplies the logits: without it they would be below 3.
    assert values["instruments/layers_0/attention/largest_logit"] > 3.0


def test_text_models_tell_of_their_layers_too():
    def told(model, params):
        loss = instruments.recorded_loss(model)
        shapes = jax.eval_shape(loss, params, tiny_models.batch(4), None)[1]
        ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
        return readings.readings(readings.split(ones)[1])[0]

    model = tiny_models.image_text_model(
        tiny_models.tower_config(**TWO),
        tiny_models.text_config(**tiny_models.TWO_LAYERS),
    )
    values = told(model, tiny_models.model_params(model))
    kinds = {"largest_logit", "entropy", "dead_heads", "query_rms", "key_rms"}
    for path in (
        "encoder/tower/layers_1/attention",
        "encoder/text/layers_0/attention",
        "decoder/layers_1/self_attention",
        "decoder/layers_1/encoder_decoder_attention",
    ):
        assert {f"instruments/{path}/{kind}" for kind in kinds} <= values.keys()
    module = tiny_gemma.prefix_lm_module("gemma3", blind=True, scan_layers=True)
    model = tiny_gemma.prefix_lm_model(module)
    values = told(model, tiny_gemma.prefix_lm_params(module))
    path = "instruments/decoder/layers_2/self_attention"
    assert {f"{path}/{kind}" for kind in kinds} <= values.keys()
    assert "instruments/decoder/layers_0/residual_rms" in values


# --- The compiled step ---


@pytest.mark.parametrize("scanned", [True, False])
def test_when_nobody_asks_the_program_is_the_same(scanned, monkeypatch):
    """As without a line of the instruments in the modules."""
    changes = dict(scan_layers=scanned, remat="block", fused_projections=True)
    config = dataclasses.replace(PARALLEL, **changes)
    model = TowerModel(config.build())
    params = params_of(config)
    params = tiny_models.stack_layers(params) if scanned else params

    def program():
        gradient = jax.jit(jax.grad(model.loss_fn, has_aux=True))
        return gradient.lower(params, {"images": IMAGES}, None).as_text()

    with_instruments = program()
    for name in ("record_rms", "record_attention"):
        monkeypatch.setattr(instruments, name, lambda *_, **__: None)
    jax.clear_caches()
    assert program() == with_instruments


def test_what_is_initialised_holds_no_instruments():
    variables = jax.eval_shape(PARALLEL.build().init, jax.random.key(0), IMAGES)
    assert set(variables) == {"params", "params_axes"}


def told_by_step(config, partitioning=ONE_DEVICE, **options):
    """(readings of one step, the parameters after it)."""
    optimizer = optimizers.adamw(1e-2, weight_decay=0.1, decay_patterns=(".*kernel",))
    model = TowerModel(config.build(), optimizer)
    batch = tiny_runs.on_device({"images": IMAGES}, partitioning)
    abstract = state.abstract_variables(model, partitioning, batch)
    params = params_of(config)
    params = tiny_models.stack_layers(params) if config.scan_layers else params
    params = jax.device_put(params, state.shardings_of(abstract))
    first = state.abstract_state(abstract, optimizer, partitioning)
    first = state.fresh_state(params, optimizer, first)
    update = steps.make_update(
        model, optimizer, partitioning, instrumented=True, **options
    )
    with partitioning.activate():
        after, metrics = tiny_models.jit(update)(first, batch, jax.random.key(0))
    told = readings.split(jax.device_get(metrics))[1]
    return readings.readings(told), jax.device_get((params, after.params))


@functools.cache
def one_step():
    return told_by_step(PARALLEL)


def test_gradient_and_update_norms_are_those_of_each_group():
    (values, _), (before, after) = one_step()
    moved = jax.tree.map(lambda new, old: np.float64(new) - old, after, before)
    for group in ("layers_0", "layers_1", "patch_embedding", "encoder_norm"):
        squares = [np.sum(np.square(x)) for x in jax.tree.leaves(moved[group])]
        told = values[f"instruments/{group}/update_norm"]
        np.testing.assert_allclose(told, np.sqrt(np.sum(squares)), rtol=1e-3)

    def loss(params):
        batch = {"images": jnp.asarray(IMAGES)}
        return TowerModel(PARALLEL.build()).loss_fn(params, batch, None)

    grads, _ = tiny_models.jit(jax.grad(loss, has_aux=True))(before)
    for group in ("layers_1", "position_embedding"):
        leaves = jax.tree.leaves(grads[group])
        squares = [np.sum(np.square(np.float64(x) / len(IMAGES))) for x in leaves]
        told = values[f"instruments/{group}/gradient_norm"]
        np.testing.assert_allclose(told, np.sqrt(np.sum(squares)), rtol=1e-4)


@pytest.mark.parametrize(
    "changes, mesh, options",
    [
        ({}, (4, 2), {}),
        (dict(scan_layers=True, fused_projections=True), (2, 4, 2, 1, True), {}),
        (dict(scan_layers=True), (1, 1), dict(num_microbatches=4)),
    ],
    ids=["data x model", "rings", "microbatches"],
)
def test_meshes_rings_and_microbatches_tell_the_same(changes, mesh, options):
    partitioning = ONE_DEVICE if mesh == (1, 1) else Partitioning(*mesh)
    config = dataclasses.replace(PARALLEL, **changes)
    (values, of_heads), _ = told_by_step(config, partitioning, **options)
    (expected, expected_of_heads), _ = one_step()
    # Adam's first step divides by the gradient: where that is nothing, by noise.
    exact = {n: x for n, x in expected.items() if not n.endswith("update_norm")}
    assert_same_told(
        ({name: values[name] for name in exact}, of_heads), (exact, expected_of_heads)
    )
    for name in expected.keys() - exact.keys():
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-3)


# --- A run ---

TEXT = tiny_models.text_config(num_encoder_layers=0, num_decoder_layers=1)
TOWER = tiny_models.tower_config(depth=1, pooling="none")


def tiny_model():
    optimizer = optimizers.adamw(1e-3)
    return tiny_models.image_text_model(TOWER, TEXT, optimizer_def=optimizer)


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory):
    """The directory of a run that was told something at steps 4 and 8 of 10."""
    directory = tmp_path_factory.mktemp("run <b>&\x07")
    told = readings.Instruments(every=4)
    periods = Periods(log=2, evaluate=20, checkpoint=5)
    run(
        directory,
        tiny_model(),
        total_steps=10,
        periods=periods,
        eval_data=None,
        instruments=told,
    )
    return directory


def test_a_run_logs_what_it_was_told_with_the_losses_of_that_step(instrumented):
    lines = logged(instrumented)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    for line in lines:
        told = {name for name in line if name.startswith("instruments/")}
        assert bool(told) == (line["step"] in (4, 8)) and "train/loss" in line
    name = "instruments/encoder/tower/layers_0/attention"
    heads = lines[1][f"{name}/entropy_of_heads"]
    assert len(heads) == 4
    assert np.isclose(lines[1][f"{name}/entropy"], np.mean(heads), rtol=1e-5)
    (events,) = glob.glob(os.path.join(glob.escape(str(instrumented)), "events*"))
    with open(events, "rb") as file:
        content = file.read()
    assert f"{name}/largest_logit".encode() in content
    assert b"entropy_of_heads" not in content


def test_a_run_draws_what_it_was_told(instrumented):
    with Image.open(instrumented / instrument_picture.PICTURE_FILE) as picture:
        colors = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert picture.size == (1250, 28 + 2 * 190)  # tower and decoder
    assert (0, 60, 220) in {color for _, color in colors}


def test_instruments_change_nothing_that_is_learned(instrumented, tmp_path):
    """The other step is compiled for itself, so to rounding, not to the bit."""
    periods = Periods(log=2, evaluate=20, checkpoint=5)
    run(tmp_path, tiny_model(), total_steps=10, periods=periods, eval_data=None)
    ours, theirs = logged(tmp_path), logged(instrumented)
    assert not os.path.exists(tmp_path / instrument_picture.PICTURE_FILE)
    for line, other in zip(ours, theirs, strict=True):
        for name, value in line.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-5, err_msg=name)


def test_a_picture_of_damaged_and_hostile_lines_is_drawn_of_the_others(tmp_path):
    stack = "a\x1b[31m" + "b" * 5000
    lines = [
        '{"step": 1, "instruments/x/layers_0/entropy": 1.0, "instruments/x": "y"}',
        '{"step": 2, "instruments/x/layers_0/entropy": "2"',
        '{"step": 3, "instruments/x/layers_0/entropy": NaN}',
        '{"step": 4, "instruments/x/layers_0/largest_logit": 1e308}',
        f'{{"step": 4, "instruments/x/layers_0/largest_logit": {10**400}}}',
        f'{{"step": {10**400}, "instruments/x/layers_0/entropy": 1}}',
        '["instruments/"]',
        '{"step": "5", "instruments/x/layers_0/entropy": 1.0}',
    ]
    lines += [
        f'{{"step": 9, "instruments/{stack.encode("unicode_escape").decode()[4:]}{i}'
        '/layers_0/entropy": -1}'
        for i in range(9)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert instrument_picture.draw(str(tmp_path))
    with Image.open(tmp_path / instrument_picture.PICTURE_FILE) as picture:
        assert picture.size[1] == 28 + 6 * 190
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    assert instrument_picture.draw(str(tmp_path)) is None


def test_instruments_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="every=0 must be at least 1"):
        readings.Instruments(every=0)
    with pytest.raises(UserError, match="every 6 steps, .* every 4: .* such as 8"):
        run(tmp_path, instruments=readings.Instruments(every=6))
    with pytest.raises(UserError, match="LinearModel has no module"):
        run(tmp_path, LinearModel(), instruments=readings.Instruments(every=4))
