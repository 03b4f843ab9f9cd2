"""Public image towers, imported: the numbers of the implementations that made them.

Each case is a tiny model of the family's own class with random weights (norms, biases,
LayerScale, registers and probe included), saved in its real format, imported, and run
on the same pixels at its own resolution and at another one. `pytest -rP` prints the
largest absolute differences.
"""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import round_trips
import safetensors.numpy
from big_vision_peers import as_scanned, big_vision_blocks, flax_part, siglip_as_npz
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import assert_within, images, jit
from torch_peers import drawn, import_peer, torch, without_gradients

from vit22b_transfer.models import vit
from vit22b_transfer.recipes import loading
from vit22b_transfer.weights import convert, export, import_plan, sources
from vit22b_transfer.weights.families import tower_rows
from vit22b_transfer.weights.families.table import FAMILIES
from vit22b_transfer.weights.files import tensor_files

transformers = import_peer("transformers")
timm = import_peer("timm")

MODEL = 1e-4
OWN, OTHER = (24, 24), (16, 40)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=8)
MLP, IMAGE = dict(intermediate_size=64), dict(image_size=24)
SWIGLU = dict(use_gated_mlp=True, hidden_act="silu")
NO_BIAS = dict(query_bias=False, value_bias=False)


def built(name, **options):
    """A randomised model of that class of Hugging Face's."""
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    return drawn(getattr(transformers, f"{name}Model")(config))


