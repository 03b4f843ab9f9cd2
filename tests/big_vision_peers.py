"""Towers of Hugging Face's classes as big_vision's files have them."""

import numpy as np
from torch_peers import torch


def flax_part(name, module, heads=None):
    """A torch module's tensors as flax names and shapes them."""
    weight, bias = (x.detach().numpy() for x in (module.weight, module.bias))
    if weight.ndim == 1:
        return {f"{name}/scale": weight, f"{name}/bias": bias}
    if weight.ndim == 4:
        return {f"{name}/kernel": weight.transpose(2, 3, 1, 0), f"{name}/bias": bias}
    kernel = weight.T
    if heads == "in":
        kernel, bias = kernel.reshape(len(kernel), 4, -1), bias.reshape(4, -1)
    elif heads == "out":
        kernel = kernel.reshape(4, -1, kernel.shape[-1])
    return {f"{name}/kernel": kernel, f"{name}/bias": bias}


def flax_attention(name, query, key, value, out):
    parts = {"query": query, "key": key, "value": value, "out": out}
    tensors = {}
    for part, module in parts.items():
        heads = "out" if part == "out" else "in"
        tensors |= flax_part(f"{name}/{part}", module, heads)
    return tensors


def big_vision_blocks(layers, *, old=False):
    """Blocks of SigLIP's class as big_vision has them, or of ViT's as the old files."""
    attention, norm, mlp = ("1", "2", "3") if old else ("0", "1", "0")
    tensors = {}
    for i, layer in enumerate(layers):
        at = f"Transformer/encoderblock_{i}"
        mha = layer.attention if old else layer.self_attn
        out = mha.o_proj if old else mha.out_proj
        norms = (
            (layer.layernorm_before, layer.layernorm_after)
            if old
            else (layer.layer_norm1, layer.layer_norm2)
        )
        tensors |= flax_part(f"{at}/LayerNorm_0", norms[0])
        tensors |= flax_part(f"{at}/LayerNorm_{norm}", norms[1])
        tensors |= flax_attention(
            f"{at}/MultiHeadDotProductAttention_{attention}",
            *(mha.q_proj, mha.k_proj, mha.v_proj, out),
        )
        for j, dense in enumerate((layer.mlp.fc1, layer.mlp.fc2)):
            tensors |= flax_part(f"{at}/MlpBlock_{mlp}/Dense_{j}", dense)
    return tensors


def siglip_as_npz(model):
    """A SigLIP tower, with its head or without, or NaFlex's, as big_vision's npz."""
    table = model.embeddings.position_embedding.weight.detach().numpy()
    naflex = type(model).__name__ == "Siglip2VisionModel"
    tensors = (
        {"pos_embedding": table.reshape(3, 3, 32) if naflex else table[None]}
        | flax_part("embedding", model.embeddings.patch_embedding)
        | big_vision_blocks(model.encoder.layers)
        | flax_part("Transformer/encoder_norm", model.post_layernorm)
    )
    if not hasattr(model, "head"):
        return tensors
    mha = model.head.attention
    stacked = [x.detach().chunk(3) for x in (mha.in_proj_weight, mha.in_proj_bias)]
    into = [torch.nn.Linear(32, 32) for _ in range(3)]
    for linear, weight, bias in zip(into, *stacked, strict=True):
        linear.weight.data, linear.bias.data = weight, bias
    head = "MAPHead_0"
    return (
        tensors
        | {f"{head}/probe": model.head.probe.detach().numpy()}
        | flax_attention(f"{head}/MultiHeadDotProductAttention_0", *into, mha.out_proj)
        | flax_part(f"{head}/LayerNorm_0", model.head.layernorm)
        | flax_part(f"{head}/MlpBlock_0/Dense_0", model.head.mlp.fc1)
        | flax_part(f"{head}/MlpBlock_0/Dense_1", model.head.mlp.fc2)
    )


def as_scanned(tensors):
    """Blocks stacked on a leading axis."""
    block = "Transformer/encoderblock"
    return {
        name.replace(f"{block}_0", block): np.stack([tensors[name], other])
        if (other := tensors.get(name.replace("block_0", "block_1"))) is not None
        and f"{block}_0" in name
        else tensors[name]
        for name in tensors
        if f"{block}_1" not in name
    }
