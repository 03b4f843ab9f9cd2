"""Attention within segments, block by block, against that over all pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import jit

from vit22b_transfer.models import attention, segments
from vit22b_transfer.models.segments import Segments

# Two images, an empty end; one image; segments that do not lie together; all empty.
NUMBERS = np.array(
    [
        [1] * 9 + [2] * 12 + [0] * 9,
        [1] * 30,
        [1, 2, 3] * 10,
        [0] * 30,
        [1] * 4 + [2] * 4 + [3] * 4 + [4] * 18,
    ],
    np.int32,
)


def operands(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shape = (3, *NUMBERS.shape, 2, 8)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype))


def dense(query, key, value, numbers):
    mask = Segments(jnp.asarray(numbers))
    return attention.attend(query, key, value, mask=mask, scale=0.3, form="einsum")


def in_blocks(query, key, value, numbers, block=4):
    mask = Segments(jnp.asarray(numbers))
    return segments.attend_in_blocks(query, key, value, mask, scale=0.3, block=block)


@pytest.mark.parametrize("block", [1, 4, 7, 30, 128])
def test_blocks_give_what_all_pairs_give(block):
    compiled = jit(in_blocks, static_argnums=4)
    found = compiled(*operands(), NUMBERS, block)
    np.testing.assert_allclose(found, jit(dense)(*operands(), NUMBERS), atol=3e-6)


def test_half_precision_stays_within_its_rounding():
    found = jit(in_blocks)(*operands(jnp.bfloat16), NUMBERS)
    assert found.dtype == jnp.bfloat16
    expected = jit(dense)(*operands(), NUMBERS)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.05)


def test_gradients_are_those_of_all_pairs():
    def gradients(attend):
        def total(*operands):
            return (attend(*operands, NUMBERS) ** 2).sum()

        return jit(jax.grad(total, argnums=(0, 1, 2)))(*operands())

    for one, other in zip(gradients(in_blocks), gradients(dense), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


def test_what_is_of_another_segment_changes_no_bit():
    query, key, value = operands()
    there = jnp.asarray(NUMBERS == 2)[..., None, None]
    huge = [jnp.where(there, 1e4 * x, x) for x in (query, key, value)]
    one = jit(in_blocks)(query, key, value, NUMBERS)
    other = jit(in_blocks)(*huge, NUMBERS)
    np.testing.assert_array_equal(one[NUMBERS != 2], other[NUMBERS != 2])
    assert not np.array_equal(one[NUMBERS == 2], other[NUMBERS == 2])


def test_one_cpu_device_runs_in_blocks_and_a_mesh_of_more_does_not(monkeypatch):
    called = []
    monkeypatch.setattr(
        attention, "attend_in_blocks", lambda *x, **_: called.append(1) or x[0]
    )
    query, key, value = operands()
    numbers = Segments(jnp.asarray(NUMBERS))
    attention.attend(query, key, value, mask=numbers)
    assert called == [1]
    attention.attend(query, key, value, mask=numbers, form="einsum")
    attention.attend(query, key, value, mask=numbers, softcap=5.0)
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        attention.attend(query, key, value, mask=numbers)
    assert called == [1]


def test_blocks_without_a_common_segment_are_not_multiplied():
    """What is NaN reaches all that it is multiplied with, even by 0."""
    query, key, value = operands()
    numbers = np.repeat(np.arange(1, 6, dtype=np.int32), 6)[None].repeat(5, axis=0)
    value = value.at[:, 12:18].set(jnp.nan)
    found = jit(in_blocks, static_argnums=4)(query, key, value, numbers, 6)
    assert np.isnan(found[:, 12:18]).all()
    assert np.isfinite(np.delete(found, np.s_[12:18], axis=1)).all()