HUGGING_FACE = {
    "ViT": lambda: built("ViT", **MLP, **IMAGE),
    "SigLIP": lambda: built("SiglipVision", **MLP, **IMAGE),
    "SigLIP 2 NaFlex": lambda: built("Siglip2Vision", **MLP, num_patches=9),
    "CLIP": lambda: built("CLIPVision", **MLP, **IMAGE),
    "DINOv2": lambda: built("Dinov2", mlp_ratio=2, **IMAGE),
    "DINOv2 g": lambda: built("Dinov2", use_swiglu_ffn=True, **IMAGE),
    "DINOv2 registers": lambda: built("Dinov2WithRegisters", mlp_ratio=2, **IMAGE),
    "DINOv2 g, another hidden_act": lambda: built(
        "Dinov2", use_swiglu_ffn=True, hidden_act="relu", **IMAGE
    ),
    "DINOv2, no registers": lambda: built(
        "Dinov2WithRegisters", mlp_ratio=2, num_register_tokens=0, **IMAGE
    ),
    "DINOv3, no registers": lambda: built("DINOv3ViT", **MLP, **IMAGE),
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


def old_vit_as_npz(model):
    """A ViT as the first public files have it: the class token has a position."""
    patches = model.embeddings
    return (
        {
            "cls": patches.cls_token.detach().numpy(),
            "Transformer/posembed_input/pos_embedding": (
                patches.position_embeddings.detach().numpy()
            ),
            "head/kernel": np.ones((32, 5), np.float32),
            "head/bias": np.ones(5, np.float32),
        }
        | flax_part("embedding", patches.patch_embeddings.projection)
        | big_vision_blocks(model.layers, old=True)
        | flax_part("Transformer/encoder_norm", model.layernorm)
    )


def below_img(tensors):
    """The tensors as a file of both towers has them."""
    rest = {"params/t": np.ones(1), "params/txt/head/bias": np.ones(3)}
    return rest | {f"params/img/{name}": value for name, value in tensors.items()}


TANH = dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
NPZ = {
    "SigLIP npz, scanned": lambda: (
        model := built("SiglipVision", **MLP, **IMAGE),
        below_img(as_scanned(siglip_as_npz(model))),
    ),
    "NaFlex npz": lambda: (
        model := built("Siglip2Vision", **MLP, num_patches=9),
        below_img(siglip_as_npz(model)),
    ),
    "old ViT npz": lambda: (
        model := built("ViT", **MLP, **IMAGE, **TANH),
        old_vit_as_npz(model),
    ),
}


def published_intern_vit(model, folder):
    """InternViT's files as they are published: other names, one fused projection."""
    names = {
        "cls_token": "class_embedding",
        "patch_embeddings.projection": "patch_embedding",
        "position_embeddings": "position_embedding",
        "encoder.layer.": "encoder.layers.",
        "attention.projection_layer": "attn.proj",
        "attention.": "attn.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_": "ls",
    }
    tensors = {}
    for name, value in model.state_dict().items():
        for theirs, published in names.items():
            name = name.replace(theirs, published)
        tensors[name] = value.numpy()
    for i in range(2):
        parts = [f"encoder.layers.{i}.attn.{x}_proj.weight" for x in "qkv"]
        fused = np.concatenate([tensors.pop(part) for part in parts])
        tensors[f"encoder.layers.{i}.attn.qkv.weight"] = fused
    config = SIZES | MLP | IMAGE | dict(model_type="intern_vit_6b")
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return tensors


def test_the_published_layout_of_intern_vit_gives_the_same_outputs_and_bytes(tmp_path):
    model = HUGGING_FACE["InternViT 6B"]()
    folder, imported, out = (tmp_path / x for x in ("published", "imported", "out"))
    folder.mkdir()
    tensors = published_intern_vit(model, folder)
    tower, params = import_(folder, imported)
    assert_equal_outputs(model, tower, params, OWN, "InternViT 6B, published layout")
    checkpoint = str(imported / "checkpoint_0")
    export.export_weights(checkpoint, str(out), FAMILIES, family="hf-internvit")
    after = safetensors.numpy.load_file(out / "model.safetensors")
    assert {n: x.tobytes() for n, x in after.items()} == {
        n: x.tobytes() for n, x in tensors.items()
    }


@without_gradients
def test_timms_parallel_blocks_give_the_same_outputs_and_bytes(tmp_path):
    """The one tower of these that has ViT-22B's block, with its stem norm and class."""
    model = timm.create_model(
        "vit_base_patch16_xp_224",
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2.0,
        img_size=24,
        patch_size=8,
        num_classes=5,
    )
    model = drawn(model)
    folder, imported, out = (tmp_path / x for x in ("saved", "imported", "out"))
    timm.models.save_for_hf(model, folder, safe_serialization="both")
    (folder / "pytorch_model.bin").unlink()
    tower, params = import_(folder, imported)
    assert tower.parallel and tower.qk_norm and tower.stem_norm
    for size in (OWN, OTHER):
        model.set_input_size(img_size=size)
        features = model.forward_features(normalised(tower, size))
        actual = run(tower, params, size)
        assert_within(MODEL, actual.tokens, features[:, 1:], f"timm {size} tokens")
        pooled = model.forward_head(features, pre_logits=True)
        assert_within(MODEL, actual.pooled, pooled, f"timm {size} pooled")
    family, checkpoint = "timm-parallel-vit", str(imported / "checkpoint_0")
    export.export_weights(checkpoint, str(out), FAMILIES, family=family)
    before, after = (
        safetensors.numpy.load_file(x / "model.safetensors") for x in (folder, out)
    )
    assert before.keys() == after.keys()
    assert all(after[n].tobytes() == before[n].tobytes() for n in after)


@pytest.mark.parametrize("name", ["ViT"])
def test_positions_resampled_by_the_import_give_the_references_outputs(name, tmp_path):
    model = HUGGING_FACE[name]()
    model.save_pretrained(tmp_path / "source")
    tower, params = import_(
        tmp_path / "source", tmp_path / "imported", image_size=OTHER
    )
    tower = dataclasses.replace(tower, image_size=OTHER)
    assert_equal_outputs(model, tower, params, OTHER, f"{name}, resampled")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIP", "SigLIP 2 NaFlex"])
def test_an_export_at_another_resolution_loads_and_gives_the_same_outputs(
    name, tmp_path
):
    model, size = HUGGING_FACE[name](), (32, 32)
    source, imported, out = (tmp_path / x for x in ("source", "imported", "out"))
    model.save_pretrained(source)
    processor = dict(size=dict(shortest_edge=30), crop_size=dict(height=24, width=24))
    processor = processor if name == "CLIP" else dict(max_num_patches=9, patch_size=8)
    (source / "preprocessor_config.json").write_text(json.dumps(processor))
    tower, params = import_(source, imported, image_size=size)
    checkpoint, family = str(imported / "checkpoint_0"), family_of(imported)
    export.export_weights(checkpoint, str(out), FAMILIES, family=family)
    loaded, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    processor = json.loads((out / "preprocessor_config.json").read_text())
    expected = dict(size=dict(shortest_edge=40), crop_size=dict(height=32, width=32))
    expected = expected if name == "CLIP" else dict(max_num_patches=16, patch_size=8)
    assert processor == expected
    tower = dataclasses.replace(tower, image_size=size)
    assert_equal_outputs(loaded.eval(), tower, params, size, f"{name}, exported")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SigLIP", "CLIP"])
def test_a_tower_trained_without_its_pooling_is_exported_with_the_imports(
    name, tmp_path, capsys
):
    """As training with a text model leaves it: no head, for CLIP no last norm."""
    model = HUGGING_FACE[name]()
    source, imported = tmp_path / "source", tmp_path / "imported"
    model.save_pretrained(source)
    tower, params = import_(source, imported)
    plain = tower.without_pooling()
    shapes = tower_rows.tower_shapes(plain).keys()
    flat = flatten_dict({"encoder": {"tower": params}}, sep="/")
    assert shapes < flat.keys()
    trained = unflatten_dict({n: flat[n] + 0.01 for n in shapes}, sep="/")
    family = family_of(imported)
    out = round_trips.exported(trained, tmp_path / "run", family, imported / family)
    assert "of the tower's pooling are not in the checkpoint" in capsys.readouterr().out
    loaded, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    tokens, _ = reference(loaded.eval(), tower, OWN)
    params = trained["encoder"]["tower"]
    if name == "SigLIP":  # CLIP's class norms its pooled vector alone
        actual = run(plain, params, OWN).tokens
        assert_within(MODEL, actual, tokens, "SigLIP, trained without pooling")
    shutil.rmtree(imported / "checkpoint_0")
    with pytest.raises(AssertionError):
        round_trips.exported(trained, tmp_path / "no", family, imported / family)
    assert "training with a text model leaves out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", NPZ)
