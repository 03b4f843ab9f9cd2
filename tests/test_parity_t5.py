"""The text model against Hugging Face's T5 v1.1: random weights, float32, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB_SIZE, assert_within, jit, random_params, text_config
from torch_peers import import_peer, torch

from vit22b_transfer.models import encoder_decoder, layers

transformers = import_peer("transformers")
modeling_t5 = import_peer("transformers.models.t5.modeling_t5")

BLOCK, MODEL = 1e-5, 1e-4
BATCH, INPUTS, TARGETS = 3, 40, 30  # long enough for the logarithmic buckets


def drawn_tokens(length, seed):
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, (BATCH, length), "int32")


@pytest.fixture(scope="module")
def tokens():
    """Prompts of all lengths, one of them of a single token, and decoder inputs."""
    lengths = np.array([INPUTS, 17, 1])
    prompts = np.where(np.arange(INPUTS) < lengths[:, None], drawn_tokens(INPUTS, 0), 0)
    shifted = drawn_tokens(TARGETS, 1)
    shifted[:, 0] = 0
    return jnp.asarray(prompts, jnp.int32), jnp.asarray(shifted)


def hugging_face_config(config):
    return transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.width,
        d_kv=config.head_dim,
        d_ff=config.mlp_dim,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=config.tied_logits,
        attn_implementation="eager",
    )


def hugging_face_t5(params, config):
    """Their model with our parameters; every one of them is used."""
    model = transformers.T5ForConditionalGeneration(hugging_face_config(config)).eval()
    table = params["token_embedder"]["embedding"]
    state = {
        "shared.weight": table,
        "encoder.embed_tokens.weight": table,
        "decoder.embed_tokens.weight": table,
        "lm_head.weight": table,
        **stack("encoder", params["encoder"]["text"], config.num_encoder_layers),
        **stack("decoder", params["decoder"], config.num_decoder_layers),
    }
    if not config.tied_logits:
        # Whatever its configuration says, it ties the two when it is built.
        model.lm_head = torch.nn.Linear(config.width, config.vocab_size, bias=False)
        state["lm_head.weight"] = params["decoder"]["logits_dense"]["kernel"].T
    state = {name: torch.tensor(np.asarray(value)) for name, value in state.items()}
    model.load_state_dict(state, strict=True)
    assert model.config.scale_decoder_outputs == config.tied_logits
    return model


def stack(side, ours, depth):
    """Their names for our parameters of an encoder or a decoder."""
    parts = {
        "encoder": [("SelfAttention", "attention", "pre_attention_layer_norm")],
        "decoder": [
            ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
            (
                "EncDecAttention",
                "encoder_decoder_attention",
                "pre_cross_attention_layer_norm",
            ),
        ],
    }[side]
    first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    state = {
        f"{side}.final_layer_norm.weight": ours[f"{side}_norm"]["scale"],
        first: ours["relpos_bias"]["rel_embedding"].T,
    }
    for i in range(depth):
        layer, prefix = ours[f"layers_{i}"], f"{side}.block.{i}.layer"
        for k, (theirs, attention, norm) in enumerate(parts):
            state[f"{prefix}.{k}.layer_norm.weight"] = layer[norm]["scale"]
            for name in ("query", "key", "value", "out"):
                letter = "o" if name == "out" else name[0]
                kernel = layer[attention][name]["kernel"]
                state[f"{prefix}.{k}.{theirs}.{letter}.weight"] = kernel.T
        mlp = f"{prefix}.{len(parts)}"
        state[f"{mlp}.layer_norm.weight"] = layer["pre_mlp_layer_norm"]["scale"]
        for name in ("wi_0", "wi_1", "wo"):
            kernel = layer["mlp"][name]["kernel"]
            state[f"{mlp}.DenseReluDense.{name}.weight"] = kernel.T
    return state


def compare(config, tokens):
    """Encodings and logits of both: (ours, theirs), (ours, theirs)."""
    prompts, shifted = tokens
    module = encoder_decoder.ImageTextModule(None, config)
    params = random_params(module, None, prompts, shifted)

    def run(params, prompts, shifted):
        variables = {"params": params}
        encoded = module.apply(variables, None, prompts, method="encode")
        logits = module.apply(variables, encoded, shifted, method="decode")
        return encoded.encodings, logits

    ours = jit(run)(params, prompts, shifted)
    with torch.no_grad():
        theirs = hugging_face_t5(params, config)(
            input_ids=torch.tensor(np.asarray(prompts)).long(),
            attention_mask=torch.tensor(np.asarray(prompts) > 0).long(),
            decoder_input_ids=torch.tensor(np.asarray(shifted)).long(),
        )
    return zip(ours, (theirs.encoder_last_hidden_state, theirs.logits), strict=True)


def test_one_encoder_and_one_decoder_block_equal_hugging_faces(tokens):
    config = text_config(num_encoder_layers=1, num_decoder_layers=1)
    encodings, logits = compare(config, tokens)
    assert_within(BLOCK, *encodings, "encoder block vs HF T5")
    assert_within(BLOCK, *logits, "decoder block with logits vs HF T5")


@pytest.mark.parametrize("tied_logits", [False, True])
def test_the_whole_model_equals_hugging_faces_with_padding(tokens, tied_logits):
    config = text_config(
        num_encoder_layers=3, num_decoder_layers=2, tied_logits=tied_logits
    )
    encodings, logits = compare(config, tokens)
    assert_within(MODEL, *encodings, f"T5 encodings vs HF, {tied_logits=}")
    assert_within(MODEL, *logits, f"T5 logits vs HF, {tied_logits=}")


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_bias_equals_hugging_faces_at_all_distances(bidirectional):
    length = 700
    bias = layers.RelativePositionBias(4, bidirectional)
    table = np.random.default_rng(2).standard_normal((4, 32)).astype(np.float32)
    config = transformers.T5Config(num_heads=4, is_decoder=not bidirectional)
    theirs = modeling_t5.T5Attention(
        config, has_relative_attention_bias=True, layer_idx=0
    )
    theirs.relative_attention_bias.weight = torch.nn.Parameter(torch.tensor(table.T))
    with torch.no_grad():
        expected = theirs.compute_bias(length, length)
    actual = bias.apply({"params": {"rel_embedding": table}}, length, length)
    assert_within(0.0, actual, expected, "relative bias vs HF T5")


def test_t5_xxl_has_as_many_parameters_as_hugging_faces():
    config = text_config(
        vocab_size=32128,
        width=4096,
        num_encoder_layers=24,
        num_decoder_layers=24,
        num_heads=64,
        head_dim=64,
        mlp_dim=10240,
        scan_layers=True,
    )
    with torch.device("meta"):
        theirs = transformers.T5ForConditionalGeneration(hugging_face_config(config))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(
        lambda *x: encoder_decoder.ImageTextModule(None, config).init(
            jax.random.key(0), None, *x
        ),
        tokens,
        tokens,
    )
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    tied_head = config.vocab_size * config.width  # not tied in ours
    assert ours == sum(p.numel() for p in theirs.parameters()) + tied_head
