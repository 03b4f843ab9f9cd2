"""Names, shapes, dtypes and logical axes of every parameter of the shipped sizes.

Nothing is allocated: the trees are abstract. The files hold the scanned trees, which
are short; `pytest tests/test_goldens.py --update-goldens` writes them anew.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import TWO_LAYERS, text_config

from vit22b_transfer.models import (
    encoder_decoder,
    gemma,
    prefix_lm,
    stacking,
    t5,
    t5_variants,
    vit,
    vit_variants,
)

GOLDENS = pathlib.Path(__file__).parent / "testdata" / "goldens"
NAMES = (
    "Ti/16 S/16 B/16 L/16 So400m/14 H/14 g/14 G/14 e/14 22B/14"  # a row each
).split()
FORMS = {"vit22b": vit.vit22b_config, "classic": vit.classic_config}
T5_XXL = t5.t5_config("xxl", vocab_size=32128, scan_layers=True)


def abstract(module, *inputs):
    """Abstract variables: `params` and `params_axes`."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)


def abstract_tower(config):
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.uint8)
    return abstract(vit.VisionTower(config), images)


def abstract_model(tower, text):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    images = tower and jax.ShapeDtypeStruct((1, *tower.image_size, 3), jnp.uint8)
    return abstract(
        encoder_decoder.ImageTextModule(tower, text), images, tokens, tokens
    )


def described(variables):
    """One line of text per parameter: dtype, shape, logical axes."""
    params = flatten_dict(variables["params"], sep="/")
    axes = flatten_dict(variables["params_axes"], sep="/")
    assert set(axes) == {f"{name}_axes" for name in params}
    return {
        name: f"{leaf.dtype} {list(leaf.shape)} "
        + " ".join(axis or "-" for axis in axes[f"{name}_axes"].names)
        for name, leaf in sorted(params.items())
    }


def count(variables, part=""):
    """Number of parameters whose path contains `part`."""
    params = flatten_dict(variables["params"], sep="/")
    return sum(math.prod(leaf.shape) for name, leaf in params.items() if part in name)


@pytest.fixture(scope="module")
def check_golden(request):
    """Compares with the golden file of that name, or writes it if asked to."""

    def check(name, value):
        path = GOLDENS / f"{name}.json"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=1) + "\n")
        assert json.loads(path.read_text()) == value

    return check


@pytest.fixture(scope="module")
def towers():
    """Abstract variables of every size and form, with MAP pooling, layers scanned."""
    return {
        (form, name): abstract_tower(make(name, scan_layers=True))
        for form, make in FORMS.items()
        for name in NAMES
    }


def test_every_row_of_the_variants_table_has_a_golden():
    assert [name.split("/")[0] for name in NAMES] == list(vit_variants.VARIANTS)


@pytest.mark.parametrize("name", NAMES)
def test_tower_parameters_are_those_of_the_golden(towers, check_golden, name):
    trees = {form: described(towers[form, name]) for form in FORMS}
    # With the width, as some file systems take vit_g_14 and vit_G_14 for the same.
    width = vit_variants.parse_variant(name)["width"]
    check_golden(f"vit_{name.replace('/', '_')}_{width}", trees)


@pytest.mark.parametrize("pooling", ["none", "gap", "cls"])
@pytest.mark.parametrize("form", FORMS)
def test_other_poolings_differ_from_the_golden_only_in_their_own_part(
    towers, form, pooling
):
    tree = described(
        abstract_tower(FORMS[form]("B/16", scan_layers=True, pooling=pooling))
    )
    expected = {
        name: line
        for name, line in described(towers[form, "B/16"]).items()
        if not name.startswith("map/")
    }
    if pooling == "cls":
        expected["cls/embedding"] = "float32 [1, 1, 768] - - embed"
    assert tree == expected


@pytest.mark.slow
@pytest.mark.parametrize("form, name", [("vit22b", "22B/14"), ("classic", "B/16")])
def test_unrolled_towers_have_the_golden_parameters_unstacked(towers, form, name):
    unrolled = abstract_tower(FORMS[form](name))
    scanned = towers[form, name]
    assert unrolled["params"] == jax.eval_shape(
        stacking.unstack_layers, scanned["params"]
    )
    axes = described(unrolled)
    for name, line in described(scanned).items():
        if name.startswith("layers/"):
            dtype, rest = line.split(" [")
            shape, names = rest.split("] layers ")
            inner = ", ".join(shape.split(", ")[1:])
            line = f"{dtype} [{inner}] {names}"
            name = name.replace("layers/", "layers_3/")
        assert axes[name] == line


def test_text_model_parameters_are_those_of_the_golden(check_golden):
    trees = {
        "untied": described(
            abstract_model(None, text_config(**TWO_LAYERS, scan_layers=True))
        ),
        "tied": described(
            abstract_model(
                None, text_config(**TWO_LAYERS, scan_layers=True, tied_logits=True)
            )
        ),
        "decoder only": described(
            abstract_model(
                None,
                text_config(
                    scan_layers=True, num_encoder_layers=0, num_decoder_layers=2
                ),
            )
        ),
    }
    check_golden("t5_tiny", trees)
    extra = set(trees["untied"]) - set(trees["tied"])
    assert extra == {"decoder/logits_dense/kernel"}


