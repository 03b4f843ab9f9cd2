"""The prefix-LM: what may see what, and one result whichever way it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_gemma import (
    gemma_config,
    prefix_lm_model,
    prefix_lm_module,
    prefix_lm_params,
)
from tiny_models import (
    VOCAB_SIZE,
    Vocabulary,
    assert_within,
    batch,
    images,
    jit,
    relative_difference,
    stack_layers,
    tower_config,
    without_type_checks,
)

from vit22b_transfer.inference import decoding
from vit22b_transfer.models import gemma, multimodal, prefix_lm, stacking
from vit22b_transfer.partitioning.rules import Partitioning

BATCH = jax.tree.map(jnp.asarray, batch(4))
PIXELS = BATCH["encoder_input_images"]
PROMPTS, SHIFTED = BATCH["encoder_input_tokens"], BATCH["decoder_input_tokens"]
TARGETS, WEIGHTS = BATCH["decoder_target_tokens"], BATCH["decoder_loss_weights"]
LOCAL = "gemma2"  # soft caps, norms on both sides, local and global layers
SMALL = dict(depth=2, global_period=2)  # a local and a global layer


def logits_of(module):
    return jit(lambda p, *inputs: module.apply({"params": p}, *inputs))


@dataclasses.dataclass
class Case:
    """A module of one family with parameters, and its logits of the batch."""

    family: str

    def __post_init__(self):
        self.module = prefix_lm_module(self.family, tower_config(depth=1), **SMALL)
        self.params = prefix_lm_params(self.module, seed=2)
        self.run = functools.partial(logits_of(self.module), self.params)
        self.logits = self.run(PIXELS, PROMPTS, SHIFTED)


# Gemma 1 has nothing that the two lack; its parity tests decode from a cache as well.
@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def local():
    return Case(LOCAL)


def moved(tokens):
    """Other tokens of the same lengths."""
    tokens = np.asarray(tokens)
    return np.where(tokens > 0, (tokens + 7) % 60 + 2, 0).astype(np.int32)


def test_future_target_tokens_do_not_change_past_logits(case):
    for position in range(1, SHIFTED.shape[1]):
        changed = np.array(SHIFTED)
        changed[:, position] = moved(SHIFTED[:, position] + 1)
        after = case.run(PIXELS, PROMPTS, changed)
        assert_within(0.0, after[:, :position], case.logits[:, :position])
        difference = np.abs(after[:, position] - case.logits[:, position])
        assert np.min(np.max(difference, axis=-1)) > 1e-3


def test_the_start_token_is_dropped(local):
    changed = np.array(SHIFTED)
    changed[:, 0] = 5
    after = local.run(PIXELS, PROMPTS, changed)
    assert_within(0.0, after, local.logits)


def test_positions_of_the_prefix_see_each_other_in_both_directions(local):
    """Of a hidden state within the image, the last prompt token is the future."""

    @jit
    def hidden(params, prompts):
        module = local.module.clone()
        x, valid = module.apply(
            {"params": params},
            PIXELS,
            prompts,
            method="embed_prefix",
        )
        views = gemma.prefix_lm_views(module.text, valid, x.shape[1])
        decoder = gemma.TextDecoder(module.text)
        return decoder.apply({"params": params["decoder"]}, x, views)

    before = hidden(local.params, PROMPTS)
    last = np.sum(PROMPTS > 0, axis=1) - 1
    changed = np.array(PROMPTS)
    rows = np.arange(len(PROMPTS))
    changed[rows, last] = moved(PROMPTS[rows, last])
    difference = np.max(np.abs(hidden(local.params, changed) - before), axis=-1)
    image_tokens = before.shape[1] - PROMPTS.shape[1]
    assert np.all(difference[:, :image_tokens] > 1e-4)


def test_pixels_and_every_prompt_token_reach_the_first_logits(local):
    other = images(4, 16, 16, 3, seed=9)
    after = local.run(other, PROMPTS, SHIFTED)
    assert np.all(np.max(np.abs(after - local.logits), axis=-1)[:, 0] > 1e-4)
    for position in range(PROMPTS.shape[1]):
        changed = np.array(PROMPTS)
        changed[:, position] = moved(PROMPTS[:, position])
        after = local.run(PIXELS, changed, SHIFTED)
        difference = np.max(np.abs(after - local.logits), axis=-1)[:, 0]
        np.testing.assert_array_equal(difference > 1e-5, PROMPTS[:, position] > 0)


def test_padding_of_the_prompt_does_not_change_the_logits(local):
    wider = np.pad(PROMPTS, ((0, 0), (0, 3)))
    padded = local.run(PIXELS, wider, SHIFTED)
    assert relative_difference([padded], [local.logits]) <= 1e-5
    # Row 2 has three tokens; without its padding it is a shorter prompt of its own.
    alone = local.run(PIXELS[2:3], PROMPTS[2:3, :3], SHIFTED[2:3])
    assert relative_difference([alone], [local.logits[2:3]]) <= 1e-5


def test_a_local_layer_forgets_what_is_behind_its_window():
    """One local layer; the first target token is fed and drops out of the window."""
    module = prefix_lm_module(LOCAL, blind=True, depth=1, sliding_window=3)
    run = functools.partial(logits_of(module), prefix_lm_params(module), None)
    changed = np.array(SHIFTED)
    changed[:, 1] = moved(SHIFTED[:, 1] + 1)
    difference = np.abs(run(PROMPTS, changed) - run(PROMPTS, SHIFTED))
    felt = np.max(difference, axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(felt, [False, True, True, True, False, False])


FRAMED = dict(bos_id=2, separator_id=3)


@pytest.mark.parametrize(
    "ids, expected",
    [
        (dict(), [[7, 8, 1, 0], [1, 0, 0, 0], [7, 8, 9, 5]]),
        (dict(bos_id=2), [[2, 7, 8, 1, 0], [2, 1, 0, 0, 0], [2, 7, 8, 9, 5]]),
        (dict(separator_id=3), [[7, 8, 3, 0, 0], [3, 0, 0, 0, 0], [7, 8, 9, 5, 3]]),
        (FRAMED, [[2, 7, 8, 3, 0, 0], [2, 3, 0, 0, 0, 0], [2, 7, 8, 9, 5, 3]]),
    ],
    ids=str,
)
def test_prompts_are_framed_as_the_module_says(ids, expected):
    """An ended prompt, an empty one, and one that was cut before its end."""
    tokens = jnp.asarray([[7, 8, 1, 0], [1, 0, 0, 0], [7, 8, 9, 5]], jnp.int32)
    ids = dict(bos_id=None, separator_id=None) | ids
    framed = prefix_lm.frame_prompt(tokens, **ids)
    assert framed.dtype == jnp.int32
    np.testing.assert_array_equal(framed, expected)


@pytest.mark.slow
def test_cached_decoding_of_beams_equals_the_full_forward(case):
    """Beams are re-parented at random; each must see its own history and no other."""
    module, variables = case.module, {"params": case.params}
    size, beams, time = len(PROMPTS), 3, 6
    rng = np.random.default_rng(0)
    prefix = jit(lambda *x: module.apply(*x, method="prefill"))(
        variables, PIXELS, PROMPTS
    )
    step = jit(lambda *x: module.apply(*x, method="decode_step"))
    cache = gemma.extend_cache(prefix.key_values, beams * time)
    places = prefix.valid.shape[1] + beams * time
    assert cache[0].key.shape[-1] == places, "the prefix is stored once"
    rows, own = np.arange(size)[:, None], np.eye(beams, dtype=bool)[None, :, :, None]
    ancestry = np.broadcast_to(own, (size, beams, beams, time))
    history = np.zeros((size, beams, time), np.int32)
    stepwise, histories = [], []
    # New arrays at every step: the device may still be reading those of the last one.
    for t in range(time):
        drawn = rng.integers(2, VOCAB_SIZE, (size, beams)) * (t > 0)
        history = np.where(np.arange(time) == t, drawn[..., None], history)
        tokens, table = jnp.asarray(drawn, jnp.int32), jnp.asarray(ancestry)
        logits, cache = step(variables, tokens, cache, prefix, jnp.int32(t), table)
        stepwise.append(logits)
        histories.append(history)
        parent = rng.integers(0, beams, (size, beams))
        history = history[rows, parent]
        ancestry = np.where(np.arange(time) <= t, ancestry[rows, parent], own)

    # Rows of the full forward: all beams of all steps, example by example.
    fed = np.stack(histories, axis=1).reshape(-1, time).astype(np.int32)
    repeated = (np.repeat(x, time * beams, axis=0) for x in (PIXELS, PROMPTS))
    whole = case.run(*repeated, fed)
    whole = np.reshape(whole, (size, time, beams, time, VOCAB_SIZE))
    stepwise = np.stack(stepwise, axis=1)
    expected = np.stack([whole[:, t, :, t] for t in range(time)], axis=1)
    assert relative_difference([stepwise], [expected]) <= 1e-5


def predictions(module, params, *searches):
    """[(token ids, scores), ...], compiled together."""
    models = [prefix_lm_model(module, decode_fn=search) for search in searches]

    @jit
    def run(params, batch):
        return [model.predict_batch_with_aux(params, batch) for model in models]

    return [(tokens, aux["scores"]) for tokens, aux in run(params, BATCH)]


@pytest.fixture(scope="module")
def searched(local):
    """Results of greedy search, of one beam and of four."""
    beam = functools.partial(decoding.beam_search, alpha=0.0)
    beams = [functools.partial(beam, num_beams=n) for n in (1, 4)]
    return predictions(local.module, local.params, decoding.greedy, *beams)


def test_one_beam_is_greedy(searched):
    (tokens, scores), (one, one_scores), _ = searched
    np.testing.assert_array_equal(one, tokens)
    assert_within(1e-5, one_scores, scores)


def test_scores_of_searches_are_those_of_the_full_forward(local, searched):
    for tokens, scores in (searched[0], searched[2]):
        tokens = np.asarray(tokens)
        ended = np.cumsum(tokens == multimodal.EOS_ID, axis=1)
        live = (ended - (tokens == multimodal.EOS_ID)) == 0
        shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        logits = local.run(PIXELS, PROMPTS, shifted)
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        picked = np.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        assert_within(1e-4, scores, np.sum(picked * live, axis=1))
        if scores is searched[0][1]:
            best = np.argmax(logits, axis=-1)
            np.testing.assert_array_equal(best[live], tokens[live])
    assert np.any(searched[0][0] != searched[2][0]), "beams look further"


def test_sampling_draws_from_the_model(local):
    model = prefix_lm_model(local.module, decode_fn=decoding.sample)
    draw = jit(lambda key: model.predict_batch(local.params, BATCH, rng=key))
    one, same, other = (np.asarray(draw(jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def everything(model, params):
    """What the model computes from targets, gradients with unrolled names."""

    @jit
    def run(params):
        (loss, metrics), gradients = jax.value_and_grad(model.loss_fn, has_aux=True)(
            params, BATCH, None
        )
        scores = model.score_batch(params, BATCH)
        return dict(loss=loss, metrics=metrics, gradients=gradients, scores=scores)

    return run(params)


@pytest.fixture(scope="module")
def blind():
    """family -> (parameters of a model without a tower, everything it computes)."""

    @functools.cache
    def compute(family):
        module = prefix_lm_module(family, blind=True, **SMALL)
        params = prefix_lm_params(module, seed=6)
        return params, everything(prefix_lm_model(module), params)

    return compute


@pytest.mark.slow
@pytest.mark.parametrize("family, remat", [("gemma2", "dots"), ("gemma3", "block")])
def test_scan_and_remat_change_neither_loss_nor_gradients(blind, family, remat):
    params, expected = blind(family)
    options = dict(scan_layers=True, remat=remat)
    module = prefix_lm_module(family, blind=True, **SMALL, **options)
    actual = everything(prefix_lm_model(module), stack_layers(params))
    actual["gradients"] = stacking.unstack_layers(actual["gradients"])
    assert relative_difference(actual, expected) <= 1e-5


def test_remat_of_unrolled_layers_changes_nothing(blind):
    params, expected = blind(LOCAL)
    module = prefix_lm_module(LOCAL, blind=True, **SMALL, remat="block")
    actual = everything(prefix_lm_model(module), params)
    assert relative_difference(actual, expected) <= 1e-5


def test_scanned_parameters_predict_the_same_tokens(local, searched):
    tower = tower_config(depth=1, scan_layers=True)
    module = prefix_lm_module(LOCAL, tower, **SMALL, scan_layers=True)
    stacked = stack_layers(local.params)
    ((actual, _),) = predictions(module, stacked, decoding.greedy)
    np.testing.assert_array_equal(actual, searched[0][0])


def test_only_target_tokens_with_a_weight_count_in_the_loss(local):
    model = prefix_lm_model(local.module)
    loss = jit(lambda batch: model.eval_fn(local.params, batch))
    total, metrics = loss(BATCH)
    log_probs = np.asarray(jax.nn.log_softmax(local.logits))
    picked = np.take_along_axis(log_probs, TARGETS[..., None], axis=-1)[..., 0]
    assert_within(1e-3, total, -np.sum(picked * np.asarray(WEIGHTS)))
    assert float(metrics["loss"].count) == int(np.sum(WEIGHTS))
    none, _ = loss(BATCH | {"decoder_loss_weights": np.zeros_like(WEIGHTS)})
    assert float(none) == 0.0


def test_dropout_acts_only_with_a_key(blind):
    params, expected = blind(LOCAL)
    module = prefix_lm_module(LOCAL, blind=True, **SMALL, dropout_rate=0.4)
    model = prefix_lm_model(module)
    loss = jit(lambda key: model.loss_fn(params, BATCH, key)[0])
    assert_within(1e-3, loss(None), expected["loss"])
    one, same, other = (float(loss(jax.random.key(i))) for i in (0, 0, 1))
    assert one == same != other and abs(one - float(expected["loss"])) > 0.1


def test_a_frozen_tower_gets_no_gradients(local):
    model = prefix_lm_model(local.module, frozen=("encoder/tower/.*",))
    gradients = jit(jax.grad(lambda p: model.loss_fn(p, BATCH, None)[0]))(local.params)
    tower = jax.tree.leaves(gradients["encoder"]["tower"])
    assert not any(np.any(leaf) for leaf in tower)
    assert np.any(gradients["encoder"]["projection"]["kernel"])


@pytest.mark.slow
def test_four_devices_compute_what_one_computes():
    """With fewer key heads than there are devices along the model axis."""
    module = prefix_lm_module(LOCAL, blind=True, **SMALL, num_kv_heads=1)
    model = prefix_lm_model(module, decode_fn=decoding.greedy)
    params = prefix_lm_params(module, seed=8)

    @jit
    def step(params, batch):
        loss = jax.value_and_grad(lambda p: model.loss_fn(p, batch, None)[0])
        return loss(params), model.predict_batch(params, batch)

    expected, tokens = jax.device_get(step(params, BATCH))
    layout = Partitioning(2, 2, 2, 2)
    shapes = {name: array.shape for name, array in BATCH.items()}
    variables = jax.eval_shape(
        lambda key: model.get_initial_variables(key, shapes), jax.random.key(0)
    )
    shardings = layout.params_shardings(variables["params"], variables["params_axes"])
    attention = shardings["decoder"]["layers_0"]["self_attention"]
    assert attention["query"]["kernel"].spec[1] == "model"
    assert attention["key"]["kernel"].spec[1] is None
    placed = jax.device_put(params, shardings)
    data = {
        name: jax.device_put(array, layout.batch_sharding(array.ndim))
        for name, array in BATCH.items()
    }
    with layout.activate():
        actual, sharded_tokens = jax.device_get(step(placed, data))
    assert relative_difference(actual, expected) <= 1e-5
    np.testing.assert_array_equal(sharded_tokens, tokens)


def test_the_tree_has_the_scopes_that_patterns_name(local):
    model = prefix_lm_model(local.module)
    shapes = {name: array.shape for name, array in BATCH.items()}
    variables = jax.eval_shape(
        lambda key: model.get_initial_variables(key, shapes), jax.random.key(0)
    )
    params = variables["params"]
    assert set(variables) == {"params", "params_axes"}
    assert set(params) == {"encoder", "decoder", "token_embedder"}
    assert set(params["encoder"]) == {"tower", "projection"}
    assert "map" not in params["encoder"]["tower"], "nothing would train it"
    assert "bias" in params["encoder"]["projection"]


def test_a_blind_model_has_no_tower_and_ignores_the_pixels():
    module = prefix_lm_module("gemma", blind=True)
    params = prefix_lm_params(module)
    assert set(params) == {"decoder", "token_embedder"}
    score = jit(prefix_lm_model(module).score_batch)
    other = BATCH | {"encoder_input_images": images(4, 16, 16, 3, seed=9)}
    assert_within(0.0, score(params, other), score(params, BATCH))


def test_several_images_stand_one_after_another(local):
    model = prefix_lm_model(local.module)
    score = jit(model.score_batch)
    two = images(4, 2, 16, 16, 3, seed=3)
    straight = score(local.params, BATCH | {"encoder_input_images": two})
    swapped = two[:, ::-1].copy()
    swapped = score(local.params, BATCH | {"encoder_input_images": swapped})
    assert np.max(np.abs(straight - swapped)) > 1e-4, "their order matters"


def test_logits_are_float32_in_a_bfloat16_model():
    types = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    module = prefix_lm_module("gemma3", tower_config(**types), **types)
    inputs = PIXELS, PROMPTS, SHIFTED
    logits, variables = jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), *inputs)
    )
    assert logits.dtype == jnp.float32
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(variables["params"])}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    model = prefix_lm_model(module, decode_fn=decoding.greedy)
    predicted = jax.eval_shape(model.predict_batch, variables["params"], BATCH)
    assert predicted.shape == TARGETS.shape


def test_decoding_with_scanned_layers_is_refused_with_what_to_do():
    module = prefix_lm_module("gemma", blind=True, scan_layers=True)
    init = functools.partial(module.init, method="prefill")
    with pytest.raises(ValueError, match="unstack the parameters"):
        jax.eval_shape(init, jax.random.key(0), None, PROMPTS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(num_kv_heads=3), "num_heads 4 is not divisible by num_kv_heads 3"),
        (dict(head_dim=7), "head_dim is 7; rotary positions need an even one"),
        (dict(sliding_window=4), "set a window and a period above 1, or neither"),
        (dict(global_period=2), "set a window and a period above 1, or neither"),
        (dict(remat="full"), "remat is 'full'"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(wrong, message):
    with without_type_checks(), pytest.raises(ValueError, match=message):
        gemma_config("gemma", **wrong)


def test_an_unknown_variant_lists_the_nearest():
    with pytest.raises(ValueError, match="'gemma2-3b'; nearest: gemma2-9b, gemma2-2b"):
        gemma.gemma_config("gemma2-3b")


def test_a_vocabulary_larger_than_the_table_is_refused(local):
    with pytest.raises(ValueError, match="the input vocabulary has 65 tokens"):
        multimodal.ImageTextModel(local.module, Vocabulary(65), Vocabulary())
