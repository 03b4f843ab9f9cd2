"""Sizes of images in their own shapes, and where a batch lays their patches."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import images
from torch_peers import import_peer

from vit22b_transfer import UserError
from vit22b_transfer.data import image_packing, preprocessors
from vit22b_transfer.data.images import kept_region, prepare, read_image
from vit22b_transfer.inference import image_batches
from vit22b_transfer.models.preparation import Preparation

siglip2 = import_peer("transformers.models.siglip2.image_processing_siglip2")
transformers = import_peer("transformers")

STRIPS = [(1, 4000), (4000, 1), (1, 1), (2, 3), (7, 5000), (16, 16), (20000, 3)]


def their_size(shape, patch, budget):
    return siglip2.get_image_size_for_max_num_patches(*shape, patch, budget)


@pytest.mark.parametrize("shape", STRIPS)
def test_extreme_shapes_have_the_size_of_siglip_2s_processor(shape):
    for patch, budget in ((16, 256), (16, 1024), (14, 49), (32, 7), (16, 1)):
        ours = image_packing.size_within(shape, budget, patch)
        assert ours == their_size(shape, patch, budget), (patch, budget)


def test_sizes_are_those_of_siglip_2s_processor_over_many_shapes():
    rng = np.random.default_rng(0)
    shapes = np.exp(rng.uniform(0, np.log(6000), (1500, 2))).astype(int)
    for height, width in (*shapes.tolist(), (480, 640), (427, 640), (640, 640)):
        patch = int(rng.choice([8, 14, 16, 32]))
        budget = int(rng.choice([64, 196, 256, 576, 729, 1024]))
        ours = image_packing.size_within((height, width), budget, patch)
        assert ours == their_size((height, width), patch, budget)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1024))
def test_sizes_are_whole_patches_within_the_budget(height, width, budget):
    for enlarge in (True, False):
        size = image_packing.size_within((height, width), budget, 16, enlarge=enlarge)
        rows, columns = size[0] // 16, size[1] // 16
        assert size == (rows * 16, columns * 16)
        assert 1 <= rows * columns <= budget
    # Only what is left of the last patch is made larger.
    assert size[0] < height + 16 and size[1] < width + 16


def test_without_enlarging_an_image_that_fits_keeps_its_size():
    assert image_packing.size_within((48, 64), 256, 16, enlarge=False) == (48, 64)
    assert image_packing.size_within((50, 64), 256, 16, enlarge=False) == (64, 64)
    assert image_packing.size_within((960, 1280), 256, 16, enlarge=False) == (
        image_packing.size_within((960, 1280), 256, 16)
    )


def test_a_strip_that_no_scale_makes_fit_is_refused():
    with pytest.raises(UserError, match=r"1x89000000 is too long and narrow for 1 pa"):
        image_packing.size_within((1, 89_000_000), 1, 16)


@pytest.mark.parametrize("shape", [(50, 130), (130, 50), (33, 33), (3, 90)])
def test_patches_of_a_file_are_those_of_siglip_2s_processor(shape):
    """Their Pillow backend, whose grey levels are ours exactly."""
    pixels = images(*shape, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    processor = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=36)
    theirs = processor(images=[Image.fromarray(pixels)], return_tensors="np")
    how = Preparation(fit="own_shape", patch=8)
    ours = read_image(buffer.getvalue(), (48, 48), how)
    patches = image_packing.patches_of(ours, 8)
    count = len(patches)
    assert (ours.shape[0] // 8, ours.shape[1] // 8) == tuple(theirs.spatial_shapes[0])
    assert theirs.pixel_attention_mask[0].sum() == count
    np.testing.assert_allclose(
        patches / 127.5 - 1, theirs.pixel_values[0][:count], atol=1e-6
    )
    np.testing.assert_array_equal(prepare(pixels, (48, 48), how), ours)
    assert kept_region(shape, (48, 48), how) == (0, 0, 1, 1)


def test_a_file_is_enlarged_or_keeps_its_size_as_its_fit_says():
    buffer = io.BytesIO()
    Image.fromarray(images(15, 30, 3)).save(buffer, "PNG")
    for fit, size in (("own_shape", (40, 80)), ("own_size", (16, 32))):
        how = Preparation(fit=fit, patch=8)
        assert read_image(buffer.getvalue(), (64, 64), how).shape[:2] == size
    assert "no larger than fits" in str(how)


def test_a_jpeg_decoded_at_a_scale_has_the_same_size():
    buffer = io.BytesIO()
    Image.fromarray(images(400, 700, 3)).save(buffer, "JPEG")
    sizes = {
        read_image(
            buffer.getvalue(), (64, 64), Preparation(fit=fit, patch=8, jpegs=jpegs)
        ).shape
        for fit in ("own_shape", "own_size")
        for jpegs in ("whole", "scaled")
    }
    assert sizes == {(48, 80, 3)}


def test_a_fit_and_a_patch_that_do_not_go_together_are_refused():
    for options in (dict(fit="own_shape"), dict(fit="own_size", patch=8, resized=9)):
        with pytest.raises(UserError, match="takes the side of the tower's patches"):
            Preparation(**options)
    with pytest.raises(UserError, match=r"patch=8 goes with fit='own_shape' or"):
        Preparation(patch=8)


def test_a_loader_gives_no_augmented_images_in_their_own_shapes():
    from vit22b_transfer.data import augmentation, image_lengths
    from vit22b_transfer.data.records import Tally

    how = Preparation(fit="own_shape", patch=8)
    drawn = augmentation.Augmentation(flip=True)
    length = image_lengths.PreparedImages((32, 32), how, drawn)
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensors({"image": images(20, 30, 3)})
    options = preprocessors.ReadingOptions()
    with pytest.raises(UserError, match="one to an example and without augmentation"):
        preprocessors.load_images(
            dataset, {"images": length}, options=options, tally=Tally()
        )


FORM = image_packing.RowFormat(tokens=20, images=4, patch=2)
SIDES = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(
    lambda grid: grid[0] * grid[1] <= 20
)


@settings(deadline=None, max_examples=60)
@given(st.lists(SIDES, max_size=40), st.integers(1, 3))
def test_every_image_is_laid_once_and_whole_into_rows_that_keep_their_budget(
    grids, rows
):
    waiting = [images(2 * h, 2 * w, 3, seed=n) for n, (h, w) in enumerate(grids)]
    found, batch = [], FORM.batch(rows)
    batches = [batch]
    for pixels in waiting:
        if not batch.add(pixels):
            batch = FORM.batch(rows)
            batches.append(batch)
            assert batch.add(pixels)
    for batch in batches:
        packed, used = batch.arrays, 0
        for row, number in batch.places:
            own = packed.segments[row] == number + 1
            height, width = packed.grids[row, own][0]
            assert (packed.grids[row, own] == (height, width)).all()
            assert own.sum() == height * width
            image = np.empty((height, width, 2, 2, 3), np.uint8)
            at = tuple(packed.places[row, own].T)
            image[at] = packed.patches[row, own].reshape(-1, 2, 2, 3)
            found.append(image.swapaxes(1, 2).reshape(2 * height, 2 * width, 3))
            used += own.sum()
        assert (packed.segments > 0).sum() == used
        assert packed.segments.max(initial=0) <= FORM.images
        assert len(set(batch.places)) == len(batch.places)
    assert len(found) == len(waiting)
    for image, pixels in zip(found, waiting, strict=True):
        np.testing.assert_array_equal(image, pixels)


def test_a_row_takes_no_more_images_than_it_has_room_for():
    batch = FORM.batch(1)
    assert [batch.add(images(2, 2, 3)) for _ in range(5)] == [True] * 4 + [False]
    assert batch.places == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_an_image_larger_than_a_row_and_one_of_no_whole_patches_are_named():
    batch = FORM.batch(1)
    with pytest.raises(UserError, match="dog.jpg has 21 patches, but a row has 20"):
        batch.add(images(6, 14, 3), "dog.jpg")
    with pytest.raises(UserError, match="dog.jpg: an image of 6x5 is no whole number"):
        batch.add(images(6, 5, 3), "dog.jpg")
    with pytest.raises(UserError, match="tokens of packed images is 0"):
        image_packing.RowFormat(0, 1, 1)


def test_rows_shorter_than_the_largest_image_are_refused_before_any_work():
    with pytest.raises(UserError, match="row_tokens is 255, but an image of the run's"):
        image_batches.Packing(255).rows(256, 16)
    form = image_batches.Packing(1024).rows(256, 16)
    assert (form.tokens, form.images, form.patch) == (1024, 32, 16)


@pytest.mark.parametrize("largest, most", [(1, 24), (3, 24), (8, 24), (16, 12)])
def test_a_row_has_room_for_many_small_images_and_no_more_than_tokens(largest, most):
    assert image_batches.Packing(24).rows(largest, 8).images == most


def test_a_stacked_batch_stretches_no_image_of_another_size():
    batch = image_batches.Stacked((4, 4, 3)).batch(2)
    with pytest.raises(ValueError, match="one.png"):
        batch.add(images(1, 1, 3), "one.png")
    assert batch.add(images(4, 4, 3)) and batch.add(images(4, 4, 3))
    assert not batch.add(images(4, 4, 3))
