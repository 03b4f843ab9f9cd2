"""Distillation: a classifier learns from what a teacher says of the same pixels.

Patient and consistent teaching (Beyer et al. 2022, section 3): the teacher sees the
very images that its student sees, cropped, flipped and mixed alike, in every step anew,
and the student learns to say the same of them, over a long training. The distance is
that of Hinton et al. 2015, section 2: a divergence at a temperature.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.models import losses, token_distances, towers

# Where the teacher's parameters lie beside those of the student.
SCOPE = "teacher"
PARAMETERS = f"{SCOPE}/.*"
# What a batch has in place of a live teacher: its logits of each image.
LOGITS = "teacher_logits"
# How the parameters begin that are of the lesson, and not of the student that is left.
OF_LESSON = (f"{SCOPE}/", f"{token_distances.SCOPE}/")


def is_of_lesson(name: str) -> bool:
    """Whether a parameter, by its path here or in a checkpoint, is not the student's.

    It is the teacher's then, or of the map of tokens to it.
    """
    return name.removeprefix("target/").startswith(OF_LESSON)


class Said(NamedTuple):
    """What a classifier says of images.

    logits: [batch, classes] in float32. tokens: [batch, length, width] of its tower;
      None where no tokens are compared.
    """

    # Any: under jax.eval_shape the leaves are no arrays.
    logits: Any
    tokens: Any = None


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a student learns from. The teacher is frozen and has no optimizer state.

    teacher: the tower of a classifier with the student's classes; its parameters come
      from a checkpoint of that classifier, and are `teacher/...` in the student's.
    temperature: by which both logits are divided, above 0. The divergence is multiplied
      by its square, so that gradients keep their size.
    label_weight: of the cross entropy to the labels, which is added to the divergence;
      0, the default, has none, as the teacher has seen the labels.
    tokens: what is added of the tokens of both towers; None, the default, is nothing.
    cached: the teacher is not run: batches have its logits, which `data.teacher_cache`
      reads, and the student's parameters are without it. Images are then as they are.
    """

    teacher: towers.TowerConfig
    temperature: float = 1.0
    label_weight: float = 0.0
    tokens: token_distances.TokenDistance | None = None
    cached: bool = False

    def __post_init__(self):
        if self.cached and self.tokens is not None:
            raise UserError(
                "cached is what a teacher says of classes, and no tokens to compare "
                "with. Leave gin_configs/runs/distill_cached.gin or distill_tokens.gin "
                "out."
            )
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

    def check_student(
        self,
        tower: towers.TowerConfig,
        loss: str,
        smoothing: float,
        mixup: float | None,
    ):
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
        if self.cached and mixup is not None:
            raise UserError(
                "cached is what a teacher says of images as they are, but "
                f"mixup={mixup} blends them anew in every step. Leave "
                "gin_configs/runs/mixup.gin out, or run the teacher: name "
                "gin_configs/runs/distill.gin in place of distill_cached.gin."
            )
        own, theirs = (getattr(t, "preparation", None) for t in (tower, self.teacher))
        if theirs is not None and own != theirs:
            said = "does not say how" if own is None else f"says: {own}"
            raise UserError(
                "student and teacher see the same pixels, but the student's tower "
                f"{said}, and the teacher's images were prepared so: {theirs}. Give "
                "the student's tower the same preparation."
            )

    def trained(self, tower: towers.TowerConfig) -> tuple[str, ...]:
        """Patterns of what a student with that tower trains to learn, as LoRA's."""
        if self.tokens is None or tower.width == self.teacher.width:
            return ()
        return (f"{token_distances.SCOPE}/.*",)

    def teacher_settings(self, num_classes: int) -> dict[str, str]:
        """What decides the teacher's logits beside its weights, for cached ones."""
        pooling = str(getattr(self.teacher, "pooling", None))
        beside = {"pooling": pooling, "num_classes": str(num_classes)}
        return self.teacher.token_settings() | beside

    def init(
        self,
        rng: jax.Array,
        student: nn.Module,
        teacher: nn.Module,
        params: Mapping[str, Any],
        images: UInt8[Array, "batch height width 3"],
    ) -> dict[str, Any]:
        """Fresh variables of all that is live beside the student's `params`, by scope.

        Raises:
          UserError: if there is no such layer, or an image is not as many tokens to
            both.
        """
        parts = {SCOPE: teacher.init(rng, images)}
        if self.tokens is not None:
            params = {**params, SCOPE: parts[SCOPE]["params"]}
            batch = {"encoder_input_images": images}
            both = jax.eval_shape(
                lambda p: self.both(student, teacher, p, batch), params
            )
            shapes = (said.tokens.shape for said in both)
            if token_map := self.tokens.init(rng, *shapes):
                parts[token_distances.SCOPE] = token_map
        return parts

    def both(
        self,
        student: nn.Module,
        teacher: nn.Module,
        params: Mapping[str, Any],
        batch: Mapping[str, Any],
    ) -> tuple[Said, Said]:
        """What student and teacher, two `ClassifierModule`s, say of the same images.

        params: the student's, with the teacher's beside them unless it is cached.

        Raises:
          UserError: if the teacher is cached and the batch has nothing of it.
        """
        images, tokens = jnp.asarray(batch["encoder_input_images"]), self.tokens
        if self.cached and LOGITS not in batch:
            raise UserError(
                "this model learns from the cached logits of a teacher, and the batch "
                "has none. `vit22b eval` and `vit22b infer` go without "
                "gin_configs/runs/distill_cached.gin."
            )
        if tokens is not None:
            layers = tokens.student_layer, tokens.teacher_layer
            found = [
                network.apply({"params": own}, images, layer, method="with_tokens")
                for network, own, layer in zip(
                    (student, teacher), (params, params[SCOPE]), layers, strict=True
                )
            ]
            return Said(*found[0]), Said(*found[1])
        own = Said(student.apply({"params": params}, images))
        if self.cached:
            return own, Said(jnp.asarray(batch[LOGITS]))
        return own, Said(teacher.apply({"params": params[SCOPE]}, images))

    def loss(
        self,
        student: Said,
        teacher: Said,
        cross_entropy: Float[Array, " batch"],
        token_map: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]:
        """Of each image in nats; and how far both are apart, by the metric's name.

        cross_entropy: to the labels. token_map: parameters of the map between tokens.
        """
        told = distances(student.logits, teacher.logits)
        loss = kl_divergence(
            student.logits, teacher.logits, temperature=self.temperature
        )
        if self.label_weight:
            loss = loss + self.label_weight * cross_entropy
        if self.tokens is not None:
            apart = self.tokens(student.tokens, teacher.tokens, token_map)
            loss = loss + self.tokens.weight * apart
            told["teacher_token_distance"] = apart
        return loss, told


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
