"""Gemma 1, 2, 3 and PaliGemma 1, 2 against Hugging Face: random weights, float32.

Soft caps bite, windows are shorter than the sequences, no norm is left at one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_gemma import (
    FAMILIES,
    gemma_config,
    prefix_lm_model,
    prefix_lm_module,
    prefix_lm_params,
)
from tiny_models import (
    TWO_BLOCKS,
    VOCAB_SIZE,
    assert_within,
    classic_tower_config,
    images,
    jit,
)
from torch_peers import import_peer, torch

from vit22b_transfer.inference import decoding
from vit22b_transfer.models import gemma, multimodal, prefix_lm

transformers = import_peer("transformers")

BLOCK, MODEL = 1e-5, 1e-4
BATCH, LENGTH = 2, 14
BOS, SEPARATOR, IMAGE = 2, 9, VOCAB_SIZE - 1


def drawn_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(10, IMAGE, shape, np.int32)


def tensor(array):
    return torch.tensor(np.asarray(array))


# Their names for our parameters.


def linear(prefix, dense):
    state = {f"{prefix}.weight": tensor(dense["kernel"].T)}
    return state | (
        {f"{prefix}.bias": tensor(dense["bias"])} if "bias" in dense else {}
    )


def gemma_state(params, config, prefix="model"):
    """State of a decoder; Gemma 1 calls the norm before the MLP as T5 does."""
    table, ours = params["token_embedder"]["embedding"], params["decoder"]
    state = {
        f"{prefix}.embed_tokens.weight": tensor(table),
        f"{prefix}.norm.weight": tensor(ours["decoder_norm"]["scale"]),
        "lm_head.weight": tensor(table),
    }
    norms = {
        "pre_self_attention_layer_norm": "input_layernorm",
        "pre_mlp_layer_norm": "post_attention_layernorm",
    }
    if config.post_norms:
        norms = {
            "pre_self_attention_layer_norm": "input_layernorm",
            "post_self_attention_layer_norm": "post_attention_layernorm",
            "pre_mlp_layer_norm": "pre_feedforward_layernorm",
            "post_mlp_layer_norm": "post_feedforward_layernorm",
        }
    dense = {"query": "q", "key": "k", "value": "v", "out": "o"}
    mlp = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
    for i in range(config.depth):
        layer, theirs = ours[f"layers_{i}"], f"{prefix}.layers.{i}"
        attention = layer["self_attention"]
        for name, other in norms.items():
            state[f"{theirs}.{other}.weight"] = tensor(layer[name]["scale"])
        for name, letter in dense.items():
            state |= linear(f"{theirs}.self_attn.{letter}_proj", attention[name])
        for name, other in mlp.items():
            state |= linear(f"{theirs}.mlp.{other}", layer["mlp"][name])
        if config.qk_norm:
            for name in ("query", "key"):
                scale = tensor(attention[f"{name}_norm"]["scale"])
                state[f"{theirs}.self_attn.{name[0]}_norm.weight"] = scale
    return state


def norm(prefix, params):
    return {
        f"{prefix}.weight": tensor(params["scale"]),
        f"{prefix}.bias": tensor(params["bias"]),
    }


def siglip_state(params, depth, prefix):
    patches = params["patch_embedding"]
    kernel = patches["kernel"].reshape(8, 8, 3, -1).transpose(3, 2, 0, 1)
    embeddings = f"{prefix}.embeddings"
    state = {
        f"{embeddings}.patch_embedding.weight": tensor(kernel),
        f"{embeddings}.patch_embedding.bias": tensor(patches["bias"]),
        f"{embeddings}.position_embedding.weight": tensor(
            params["position_embedding"]["embedding"]
        ),
    } | norm(f"{prefix}.post_layernorm", params["encoder_norm"])
    for i in range(depth):
        ours, theirs = params[f"layers_{i}"], f"{prefix}.encoder.layers.{i}"
        state |= norm(f"{theirs}.layer_norm1", ours["norm"])
        state |= norm(f"{theirs}.layer_norm2", ours["mlp_norm"])
        state |= linear(f"{theirs}.mlp.fc1", ours["mlp"]["wi"])
        state |= linear(f"{theirs}.mlp.fc2", ours["mlp"]["wo"])
        for name, short in dict(query="q", key="k", value="v", out="out").items():
            state |= linear(f"{theirs}.self_attn.{short}_proj", ours["attention"][name])
    return state


def hugging_face_config(config, family):
    """Their configuration of the same text model."""
    kinds = {True: "sliding_attention", False: "full_attention"}
    sizes = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        intermediate_size=config.mlp_dim,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        attn_implementation="eager",
    )
    local = dict(
        query_pre_attn_scalar=config.query_scalar or config.head_dim,
        sliding_window=config.sliding_window,
        layer_types=[kinds[is_local] for is_local in config.is_local],
    )
    if family == "gemma":
        return transformers.GemmaConfig(**sizes)
    if family == "gemma2":
        return transformers.Gemma2Config(
            **sizes,
            **local,
            attn_logit_softcapping=config.attention_softcap,
            final_logit_softcapping=config.logit_softcap,
        )
    rope = dict(
        sliding_attention=dict(rope_type="default", rope_theta=config.local_rope_base),
        full_attention=dict(
            rope_type="linear", factor=config.rope_stretch, rope_theta=config.rope_base
        ),
    )
    return transformers.Gemma3TextConfig(**sizes, **local, rope_parameters=rope)


def causal_peer(config, family):
    """Their class of the family, with random parameters."""
    kind = getattr(transformers, f"{family.capitalize()}ForCausalLM")
    return kind(hugging_face_config(config, family))


def load(model, state):
    """Their model in evaluation mode with our parameters; every one is used."""
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_equals_hugging_faces(family):
    """A local one where the family has them, on a sequence longer than the window."""
    module = prefix_lm_module(family, blind=True, depth=1)
    config, params = module.text, prefix_lm_params(module)
    tokens = drawn_tokens(BATCH, LENGTH)

    def run(params, tokens):
        views = gemma.prefix_lm_views(config, tokens > 0, prefix_length=0)
        embed = functools.partial(module.apply, {"params": params}, None, tokens)
        x, _ = embed(method="embed_prefix")
        decoder = gemma.TextDecoder(config)
        return decoder.apply({"params": params["decoder"]}, x, views)

    peer = causal_peer(config, family)
    peer = load(peer, gemma_state(params, config))
    with torch.no_grad():
        expected = peer.model(torch.tensor(tokens).long()).last_hidden_state
    actual = jit(run)(params, jnp.asarray(tokens))
    assert_within(BLOCK, actual, expected, f"{family} block vs HF")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_text_equal_hugging_faces(family):
    """A prompt of one token leaves a purely causal model."""
    module = prefix_lm_module(family, blind=True, depth=4)
    params, config = prefix_lm_params(module), module.text
    tokens = drawn_tokens(BATCH, LENGTH)
    shifted = np.concatenate([np.zeros((BATCH, 1), np.int32), tokens[:, 1:]], axis=1)
    logits = jit(lambda p, x, y: module.apply({"params": p}, None, x, y))
    peer = causal_peer(config, family)
    peer = load(peer, gemma_state(params, config))
    with torch.no_grad():
        expected = peer(torch.tensor(tokens).long()).logits
    actual = logits(params, tokens[:, :1], shifted)
    assert_within(MODEL, actual, expected, f"{family} logits vs HF")
    if config.logit_softcap is not None:
        assert np.max(np.abs(actual)) > 0.8 * config.logit_softcap, "the cap is felt"


class PaliGemma:
    """Both models with the same weights; prompts of all lengths, right-padded."""

    LENGTHS = np.arange(20) * 3 % 8
    TARGETS = 8

    def __init__(self, family):
        tower = classic_tower_config(**TWO_BLOCKS, pooling="none")
        framing = dict(bos_id=BOS, separator_id=SEPARATOR)
        self.module = prefix_lm_module(family, tower, framing=framing)
        self.params = prefix_lm_params(self.module, seed=3)
        # With tied logits a large embedding predicts its own token again and again.
        table = self.params["token_embedder"]
        table["embedding"] = 0.2 * table["embedding"]
        self.pixels = images(len(self.LENGTHS), 16, 16, 3)
        drawn = drawn_tokens(len(self.LENGTHS), 8, seed=1)
        places, lengths = np.arange(8)[None], self.LENGTHS[:, None]
        ended = np.where(places == lengths, prefix_lm.EOS_ID, 0)
        # As tasks make them: EOS behind the prompt, then padding.
        self.prompts = np.where(places < lengths, drawn, ended).astype(np.int32)
        self.peer = self._hugging_face(tower, family)

    def _hugging_face(self, tower, family):
        vision = transformers.SiglipVisionConfig(
            hidden_size=tower.width,
            intermediate_size=tower.mlp_dim,
            num_hidden_layers=tower.depth,
            num_attention_heads=tower.num_heads,
            image_size=16,
            patch_size=8,
            vision_use_head=False,
        )
        config = transformers.PaliGemmaConfig(
            vision_config=vision,
            text_config=hugging_face_config(self.module.text, family),
            image_token_index=IMAGE,
            vocab_size=VOCAB_SIZE,
            projection_dim=self.module.text.width,
            hidden_size=self.module.text.width,
            attn_implementation="eager",
        )
        params, encoder = self.params, self.params["encoder"]
        state = gemma_state(params, self.module.text, "model.language_model")
        state |= siglip_state(encoder["tower"], tower.depth, "model.vision_tower")
        state |= linear("model.multi_modal_projector.linear", encoder["projection"])
        return load(transformers.PaliGemmaForConditionalGeneration(config), state)

    def inputs(self, targets=None):
        """Inputs of their model, padded on the left as it wants it."""
        rows = [
            [IMAGE] * 4 + [BOS, *prompt[:length], SEPARATOR]
            for prompt, length in zip(self.prompts, self.LENGTHS, strict=True)
        ]
        widest = max(map(len, rows))
        ids = np.array([[0] * (widest - len(row)) + row for row in rows])
        kinds, mask = np.zeros_like(ids), (ids > 0).astype(int)
        if targets is not None:
            ids, kinds, mask = (
                np.concatenate([left, right], axis=1)
                for left, right in (
                    (ids, targets),
                    (kinds, np.ones_like(targets)),
                    (mask, np.ones_like(targets)),
                )
            )
        return dict(
            input_ids=torch.tensor(ids),
            token_type_ids=torch.tensor(kinds),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(mask.cumsum(1)),
            pixel_values=torch.tensor(self.pixels).permute(0, 3, 1, 2) / 127.5 - 1.0,
        )


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def paligemma(request):
    return PaliGemma(request.param)


@pytest.mark.slow
def test_logits_of_image_prompt_and_target_equal_paligemmas(paligemma):
    targets = drawn_tokens(len(paligemma.LENGTHS), paligemma.TARGETS, seed=5)
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    module, params = paligemma.module, paligemma.params
    logits = jit(lambda *inputs: module.apply({"params": params}, *inputs))
    actual = logits(paligemma.pixels, paligemma.prompts, shifted)
    with torch.no_grad():
        expected = paligemma.peer(**paligemma.inputs(targets[:, :-1])).logits
    assert_within(MODEL, actual, expected[:, -paligemma.TARGETS :], "PaliGemma vs HF")


@pytest.mark.slow
def test_greedy_generation_is_paligemmas_token_for_token(paligemma):
    model = prefix_lm_model(paligemma.module, decode_fn=decoding.greedy)
    time = 12
    batch = dict(
        encoder_input_images=paligemma.pixels,
        encoder_input_tokens=paligemma.prompts,
        decoder_target_tokens=np.zeros((len(paligemma.prompts), time), np.int32),
    )
    actual = np.asarray(jit(model.predict_batch)(paligemma.params, batch))
    inputs = paligemma.inputs()
    del inputs["position_ids"]  # it derives them from the mask
    with torch.no_grad():
        output = paligemma.peer.generate(
            **inputs,
            max_new_tokens=time,
            do_sample=False,
            eos_token_id=multimodal.EOS_ID,
            pad_token_id=0,
        )
    expected = np.asarray(output)[:, inputs["input_ids"].shape[1] :]
    np.testing.assert_array_equal(actual[:, : expected.shape[1]], expected)
    assert not np.any(actual[:, expected.shape[1] :])
    assert len(np.unique(actual)) > 20, "predictions that differ prove more"
    assert np.any(actual == multimodal.EOS_ID), "some end early"


@pytest.mark.slow
def test_published_variants_have_as_many_parameters_as_hugging_faces():
    for name in gemma.VARIANTS:
        family = name.split("-")[0]
        config = gemma.gemma_config(name, scan_layers=True)
        with torch.device("meta"):
            peer = causal_peer(config, family)
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        module = prefix_lm.PrefixLMModule(None, config)
        shapes = jax.eval_shape(module.init, jax.random.key(0), None, tokens, tokens)
        ours = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        assert ours == sum(p.numel() for p in peer.parameters()), name


def test_tiny_configs_are_what_they_say():
    assert gemma_config("gemma").is_local == (False, False, False)
    assert gemma_config("gemma2").is_local == (True, False, True)
    assert gemma_config("gemma3").is_local == (True, True, False)
