"""Mixup against numpy, on one device and on many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit22b_transfer import UserError
from vit22b_transfer.models.mixup import mixup
from vit22b_transfer.partitioning.rules import Partitioning

BATCH, CLASSES = 8, 5
KEY = jax.random.key(3)


def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, 4, 6, 3), np.uint8)
    labels = np.eye(CLASSES, dtype=np.float32)[np.arange(BATCH) % CLASSES]
    labels[0, 3] = 1.0  # of two classes
    return images, labels


def mixed_up(images, labels, key=KEY, **arguments):
    """`mixup` of numpy arrays, as such."""
    both = mixup(key, jnp.asarray(images), jnp.asarray(labels), **arguments)
    return tuple(map(np.asarray, both))


def share_in(labels, mixed, row=1):
    """The weight of an image of one class, read from what its label became."""
    return float(mixed[row, labels[row].argmax()])


def test_each_image_is_blended_with_the_one_before_it_and_so_are_the_labels():
    images, labels = batch()
    pixels, mixed = mixed_up(images, labels)
    share = share_in(labels, mixed)
    assert 0.5 <= share < 0.99
    want = share * labels + (1 - share) * np.roll(labels, 1, axis=0)
    np.testing.assert_allclose(mixed, want, atol=1e-6)
    whole = images.astype(np.float64)
    want = share * whole + (1 - share) * np.roll(whole, 1, axis=0)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - want).max() <= 0.5 + 1e-3  # rounded, not cut


@pytest.mark.parametrize("alpha, spread", [(1.0, 0.75), (0.2, 0.899)])
def test_the_share_is_the_larger_part_of_a_beta(alpha, spread):
    """The mean of max(a, 1 - a): 3/4 of a uniform a, 0.899 by quadrature for 0.2."""
    images, labels = batch()
    images, labels = jnp.asarray(images[:, :1, :1]), jnp.asarray(labels)
    draw = jax.jit(jax.vmap(lambda key: mixup(key, images, labels, alpha=alpha)[1]))
    shares = np.asarray(draw(jax.random.split(KEY, 2000)))[:, 1, 1]
    assert shares.min() >= 0.5
    assert abs(shares.mean() - spread) < 0.015


def test_an_image_without_labels_mixes_with_none():
    images, labels = batch()
    labels[4] = 0
    pixels, mixed = mixed_up(images, labels)
    for row in (4, 5):  # itself, and the one that it is the partner of
        np.testing.assert_array_equal(pixels[row], images[row])
        np.testing.assert_array_equal(mixed[row], labels[row])
    assert (pixels[6] != images[6]).any()


def test_the_key_decides_and_the_number_of_devices_does_not():
    images, labels = batch()
    one = jax.jit(mixup)(KEY, images, labels)
    mesh = Partitioning(data=4, model=2)
    spread = [jax.device_put(x, mesh.batch_sharding(x.ndim)) for x in (images, labels)]
    many = jax.jit(mixup)(KEY, *spread)
    assert len(many[0].sharding.device_set) == 8
    for first, second in zip(one, many, strict=True):
        np.testing.assert_array_equal(first, second)
    other = jax.jit(mixup)(jax.random.fold_in(KEY, 1), images, labels)
    assert share_in(labels, other[1]) != share_in(labels, one[1])


def test_a_share_that_cannot_be_drawn_is_an_error():
    with pytest.raises(UserError, match="alpha 0.0; it must be above 0"):
        mixed_up(*batch(), alpha=0.0)
