"""The networks of a mixed model: one image tower, and heads that share its one run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from vit22b_transfer.models import classifier, encoder_decoder, prefix_lm, towers
from vit22b_transfer.models import contrastive as pairs

OBJECTIVES = ("captioning", "classification", "contrastive")
# What `MixedModule.apply` calls the tower.
TOWER = "tower"


class _TowerAlone(nn.Module):
    """The tower under T5X's top scope `encoder`."""

    tower_config: towers.TowerConfig

    def setup(self):
        self.tower = self.tower_config.build()

    def __call__(self, images):
        return self.tower(images)


class SharedTower(nn.Module):
    """The tower alone, with the parameters' names that it has in every model."""

    tower: towers.TowerConfig

    def setup(self):
        self.encoder = _TowerAlone(self.tower)

    def __call__(self, images) -> towers.TowerOutput:
        """What the tower returns for uint8 images [B, H, W, 3]."""
        return self.encoder(images)


@dataclasses.dataclass(frozen=True)
class MixedModule:
    """The networks of a mixed model: a tower, and heads that take what it returns.

    captioning, classification, contrastive: whole modules, of which the tower is not
      run: they are given a `towers.TowerOutput` in place of images.
    """

    tower: towers.TowerConfig
    captioning: encoder_decoder.ImageTextModule | prefix_lm.PrefixLMModule | None = None
    classification: classifier.ClassifierModule | None = None
    contrastive: pairs.ContrastiveModule | None = None

    @property
    def text(self) -> Any:
        """The text model's configuration; without one that of the text tower."""
        return getattr(self.captioning or self.contrastive, "text", None)

    @property
    def num_classes(self) -> int | None:
        """How many classes the classifier has; None without one."""
        return getattr(self.classification, "num_classes", None)

    def clone(self, *, tower: Any = None, text: Any = None) -> "MixedModule":
        """The same with another configuration of the tower, or of `text`."""
        changed = {
            name: head.clone(**({} if tower is None else {"tower": tower}))
            for name in OBJECTIVES
            if (head := getattr(self, name)) is not None
        }
        if text is not None:
            with_text = next(name for name in changed if name != "classification")
            changed[with_text] = changed[with_text].clone(text=text)
        tower = self.tower if tower is None else tower
        return dataclasses.replace(self, tower=tower, **changed)

    def init(
        self, rng: jax.Array, images: Any, inputs: Mapping[str, tuple[Any, ...]]
    ) -> dict[str, Any]:
        """`params` and `params_axes` of the tower and all heads, in one tree.

        inputs: of each head what its module is called with behind the images. A
        parameter is what the model of its objective alone has for the same `rng`.
        """
        shared = SharedTower(self.tower)
        output, variables = shared.init_with_output(rng, images)
        flat = flatten_dict(flax.core.unfreeze(variables))
        for name, arguments in inputs.items():
            own = getattr(self, name).init(rng, output, *arguments)
            flat |= flatten_dict(flax.core.unfreeze(own))
        return unflatten_dict(flat)

    def apply(
        self, variables: Mapping[str, Any], *inputs: Any, part: str, **options: Any
    ) -> Any:
        """What `apply` of the tower or of one head returns: `part` says of which."""
        module = SharedTower(self.tower) if part == TOWER else getattr(self, part)
        return module.apply(variables, *inputs, **options)


@dataclasses.dataclass(frozen=True)
class Head:
    """One head of a `MixedModule`, as its model knows a module."""

    whole: Any
    objective: str

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self.whole, self.objective), name)

    def apply(self, variables: Mapping[str, Any], *inputs: Any, **options: Any) -> Any:
        """What the head's own `apply` returns."""
        return self.whole.apply(variables, *inputs, part=self.objective, **options)
