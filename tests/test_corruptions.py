"""Corruptions against figures of a published implementation and their definitions.

Figures are the mean and standard deviation of a gradient of 224 pixels at severity 3,
and for what is random of the mean over many draws, of imagecorruptions-imaug 1.1.5.
"""

import numpy as np
import pytest
import scipy.ndimage
import skimage.color

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import (
    corruption_blurs,
    corruption_errors,
    corruption_weather,
    corruptions,
)


def gradient(height=224, width=224):
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)


def photograph(height=40, width=48, seed=0):
    """Smooth colours, from black to white."""
    noise = np.random.default_rng(seed).random((height, width, 3))
    smooth = scipy.ndimage.gaussian_filter(noise, (2, 2, 0))
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))


@pytest.mark.parametrize(
    "name, mean, deviation, tolerance",
    [
        ("zoom_blur", 110.64, 54.25, 0.02),
        ("brightness", 161.90, 69.92, 0.02),
        ("contrast", 110.88, 11.81, 0.02),
        ("pixelate", 111.61, 59.03, 0.02),
        ("jpeg_compression", 111.56, 58.31, 0.02),
        ("saturate", 92.65, 67.20, 0.02),
        ("gaussian_blur", 111.18, 58.93, 0.02),
        # Its sums are whole numbers but for rounding, which decides what is cut off.
        ("defocus_blur", 110.60, 58.94, 0.5),
        ("gaussian_noise", 112.4, 69.9, 0.4),
        ("shot_noise", 109.4, 72.4, 0.4),
        ("impulse_noise", 112.9, 68.2, 0.4),
        ("speckle_noise", 109.3, 69.5, 0.4),
        ("glass_blur", 108.61, 58.98, 0.1),
        ("motion_blur", 113.6, 58.93, 3.0),
        ("snow", 180.8, 57.9, 4.0),
        ("fog", 111.4, 30.2, 30.0),
    ],
)
def test_figures_are_those_of_a_published_implementation(
    name, mean, deviation, tolerance
):
    found = corruptions.corrupted(gradient(), name, 3, "a")
    assert found.mean() == pytest.approx(mean, abs=tolerance)
    assert found.std() == pytest.approx(deviation, abs=tolerance)


@pytest.mark.parametrize("name", corruptions.NAMES + corruptions.EXTRA)
def test_a_picture_is_corrupted_alike_in_every_run(name):
    image = photograph(33, 47)
    before = image.copy()
    found = {s: corruptions.corrupted(image, name, s, "a") for s in (1, 5)}
    np.testing.assert_array_equal(image, before)
    for severity, one in found.items():
        assert one.shape == image.shape and one.dtype == np.uint8
        assert not np.array_equal(one, image)
        again = corruptions.corrupted(image, name, severity, "a")
        np.testing.assert_array_equal(one, again)
    other = corruptions.corrupted(image, name, 5, "b")
    fixed = "defocus zoom_blur brightness contrast pixelate jpeg gaussian_blur saturate"
    is_fixed = name.startswith(tuple(fixed.split()))
    assert np.array_equal(found[5], other) == is_fixed
    changes = [np.abs(one - 1.0 * image).mean() for one in found.values()]
    # From severity 3 on a rubber sheet is finer than before; frost is dark or bright.
    if name not in ("elastic_transform", "frost"):
        assert changes[1] > changes[0]


def test_colours_change_in_hsv():
    image = photograph()
    image[:3] = 0
    image[3:6] = 128
    hue, saturation, value = np.moveaxis(skimage.color.rgb2hsv(image), -1, 0)
    for name, changed in (
        ("brightness", (hue, saturation, np.clip(value + 0.5, 0, 1))),
        ("saturate", (hue, np.clip(saturation * 20 + 0.2, 0, 1), value)),
    ):
        expected = 255 * skimage.color.hsv2rgb(np.stack(changed, axis=-1))
        found = corruptions.corrupted(image, name, 5, "a")
        assert np.all(np.abs(found + 0.5 - expected) < 0.51)


def test_contrast_is_towards_the_mean_of_each_channel():
    image = photograph()
    found = corruptions.corrupted(image, "contrast", 2, "a")
    expected = 0.3 * image + 0.7 * image.mean(axis=(0, 1))
    assert np.all(np.abs(found + 0.5 - expected) < 0.51)


