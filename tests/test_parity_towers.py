"""Towers against independent implementations: random weights, float32, on a CPU.

The peers are Hugging Face's SigLIP and ViT, timm's parallel block, flax's attention,
scipy and torch. No weight, bias or norm scale is left at its initial value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import linen as nn
from tiny_models import (
    TWO_BLOCKS,
    assert_within,
    classic_tower_config,
    images,
    jit,
    random_params,
    tower_config,
)
from torch_peers import import_peer, torch, without_gradients

from vit22b_transfer.models import (
    multi_head_attention,
    vit,
    vit_pooling,
    vit_positions,
)

timm_vit = import_peer("timm.models.vision_transformer")
timm_layers = import_peer("timm.layers")
transformers = import_peer("transformers")
modeling_siglip = import_peer("transformers.models.siglip.modeling_siglip")

BLOCK, MODEL = 1e-5, 1e-4
PIXELS = images(2, 16, 16, 3)
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
    layer_norm_eps=1e-6,
    attn_implementation="eager",
)


def run_tower(config, params=None):
    """Parameters, random by default, and the tower's output with all intermediates."""
    tower = vit.VisionTower(config)
    params = params or random_params(tower, PIXELS)
    names = ("stem", *(f"block_{i}" for i in range(config.depth)))
    apply = jit(lambda p, x: tower.apply({"params": p}, x, intermediates=names))
    return params, apply(params, PIXELS)


def torch_pixels():
    """The same pixels in [-1, 1], channels first, normalised by other code."""
    return torch.tensor(PIXELS).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def tensor(array):
    return torch.tensor(np.asarray(array))


def linear(prefix, dense):
    """State of a torch Linear: kernels are [out, in] there."""
    state = {f"{prefix}.weight": tensor(dense["kernel"].T)}
    return state | (
        {f"{prefix}.bias": tensor(dense["bias"])} if "bias" in dense else {}
    )


def norm(prefix, params):
    names = {"scale": "weight", "bias": "bias"}
    return {f"{prefix}.{names[k]}": tensor(v) for k, v in params.items()}


def convolution(prefix, dense, patch_size=8):
    """State of the patch embedding as a torch convolution, [out, 3, p, p]."""
    kernel = dense["kernel"].reshape(patch_size, patch_size, 3, -1)
    return {
        f"{prefix}.weight": tensor(kernel.transpose(3, 2, 0, 1)),
        f"{prefix}.bias": tensor(dense["bias"]),
    }


def siglip_mlp(prefix, mlp):
    return linear(f"{prefix}.fc1", mlp["wi"]) | linear(f"{prefix}.fc2", mlp["wo"])


def siglip_pooling(prefix, pooling):
    """State of the pooling head; its attention is torch's own, with q, k, v stacked."""
    attention = pooling["attention"]
    inputs = [attention[name] for name in ("query", "key", "value")]
    stacked = {
        name: np.concatenate([part[name] for part in inputs], axis=-1)
        for name in ("kernel", "bias")
    }
    return (
        {
            f"{prefix}probe": tensor(pooling["probe"]["embedding"]),
            f"{prefix}attention.in_proj_weight": tensor(stacked["kernel"].T),
            f"{prefix}attention.in_proj_bias": tensor(stacked["bias"]),
        }
        | linear(f"{prefix}attention.out_proj", attention["out"])
        | norm(f"{prefix}layernorm", pooling["norm"])
        | siglip_mlp(f"{prefix}mlp", pooling["mlp"])
    )


def siglip_state(params, depth=2):
    state = {
        "embeddings.position_embedding.weight": tensor(
            params["position_embedding"]["embedding"]
        )
    }
    state |= convolution("embeddings.patch_embedding", params["patch_embedding"])
    state |= norm("post_layernorm", params["encoder_norm"])
    for i in range(depth):
        ours, theirs = params[f"layers_{i}"], f"encoder.layers.{i}"
        state |= norm(f"{theirs}.layer_norm1", ours["norm"])
        state |= norm(f"{theirs}.layer_norm2", ours["mlp_norm"])
        state |= siglip_mlp(f"{theirs}.mlp", ours["mlp"])
        for name in ("query", "key", "value", "out"):
            short = name if name == "out" else name[0]
            state |= linear(f"{theirs}.self_attn.{short}_proj", ours["attention"][name])
    return state | siglip_pooling("head.", params["map"])


def parallel_block_state(block, *, qkv_bias, fuse_out_proj):
    """State of timm's block: one input matmul in the order mlp, query, key, value."""
    attention, mlp = block["attention"], block["mlp"]
    inputs = [mlp["wi"], *(attention[name] for name in ("query", "key", "value"))]
    state = norm("in_norm", block["norm"])
    state |= {
        "in_proj.weight": tensor(
            np.concatenate([part["kernel"] for part in inputs], axis=-1).T
        )
    }
    if qkv_bias:
        biases = np.concatenate([part["bias"] for part in inputs])
        state["in_proj.bias"] = tensor(biases)
    else:
        state["mlp_bias"] = tensor(mlp["wi"]["bias"])
    state |= norm("q_norm", attention["query_norm"])
    state |= norm("k_norm", attention["key_norm"])
    if fuse_out_proj:
        kernels = [attention["out"]["kernel"], mlp["wo"]["kernel"]]
        bias = attention["out"]["bias"] + mlp["wo"]["bias"]
        joined = {"kernel": np.concatenate(kernels), "bias": bias}
        return state | linear("out_proj", joined)
    state |= linear("attn_out_proj", attention["out"])
    return state | linear("mlp_out_proj", mlp["wo"])


