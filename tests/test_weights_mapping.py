"""Transforms undo themselves, tables cover the model, and misfits are named."""

import numpy as np
import pytest

from vit22b_transfer.weights import mapping, transforms
from vit22b_transfer.weights.mapping import Model, Row, per_layer

# transform, shapes of theirs, shapes of ours
TRANSFORMS = {
    "same": (transforms.SAME, [(3, 4)], [(3, 4)]),
    "transpose": (transforms.TRANSPOSE, [(3, 4)], [(4, 3)]),
    "reshape": (transforms.reshape((-1, 6), (2, 3, -1)), [(2, 3, 4)], [(4, 6)]),
    "leading ones": (transforms.leading_ones(0, 2), [(1, 1, 5)], [(5,)]),
    "more leading ones": (transforms.leading_ones(2, 1), [(1, 5)], [(1, 1, 5)]),
    "query kernel": (transforms.join_heads(2, axis=1), [(6, 2, 3)], [(6, 6)]),
    "out kernel": (transforms.join_heads(2, axis=0), [(2, 3, 6)], [(6, 6)]),
    "head bias": (transforms.join_heads(2, axis=0), [(2, 3)], [(6,)]),
    "fused": (transforms.split(3, axis=0), [(12, 5)], [(4, 5)] * 3),
    "uneven": (transforms.split((1, -1), axis=0), [(5, 4)], [(1, 4), (4, 4)]),
    "stacked pair": (transforms.unstack(), [(2, 4, 5)], [(4, 5)] * 2),
    "torch patches": (transforms.conv_kernel_oihw(2), [(7, 3, 2, 2)], [(12, 7)]),
    "flax patches": (transforms.conv_kernel_hwio(2), [(2, 2, 3, 7)], [(12, 7)]),
    "fused kernels": (
        transforms.then(transforms.split(3, axis=0), transforms.TRANSPOSE),
        [(12, 5)],
        [(5, 4)] * 3,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_undoes_itself_on_values_and_on_shapes(name):
    transform, theirs, ours = TRANSFORMS[name]
    rng = np.random.default_rng(0)
    arrays = tuple(rng.standard_normal(shape) for shape in theirs)
    there = transform.to_ours(arrays)
    assert [x.shape for x in there] == ours
    for back, array in zip(transform.to_theirs(there), arrays, strict=True):
        np.testing.assert_array_equal(back, array)
    shapes = transform.to_ours(tuple(map(transforms.abstract, theirs)))
    assert [x.shape for x in shapes] == ours
    backs = transform.to_theirs(tuple(map(transforms.abstract, ours)))
    assert [x.shape for x in backs] == theirs


def test_shapes_of_any_size_take_no_memory():
    parts = (transforms.abstract((10**6, 10**6)),) * 3
    (fused,) = transforms.split(3, axis=0).to_theirs(parts)
    assert fused.shape == (3 * 10**6, 10**6)
    assert not any(fused.strides)


def test_patches_are_read_row_by_row_with_the_channels_innermost():
    """Both libraries' kernels give the products of their own convolutions."""
    rng = np.random.default_rng(1)
    hwio, image = rng.standard_normal((2, 2, 3, 7)), rng.standard_normal((2, 2, 3))
    expected = np.einsum("hwc,hwce->e", image, hwio)
    (ours,) = transforms.conv_kernel_hwio(2).to_ours((hwio,))
    np.testing.assert_allclose(image.reshape(-1) @ ours, expected)
    (ours,) = transforms.conv_kernel_oihw(2).to_ours((hwio.transpose(3, 2, 0, 1),))
    np.testing.assert_allclose(image.reshape(-1) @ ours, expected)


def test_a_transform_for_other_heads_or_ones_is_refused():
    with pytest.raises(ValueError, match="is not 4 heads"):
        transforms.join_heads(4, axis=1).to_ours((np.zeros((6, 2, 3)),))
    with pytest.raises(ValueError, match="does not begin with 1 ones"):
        transforms.leading_ones(0, 1).to_ours((np.zeros((2, 3)),))


ROWS = (
    Row("embedding", "embed"),
    *per_layer(
        2,
        [
            Row("layers_{i}/norm/scale", "block_{i}/norm"),
            Row(
                ("layers_{i}/key/kernel", "layers_{i}/value/kernel"),
                "block_{i}/kv",
                transforms.unstack(),
            ),
        ],
    ),
)
OURS = {
    "embedding": (9, 4),
    **{f"layers_{i}/norm/scale": (4,) for i in range(2)},
    **{f"layers_{i}/key/kernel": (4, 6) for i in range(2)},
    **{f"layers_{i}/value/kernel": (4, 6) for i in range(2)},
}
UNROLLED = {
    "embed": (9, 4),
    **{f"block_{i}/norm": (4,) for i in range(2)},
    **{f"block_{i}/kv": (2, 4, 6) for i in range(2)},
}
STACKED = {"embed": (9, 4), "block/norm": (2, 4), "block/kv": (2, 2, 4, 6)}


def misfits(theirs, ours=None, **fields):
    ours = OURS if ours is None else ours
    found = {name: transforms.abstract(shape) for name, shape in theirs.items()}
    expected = mapping.expected_shapes(mapping.steps(ROWS, found, ours), ours)
    return mapping.misfits(expected, found, Model(ROWS, **fields))


@pytest.mark.parametrize("theirs", [UNROLLED, STACKED], ids=["unrolled", "stacked"])
@pytest.mark.parametrize("scanned", [False, True])
def test_layers_may_be_stacked_on_either_side(theirs, scanned):
    ours = mapping.stack_shapes(OURS) if scanned else OURS
    assert misfits(theirs, ours) == []
    if scanned:
        assert ours["layers/key/kernel"] == (2, 4, 6)
    plan = mapping.steps(ROWS, theirs, ours)
    last = plan[-1]
    assert last.theirs == (
        mapping.Slot("block/kv", 1)
        if theirs is STACKED
        else mapping.Slot("block_1/kv"),
    )


def test_missing_extra_and_wrong_shapes_are_named():
    theirs = UNROLLED | {"block_1/kv": (6, 4, 2), "block_0/nrm": (4,)}
    del theirs["block_0/norm"]
    lines = "\n".join(misfits(theirs))
    assert "block_0/norm: missing, expected shape (4,); nearest: block_0/nrm" in lines
    assert "block_0/nrm: not expected" in lines
    transposed = "block_1/kv: shape (6, 4, 2), expected (2, 4, 6) (it is transposed)"
    assert transposed in lines
    assert len(misfits(theirs)) == 3


def test_a_stack_of_too_few_layers_is_named():
    (line,) = misfits(STACKED | {"block/norm": (1, 4)})
    assert line == "block/norm: shape (1, 4), expected (2, 4)"


def test_copies_and_dropped_tensors_may_be_there_or_not():
    theirs = UNROLLED | {"head": (9, 4), "ids": (1,)}
    assert len(misfits(theirs)) == 2
    assert misfits(theirs, copies={"head": "embed"}, dropped={"ids": "a buffer"}) == []
    (line,) = misfits(UNROLLED | {"head": (4, 9)}, copies={"head": "embed"})
    assert line == "head: shape (4, 9), but it repeats embed of shape (9, 4)"


def test_a_table_that_does_not_cover_the_model_is_an_error():
    with pytest.raises(ValueError, match="no row for 1 parameters.*: extra"):
        misfits(UNROLLED, OURS | {"extra": (1,)})
    ours = {name: shape for name, shape in OURS.items() if name != "embedding"}
    with pytest.raises(ValueError, match="a row for embedding, which the model has"):
        misfits(UNROLLED, ours)