def test_defocus_is_the_mean_over_a_soft_disk():
    pixels = photograph() / 255
    for radius, softness, reach in ((4, 0.5, 8), (10, 0.5, 10)):
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        disk = (x**2 + y**2 <= radius**2) / np.sum(x**2 + y**2 <= radius**2)
        half = 1 if radius <= 8 else 2
        line = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * softness**2))
        soft = np.outer(line, line) / line.sum() ** 2
        disk = scipy.ndimage.correlate(disk, soft, mode="mirror")
        expected = scipy.ndimage.correlate(pixels, disk[:, :, None], mode="mirror")
        found = corruption_blurs.defocus(pixels, radius, softness)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_glass_takes_nearby_pixels_from_the_lower_right_on():
    pixels = photograph() / 255
    found = corruption_blurs.glass(pixels, 1.0, 3, 2, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    expected = np.floor(255 * corruption_blurs.gaussian(pixels, 1.0)) / 255
    for _ in range(2):
        moves = rng.integers(-3, 3, (40 - 6, 48 - 6, 2))
        for i, row in enumerate(range(37, 3, -1)):
            for j, column in enumerate(range(45, 3, -1)):
                x, y = moves[i, j]
                expected[row, column] = expected[row + y, column + x]
    expected = corruption_blurs.gaussian(expected, 1.0)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("angle, axis", [(0.0, 1), (90.0, 0)])
def test_motion_smears_to_one_side_along_its_line(angle, axis):
    pixels = np.zeros((41, 41))
    pixels[20, 20] = 1.0
    found = corruption_blurs.motion(pixels, 5, 3.0, angle)
    weights = np.exp(-(np.arange(11) ** 2) / 18)
    line = np.take(found, 20, axis=1 - axis)
    np.testing.assert_allclose(line[20:9:-1], weights / weights.sum())
    assert found.sum() == pytest.approx(1) and line[21:].sum() == 0


def test_an_enlarged_middle_keeps_the_centre_and_the_size():
    pixels = photograph(41, 61) / 255
    found = corruption_blurs.enlarged(pixels, 2.0)
    assert found.shape == pixels.shape
    ramp = np.repeat(np.arange(61.0)[None], 41, axis=0)
    slopes = np.diff(corruption_blurs.enlarged(ramp, 2.0), axis=1)
    assert slopes.mean() == pytest.approx(0.5, abs=0.02)


def test_a_rubber_sheet_is_displaced_smoothly_after_an_affine_map():
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, (20, 27))
    for deviation in (1.3, 15.0):
        expected = scipy.ndimage.gaussian_filter(
            noise, deviation, mode="reflect", truncate=3
        )
        found = corruption_weather._smoothed(noise, deviation)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    pixels = gradient(60, 60) / 255
    still = corruption_weather.elastic(pixels, 0.0, 0.1, 0.0, rng)
    np.testing.assert_allclose(still, pixels, atol=1e-9)
    # An affine map of a plane is a plane: second differences vanish. Its three corners
    # have moved by up to 2 % of the side, that of 244 pixels for a picture of 224.
    planes = np.repeat(np.mgrid[:60, :60][0][:, :, None] / 60, 3, axis=2)
    rng = np.random.default_rng(1)
    mapped = corruption_weather.elastic(planes, 0.0, 0.1, 0.02, rng)[:, :, 0]
    for axis in (0, 1):
        assert np.abs(np.diff(mapped[5:-5, 5:-5], 2, axis=axis)).max() < 1e-9
    most = 0.02 * 244 * 60 / 224
    corners = np.array([[50, 50], [50, 10], [10, 10]])
    moved = corners + np.random.default_rng(1).uniform(-most, most, (3, 2))
    found = scipy.ndimage.map_coordinates(mapped, moved.T, order=1)
    np.testing.assert_allclose(found, corners[:, 0] / 60)


def test_fog_is_a_cloud_that_repeats_and_darkens_what_is_below():
    cloud = corruption_weather.plasma(64, 2.0, np.random.default_rng(0))
    assert (cloud.min(), cloud.max()) == (0, 1)
    inner = np.abs(np.diff(cloud, axis=0)).max()
    assert np.abs(cloud[0] - cloud[-1]).max() <= inner
    # Finer clouds change more from pixel to pixel.
    fine = corruption_weather.plasma(64, 1.3, np.random.default_rng(0))
    assert np.abs(np.diff(fine, axis=0)).mean() > 2 * np.abs(np.diff(cloud)).mean()
    pixels = photograph(64, 64) / 255
    found = corruption_weather.fog(pixels, 1.5, 2.0, np.random.default_rng(0))
    np.testing.assert_allclose(found, (pixels + 1.5 * cloud[:, :, None]) / 2.5)