def test_an_npz_of_big_visions_layout_gives_the_same_outputs_and_bytes(name, tmp_path):
    model, tensors = NPZ[name]()
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    np.savez(tmp_path / "tower.npz", **tensors)
    tower, params = import_(tmp_path / "tower.npz", tmp_path / "imported")
    assert_equal_outputs(model, tower, params, OWN, name)
    checkpoint, out = tmp_path / "imported" / "checkpoint_0", tmp_path / "out"
    family = "big_vision-vit"
    export.export_weights(str(checkpoint), str(out), FAMILIES, family=family)
    after = np.load(out / f"{family}.npz", allow_pickle=False)
    assert set(after) == {n for n in tensors if not n.startswith("params/t")}
    assert all(after[n].tobytes() == tensors[n].tobytes() for n in after)


def import_(source, out, **options):
    """(tower configuration, parameters) of a source, through our import."""
    convert.import_weights(
        [str(source)], str(out), FAMILIES, options=import_plan.ImportOptions(**options)
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


def family_of(out):
    """The name of the family that an import into `out` found."""
    (family,) = [path.name for path in out.iterdir() if path.name.startswith("hf-")]
    return family


def run(tower, params, size):
    """Our tower's output for pixels of that size."""
    module = vit.VisionTower(tower)
    apply = jit(lambda p, x: module.apply({"params": p}, x))
    return apply(params, images(2, *size, 3))


def normalised(tower, size):
    """The pixels as the reference gets them: channels first, by the same mean."""
    mean, deviation = np.float32(tower.pixel_mean), np.float32(tower.pixel_std)
    pixels = images(2, *size, 3) / np.float32(255)
    return torch.tensor((pixels - mean) / deviation).permute(0, 3, 1, 2)


@without_gradients
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
    out = run(tower, params, size)
    tokens, pooled = reference(model, tower, size)
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


# How the reference resamples positions; DINOv3 has rotations.
RESAMPLING = {
    "ViT": "bicubic",
    "SigLIP": "bicubic",
    "SigLIP 2 NaFlex": "bilinear_antialiased",
    "CLIP": "bicubic",
    "DINOv2": "bicubic",
    "DINOv2 g": "bicubic",
    "DINOv2 g, another hidden_act": "bicubic",
    "DINOv2 registers": "bicubic_antialiased",
    "DINOv2, no registers": "bicubic_antialiased",
    "DINOv3, no registers": None,
    "DINOv3": None,
    "DINOv3 7B": None,
    "InternViT 6B": "bicubic",
    "InternViT 300M": "bicubic",
}
# One tower for each; test_weights_towers.py compares them with torch's at more sizes.
RESAMPLED = ("ViT", "SigLIP 2 NaFlex", "DINOv2 registers", "DINOv3")


def test_an_imported_tower_gives_its_references_outputs(case):
    name, model, _, _, tower, params = case
    assert RESAMPLING[name] in (tower.position_resampling, None)
    for size in (OWN, OTHER) if name in RESAMPLED else (OWN,):
        assert_equal_outputs(model, tower, params, size, name)


def test_the_imported_gin_file_builds_the_tower_that_was_verified(case):
    _, _, _, out, tower, _ = case
    recipe = out / "recipe.gin"
    recipe.write_text(
        "from __gin__ import dynamic_registration\n"
        "from vit22b_transfer.models import vit\n"
        # What a recipe may say of its own tower: nothing of it is left.
        "vit.ViTConfig.norm_epsilon = 0.5\n"
        "vit.ViTConfig.final_norm = 'none'\n"
        f"include '{out}/model.gin'\n"
        "vit.VisionTower.config = %TOWER\n"
    )
    read = loading.read([str(recipe)], [], [""])
    assert loading.install(read, vit.VisionTower, [""])().config == tower


@pytest.mark.slow
def test_what_was_imported_and_exported_again_has_the_same_bytes_and_loads(
    case, tmp_path
):
    name, model, folder, out, *_ = case
    export.export_weights(
        str(out / "checkpoint_0"),
        str(tmp_path / "out"),
        FAMILIES,
        family=family_of(out),
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
