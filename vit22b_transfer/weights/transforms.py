"""Between the layout of their tensors and ours: transpose, split, fuse, reshape.

A transform is two functions, one for each direction, over tuples of NumPy arrays. It
moves values and changes none, so import and then export gives every byte back.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vit22b_transfer import UserError

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Their tensors to ours and back; each function undoes the other."""

    to_ours: Callable[[Arrays], Arrays]
    to_theirs: Callable[[Arrays], Arrays]


def each(
    to_ours: Callable[[np.ndarray], np.ndarray],
    to_theirs: Callable[[np.ndarray], np.ndarray],
) -> Transform:
    """The transform that treats every tensor of a row alike."""
    return Transform(
        lambda arrays: tuple(map(to_ours, arrays)),
        lambda arrays: tuple(map(to_theirs, arrays)),
    )


def then(first: Transform, second: Transform) -> Transform:
    """On the way in `first` and then `second`, on the way out the other way round."""
    return Transform(
        lambda arrays: second.to_ours(first.to_ours(arrays)),
        lambda arrays: first.to_theirs(second.to_theirs(arrays)),
    )


SAME = each(lambda x: x, lambda x: x)
# [out, in] of torch's Linear <-> [in, out] of a kernel.
TRANSPOSE = each(lambda x: x.T, lambda x: x.T)


def reshape(ours: Sequence[int], theirs: Sequence[int]) -> Transform:
    """Equal elements in equal order; one size of each shape may be -1."""
    return each(lambda x: x.reshape(ours), lambda x: x.reshape(theirs))


def leading_ones(ours: int, theirs: int) -> Transform:
    """As many leading axes of size one as said, before the axes that both have."""

    def change(old: int, new: int):
        def apply(x: np.ndarray) -> np.ndarray:
            if x.shape[:old] != (1,) * old:
                raise UserError(f"shape {x.shape} does not begin with {old} ones.")
            return x.reshape((1,) * new + x.shape[old:])

        return apply

    return each(change(theirs, ours), change(ours, theirs))


def join_heads(num_heads: int, *, axis: int) -> Transform:
    """Theirs [..., N, H, ...] with N at `axis`, ours [..., N*H, ...].

    axis=1 for the query, key and value kernels of flax, axis=0 for its out kernel
    [N, H, E] and for biases [N, H].
    """

    def join(x: np.ndarray) -> np.ndarray:
        if x.shape[axis] != num_heads:
            raise UserError(f"axis {axis} of {x.shape} is not {num_heads} heads.")
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def part(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:axis], num_heads, -1, *x.shape[axis + 1 :])

    return each(join, part)


def split(parts: int | Sequence[int], *, axis: int) -> Transform:
    """One tensor of theirs is several of ours, one after the other along `axis`.

    parts: how many equal ones, or the size of each (the last may be -1: the rest).
    """

    def cut(arrays: Arrays) -> Arrays:
        (whole,) = arrays
        if isinstance(parts, int):
            return tuple(np.split(whole, parts, axis=axis))
        return tuple(np.split(whole, np.cumsum(parts[:-1]), axis=axis))

    return Transform(cut, lambda arrays: (_concatenate(arrays, axis),))


def unstack(axis: int = 0) -> Transform:
    """One tensor of theirs is several of ours, stacked along a new `axis`."""

    def take(arrays: Arrays) -> Arrays:
        (whole,) = arrays
        return tuple(np.moveaxis(whole, axis, 0))

    def stack(arrays: Arrays) -> Arrays:
        return (_concatenate([np.expand_dims(x, axis) for x in arrays], axis),)

    return Transform(take, stack)


def conv_kernel_oihw(patch_size: int) -> Transform:
    """torch's patch convolution [E, 3, p, p] <-> our kernel [p*p*3, E]."""
    p = patch_size
    return each(
        lambda x: x.transpose(2, 3, 1, 0).reshape(p * p * 3, -1),
        lambda x: x.reshape(p, p, 3, -1).transpose(3, 2, 0, 1),
    )


def conv_kernel_hwio(patch_size: int) -> Transform:
    """flax's patch convolution [p, p, 3, E] <-> our kernel [p*p*3, E]."""
    p = patch_size
    return reshape((p * p * 3, -1), (p, p, 3, -1))


def _concatenate(arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
    if all(not any(x.strides) for x in arrays):  # shapes alone: see `abstract`
        shape = list(arrays[0].shape)
        shape[axis] = sum(x.shape[axis] for x in arrays)
        return abstract(tuple(shape))
    return np.concatenate(arrays, axis)


def abstract(shape: Sequence[int]) -> np.ndarray:
    """An array that has a shape and takes no memory, to run transforms on."""
    return np.broadcast_to(np.zeros((), np.int8), tuple(shape))
