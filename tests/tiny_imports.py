"""Tiny random public models, imported as `vit22b import` does, for runs from them."""

import json

import gemma_peers
from torch_peers import torch

from vit22b_transfer import cli

transformers = gemma_peers.transformers

VOCAB = 320


def import_(out, *models, processor=None):
    """The directory of an import of the models, which are saved as published.

    processor: values of an image processor's file beside the first.
    """
    names = []
    for i, model in enumerate(models):
        names.append(str(out / f"source_{i}"))
        model.save_pretrained(names[-1])
    if processor:
        path = out / "source_0" / "preprocessor_config.json"
        path.write_text(json.dumps(processor))
    assert cli.main(["import", *names, "--out", str(out / "imported")]) == 0
    return out / "imported"


def paligemma(out):
    """The directory of an import of a PaliGemma 2 that sees images of 16 x 16."""
    model = gemma_peers.paligemma_model("Gemma2", vocab_size=VOCAB, num_hidden_layers=1)
    return import_(out, model)


def tower_and_t5(out, processor=None):
    """That of SigLIP and T5 v1.1: all of a model but the projection between them."""
    tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            vision_use_head=False,
        )
    )
    sizes = dict(vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=48, num_layers=1)
    config = transformers.T5Config(
        **sizes,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    text = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        text.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 24))
    return import_(out, tower, text, processor=processor)
