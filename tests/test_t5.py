"""The text model: what may see what, and one result whichever way it is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    TWO_LAYERS,
    VOCAB_SIZE,
    assert_within,
    batch,
    image_text_model,
    jit,
    model_params,
    random_params,
    relative_difference,
    stack_layers,
    text_config,
    without_type_checks,
)

from vit22b_transfer.models import encoder_decoder, products, stacking, t5_caches

BATCH = jax.tree.map(jnp.asarray, batch(3))
PROMPTS, SHIFTED = BATCH["encoder_input_tokens"], BATCH["decoder_input_tokens"]


def module_of(**options):
    """The text model alone: token embedder, encoder, decoder."""
    return encoder_decoder.ImageTextModule(None, text_config(**(TWO_LAYERS | options)))


def params_of(module, seed=0):
    """Random parameters, the same whether layers are scanned or not."""
    config = dataclasses.replace(module.text, scan_layers=False)
    unrolled = module.clone(text=config)
    params = random_params(unrolled, None, PROMPTS, SHIFTED, seed=seed)
    return stack_layers(params) if module.text.scan_layers else params


def loss_and_gradients(dropout_rng=None, **options):
    """Loss and gradients with unrolled names."""
    model = image_text_model(blind=True, text=text_config(**(TWO_LAYERS | options)))
    run = jit(jax.value_and_grad(model.loss_fn, has_aux=True))
    (loss, _), gradients = run(params_of(model.module), BATCH, dropout_rng)
    if options.get("scan_layers"):
        gradients = stacking.unstack_layers(gradients)
    return loss, gradients


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradients()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [dict(scan_layers=True), dict(remat="dots"), dict(remat="block", scan_layers=True)],
    ids=str,
)
def test_scan_and_remat_change_neither_loss_nor_gradients(plain, options):
    # The same sums, which XLA may fuse, and so round, differently.
    assert relative_difference(loss_and_gradients(**options), plain) <= 1e-5


@pytest.mark.slow
def test_remat_draws_the_same_dropout_again():
    rng = jax.random.key(7)
    plain = loss_and_gradients(rng, dropout_rate=0.3)
    remat = loss_and_gradients(rng, dropout_rate=0.3, remat="block")
    assert relative_difference(remat, plain) <= 1e-5


@pytest.fixture(scope="module")
def text():
    """(module, parameters, jitted logits of prompts and shifted targets)."""
    module = module_of()
    logits = jit(lambda p, x, y: module.apply({"params": p}, None, x, y))
    return module, params_of(module), logits


@pytest.mark.slow
def test_dropout_acts_in_training_only_and_follows_its_key(text):
    _, params, logits = text
    module = module_of(dropout_rate=0.3, scan_layers=True)
    stacked = stack_layers(params)

    @jit
    def run(params, key):
        def apply(**options):
            return module.apply({"params": params}, None, PROMPTS, SHIFTED, **options)

        rngs = {"dropout": key}
        return apply(), apply(train=True, rngs=rngs), apply(train=True, rngs=rngs)

    still, one, same = run(stacked, jax.random.key(0))
    _, other, _ = run(stacked, jax.random.key(1))
    assert_within(1e-5, still, logits(params, PROMPTS, SHIFTED))
    assert_within(0.0, same, one)
    assert np.max(np.abs(one - still)) > 0.1 and np.max(np.abs(one - other)) > 0.1


def test_future_tokens_do_not_change_past_logits(text):
    _, params, logits = text
    before = logits(params, PROMPTS, SHIFTED)
    for position in range(1, SHIFTED.shape[1]):
        changed = SHIFTED.at[:, position].set((SHIFTED[:, position] + 9) % VOCAB_SIZE)
        after = logits(params, PROMPTS, changed)
        assert_within(0.0, after[:, :position], before[:, :position])
        assert np.max(np.abs(after[:, position] - before[:, position])) > 1e-3


def test_padding_of_the_prompt_does_not_change_the_logits(text):
    _, params, logits = text
    before = logits(params, PROMPTS, SHIFTED)
    padded = jnp.pad(PROMPTS, ((0, 0), (0, 4)))
    assert_within(1e-5, logits(params, padded, SHIFTED), before)
    # Row 2 has three tokens; without its padding it is a shorter prompt of its own.
    alone = logits(params, PROMPTS[2:, :3], SHIFTED[2:])
    assert_within(1e-5, alone, before[2:])


def test_every_prompt_token_matters_to_every_logit(text):
    _, params, logits = text
    before = logits(params, PROMPTS, SHIFTED)
    for position in range(3):
        changed = PROMPTS.at[:, position].set(PROMPTS[:, position] % 60 + 2)
        after = logits(params, changed, SHIFTED)
        assert np.all(np.max(np.abs(after - before), axis=-1) > 1e-5)


def test_a_permuted_batch_gives_permuted_logits(text):
    _, params, logits = text
    order = jnp.asarray([2, 0, 1])
    permuted = logits(params, PROMPTS[order], SHIFTED[order])
    assert_within(1e-5, permuted, logits(params, PROMPTS, SHIFTED)[order])


@pytest.mark.slow
@pytest.mark.parametrize("tied_logits", [False, True])
def test_cached_decoding_of_beams_equals_the_full_forward(tied_logits):
    """Beams are re-parented at random; each must see its own history and no other."""
    module = module_of(tied_logits=tied_logits)
    variables = {"params": params_of(module)}
    size, beams, time = len(PROMPTS), 3, 5
    rng = np.random.default_rng(0)

    @jit
    def encode(variables):
        encoded = module.apply(variables, None, PROMPTS, method="encode")
        cross = module.apply(variables, encoded, method="cross_key_values")
        return encoded, cross

    @jit
    def step(variables, encoded, cross, cache, tokens, index, ancestry):
        return module.apply(
            variables,
            tokens,
            cache,
            cross,
            encoded.mask,
            index,
            ancestry,
            method="decode_step",
        )

    encoded, cross = encode(variables)
    cache = t5_caches.empty_cache(module.text, size, beams, time)
    rows, own = np.arange(size)[:, None], np.eye(beams, dtype=bool)[None, :, :, None]
    ancestry = np.broadcast_to(own, (size, beams, beams, time))
    history = np.zeros((size, beams, time), np.int32)
    stepwise, histories = [], []
    # New arrays at every step: the device may still be reading those of the last one.
    for t in range(time):
        drawn = rng.integers(2, VOCAB_SIZE, (size, beams)) * (t > 0)
        history = np.where(np.arange(time) == t, drawn[..., None], history)
        logits, cache = step(
            variables,
            encoded,
            cross,
            cache,
            jnp.asarray(drawn, jnp.int32),
            jnp.int32(t),
            jnp.asarray(ancestry),
        )
        stepwise.append(logits)
        histories.append(history)
        parent = rng.integers(0, beams, (size, beams))
        history = history[rows, parent]
        ancestry = np.where(np.arange(time) <= t, ancestry[rows, parent], own)

    # Rows of the full forward: all beams of all steps, example by example.
    tokens = np.stack(histories, axis=1).reshape(-1, time).astype(np.int32)

    @jit
    def full(variables, encoded, tokens):
        repeated = jax.tree.map(lambda x: jnp.repeat(x, time * beams, axis=0), encoded)
        return module.apply(variables, repeated, tokens, method="decode")

    whole = full(variables, encoded, jnp.asarray(tokens))
    whole = whole.reshape(size, time, beams, time, VOCAB_SIZE)
    for t in range(time):
        assert_within(1e-5, stepwise[t], whole[:, t, :, t])


def test_without_encoder_layers_the_encoder_only_normalises(text):
    _, params, _ = text
    module = module_of(num_encoder_layers=0)
    own = params_of(module)
    assert set(own["encoder"]["text"]) == {"encoder_norm"}

    def encode(variables):
        return module.apply(variables, None, PROMPTS, method="encode")

    encoded = jit(encode)({"params": own})
    x = np.float64(own["token_embedder"]["embedding"])[np.asarray(PROMPTS)]
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    x = x * np.float64(own["encoder"]["text"]["encoder_norm"]["scale"])
    assert_within(1e-5, encoded.encodings, x)
    logits = jit(lambda p: module.apply({"params": p}, None, PROMPTS, SHIFTED))(own)
    assert logits.shape == (*SHIFTED.shape, VOCAB_SIZE)


def test_logits_are_float32_in_a_bfloat16_model():
    module = module_of(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), None, PROMPTS, SHIFTED)
    )
    assert shapes[0].dtype == jnp.float32
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(shapes[1]["params"])}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    # A CPU keeps it in float32: test_products.
    with products.as_on_accelerators():
        cache = jax.eval_shape(lambda: t5_caches.empty_cache(module.text, 2, 3, 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == dtypes


def test_decoding_with_scanned_layers_is_refused_with_what_to_do():
    model = image_text_model(blind=True, text=text_config(scan_layers=True))
    variables = {"params": model_params(model)}
    with pytest.raises(ValueError, match="unstack the parameters"):
        model.module.apply(
            variables,
            encoder_decoder.Encoded(
                jnp.zeros((1, 2, 24)), jnp.ones((1, 1, 1, 2), bool)
            ),
            method="cross_key_values",
        )


def test_an_unknown_remat_policy_is_refused():
    with without_type_checks(), pytest.raises(ValueError, match="remat is 'full'"):
        text_config(remat="full")
