"""Tiny models of the Gemma family, alone and behind a tower, and their parameters."""

from tiny_models import VOCAB_SIZE, Vocabulary, batch, random_params, tower_config

from vit22b_transfer.models import gemma, multimodal, prefix_lm

# Windows shorter than the sequences of the tests, soft caps that bite.
FAMILIES = {
    "gemma": dict(num_kv_heads=1),
    "gemma2": dict(
        attention_softcap=2.0,
        logit_softcap=3.0,
        query_scalar=5,
        post_norms=True,
        sliding_window=4,
        global_period=2,
    ),
    "gemma3": dict(
        post_norms=True,
        qk_norm=True,
        query_scalar=12,
        sliding_window=3,
        global_period=3,
        rope_base=1e6,
        rope_stretch=8.0,
        local_rope_base=100.0,
    ),
}


def gemma_config(family, **overrides):
    """A text model of three layers; overrides are GemmaConfig fields."""
    sizes = dict(
        vocab_size=VOCAB_SIZE,
        width=24,
        depth=3,
        mlp_dim=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    return gemma.GemmaConfig(**(sizes | FAMILIES[family] | overrides))


def prefix_lm_module(family, tower=None, *, blind=False, framing=None, **overrides):
    """Framing: `bos_id` and `separator_id`; overrides are GemmaConfig fields."""
    tower = None if blind else tower or tower_config()
    text = gemma_config(family, **overrides)
    return prefix_lm.PrefixLMModule(tower, text, **(framing or {}))


def prefix_lm_model(module, **arguments):
    """An `ImageTextModel`; arguments are the constructor's."""
    return multimodal.ImageTextModel(module, Vocabulary(), Vocabulary(), **arguments)


def prefix_lm_params(module, seed=0):
    """Random parameters; images, prompts and targets as in `tiny_models.batch`."""
    example = batch(1)
    inputs = [
        example[name]
        for name in (
            "encoder_input_images",
            "encoder_input_tokens",
            "decoder_input_tokens",
        )
    ]
    return random_params(module, *inputs, seed=seed)
