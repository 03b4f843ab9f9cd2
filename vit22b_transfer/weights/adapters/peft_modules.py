"""Names of modules that PEFT's adapters update, in each family.

The tables know modules by the names in files of weights. transformers 5 calls some
otherwise, so both names are read and the newer one is written.
"""

import dataclasses
import re
from collections.abc import Iterable

from vit22b_transfer import UserError
from vit22b_transfer.models import lora
from vit22b_transfer.weights.mapping import Slot, Step
from vit22b_transfer.weights.transforms import TRANSPOSE

_GEMMA = ((r"^language_model\.model\.", "model.language_model."),)
_ATTENTION = (
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)$", r".attention.\1_proj"),
    (r"\.attention\.output\.dense$", ".attention.o_proj"),
)
# Families whose adapters are read and written: patterns in the names of modules that
# files of weights have, and what stands there in the classes of transformers 5.
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "hf-t5": (),
    "hf-gemma": _GEMMA,
    "hf-paligemma": (
        *_GEMMA,
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    ),
    "hf-siglip": (),
    "hf-clip": (),
    "hf-vit": (
        (r"\bencoder\.layer\.", "layers."),
        *_ATTENTION,
        (r"\.intermediate\.dense$", ".mlp.fc1"),
        (r"\.output\.dense$", ".mlp.fc2"),
    ),
    "hf-siglip2-naflex": (),
    "hf-dinov2": (
        (r"^dinov2(_with_registers)?\.", ""),
        *_ATTENTION,
        (r"\.mlp\.weights_out$", ".mlp.down_proj"),
    ),
    "hf-dinov3": ((r"^(model\.)*layer\.", "model.layer."),),
    "hf-internvl-vision": ((r"^(model\.)?vision_tower\.", ""),),
}
# What files fuse and the classes of transformers 5 do not: the last part of a name.
_SPLIT = {"weights_in": ("gate_proj", "up_proj")}
# Scopes of classes that wrap the class of a file, or are wrapped by it.
_WRAPPERS = r"^(model\.|vit\.|vision_model\.)+"


@dataclasses.dataclass(frozen=True)
class Place:
    """A kernel of ours and the module whose weight it is."""

    kernel: Slot
    module: str


def modules(plans: Iterable[tuple[str, Iterable[Step]]]) -> dict[str, Place]:
    """What an adapter may update, by the name that `plain` gives a module."""
    found: dict[str, Place] = {}
    for family, plan in plans:
        for step in plan if family in _RENAMED else ():
            if not re.fullmatch(lora.POSSIBLE, step.ours[0].name):
                continue
            for kernel, module in zip(step.ours, _modules_of(step), strict=False):
                place = Place(kernel, _renamed(module, family))
                name = plain(place.module)
                assert name not in found, name
                found[name] = place
    if not found:
        raise UserError(
            "adapters are read and written for models of the families "
            f"{', '.join(_RENAMED)}, and here is none of these. To import, merge the "
            "adapter into its model with PEFT (merge_and_unload) and import that; to "
            "export, leave --adapter out: the updates are merged."
        )
    return found


def _modules_of(step: Step) -> list[str]:
    """The modules of a step's kernels; none if PEFT cannot update them."""
    module = step.theirs[0].name.removesuffix(".weight")
    scope, _, last = module.rpartition(".")
    if last in _SPLIT:
        return [f"{scope}.{name}" for name in _SPLIT[last]]
    return [module] if step.transform is TRANSPOSE else []


def _renamed(module: str, *families: str) -> str:
    """A module's name in transformers 5."""
    for family in families:
        for pattern, new in _RENAMED.get(family, ()):
            module = re.sub(pattern, new, module)
    return module


def plain(module: str, *families: str) -> str:
    """The same without the scopes of wrapping classes."""
    return re.sub(_WRAPPERS, "", _renamed(module, *families))