def test_frost_has_the_brightness_of_photographs_of_it():
    pixels = np.zeros((64, 64, 3))
    drawn = [
        255 * corruption_weather.frost(pixels, 1.0, 1.0, np.random.default_rng(seed))
        for seed in range(20)
    ]
    means = np.mean(drawn, axis=(1, 2))
    assert np.all(means > np.array([78, 149, 166]) - 5)
    assert np.all(means < np.array([201, 205, 214]) + 5)
    assert np.ptp(means[:, 0]) > 60
    assert np.std(drawn, axis=(1, 2)).mean() == pytest.approx(28, abs=4)
    own = corruption_weather.frost(pixels + 0.5, 0.6, 0.75, np.random.default_rng(3))
    np.testing.assert_allclose(own, 0.3 + 0.75 * drawn[3] / 255)


def test_noise_is_of_its_deviation():
    grey = np.full((64, 64, 3), 128, np.uint8)

    def values(name, severity):
        return corruptions.corrupted(grey, name, severity, "a") / 255

    assert values("gaussian_noise", 2).std() == pytest.approx(0.12, rel=0.03)
    assert values("speckle_noise", 1).std() == pytest.approx(0.15 / 2, rel=0.03)
    assert values("shot_noise", 1).std() == pytest.approx(np.sqrt(0.5 / 60), rel=0.03)
    hit = values("impulse_noise", 5)
    black, white = np.mean(hit == 0), np.mean(hit == 1)
    assert (black, white) == pytest.approx((0.135, 0.135), abs=0.015)
    assert np.mean(hit == 128 / 255) == pytest.approx(1 - black - white)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((photograph(), "fogg", 1, "a"), "the nearest is 'fog'"),
        ((photograph(), "fog", 0, "a"), "severity 0 is none of 1"),
        ((photograph(31, 48), "fog", 1, "a"), "31 x 48 pixels is too small"),
    ],
)
def test_what_cannot_be_corrupted_is_said(arguments, message):
    with pytest.raises(UserError, match=message):
        corruptions.corrupted(*arguments)


def test_the_mean_error_of_alexnet_is_a_hundred():
    alexnet = {name: [error] * 5 for name, error in corruption_errors.ALEXNET.items()}
    found = corruption_errors.mean_corruption_error(alexnet, 0.4348)
    assert found == pytest.approx(dict.fromkeys(found, 100)) and len(found) == 17
    errors = {name: [0.1, 0.2, 0.3, 0.4, 0.5] for name in corruptions.NAMES}
    found = corruption_errors.mean_corruption_error(errors, 0.1)
    rates = np.array(list(corruption_errors.ALEXNET.values()))
    assert found["ce/fog"] == pytest.approx(100 * 0.3 / 0.819324)
    assert found["mce"] == pytest.approx(100 * np.mean(0.3 / rates))
    assert found["relative_mce"] == pytest.approx(100 * np.mean(0.2 / (rates - 0.4348)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fog": [0.1] * 4}, "fog is to have an error"),
        ({"fog": [0.1, 0.1, 0.1, 0.1, 10.0]}, "fog is to have an error"),
        ({"spatter": [0.1] * 5}, "missing: none, not among them: spatter"),
    ],
)
def test_a_mean_error_is_over_all_fifteen(change, message):
    errors = {name: [0.1] * 5 for name in corruptions.NAMES} | change
    with pytest.raises(UserError, match=message):
        corruption_errors.mean_corruption_error(errors, 0.1)
    del errors["snow"]
    with pytest.raises(UserError, match="missing: snow"):
        corruption_errors.mean_corruption_error(errors, 0.1)


def test_a_picture_too_small_to_be_corrupted_is_named():
    import tensorflow as tf

    from vit22b_transfer.data import changed_images
    from vit22b_transfer.experiments import corrupted

    strip = {"images": np.zeros((1, 16, 64, 3), np.uint8), "image_id": ["strip"]}
    found = changed_images._map_pictures(
        tf.data.Dataset.from_tensor_slices(strip),
        change=corrupted.change("contrast", 3),
    )
    message = "image '?strip'?, contrast 3: .*16 x 64 pixels is too small"
    with pytest.raises(tf.errors.OpError, match=message):
        next(iter(found))