# Of T5X's examples/t5/t5_1_1 with 32,128 tokens; PaLI-X's with 250,112.
T5S = {
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
    "32b": 32_248_939_520,
}


def test_every_t5_has_the_golden_parameters_and_the_published_count(check_golden):
    trees = {}
    for name in t5_variants.VARIANTS:
        rows = 250_112 if name == "32b" else 32_128
        config = t5.t5_config(name, vocab_size=rows, scan_layers=True)
        variables = abstract_model(None, config)
        trees[name] = described(variables)
        assert count(variables) == T5S[name], name
    check_golden("t5", trees)


def test_a_22b_tower_before_t5_xxl_has_the_golden_parameters(check_golden):
    tower = vit.vit22b_config(scan_layers=True, pooling="none")
    variables = abstract_model(tower, T5_XXL)
    check_golden("vit_22B_14_t5_xxl", described(variables))
    projection = 6144 * 4096 + 4096
    assert count(variables, "encoder/tower") == 21_750_546_432
    assert count(variables) == 21_750_546_432 + projection + 11_135_332_352


# Token tables included; tests/test_parity_gemma.py finds as many in Hugging Face's.
GEMMAS = {
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
}


def abstract_prefix_lm(tower, text):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    images = tower and jax.ShapeDtypeStruct((1, *tower.image_size, 3), jnp.uint8)
    return abstract(prefix_lm.PrefixLMModule(tower, text), images, tokens, tokens)


@pytest.mark.slow
def test_every_gemma_has_the_golden_parameters_and_the_published_count(check_golden):
    trees = {}
    for name in gemma.VARIANTS:
        config = gemma.gemma_config(name, scan_layers=True)
        variables = abstract_prefix_lm(None, config)
        trees[name] = described(variables)
        assert count(variables) == GEMMAS[name], name
    check_golden("gemma", trees)


def test_paligemma_3b_has_the_golden_parameters(check_golden):
    tower = vit.classic_config("So400m/14", scan_layers=True)
    text = gemma.gemma_config("gemma-2b", vocab_size=257_152, scan_layers=True)
    variables = abstract_prefix_lm(tower, text)
    check_golden("paligemma_3b", described(variables))
    projection = 1152 * 2048 + 2048
    assert count(variables, "encoder/tower") == 412_442_352
    new_tokens = (1024 + 128) * 2048
    text_model = GEMMAS["gemma-2b"] + new_tokens
    assert count(variables) == 412_442_352 + projection + text_model


def test_vit22b_has_the_published_parameter_counts(towers):
    """The readings of "22B" (Dehghani et al. 2023, table 1 gives 21743M)."""
    tower = towers["vit22b", "22B/14"]
    blocks = flatten_dict(tower["params"]["layers"], sep="/")
    kernels = sum(math.prod(x.shape) for k, x in blocks.items() if "kernel" in k)
    assert kernels == 21_743_271_936
    trunk = count(tower) - count(tower, "map/")
    assert trunk == 21_750_546_432
    assert count(tower) == 22_203_580_416
    without_out_bias = vit.vit22b_config(
        scan_layers=True, pooling="none", out_bias=False
    )
    assert count(abstract_tower(without_out_bias)) == 21_750_251_520
    with_all_biases_in_map = vit.vit22b_config(
        scan_layers=True, qkv_bias=True, norm_bias=True
    )
    pooling = count(abstract_tower(with_all_biases_in_map), "map/")
    assert trunk + pooling == 22_203_604_992


@pytest.mark.parametrize(
    "name, kernels, trunk, with_map",
    [
        ("B/16", 84_934_656, 85_797_120, 92_884_224),
        ("L/16", 301_989_888, 303_299_584, 315_894_784),
        ("So400m/14", 411_070_464, 412_442_352, 427_680_704),
        ("H/14", 629_145_600, 630_762_240, 650_438_400),
        ("g/14", 1_009_254_400, 1_011_199_616, 1_036_448_384),
        ("G/14", 1_840_250_880, 1_842_772_352, 1_881_132_416),
        ("e/14", 3_802_136_576, 3_805_417_728, 3_873_342_720),
        ("22B/14", 21_743_271_936, 21_752_309_760, None),
    ],
)
def test_classic_towers_have_the_published_parameter_counts(
    towers, name, kernels, trunk, with_map
):
    tower = towers["classic", name]
    blocks = flatten_dict(tower["params"]["layers"], sep="/")
    assert kernels == sum(
        math.prod(x.shape) for k, x in blocks.items() if "kernel" in k
    )
    assert count(tower) - count(tower, "map/") == trunk
    assert with_map is None or count(tower) == with_map


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_follow_from_the_sizes(towers, name):
    sizes = vit_variants.parse_variant(name)
    width, depth, mlp = sizes["width"], sizes["depth"], sizes["mlp_dim"]
    patch, head_dim = sizes["patch_size"], sizes["width"] // sizes["num_heads"]
    stem = 3 * patch**2 * width + width + (224 // patch) ** 2 * width
    kernels = 4 * width**2 + 2 * width * mlp
    classic = depth * (kernels + 9 * width + mlp) + stem + 2 * width
    vit22b = depth * (kernels + 3 * width + 2 * head_dim + mlp) + stem + width
    for form, expected in (("classic", classic), ("vit22b", vit22b)):
        tower = towers[form, name]
        assert count(tower) - count(tower, "map/") == expected
