"""Tables of image towers: published sizes map whole, configs and pixels are read."""

import json
import math

import numpy as np
import pytest
from published_layouts import check_layout
from tiny_models import assert_within
from torch_peers import import_peer, torch

from vit22b_transfer.models import vit_positions
from vit22b_transfer.weights import mapping, sources
from vit22b_transfer.weights.families import (
    tower_rows,
    towers_big_vision,
    towers_dino,
    towers_hugging_face,
    towers_internvit,
)
from vit22b_transfer.weights.families.table import FAMILIES

transformers = import_peer("transformers")
core_model_loading = import_peer("transformers.core_model_loading")

# What the published config.json files say of the sizes.
PUBLISHED = {
    "SigLIP So400m/14 384": (
        "SiglipVision",
        dict(
            hidden_size=1152,
            image_size=384,
            intermediate_size=4304,
            num_attention_heads=16,
            num_hidden_layers=27,
            patch_size=14,
        ),
    ),
    "SigLIP 2 g-opt/16 256": (
        "SiglipVision",
        dict(
            hidden_size=1536,
            image_size=256,
            intermediate_size=6144,
            num_attention_heads=16,
            num_hidden_layers=40,
            patch_size=16,
        ),
    ),
    "DINOv2 g": (
        "Dinov2",
        dict(
            hidden_size=1536,
            image_size=518,
            mlp_ratio=4,
            num_attention_heads=24,
            num_hidden_layers=40,
            patch_size=14,
            use_swiglu_ffn=True,
        ),
    ),
    "DINOv3 7B": (
        "DINOv3ViT",
        dict(
            hidden_act="silu",
            hidden_size=4096,
            intermediate_size=8192,
            key_bias=False,
            num_attention_heads=32,
            num_hidden_layers=40,
            num_register_tokens=4,
            patch_size=16,
            query_bias=False,
            use_gated_mlp=True,
            value_bias=False,
        ),
    ),
    "InternViT 6B": (
        "InternVLVision",
        dict(
            hidden_size=3200,
            image_size=448,
            intermediate_size=12800,
            norm_type="rms_norm",
            num_attention_heads=25,
            num_hidden_layers=45,
            patch_size=14,
            use_qk_norm=True,
        ),
    ),
}
# Parameters in millions, a mask token not counted.
MILLIONS = {
    "SigLIP So400m/14 384": 428,
    "SigLIP 2 g-opt/16 256": 1163,
    "DINOv2 g": 1136,
    "DINOv3 7B": 6716,
    "InternViT 6B": 5536,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_size_maps_and_none_is_left(name):
    kind, sizes = PUBLISHED[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(config)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in core_model_loading.revert_weight_conversion(
            model, model.state_dict()
        ).items()
    }
    said = sizes | {"model_type": config.model_type}
    family = sources.choose(FAMILIES, said, shapes, None, name)
    read = check_layout(family, said, shapes)
    ours = family.shapes(read.tower, None)
    count = sum(map(math.prod, ours.values()))
    unused = [shape for n, shape in shapes.items() if read.drops(n)]
    assert count + sum(map(math.prod, unused)) == sum(map(math.prod, shapes.values()))
    assert all(math.prod(shape) == read.tower.width for shape in unused)
    assert round(count / 1e6) == MILLIONS[name]


DEFAULTS = {
    "ViT": towers_hugging_face.VIT_DEFAULTS,
    "SiglipVision": towers_hugging_face.SIGLIP_DEFAULTS,
    "Siglip2Vision": towers_hugging_face.NAFLEX_DEFAULTS,
    "CLIPVision": towers_hugging_face.CLIP_DEFAULTS,
    "Dinov2": towers_dino.DINOV2_DEFAULTS,
    "Dinov2WithRegisters": towers_dino.REGISTERS_DEFAULTS,
    "DINOv3ViT": towers_dino.DINOV3_DEFAULTS,
    "InternVLVision": towers_internvit.HF_DEFAULTS,
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_config_leaves_unsaid_is_the_default_of_its_class(kind):
    config = getattr(transformers, f"{kind}Config")().to_dict()
    for field, value in DEFAULTS[kind].items():
        said = config[field]
        assert (tuple(said) if isinstance(said, list) else said) == value, field


@pytest.mark.parametrize("resampling", vit_positions.RESAMPLINGS)
@pytest.mark.parametrize("new", [(9, 4), (3, 14), (16, 11), (1, 1), (12, 16)], ids=str)
def test_resampling_of_positions_equals_torchs(new, resampling):
    old = (6, 8)
    table = np.random.default_rng(4).standard_normal((*old, 16)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None],
        size=new,
        mode=resampling.partition("_")[0],
        align_corners=resampling.endswith("corners"),
        antialias=resampling.endswith("antialiased"),
    )[0].permute(1, 2, 0)
    actual = tower_rows.resample(resampling)(table.reshape(-1, 16), old, new)
    assert_within(1e-5, actual, expected.reshape(-1, 16), f"{resampling} to {new}")


def siglip_shapes(**sizes):
    """Names and shapes of a SigLIP tower on paper, and its config."""
    sizes = (
        dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=24,
            patch_size=8,
            model_type="siglip_vision_model",
        )
        | sizes
    )
    tower, _ = towers_hugging_face.siglip_tower(sizes)
    ours = tower_rows.tower_shapes(tower)
    plan = mapping.steps(towers_hugging_face.siglip_rows(tower, ""), (), ours)
    return sizes, mapping.expected_shapes(plan, ours)


