"""Towers: one result whichever way it is computed, and what each option does.

"Equal" for scanned and unrolled layers, fused and separate projections, and remat
policies means 1e-5 of the scale: the sums are the same, but XLA fuses (and so rounds)
another program differently. Where the program is the same, equal means every bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    TWO_BLOCKS,
    assert_within,
    batch,
    classic_tower_config,
    image_text_model,
    images,
    jit,
    random_params,
    relative_difference,
    stack_layers,
    tower_config,
    without_type_checks,
)

from vit22b_transfer.models import (
    layers,
    stacking,
    vit,
    vit_pooling,
    vit_positions,
    vit_variants,
)

PIXELS = jnp.asarray(images(3, 16, 16, 3))


def tower_params(config, seed=0):
    """Random parameters, the same whether layers are scanned or not."""
    unrolled = vit.VisionTower(dataclasses.replace(config, scan_layers=False))
    params = random_params(unrolled, PIXELS, seed=seed)
    return stack_layers(params) if config.scan_layers else params


def outputs_and_gradients(config, names=("stem", "block_1")):
    """Output, intermediates, and gradients of a sum that no symmetry makes zero."""
    tower = vit.VisionTower(config)

    def loss(params):
        out = tower.apply({"params": params}, PIXELS, intermediates=names)
        total = sum(jnp.sum(jnp.sin(3.0 * part)) for part in jax.tree.leaves(out))
        return total, out

    run = jit(jax.grad(loss, has_aux=True))
    gradients, outputs = run(tower_params(config))
    if config.scan_layers:
        gradients = stacking.unstack_layers(gradients)
    return outputs, gradients


@pytest.fixture(scope="module")
def plain():
    """The ViT-22B form unrolled, without remat, projections apart."""
    return outputs_and_gradients(tower_config(**TWO_BLOCKS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(scan_layers=True),
        dict(remat="dots"),
        dict(scan_layers=True, remat="block"),
        dict(fused_projections=True),
        dict(fused_projections=True, scan_layers=True, remat="dots"),
    ],
    ids=str,
)
def test_scan_remat_and_fusion_change_neither_output_nor_gradients(plain, options):
    other = outputs_and_gradients(tower_config(**TWO_BLOCKS, **options))
    assert relative_difference(other, plain) <= 1e-5


def test_remat_computes_more_products_again_and_fusion_has_fewer_of_them():
    def products(**options):
        config = tower_config(depth=1, pooling="none", **options)
        module = vit.VisionTower(config)

        def loss(params):
            return jnp.sum(module.apply({"params": params}, PIXELS).tokens)

        shapes = jax.eval_shape(module.init, jax.random.key(0), PIXELS)["params"]
        return str(jax.make_jaxpr(jax.grad(loss))(shapes)).count("dot_general[")

    # "dots" keeps the results of projections, but not the two products of attention.
    plain, dots, block = (products(remat=r) for r in ("none", "dots", "block"))
    assert plain < dots < block
    assert products(fused_projections=True) < plain


@pytest.mark.slow
def test_scan_and_remat_change_nothing_in_the_classic_form():
    plain = outputs_and_gradients(classic_tower_config(**TWO_BLOCKS))
    other = outputs_and_gradients(
        classic_tower_config(**TWO_BLOCKS, scan_layers=True, remat="block")
    )
    assert relative_difference(other, plain) <= 1e-5


# Every option that a public tower needs, none of them the default.
PUBLIC = dict(
    qkv_bias=True,
    key_bias=False,
    qk_norm_per_head=False,
    layer_scale=True,
    activation="quick_gelu",
    positions="rotary",
    class_token=True,
    num_registers=2,
    stem_norm=True,
    patch_bias=False,
    final_norm="pooled",
)


@pytest.mark.slow
def test_scan_remat_and_fusion_change_nothing_in_the_forms_of_public_towers():
    plain = outputs_and_gradients(tower_config(**TWO_BLOCKS, **PUBLIC))
    for options in (
        dict(scan_layers=True, remat="block"),
        dict(fused_projections=True, remat="dots"),
    ):
        other = outputs_and_gradients(tower_config(**TWO_BLOCKS, **PUBLIC, **options))
        assert relative_difference(other, plain) <= 1e-5


def test_fusion_changes_nothing_where_every_bias_exists_or_none():
    small = dict(depth=1, pooling="none")
    biased = dict(qkv_bias=True, norm_centering=True, norm_bias=True)
    for options in (biased, dict(qk_norm=False, out_bias=False)):
        config = tower_config(**small, **options)
        plain = outputs_and_gradients(config, ())
        config = tower_config(fused_projections=True, **small, **options)
        fused = outputs_and_gradients(config, ())
        assert relative_difference(fused, plain) <= 1e-5


def test_class_token_and_registers_are_seen_by_the_patches_but_not_returned():
    config = tower_config(
        depth=1, class_token=True, class_position=True, num_registers=2, pooling="none"
    )
    module, params = vit.VisionTower(config), tower_params(config)
    run = jit(lambda p: module.apply({"params": p}, PIXELS, intermediates=("block_0",)))
    out = run(params)
    assert out.tokens.shape == (3, 4, 32) and out.pooled is None
    assert out.intermediates["block_0"].shape == (3, 4 + 3, 32)
    for name in ("cls", "cls_position", "registers"):
        changed = jax.tree.map(lambda x: -x, params[name])
        other = run(params | {name: changed})
        assert np.max(np.abs(other.tokens - out.tokens)) > 1e-4, name


def test_the_class_token_stays_where_a_text_model_asks_for_no_pooling():
    tower = tower_config(class_token=True, num_registers=1, pooling="cls")
    model = image_text_model(tower)
    sizes = {name: array.shape for name, array in batch().items()}
    init = functools.partial(model.get_initial_variables, input_shapes=sizes)
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert {"cls", "registers"} <= set(shapes["params"]["encoder"]["tower"])


@pytest.mark.parametrize("final_norm", ["all", "pooled", "none"])
def test_the_final_norm_is_of_all_tokens_of_the_pooled_vector_or_of_nothing(final_norm):
    config = tower_config(depth=1, pooling="gap", final_norm=final_norm)
    module, params = vit.VisionTower(config), tower_params(config)
    run = jit(lambda p: module.apply({"params": p}, PIXELS, intermediates=("block_0",)))
    out = run(params)
    raw = out.intermediates["block_0"]
    assert ("encoder_norm" in params) == (final_norm != "none")

    def normed(x):
        return layers.Norm(32).apply({"params": params["encoder_norm"]}, x)

    tokens = normed(raw) if final_norm == "all" else raw
    pooled = jnp.mean(tokens, axis=1)
    pooled = normed(pooled) if final_norm == "pooled" else pooled
    assert_within(1e-5, out.tokens, tokens)
    assert_within(1e-5, out.pooled, pooled)


def test_rotary_positions_tell_rows_apart_and_take_no_parameters():
    config = tower_config(depth=1, positions="rotary", pooling="none")
    module, params = vit.VisionTower(config), tower_params(config)
    assert "position_embedding" not in params
    tokens = jit(lambda x: module.apply({"params": params}, x).tokens)
    swapped = tokens(jnp.roll(PIXELS, 8, axis=1))[:, jnp.asarray([2, 3, 0, 1])]
    assert np.max(np.abs(swapped - tokens(PIXELS))) > 1e-3


@pytest.fixture(scope="module")
def tower():
    """(parameters, jitted `apply(params, images)`): one block and MAP pooling."""
    config = tower_config(depth=1)
    module = vit.VisionTower(config)
    apply = jit(lambda params, x: module.apply({"params": params}, x))
    return tower_params(config), apply


def test_several_images_give_the_tokens_of_each_one_after_another(tower):
    params, apply = tower
    several = jnp.asarray(images(3, 2, 16, 16, 3, seed=1))
    together = apply(params, several)
    apart = [apply(params, several[:, i]) for i in range(2)]
    tokens = jnp.concatenate([one.tokens for one in apart], axis=1)
    pooled = jnp.stack([one.pooled for one in apart], axis=1)
    assert together.tokens.shape == (3, 8, 32)
    assert_within(1e-5, together.tokens, tokens)
    assert_within(1e-5, together.pooled, pooled)


def test_a_permuted_batch_gives_permuted_outputs(tower):
    params, apply = tower
    order = jnp.asarray([2, 0, 1])
    straight, permuted = apply(params, PIXELS), apply(params, PIXELS[order])
    assert_within(1e-6, permuted.tokens, straight.tokens[order])
    assert_within(1e-6, permuted.pooled, straight.pooled[order])


@pytest.mark.parametrize("size", [(24, 16), (8, 40)])
def test_another_image_size_equals_a_tower_whose_positions_were_resampled(tower, size):
    params, apply = tower
    pixels = jnp.asarray(images(2, *size, 3))
    grid = (size[0] // 8, size[1] // 8)
    table = params["position_embedding"]["embedding"]
    resampled = vit_positions.resample_position_embeddings(table, (2, 2), grid)
    native = vit.VisionTower(tower_config(depth=1, image_size=size))
    expected = jit(native.apply)(
        {"params": params | {"position_embedding": {"embedding": resampled}}}, pixels
    )
    actual = apply(params, pixels)
    assert actual.tokens.shape == (2, grid[0] * grid[1], 32)
    assert_within(1e-5, actual.tokens, expected.tokens)
    assert_within(1e-5, actual.pooled, expected.pooled)


def test_positions_of_the_own_grid_are_untouched():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    assert vit_positions.resample_position_embeddings(table, (2, 3), (2, 3)) is table
    corners = vit_positions.resample_position_embeddings(table, (2, 3), (5, 7))
    rows = jnp.asarray([0, 6, 28, 34])
    assert_within(1e-6, corners[rows], table[jnp.asarray([0, 2, 3, 5])])


def test_pixels_are_scaled_by_mean_and_deviation_of_each_channel():
    mean, deviation = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
    config = tower_config(depth=1, pixel_mean=mean, pixel_std=deviation)
    module = vit.VisionTower(config)
    params = tower_params(config)
    out = jit(lambda p, x: module.apply({"params": p}, x, intermediates=("stem",)))(
        params, PIXELS
    )
    pixels = (np.float64(PIXELS) / 255.0 - np.array(mean)) / np.array(deviation)
    first = pixels[:, :8, 8:].reshape(3, -1)  # the second patch of the first row
    dense = params["patch_embedding"]
    expected = first @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
    expected += np.float64(params["position_embedding"]["embedding"])[1]
    assert_within(1e-5, out.intermediates["stem"][:, 1], expected)


def test_each_pooling_gives_what_its_name_says(tower):
    params, apply = tower
    mapped = apply(params, PIXELS)
    assert mapped.pooled.shape == (3, 32)

    def run(pooling):
        config = tower_config(depth=1, pooling=pooling)
        module = vit.VisionTower(config)
        own = tower_params(config)
        shared = {name: params[name] for name in own if name in params}
        return own, jit(module.apply)({"params": own | shared}, PIXELS)

    _, none = run("none")
    assert none.pooled is None and none.intermediates == {}
    assert_within(1e-6, none.tokens, mapped.tokens)
    _, average = run("gap")
    assert_within(1e-6, average.tokens, mapped.tokens)
    assert_within(1e-6, average.pooled, jnp.mean(mapped.tokens, axis=1))
    own, cls = run("cls")
    assert own["cls"]["embedding"].shape == (1, 1, 32)
    # The class token attends and is attended, but is not among the patch tokens.
    assert cls.tokens.shape == mapped.tokens.shape
    assert np.max(np.abs(cls.tokens - mapped.tokens)) > 1e-3
    assert cls.pooled.shape == (3, 32)


def test_map_pooling_does_not_depend_on_the_order_of_tokens(tower):
    params, _ = tower
    tokens = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 32)), "f4")
    pool = jit(vit_pooling.MapPooling(tower_config()).apply)
    pooled = pool({"params": params["map"]}, tokens)
    reversed_ = pool({"params": params["map"]}, tokens[:, ::-1])
    assert_within(1e-6, reversed_, pooled)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_intermediates_come_by_name(scan_layers):
    config = tower_config(**TWO_BLOCKS, scan_layers=scan_layers)
    module = vit.VisionTower(config)
    names = ("block_1", "stem", "block_0")
    params = tower_params(config)
    apply = jit(lambda p, x: module.apply({"params": p}, x, intermediates=names))
    kept = apply(params, PIXELS)
    assert set(kept.intermediates) == set(names)
    assert all(kept.intermediates[name].shape == (3, 4, 32) for name in names)
    # The last block, normalised, is the output; the others differ from it.
    last = kept.intermediates["block_1"]
    norm = layers.Norm(32).apply({"params": params["encoder_norm"]}, last)
    assert_within(1e-5, norm, kept.tokens)
    assert np.max(np.abs(kept.intermediates["block_0"] - last)) > 1e-3


def test_a_public_tower_in_bfloat16_stays_in_bfloat16():
    types = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    options = PUBLIC | dict(positions="learned", class_position=True, gated_mlp=True)
    for config in (tower_config(**PUBLIC, **types), tower_config(**options, **types)):
        init = functools.partial(
            vit.VisionTower(config).init_with_output, jax.random.key(0)
        )
        leaves = jax.tree.leaves(jax.eval_shape(init, PIXELS))
        arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]
        assert {leaf.dtype for leaf in arrays} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("fused_projections", [False, True])
def test_a_bfloat16_tower_stays_in_bfloat16(tower, fused_projections):
    params, apply = tower
    config = tower_config(
        depth=1,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        fused_projections=fused_projections,
    )
    module = vit.VisionTower(config)
    own = tower_params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype(jnp.bfloat16)}
    names = ("stem", "block_0")
    out = jit(lambda p, x: module.apply({"params": p}, x, intermediates=names))(
        own, PIXELS
    )
    for array in (out.tokens, out.pooled, *out.intermediates.values()):
        assert array.dtype == jnp.bfloat16
    exact = apply(params, PIXELS)
    scale = float(jnp.max(jnp.abs(exact.tokens)))
    assert_within(0.05 * scale, out.tokens.astype(jnp.float32), exact.tokens)


def test_params_may_be_bfloat16_under_float32_computation():
    config = tower_config(param_dtype=jnp.bfloat16)
    out = jax.eval_shape(
        lambda x: vit.VisionTower(config).init_with_output(jax.random.key(0), x), PIXELS
    )
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(out[1]["params"])}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert out[0].tokens.dtype == jnp.float32


@pytest.mark.slow
def test_a_fresh_tower_begins_with_zero_biases_and_unit_scales():
    module = vit.VisionTower(classic_tower_config(**TWO_BLOCKS, scan_layers=True))
    params = jit(module.init)(jax.random.key(0), PIXELS)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name in ("bias", "scale"):
            assert np.all(leaf == (1.0 if name == "scale" else 0.0))
        else:
            assert np.all(np.isfinite(leaf)) and 0.01 < np.std(leaf) < 1.0
    blocks = params["layers"]["mlp"]["wi"]["kernel"]
    assert np.max(np.abs(blocks[0] - blocks[1])) > 0.1, "layers are drawn apart"


def test_fused_projections_and_scan_share_the_parameters_of_the_plain_tower():
    def shapes(**options):
        module = vit.VisionTower(tower_config(**TWO_BLOCKS, **options))
        return jax.eval_shape(module.init, jax.random.key(0), PIXELS)["params"]

    assert shapes(fused_projections=True) == shapes()
    stacked = jax.eval_shape(stack_layers, shapes())
    assert shapes(scan_layers=True, remat="dots") == stacked


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_heads=5), "width 32 is not divisible by num_heads 5"),
        (dict(image_size=(16, 20)), "image is 16x20 but patch_size 8 .* multiples"),
        (dict(pooling="mean"), "pooling is 'mean'; valid are map, gap, cls, none"),
        (dict(remat="full"), "remat is 'full'; valid are none, dots, block"),
        (
            dict(parallel=False, fused_projections=True),
            "fused_projections needs the parallel block",
        ),
        (
            dict(fused_projections=True, mlp_dim=66),
            "mlp_dim 66 is not divisible by num_heads 4",
        ),
        (dict(fused_projections=True, gated_mlp=True), "has no gated_mlp"),
        (
            dict(activation="relu"),
            "activation is 'relu'; valid are gelu_tanh, gelu_erf",
        ),
        (dict(positions="none"), "positions is 'none'; valid are learned, rotary"),
        (
            dict(position_resampling="nearest"),
            "position_resampling is 'nearest'; valid",
        ),
        (
            dict(final_norm="first"),
            "final_norm is 'first'; valid are all, pooled, none",
        ),
        (dict(class_position=True), "class_position needs a class token and learned"),
        (dict(positions="rotary", num_heads=16), "head_dim 2 is not divisible by 4"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, message):
    with without_type_checks(), pytest.raises(ValueError, match=message):
        tower_config(**options)


def test_variants_are_read_by_name_and_their_fields_can_be_overridden():
    config = vit.vit22b_config(depth=3, image_size=(28, 42))
    assert (config.width, config.depth, config.num_heads) == (6144, 3, 48)
    assert (config.head_dim, config.grid_of(28, 42)) == (128, (2, 3))
    classic = vit.classic_config("B/32")
    assert (classic.patch_size, classic.parallel, classic.qkv_bias) == (32, False, True)


@pytest.mark.parametrize("name", ["So400/14", "B", "B/x", "B/0", "", "b/16"])
def test_an_unknown_variant_is_refused_with_the_nearest_names(name):
    with pytest.raises(ValueError, match="unknown ViT variant .*Nearest sizes: ") as e:
        vit_variants.parse_variant(name)
    if name == "So400/14":
        assert "Nearest sizes: So400m" in str(e.value)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_an_unknown_intermediate_is_refused_with_the_nearest_names(scan_layers):
    module = vit.VisionTower(tower_config(**TWO_BLOCKS, scan_layers=scan_layers))
    for name in ("block_2", "blocks_0", "pooled"):
        with pytest.raises(ValueError, match=f"no intermediate '{name}'; nearest: "):
            jax.eval_shape(
                lambda x, name=name: module.init(
                    jax.random.key(0), x, intermediates=(name,)
                ),
                PIXELS,
            )


def test_images_of_another_size_that_patches_cannot_tile_are_refused():
    module = vit.VisionTower(tower_config())
    with pytest.raises(ValueError, match="image is 16x23 but patch_size 8"):
        jax.eval_shape(
            module.init, jax.random.key(0), jnp.zeros((1, 16, 23, 3), jnp.uint8)
        )


def test_images_that_are_not_bytes_are_refused():
    module = vit.VisionTower(tower_config())
    floats = jnp.zeros((1, 16, 16, 3))
    with (
        without_type_checks(),
        pytest.raises(ValueError, match="float32; the tower takes uint8 pixels"),
    ):
        jax.eval_shape(module.init, jax.random.key(0), floats)
