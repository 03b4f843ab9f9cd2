"""Distillation: a classifier learns from what a teacher says of the same pixels.

Patient and consistent teaching (Beyer et al. 2022, section 3): the teacher sees the
very images that its student sees, cropped, flipped and mixed alike, in every step anew,
and the student learns to say the same of them, over a long training. The distance is
that of Hinton et al. 2015, section 2: a divergence at a temperature.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import losses, towers

# Where the teacher's parameters lie beside those of the student.
SCOPE = "teacher"
PARAMETERS = f"{SCOPE}/.*"


def is_of_teacher(name: str) -> bool:
    """Whether a parameter, by its path here or in a checkpoint, is the teacher's."""
    return name.removeprefix("target/").startswith(f"{SCOPE}/")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a student learns from. The teacher is frozen and has no optimizer state.

    teacher: the tower of a classifier with the student's classes; its parameters come
      from a checkpoint of that classifier, and are `teacher/...` in the student's.
    temperature: by which both logits are divided, above 0. The divergence is multiplied
      by its square, so that gradients keep their size.
    label_weight: of the cross entropy to the labels, which is added to the divergence;
      0, the default, has none, as the teacher has seen the labels.
    """

    teacher: towers.TowerConfig
    temperature: float = 1.0
    label_weight: float = 0.0

    def __post_init__(self):
        if not 0.0 < self.temperature < float("inf"):
            raise UserError(
                f"the temperature of a distillation is {self.temperature}; it must be "
                "a number above 0, such as 1.0."
            )
        if not 0.0 <= self.label_weight < float("inf"):
            raise UserError(
                f"label_weight of a distillation is {self.label_weight}; it must be a "
                "number from 0, such as 0.5."
            )

    def check_student(self, tower: towers.TowerConfig, loss: str, smoothing: float):
        """Raises UserError unless a student of that tower and loss can learn so."""
        if loss != "softmax":
            raise UserError(
                f"a distillation compares two softmaxes, but the loss is {loss}. Leave "
                "gin_configs/models/multi_label.gin or gin_configs/runs/distill.gin "
                "out."
            )
        if smoothing and not self.label_weight:
            raise UserError(
                f"label_smoothing is {smoothing}, but this distillation learns nothing "
                "from labels. Set label_smoothing=0, or a Distillation.label_weight "
                "above 0."
            )
        own, theirs = (getattr(t, "preparation", None) for t in (tower, self.teacher))
        if theirs is not None and own != theirs:
            said = "does not say how" if own is None else f"says: {own}"
            raise UserError(
                "student and teacher see the same pixels, but the student's tower "
                f"{said}, and the teacher's images were prepared so: {theirs}. Give "
                "the student's tower the same preparation."
            )

    def loss(
        self,
        student: Float[Array, "batch classes"],
        teacher: Float[Array, "batch classes"],
        cross_entropy: Float[Array, " batch"],
    ) -> Float[Array, " batch"]:
        """Of each image in nats, of both logits and its cross entropy to the labels."""
        loss = kl_divergence(student, teacher, temperature=self.temperature)
        return loss + self.label_weight * cross_entropy if self.label_weight else loss


def kl_divergence(
    student: Float[Array, "batch classes"],
    teacher: Float[Array, "batch classes"],
    *,
    temperature: float = 1.0,
) -> Float[Array, " batch"]:
    """t^2 times the divergence KL(teacher || student) of softmaxes of logits / t, nats.

    At least 0, and 0 only where both say the same.
    """
    said = jax.nn.log_softmax(teacher / temperature, axis=-1)
    share = jnp.exp(said)
    entropy = losses.softmax_cross_entropy(teacher / temperature, share)
    cross = losses.softmax_cross_entropy(student / temperature, share)
    return temperature**2 * (cross - entropy)


def euclidean_distance(
    student: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Of the logits; 1e-12 under the root, as in big_vision, keeps its gradient."""
    return jnp.sqrt(jnp.sum(jnp.square(student - teacher), axis=-1) + 1e-12)


def agreement(
    student: Float[Array, "batch classes"],
    teacher: Float[Array, "batch classes"],
    *,
    top: int = 1,
) -> Float[Array, " batch"]:
    """1 where the teacher's best class is among the student's best `top`, else 0."""
    _, best = jax.lax.top_k(student, top)
    first = jnp.argmax(teacher, axis=-1, keepdims=True)
    return jnp.max((best == first).astype(jnp.float32), axis=-1)


def distances(
    student: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"]
) -> dict[str, Float[Array, " batch"]]:
    """What metrics tell of each image, by name; the divergence at temperature 1."""
    return {
        "teacher_divergence": kl_divergence(student, teacher),
        "teacher_distance": euclidean_distance(student, teacher),
        "teacher_agreement": agreement(student, teacher),
    }
