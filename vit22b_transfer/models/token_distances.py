"""Distances between the tokens of a student's tower and those of its teacher's.

Beside what a teacher says of classes, a student may learn what it says of each patch
(feature distillation: Wei et al. 2022, section 3). Where the towers' widths differ, a
linear map that is learned with the student takes its tokens to the teacher's width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import layers, towers

# Where the map between the widths lies, beside the parameters of the student.
SCOPE = "token_map"
# Under roots, so that tokens of equal values have a gradient.
_EPSILON = 1e-6

Distance = Callable[
    [Float[Array, "batch length width"], Float[Array, "batch length width"]],
    Float[Array, " batch"],
]


@dataclasses.dataclass(frozen=True)
class TokenDistance:
    """A part of a distillation's loss: how far the tokens of both towers are apart.

    distance: `normalised_square` or `cosine`, or a function like them.
    weight: of it in the loss, above 0.
    student_layer, teacher_layer: whose tokens, an intermediate of that tower by name,
      such as `block_5`, whose last tokens are the patches; None, the default: what the
      tower returns, after its last layer and norm. A scanned tower keeps the tokens of
      all layers for a named one.

    Class tokens and registers are not compared.
    """

    distance: Distance
    weight: float = 1.0
    student_layer: str | None = None
    teacher_layer: str | None = None

    def __post_init__(self):
        if not 0.0 < self.weight < float("inf"):
            raise UserError(
                f"the weight of a token distance is {self.weight}; it must be a number "
                "above 0, such as 1.0. Without tokens name gin_configs/runs/"
                "distill.gin in place of distill_tokens.gin."
            )

    def init(
        self, rng: jax.Array, student: tuple[int, ...], teacher: tuple[int, ...]
    ) -> dict[str, Any]:
        """Variables of the map between tokens of these shapes; {} of equal widths.

        student, teacher: shapes [batch, length, width].

        Raises:
          UserError: if an image is not as many tokens to both towers.
        """
        if student[1] != teacher[1]:
            raise UserError(
                f"the student's tower makes {student[1]} tokens of an image, the "
                f"teacher's {teacher[1]}, so there is no token to compare with. Give "
                "both the same patch_size, or leave the tokens out: name "
                "gin_configs/runs/distill.gin in place of distill_tokens.gin."
            )
        if student[2] == teacher[2]:
            return {}
        return dict(_map(student[2], teacher[2]).init(rng, jnp.zeros((1, student[2]))))

    def __call__(
        self,
        student: Float[Array, "batch length embed"],
        teacher: Float[Array, "batch length width"],
        params: Mapping[str, Any] | None,
    ) -> Float[Array, " batch"]:
        """Of each image, unweighted; the student's tokens mapped by `params`, if any.

        params: of the map that `init` makes; None where it makes none.
        """
        student, teacher = (x.astype(jnp.float32) for x in (student, teacher))
        if params is not None:
            width = student.shape[-1], teacher.shape[-1]
            student = _map(*width).apply({"params": params}, student)  # pyright: ignore[reportAssignmentType]
        return self.distance(student, teacher)


def normalised_square(
    student: Float[Array, "batch length width"],
    teacher: Float[Array, "batch length width"],
) -> Float[Array, " batch"]:
    """Mean square of what tokens of mean 0 and variance 1 are apart, in [0, 4].

    Each token is normalised over its width, as by a LayerNorm without parameters. So
    it is twice 1 - the correlation of both.
    """
    apart = _normalised(student) - _normalised(teacher)
    return jnp.mean(jnp.square(apart), axis=(1, 2))


def cosine(
    student: Float[Array, "batch length width"],
    teacher: Float[Array, "batch length width"],
) -> Float[Array, " batch"]:
    """1 - the cosine of the angle between both, the mean over tokens, in [0, 2]."""
    both = jnp.sum(_of_length_1(student) * _of_length_1(teacher), axis=-1)
    return 1.0 - jnp.mean(both, axis=-1)


def tokens_of(output: towers.TowerOutput, layer: str | None) -> jax.Array:
    """The patch tokens [batch, length, width] of a tower at a layer: `TokenDistance`.

    Class token and registers stand before the patches.
    """
    if layer is None:
        return output.tokens
    return output.intermediates[layer][:, -output.tokens.shape[1] :]


def _map(inputs: int, outputs: int) -> layers.Dense:
    return layers.Dense(
        inputs, outputs, ("mlp", "embed"), kernel_init=layers.fan_in_normal
    )


def _normalised(x):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + _EPSILON)


def _of_length_1(x):
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + _EPSILON)