@pytest.fixture(scope="module")
def classic():
    return run_tower(classic_tower_config(**TWO_BLOCKS))


@pytest.fixture(scope="module")
def siglip(classic):
    config = transformers.SiglipVisionConfig(
        hidden_act="gelu_pytorch_tanh", vision_use_head=True, **SIZES
    )
    model = transformers.SiglipVisionModel(config).eval()
    model.load_state_dict(siglip_state(classic[0]), strict=True)
    return model


@without_gradients
def test_classic_blocks_equal_those_of_hugging_face_siglip(classic, siglip):
    kept = classic[1].intermediates
    stem = siglip.embeddings(torch_pixels())
    assert_within(BLOCK, kept["stem"], stem, "stem vs SigLIP")
    for i, before in enumerate(("stem", "block_0")):
        expected = siglip.encoder.layers[i](tensor(kept[before]), attention_mask=None)
        assert_within(BLOCK, kept[f"block_{i}"], expected, f"block {i} vs SigLIP")


@without_gradients
def test_classic_tower_equals_hugging_face_siglip(classic, siglip):
    expected = siglip(torch_pixels())
    assert_within(MODEL, classic[1].tokens, expected.last_hidden_state, "SigLIP tokens")
    assert_within(MODEL, classic[1].pooled, expected.pooler_output, "SigLIP pooled")


@without_gradients
def test_map_pooling_equals_hugging_face_siglips_head(classic):
    config = transformers.SiglipVisionConfig(hidden_act="gelu_pytorch_tanh", **SIZES)
    head = modeling_siglip.SiglipMultiheadAttentionPoolingHead(config).eval()
    pooling = classic[0]["map"]
    head.load_state_dict(siglip_pooling("", pooling), strict=True)
    tokens = np.random.default_rng(1).standard_normal((3, 7, 32)).astype(np.float32)
    ours = vit_pooling.MapPooling(classic_tower_config())
    pooled = jit(ours.apply)({"params": pooling}, jnp.asarray(tokens))
    assert_within(BLOCK, pooled, head(tensor(tokens)), "MAP vs SigLIP")


@without_gradients
def test_class_token_tower_with_exact_gelu_equals_hugging_face_vit():
    params, output = run_tower(
        classic_tower_config(**TWO_BLOCKS, pooling="cls", activation="gelu_erf")
    )
    model = transformers.ViTModel(
        transformers.ViTConfig(hidden_act="gelu", **SIZES), add_pooling_layer=False
    ).eval()
    # There the class token has a position of its own, which here is part of the token.
    positions = np.concatenate(
        [np.full((1, 32), 0.25), params["position_embedding"]["embedding"]]
    ).astype(np.float32)
    state = {
        "embeddings.cls_token": tensor(params["cls"]["embedding"]) - 0.25,
        "embeddings.position_embeddings": tensor(positions)[None],
    }
    state |= convolution(
        "embeddings.patch_embeddings.projection", params["patch_embedding"]
    )
    state |= norm("layernorm", params["encoder_norm"])
    for i in range(2):
        ours, theirs = params[f"layers_{i}"], f"layers.{i}"
        state |= norm(f"{theirs}.layernorm_before", ours["norm"])
        state |= norm(f"{theirs}.layernorm_after", ours["mlp_norm"])
        state |= siglip_mlp(f"{theirs}.mlp", ours["mlp"])
        for name in ("query", "key", "value", "out"):
            short = "o" if name == "out" else name[0]
            state |= linear(f"{theirs}.attention.{short}_proj", ours["attention"][name])
    model.load_state_dict(state, strict=True)
    expected = model(torch_pixels()).last_hidden_state
    assert_within(MODEL, output.pooled, expected[:, 0], "class token vs HF ViT")
    assert_within(MODEL, output.tokens, expected[:, 1:], "patch tokens vs HF ViT")


