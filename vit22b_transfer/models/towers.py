"""Image towers as the rest of the library knows them: a configuration that builds one.

A new family is one file beside this one with a frozen dataclass that satisfies
`TowerConfig` and a module that returns `TowerOutput`. What else can be done with a
tower depends on the fields that its configuration has: `scan_layers`, `remat`, `lora`
(`models.lora`) and `int8_kernels` (`models.int8`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import layers

# In a batch, beside images: the `TowerOutput` of them. Whoever puts it there has run
# the tower, so that several heads share one run of it.
OUTPUT = "tower_output"


@flax.struct.dataclass
class TowerOutput:
    """What a tower returns.

    tokens: every patch token after the final norm, [B, n*k, E] for n images of k
      patches; class tokens and registers are not among them.
    pooled: [B, E] for [B, H, W, 3] images, [B, n, E] for [B, n, H, W, 3]; None without
      pooling.
    intermediates: what was asked for by name, with the n images folded into the batch.
    """

    # Any: under jax.eval_shape and in tree operations the leaves are no arrays.
    tokens: Any
    pooled: Any
    intermediates: dict[str, Any]


@runtime_checkable
class TowerConfig(Protocol):
    """The configuration of one tower: a frozen dataclass.

    Beside these methods it has the fields `width`, `image_size` (height and width of
    its own resolution), `pixel_mean` and `pixel_std` (of pixels in [0, 1]), `dtype` and
    `param_dtype`. It may have `preparation`, a `models.preparation.Preparation`: how
    image files become its pixels, which every task of a run then does.
    """

    def build(self) -> nn.Module:
        """The tower, without a name.

        A call takes uint8 images [B, H, W, 3] or [B, n, H, W, 3] and `intermediates`, a
        tuple of names, and returns `TowerOutput`. Its submodules that are checkpointed,
        frozen and shown by name are its own affair.
        """
        ...

    def without_pooling(self) -> "TowerConfig":
        """The same tower, whose `pooled` is None and has no parameters."""
        ...

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of that size; a size it cannot take is an error."""
        ...

    def token_settings(self) -> dict[str, str]:
        """What decides the tokens beside the weights, by field, for cached features.

        A field that a later version adds must not change what is said of towers that
        leave it at its default: older caches stay as good as they were.
        """
        ...


def images_of(batch: Mapping[str, Any]) -> Any:
    """The uint8 images of a batch, or what the tower made of them already."""
    if OUTPUT in batch:
        return batch[OUTPUT]
    return jnp.asarray(batch["encoder_input_images"])


def output_of(
    tower: nn.Module, images: Any, intermediates: tuple[str, ...] = ()
) -> TowerOutput:
    """What the tower returns; a `TowerOutput` in place of images stays as it is.

    A tower that is not run has no parameters.
    """
    if isinstance(images, TowerOutput):
        return images
    return tower(images, intermediates=intermediates)


def changed(tower: Any, what: str, **fields: Any) -> Any:
    """The configuration with other fields; `what` says what for, in an error.

    Raises:
      UserError: if the tower's configuration has no such field.
    """
    known = {field.name for field in dataclasses.fields(tower)}
    if missing := fields.keys() - known:
        raise UserError(
            f"{what} needs a tower with the field {sorted(missing)[0]!r}, but "
            f"{type(tower).__name__} has none. Leave it out, or take another tower."
        )
    return dataclasses.replace(tower, **fields)


class ImageEncoder(nn.Module):
    """Tower and projection to the text model's width, under T5X's top scope `encoder`.

    text_config: a configuration of the text model: its width and dtypes are used.
    """

    tower_config: TowerConfig | None
    text_config: Any

    def setup(self):
        tower, text = self.tower_config, self.text_config
        if tower is not None:
            # Pooling would create parameters that nothing trains.
            self.tower = tower.without_pooling().build()
            self.projection = layers.Dense(
                tower.width,
                text.width,
                ("mlp", "embed"),
                dtype=text.dtype,
                param_dtype=text.param_dtype,
                kernel_init=layers.fan_in_normal,
            )

    def image_tokens(self, images: Any) -> Float[Array, "batch length embed"]:
        """Tokens of the tower, projected.

        `images` may be a `TowerOutput` already, as of a feature cache.
        """
        return self.projection(output_of(self.tower, images).tokens)

    def with_image(
        self,
        images: Any,
        embedded_text: Float[Array, "batch text embed"],
        text_mask: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Image tokens before the text, and which positions are real (bool).

        Without a tower the text alone; `images` are ignored.
        """
        if self.tower_config is None:
            return embedded_text, text_mask
        tokens = self.image_tokens(images)
        real = jnp.ones(tokens.shape[:2], bool)
        return (
            jnp.concatenate([tokens, embedded_text], axis=1),
            jnp.concatenate([real, text_mask], axis=1),
        )
