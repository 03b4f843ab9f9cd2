"""A tower on packed images: as on each alone, and as SigLIP 2's own NaFlex tower."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models
from PIL import Image
from tiny_models import assert_within, images
from tiny_models import jit as compiled
from torch_peers import drawn, import_peer, torch, without_gradients

from vit22b_transfer import UserError
from vit22b_transfer.data.image_packing import RowFormat
from vit22b_transfer.data.images import prepare
from vit22b_transfer.models import vit_positions
from vit22b_transfer.models.preparation import Preparation

transformers = import_peer("transformers")

GRIDS = [(1, 1), (2, 2), (3, 1), (1, 5), (4, 3), (2, 3)]
PIXELS = [images(8 * h, 8 * w, 3, seed=n) for n, (h, w) in enumerate(GRIDS)]
FORM = RowFormat(tokens=16, images=4, patch=8)
KEPT = ("stem", "block_0")
CASES = {
    "ViT-22B": {},
    "scanned": dict(scan_layers=True, depth=2),
    "rotary": dict(positions="rotary"),
    "gap": dict(pooling="gap"),
    "none": dict(pooling="none"),
    "bicubic, norm of the pooled": dict(
        position_resampling="bicubic", final_norm="pooled"
    ),
    "bicubic antialiased": dict(position_resampling="bicubic_antialiased"),
    "NaFlex": dict(
        parallel=False, qk_norm=False, position_resampling="bilinear_antialiased"
    ),
    "stem norm, fused, remat": dict(
        stem_norm=True, fused_projections=True, remat="block"
    ),
}


def packed(pictures=PIXELS, rows=3, form=FORM):
    batch = form.batch(rows)
    assert all(batch.add(pixels) for pixels in pictures)
    return batch


def applied(config, params, pixels):
    tower = config.build()

    @compiled
    def apply(params, pixels):
        return tower.apply({"params": params}, pixels, intermediates=KEPT)

    return apply(params, pixels)


def built(**fields):
    config = tiny_models.tower_config(**fields)
    pixels = images(1, *config.image_size, 3)
    return config, tiny_models.random_params(config.build(), pixels)


def per_image(output, batch):
    """(tokens, pooled, stem, block_0) of each image, out of the rows."""
    found = []
    for row, number in batch.places:
        own = batch.arrays.segments[row] == number + 1
        arrays = (output.tokens, *(output.intermediates[name] for name in KEPT))
        tokens, *kept = (np.asarray(array)[row, own] for array in arrays)
        pooled = None if output.pooled is None else output.pooled[row, number]
        found.append((tokens, pooled, *kept))
    return found


@pytest.mark.parametrize("case", CASES)
def test_packed_images_are_what_each_is_alone(case):
    config, params = built(**CASES[case])
    some = PIXELS[2:5]  # each is compiled anew
    batch = packed(some, rows=2)
    found = per_image(applied(config, params, batch.arrays), batch)
    for pixels, (tokens, pooled, stem, block) in zip(some, found, strict=True):
        alone = applied(config, params, pixels[None])
        np.testing.assert_allclose(tokens, alone.tokens[0], atol=1e-5)
        np.testing.assert_allclose(stem, alone.intermediates["stem"][0], atol=1e-5)
        np.testing.assert_allclose(block, alone.intermediates["block_0"][0], atol=1e-5)
        assert (pooled is None) == (config.pooling == "none")
        if pooled is not None:
            np.testing.assert_allclose(pooled, alone.pooled[0], atol=1e-5)


def test_the_parameters_are_those_of_images_of_one_size():
    config, params = built()
    of_rows = jax.eval_shape(config.build().init, jax.random.key(0), packed().arrays)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), of_rows["params"])


def test_another_order_gives_the_same_vectors_in_that_order():
    config, params = built()
    order = [3, 0, 5, 2, 4, 1]
    first, second = packed(), packed([PIXELS[n] for n in order])
    one = per_image(applied(config, params, first.arrays), first)
    other = per_image(applied(config, params, second.arrays), second)
    for place, number in enumerate(order):
        np.testing.assert_allclose(other[place][0], one[number][0], atol=2e-6)
        np.testing.assert_allclose(other[place][1], one[number][1], atol=2e-6)


def test_nothing_of_an_image_reaches_another_or_an_empty_place():
    config, params = built(depth=2)
    batch, changed = packed(), packed([PIXELS[0], 255 - PIXELS[1], *PIXELS[2:]])
    one, other = (applied(config, params, x.arrays) for x in (batch, changed))
    pairs = zip(per_image(one, batch), per_image(other, changed), strict=True)
    for number, (before, after) in enumerate(pairs):
        same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [number != 1] * 4
    there = np.asarray(batch.arrays.members.any(axis=-1))
    assert there.sum() == len(PIXELS)
    assert not np.asarray(one.pooled)[~there].any()
    assert np.isfinite(one.tokens).all()


def test_a_gradient_is_of_the_images_alone():
    """Rows without images change no gradient, and none is NaN."""
    config, params = built()
    tower = config.build()

    @compiled
    def gradient(params, arrays):
        def total(params):
            return (tower.apply({"params": params}, arrays).pooled ** 2).sum()

        return jax.grad(total)(params)

    few, many = (gradient(params, packed(rows=rows).arrays) for rows in (3, 5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), few, many)


def test_what_a_tower_cannot_pack_is_refused():
    batch = packed().arrays
    for fields in (dict(pooling="cls"), dict(class_token=True), dict(num_registers=2)):
        config, params = built(**fields)
        with pytest.raises(UserError, match="has a class token or registers, of which"):
            applied(config, params, batch)
    config, params = built(patch_size=16)
    with pytest.raises(UserError, match="have 192 values, but the tower's, of 16x16"):
        applied(config, params, batch)
    config, params = built()
    with pytest.raises(UserError, match="the tower takes uint8 pixels"):
        applied(config, params, batch.replace(patches=batch.patches * 1.0))
    with pytest.raises(UserError, match="what a tower is given is of one size"):
        dataclasses.replace(config, preparation=Preparation(fit="own_size", patch=8))


@pytest.mark.parametrize("resampling", vit_positions.RESAMPLINGS)
def test_positions_of_tokens_are_those_of_whole_grids(resampling):
    table = np.random.default_rng(0).normal(size=(5, 7, 6)).astype(np.float32)
    grids = [(1, 1), (5, 7), (3, 20), (16, 2), (64, 64)]
    expected, places = [], []
    for grid in grids:
        axes = zip((5, 7), grid, strict=True)
        rows, columns = (vit_positions.interpolation(*x, resampling) for x in axes)
        expected += [*np.einsum("hH,wW,HWE->hwE", rows, columns, table).reshape(-1, 6)]
        places += [*np.indices(grid).reshape(2, -1).T]
    of = np.repeat(grids, [rows * columns for rows, columns in grids], axis=0)
    positions_at = compiled(vit_positions.positions_at, static_argnums=(1, 4))
    found = positions_at(table.reshape(-1, 6), (5, 7), np.array(places), of, resampling)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@without_gradients
def test_packed_files_give_siglip_2s_last_states_and_pooled_vectors(tmp_path):
    """From pixels of six shapes, by their processor, padded as they do it."""
    from test_parity_families import import_

    config = transformers.Siglip2VisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=8,
        intermediate_size=64,
        num_patches=9,
    )
    model = drawn(transformers.Siglip2VisionModel(config))
    model.save_pretrained(tmp_path / "source")
    tower, params = import_(tmp_path / "source", tmp_path / "imported")
    shapes = [(50, 130), (130, 50), (33, 33), (3, 90), (9, 8), (300, 200)]
    pictures = [images(*shape, 3, seed=n) for n, shape in enumerate(shapes)]
    processor = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=36)
    inputs = processor([Image.fromarray(x) for x in pictures], return_tensors="pt")
    theirs = model(**inputs)
    how = Preparation(fit="own_shape", patch=8)
    ours = [prepare(x, (48, 48), how) for x in pictures]
    batch = packed(ours, rows=3, form=RowFormat(tokens=80, images=4, patch=8))
    assert max(number for _, number in batch.places) > 0
    found = per_image(applied(tower, params, batch.arrays), batch)
    for n, (tokens, pooled, *_) in enumerate(found):
        real = inputs["pixel_attention_mask"][n].to(torch.bool)
        states = theirs.last_hidden_state[n][real]
        assert_within(1e-5, tokens, states, f"tokens of {shapes[n]}")
        assert_within(1e-5, pooled, theirs.pooler_output[n], f"pooled of {shapes[n]}")