@pytest.mark.parametrize("qkv_bias", [False, True])
@without_gradients
def test_parallel_blocks_equal_timms_fused_and_unfused(qkv_bias):
    config = tower_config(**TWO_BLOCKS, qkv_bias=qkv_bias, pooling="none")
    params, output = run_tower(config)
    fused = tower_config(
        **TWO_BLOCKS, qkv_bias=qkv_bias, pooling="none", fused_projections=True
    )
    kept = output.intermediates
    fused_kept = run_tower(fused, params)[1].intermediates
    for fuse_out_proj in (False, True):
        block = timm_vit.ParallelScalingBlock(
            32,
            4,
            mlp_ratio=2.0,
            qkv_bias=qkv_bias,
            qk_norm=True,
            norm_layer=timm_layers.RmsNorm,
            act_layer=functools.partial(torch.nn.GELU, approximate="tanh"),
            fuse_out_proj=fuse_out_proj,
        ).eval()
        state = parallel_block_state(
            params["layers_0"], qkv_bias=qkv_bias, fuse_out_proj=fuse_out_proj
        )
        block.load_state_dict(state, strict=True)
        expected = block(tensor(kept["stem"]))
        label = f"vs timm, out-projection fused there: {fuse_out_proj}"
        assert_within(BLOCK, kept["block_0"], expected, f"parallel block {label}")
        assert_within(BLOCK, fused_kept["block_0"], expected, f"fused block {label}")


@without_gradients
def test_vit22b_tower_equals_timms_parallel_tower():
    params, output = run_tower(
        tower_config(**TWO_BLOCKS, pooling="gap", activation="gelu_erf")
    )
    model = timm_vit.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2.0,
        qkv_bias=False,
        qk_norm=True,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
        norm_layer=timm_layers.RmsNorm,
        block_fn=timm_vit.ParallelScalingBlock,
    ).eval()
    state = {"pos_embed": tensor(params["position_embedding"]["embedding"])[None]}
    state |= convolution("patch_embed.proj", params["patch_embedding"])
    state |= norm("norm", params["encoder_norm"])
    for i in range(2):
        block = parallel_block_state(
            params[f"layers_{i}"], qkv_bias=False, fuse_out_proj=False
        )
        state |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    model.load_state_dict(state, strict=True)
    tokens = model.forward_features(torch_pixels())
    assert_within(MODEL, output.tokens, tokens, "ViT-22B tower vs timm")
    pooled = model.forward_head(tokens, pre_logits=True)
    assert_within(MODEL, output.pooled, pooled, "average pooling vs timm")


@pytest.mark.parametrize("use_bias", [False, True])
def test_centred_qk_norm_attention_equals_flaxs_own(use_bias):
    ours = multi_head_attention.MultiHeadAttention(
        32,
        4,
        8,
        qkv_bias=use_bias,
        out_bias=use_bias,
        qk_norm=True,
        norm_centering=True,
    )
    theirs = nn.MultiHeadDotProductAttention(
        num_heads=4, qkv_features=32, use_bias=use_bias, normalize_qk=True
    )
    rng = np.random.default_rng(2)
    x, kv = (
        jnp.asarray(rng.standard_normal((2, length, 32)), jnp.float32)
        for length in (5, 7)
    )
    mask = jnp.asarray(rng.random((2, 1, 5, 7)) < 0.7).at[..., 0].set(True)
    params = random_params(ours, x, kv)

    def by_head(name, dense):
        kernel = (4, 8, 32) if name == "out" else (32, 4, 8)
        shapes = {"kernel": kernel, "bias": (32,) if name == "out" else (4, 8)}
        return {k: v.reshape(shapes[k]) for k, v in dense.items()}

    state = {name: by_head(name, params[name]) for name in ("query", "key", "value")}
    state |= {"out": by_head("out", params["out"])}
    state |= {"query_ln": params["query_norm"], "key_ln": params["key_norm"]}
    # flax adds biases of a lower rank, which the tests' conditions refuse
    with jax.numpy_rank_promotion("allow"):
        expected = jit(theirs.apply)({"params": state}, x, kv, mask=mask)
    actual = jit(ours.apply)({"params": params}, x, kv, mask=mask)
    assert_within(BLOCK, actual, expected, f"QK-norm attention vs flax, {use_bias=}")


@pytest.mark.parametrize("new", [8, 5, 24])
def test_square_position_resampling_equals_scipys_zoom(new):
    old = 6
    table = np.random.default_rng(3).standard_normal((old, old, 16)).astype(np.float32)
    expected = scipy.ndimage.zoom(table, (new / old, new / old, 1), order=1)
    actual = vit_positions.resample_position_embeddings(
        jnp.asarray(table.reshape(-1, 16)), (old, old), (new, new)
    )
    assert_within(1e-5, actual, expected.reshape(-1, 16), f"{old} to {new} vs scipy")


@pytest.mark.parametrize("new", [(9, 4), (3, 14), (6, 11), (1, 1)])
def test_rectangular_position_resampling_equals_torchs_bilinear(new):
    old = (6, 8)
    table = np.random.default_rng(4).standard_normal((*old, 16)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        tensor(table).permute(2, 0, 1)[None],
        size=new,
        mode="bilinear",
        align_corners=True,
    )[0].permute(1, 2, 0)
    actual = vit_positions.resample_position_embeddings(
        jnp.asarray(table.reshape(-1, 16)), old, new
    )
    assert_within(1e-5, actual, expected.reshape(-1, 16), f"{old} to {new} vs torch")
