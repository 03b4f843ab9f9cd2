"""Public image towers, imported: the numbers of the implementations that made them.

Each case is a tiny model of the family's own class with random weights (norms, biases,
LayerScale, registers and probe included), saved in its real format, imported, and run
on the same pixels at its own resolution and at another one. `pytest -rP` prints the
largest absolute differences.
"""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax.traverse_util import unflatten_dict
from tiny_models import assert_within, images, jit
from torch_peers import import_peer

from vit22b_transfer.models import vit, vit_positions
from vit22b_transfer.weights import (
    convert,
    export,
    mapping,
    sources,
    tensor_files,
    towers_big_vision,
    towers_dino,
    towers_hugging_face,
    towers_internvit,
)
from vit22b_transfer.weights.families import FAMILIES

transformers = import_peer("transformers")
timm = import_peer("timm")
saved_names = import_peer("transformers.core_model_loading").revert_weight_conversion

MODEL = 1e-4
OWN, OTHER = (24, 24), (16, 40)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=8)
MLP, IMAGE = dict(intermediate_size=64), dict(image_size=24)
SWIGLU = dict(use_gated_mlp=True, hidden_act="silu")
NO_BIAS = dict(query_bias=False, value_bias=False)


def built(name, **options):
    """A randomised model of that class of Hugging Face's."""
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    return randomised(getattr(transformers, f"{name}Model")(config))


def randomised(model, seed=0):
    """The model with every parameter random, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            weight = name.endswith("weight")
            if "lambda" in name or (weight and parameter.ndim == 1):
                parameter.copy_(1.0 + 0.3 * noise)
            elif weight and "position" not in name:
                parameter.copy_(noise * 0.7 / np.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


HUGGING_FACE = {
    "ViT": lambda: built("ViT", **MLP, **IMAGE),
    "SigLIP": lambda: built("SiglipVision", **MLP, **IMAGE),
    "SigLIP 2 NaFlex": lambda: built("Siglip2Vision", **MLP, num_patches=9),
    "CLIP": lambda: built("CLIPVision", **MLP, **IMAGE),
    "DINOv2": lambda: built("Dinov2", mlp_ratio=2, **IMAGE),
    "DINOv2 g": lambda: built("Dinov2", use_swiglu_ffn=True, **IMAGE),
    "DINOv2 registers": lambda: built("Dinov2WithRegisters", mlp_ratio=2, **IMAGE),
    "DINOv3": lambda: built("DINOv3ViT", num_register_tokens=4, **MLP, **IMAGE),
    "DINOv3 7B": lambda: built(
        "DINOv3ViT", num_register_tokens=4, **SWIGLU, **NO_BIAS, **MLP, **IMAGE
    ),
    "InternViT 6B": lambda: built(
        "InternVLVision", use_qk_norm=True, norm_type="rms_norm", **MLP, **IMAGE
    ),
    "InternViT 300M": lambda: built(
        "InternVLVision", attention_bias=True, **MLP, **IMAGE
    ),
}


def import_(source, out, **options):
    """(tower configuration, parameters) of a source, through our import."""
    convert.import_weights(
        [str(source)], str(out), FAMILIES, options=convert.ImportOptions(**options)
    )
    opened = sources.open_source(str(source), FAMILIES)
    tensors = tensor_files.open_tensors(str(out / "checkpoint_0"))
    prefix = "target/encoder/tower/"
    params = {
        tuple(name.removeprefix(prefix).split("/")): jnp.asarray(tensor.read())
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return opened.model.tower, unflatten_dict(params)


def run(tower, params, size):
    """Our tower's output for pixels of that size."""
    module = vit.VisionTower(tower)
    apply = jit(lambda p, x: module.apply({"params": p}, x))
    return apply(params, images(2, *size, 3))


def normalised(tower, size):
    """The pixels as the reference gets them: channels first, by the tower's own mean."""
    mean, deviation = np.float32(tower.pixel_mean), np.float32(tower.pixel_std)
    pixels = images(2, *size, 3) / np.float32(255)
    return torch.tensor((pixels - mean) / deviation).permute(0, 3, 1, 2)


@torch.no_grad()
def reference(model, tower, size):
    """(patch tokens, pooled) of a Hugging Face tower."""
    x, name = normalised(tower, size), type(model).__name__
    if name == "Siglip2VisionModel":
        rows, columns = size[0] // 8, size[1] // 8
        patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
        out = model(
            patches.reshape(2, rows * columns, -1),
            torch.ones(2, rows * columns, dtype=torch.int64),
            torch.tensor([[rows, columns]] * 2),
        )
    elif name in ("ViTModel", "SiglipVisionModel", "CLIPVisionModel"):
        out = model(x, interpolate_pos_encoding=True)
    else:
        out = model(x)
    tokens = out.last_hidden_state[:, tower.has_class_token + tower.num_registers :]
    if name in ("ViTModel", "InternVLVisionModel"):  # they pool in no such way
        return tokens, out.last_hidden_state[:, 0]
    return tokens, out.pooler_output


def assert_equal_outputs(model, tower, params, size, label):
    out, (tokens, pooled) = run(tower, params, size), reference(model, tower, size)
    assert_within(MODEL, out.tokens, tokens, f"{label} {size} tokens")
    assert_within(MODEL, out.pooled, pooled, f"{label} {size} pooled")


@pytest.fixture(scope="module", params=HUGGING_FACE)
def case(request, tmp_path_factory):
    """(name, their model, folder of its files, folder of the import, tower, params)."""
    folder = tmp_path_factory.mktemp("source")
    model = HUGGING_FACE[request.param]()
    model.save_pretrained(folder)
    out = tmp_path_factory.mktemp("imported")
    return request.param, model, folder, out, *import_(folder, out)


@pytest.mark.parametrize("size", [OWN, OTHER], ids=str)
def test_an_imported_tower_gives_its_references_outputs(case, size):
    name, model, _, _, tower, params = case
    assert_equal_outputs(model, tower, params, size, name)


def test_what_was_imported_and_exported_again_has_the_same_bytes_and_loads(
    case, tmp_path
):
    name, model, folder, out, *_ = case
    (family,) = [path.name for path in out.iterdir() if path.name.startswith("hf-")]
    export.export_weights(
        str(out / "checkpoint_0"), str(tmp_path / "out"), FAMILIES, family=family
    )
    before = safetensors.numpy.load_file(folder / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert value.tobytes() == after[tensor].tobytes(), tensor
        assert (value.shape, value.dtype) == (after[tensor].shape, after[tensor].dtype)
    loaded, info = type(model).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