def read(config, shapes):
    family = sources.choose(FAMILIES, config, shapes, None, "the source")
    return check_layout(family, config, shapes)


def test_an_image_processors_file_decides_on_mean_deviation_and_size():
    config, shapes = siglip_shapes()
    usual = read(config, shapes)
    assert usual.tower.pixel_mean == (0.5, 0.5, 0.5)
    processor = dict(
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
        size={"height": 24, "width": 24},
        resample=3,
    )
    said = read(config | {"preprocessor": processor}, shapes)
    assert said.tower.pixel_mean == (0.1, 0.2, 0.3)
    assert said.tower.pixel_std == (0.4, 0.5, 0.6)
    assert said.images == (24, 24) and said.tower.preparation.filter == "bicubic"


def test_an_image_processor_is_read_from_either_of_its_files(tmp_path):
    means = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    whole = dict(image_processor=dict(image_mean=means[0]), processor_class="P")
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    assert sources.read_config(str(tmp_path))["preprocessor"]["image_mean"] == means[0]
    alone = dict(image_mean=means[1])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(alone))
    assert sources.read_config(str(tmp_path))["preprocessor"]["image_mean"] == means[1]


def test_an_image_that_patches_do_not_tile_is_cropped_as_the_convolution_does():
    config, shapes = siglip_shapes(image_size=30)
    model = read(config, shapes)
    assert model.tower.image_size == (24, 24)
    how = model.tower.preparation
    assert (how.resized, how.cropped, how.kept) == (30, 30, 24)
    assert "its top left (24 of 30) kept" in str(how)


def test_the_text_tower_of_a_whole_model_is_left_out():
    config, shapes = siglip_shapes()
    whole = {"model_type": "siglip", "vision_config": config, "text_config": {}}
    others = {"text_model.head.weight": (3, 3), "logit_scale": (1,)}
    names = {f"vision_model.{name}": shape for name, shape in shapes.items()} | others
    model = read(whole, names)
    assert model.tower.width == 16
    assert all(model.drops(name) for name in others)


def test_a_tower_inside_another_model_is_not_taken_for_the_whole():
    config, shapes = siglip_shapes()
    with pytest.raises(ValueError, match="is of no family"):
        read({"model_type": "some_vlm", "vision_config": config}, shapes)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(hidden_act="relu"), "hidden_act = 'relu'; known are 'gelu'"),
        (dict(num_channels=4), "num_channels = 4; .* only .* with 3"),
        (dict(num_attention_heads=3), "width 16 is not divisible by num_heads 3"),
        (dict(hidden_size=32), r"embeddings.patch_embedding.weight: shape \(16, 3"),
    ],
)
def test_a_config_that_cannot_be_computed_or_lies_is_refused(options, message):
    config, shapes = siglip_shapes()
    with pytest.raises(ValueError, match=message):
        read(config | options, shapes)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("dinov3_vit", dict(rope_theta=10.0), "rope_theta = 10.0"),
        ("dinov3_vit", dict(mlp_bias=False), "mlp_bias = False"),
        ("dinov3_vit", dict(value_bias=False), "value_bias = False"),
        ("internvl_vision", dict(use_qk_norm=True), "RMS-normalised queries"),
        (
            "internvl_vision",
            dict(use_absolute_position_embeddings=False),
            "use_absolute_position_embeddings = False",
        ),
        ("intern_vit_6b", dict(norm_type="group"), "norm_type = 'group'"),
    ],
)
def test_a_variant_that_no_published_tower_has_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        read({"model_type": kind} | options, {})


def test_a_source_that_says_nothing_of_its_sizes_is_refused():
    for family in ("big_vision-vit", "timm-parallel-vit"):
        with pytest.raises(ValueError, match="read from its tensors; name with --conf"):
            sources.by_name(FAMILIES, family).read({}, {})


def test_fixed_sine_positions_become_a_table_of_the_published_resolution():
    """Files with `sincos2d` have no table; DeiT-like baselines at 224 pixels use it."""
    width, block = 16, "Transformer/encoderblock_0"
    mha = f"{block}/MultiHeadDotProductAttention_0"
    shapes = {
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        f"{block}/MlpBlock_0/Dense_0/kernel": (width, 32),
        f"{block}/MlpBlock_0/Dense_0/bias": (32,),
        f"{block}/MlpBlock_0/Dense_1/kernel": (32, width),
        f"{block}/MlpBlock_0/Dense_1/bias": (width,),
        f"{mha}/out/kernel": (2, 8, width),
        f"{mha}/out/bias": (width,),
    }
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        shapes |= {f"{block}/{norm}/{x}": (width,) for x in ("scale", "bias")}
    for name in ("query", "key", "value"):
        shapes[f"{mha}/{name}/kernel"] = (width, 2, 8)
        shapes[f"{mha}/{name}/bias"] = (2, 8)
    model = read({}, shapes)
    assert (model.tower.image_size, model.tower.pooling) == ((224, 224), "gap")
    (row,) = [row for row in model.rows if not row.theirs]
    (table,) = row.transform.to_ours(())
    assert table.shape == (14 * 14, width)
    # The sine and cosine of the column's and the row's number come first.
    third = table.reshape(14, 14, width)[2, 3]
    values = [f(x) for x in (3.0, 2.0) for f in (math.sin, math.cos)]
    np.testing.assert_allclose(third[:: width // 4], values, rtol=1e-5)
    assert towers_big_vision.sine_positions(width, (3, 5)).shape == (15, width)
