"""Attention by einsum and by cuDNN's kernels: the same function, chosen by place.

No GPU here: what is lowered for CUDA is read, and cuDNN's arguments are given to XLA's
own form. benchmarks/attention_forms.py compares results and gradients on a GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from vit22b_transfer import UserError
from vit22b_transfer.models import attention, gemma, t5, text_towers, vit

LENGTH = attention.SHORT


def arrays(queries, keys, heads, kv_heads, size=16, batch=2, dtype=np.float32):
    random = np.random.default_rng(queries + keys)
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads)]
    return [
        jnp.asarray(random.normal(size=(batch, *shape, size)), dtype)
        for shape in shapes
    ]


def causal(queries, keys):
    return jnp.tril(jnp.ones((1, 1, queries, keys), bool))


def own_masks(queries, keys, batch=2):
    lengths = jnp.arange(1, batch + 1)[:, None] * keys // batch
    return jnp.broadcast_to(
        (jnp.arange(keys)[None] < lengths)[:, None, None], (batch, 1, 1, keys)
    )


CASES = {
    "plain": (6, 8, 4, 4, None, False),
    "groups": (6, 8, 4, 2, None, False),
    "one key head": (6, 8, 4, 1, own_masks, False),
    "odd": (7, 9, 4, 4, None, False),
    "odd keys, groups": (8, 9, 4, 2, None, False),
    "causal, bias": (8, 8, 4, 4, causal, True),
    "own masks": (6, 8, 4, 4, own_masks, False),
    "bias, groups": (6, 8, 4, 2, causal, True),
}


@pytest.mark.parametrize("name", CASES)
def test_both_forms_are_jaxs_attention(name, monkeypatch):
    queries, keys, heads, kv_heads, mask, biased = CASES[name]
    whole = arrays(queries, keys, heads, kv_heads)
    mask = mask(queries, keys) if mask else None
    bias = None
    if biased:
        bias = jax.random.normal(jax.random.key(0), (1, heads, queries, keys))
    xla = functools.partial(jax.nn.dot_product_attention)

    def as_cudnn(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return xla(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)

    def loss(function, query, key, value):
        return jnp.sum(jnp.sin(function(query, key, value)))

    forms = [
        lambda q, k, v: xla(q, k, v, bias, mask, scale=0.3),
        lambda q, k, v: attention.attend(q, k, v, mask=mask, bias=bias, scale=0.3),
        lambda q, k, v: attention._attend_cudnn(q, k, v, mask, bias, 0.3),
    ]

    @jax.jit
    def results_of(*arrays):
        return [
            (
                form(*arrays),
                *jax.grad(functools.partial(loss, form), (0, 1, 2))(*arrays),
            )
            for form in forms
        ]

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        results = results_of(*whole)
    for found in results[1:]:
        for ours, theirs in zip(found, results[0], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_the_logits_are_bounded_before_the_mask():
    query, key, value = arrays(4, 6, 2, 1)
    mask = own_masks(4, 6)
    found = attention.attend(query, key, value, mask=mask, scale=2.0, softcap=1.5)
    logits = np.einsum("bqnh,bkh->bnqk", 2.0 * query, key[:, :, 0])
    powers = np.where(mask, np.exp(1.5 * np.tanh(logits / 1.5)), 0.0)
    weights = powers / powers.sum(-1, keepdims=True)
    expected = np.einsum("bnqk,bkh->bqnh", weights, value[:, :, 0])
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.fixture
def on_cuda(monkeypatch):
    """A process that takes itself to be on a Hopper GPU: it can lower, not run."""
    monkeypatch.setattr(attention, "_on_cuda", lambda: True)
    monkeypatch.setattr(attention, "_largest_head", lambda: 256)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    attention._say_once.cache_clear()
    yield
    attention._say_once.cache_clear()


def lowered(function, *arguments):
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def tower_loss(form="auto", dtype=jnp.bfloat16, side=160, **options):
    """(loss, parameters, images) of a tower of one block with 100 tokens."""
    config = vit.vit22b_config(
        "Ti/16",
        depth=1,
        width=32,
        num_heads=2,
        mlp_dim=32,
        image_size=(side, side),
        pooling="none",
        dtype=dtype,
        attention_form=form,
        **options,
    )
    tower = vit.VisionTower(config)
    images = jax.ShapeDtypeStruct((3, side, side, 3), jnp.uint8)
    params = jax.eval_shape(tower.init, jax.random.key(0), images)["params"]

    def loss(params, images):
        output: Any = tower.apply({"params": params}, images)
        return jnp.sum(output.tokens.astype(jnp.float32))

    return jax.grad(loss), params, images


@pytest.mark.parametrize("form, calls", [("auto", 2), ("cudnn", 2), ("einsum", 0)])
def test_a_tower_for_cuda_has_cudnns_kernels_and_no_logits(form, calls, on_cuda):
    text = lowered(*tower_loss(form))
    assert text.count("custom_call @__cudnn$fmha") == calls
    assert ("tensor<3x2x100x100xf32>" in text) == (not calls)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat, calls", [("dots", 2), ("block", 3)])
def test_what_cudnn_made_is_kept_where_matmuls_are(remat, calls, scan_layers, on_cuda):
    text = lowered(*tower_loss(remat=remat, scan_layers=scan_layers))
    assert text.count("custom_call @__cudnn$fmha") == calls


def test_the_choice_is_told_once(on_cuda, capsys):
    for dtype in (jnp.bfloat16, jnp.bfloat16, jnp.float32):
        lowered(*tower_loss(dtype=dtype))
    assert capsys.readouterr().err.splitlines() == [
        "attention: cuDNN's, bfloat16, heads of 16",
        "attention: einsum, since cuDNN's takes bfloat16 and float16, not float32",
    ]


@pytest.mark.parametrize(
    "shape, options, reason",
    [
        (dict(dtype=jnp.float32), {}, "not float32"),
        (dict(size=12), {}, "multiples of 8 up to 256 here, not of 12"),
        (dict(size=264), {}, "not of 264"),
        ({}, dict(softcap=5.0), "no soft bound"),
        (dict(queries=1), {}, "so few"),
        (dict(keys=LENGTH - 1), {}, "so few"),
        (dict(size=136), dict(mask=causal), "heads above 128"),
        ({}, dict(mask=own_masks, bias=True), "array of all pairs"),
        (dict(queries=LENGTH + 1), dict(mask=causal), "odd lengths"),
        (dict(queries=LENGTH + 1), {}, None),
        ({}, dict(mask=own_masks), None),
        ({}, dict(mask=causal, bias=True), None),
        (dict(size=256), {}, None),
    ],
)
def test_what_cudnn_refuses(shape, options, reason, on_cuda):
    sizes = dict(queries=LENGTH, keys=LENGTH, size=64) | shape
    dtype = sizes.pop("dtype", jnp.bfloat16)
    query = jax.ShapeDtypeStruct((2, sizes["queries"], 4, sizes["size"]), dtype)
    key = jax.ShapeDtypeStruct((2, sizes["keys"], 4, sizes["size"]), dtype)
    options = dict(options)
    if "mask" in options:
        options["mask"] = options["mask"](sizes["queries"], sizes["keys"])
    if options.pop("bias", False):
        options["bias"] = jnp.zeros((1, 4, LENGTH, LENGTH), dtype)

    def found(query, key):
        said.append(attention.cudnn_refuses(query, key, **options))
        return query

    said = []
    jax.eval_shape(found, query, key)
    (said,) = said
    assert said is None if reason is None else reason in said


def test_a_form_that_cannot_run_is_an_error():
    query, key, value = arrays(4, 4, 2, 2)
    with pytest.raises(UserError, match="computes on cpu, not on CUDA"):
        attention.attend(query, key, value, form="cudnn")
    with pytest.raises(UserError, match="valid are auto, einsum, cudnn"):
        # Past the check of annotations, which runs in tests alone.
        attention.attend.__wrapped__(query, key, value, form="flash")


TINY: dict[str, Any] = dict(width=16, num_heads=2, mlp_dim=16)
MODELS = {
    "tower": lambda: tower_loss("cudnn"),
    "text tower": lambda: (
        text_towers.TransformerConfig(
            **TINY,
            depth=1,
            vocab_size=8,
            max_length=4,
            embed_dim=4,
            attention_form="cudnn",
        )
        .build()
        .init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, 4), jnp.int32),
    ),
    "T5": lambda: (
        t5.TextEncoder(
            t5.T5Config(
                **TINY,
                vocab_size=8,
                num_encoder_layers=1,
                num_decoder_layers=1,
                head_dim=8,
                attention_form="cudnn",
            )
        ).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, 4, 16), jnp.float32),
        jax.ShapeDtypeStruct((2, 1, 1, 4), jnp.bool_),
    ),
    "Gemma": lambda: (
        gemma_call,
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, 4, 16), jnp.float32),
    ),
}


def gemma_call(rng, x):
    config = gemma.GemmaConfig(
        **TINY,
        vocab_size=8,
        depth=1,
        num_kv_heads=1,
        head_dim=8,
        attention_form="cudnn",
    )
    views = gemma.prefix_lm_views(config, jnp.ones((2, 4), bool), 2)
    return gemma.TextDecoder(config).init(rng, x, views)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_asks_for_the_form_of_its_configuration(name):
    with pytest.raises(UserError, match="attention_form is 'cudnn', but"):
        function, *arguments = MODELS[name]()
        jax.eval_shape(function, *arguments)
