"""Low-rank updates of frozen kernels (LoRA; Hu et al. 2021).

A chosen `layers.Dense` adds `(alpha / rank) * (x @ lora_a) @ lora_b` to its result. The
two matrices are parameters beside the kernel, so that scans, shardings, checkpoints and
both runtimes treat them as all others. The product is not added to the kernel before
use: that would hold a second copy of every chosen kernel, round the update to the dtype
of a frozen bfloat16 kernel, and compute the gradient of the whole kernel. An export
adds it once (`weights.adapters.merging`).
"""

import dataclasses
import difflib
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vit22b_transfer import UserError

# The paths of the updates.
UPDATES = r"(.*/)?lora_[ab]"
# The kernels that can have one.
POSSIBLE = r"(.*/)?(\w*attention|mlp)/[^/]*/kernel"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels get an update, of which size, and what else is trained.

    patterns: regular expressions over whole paths of kernels, as those of `frozen`;
      kernels of attention and MLPs can be chosen.
    trained: patterns of parameters that are trained beside the updates, as PEFT's
      `modules_to_save`; all others are frozen.
    """

    rank: int
    alpha: float
    patterns: tuple[str, ...]
    trained: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"LoRA's rank is {self.rank}; it must be at least 1.")
        if not self.patterns:
            raise UserError("LoRA has no patterns, so it would train nothing.")

    @property
    def scale(self) -> float:
        """Factor of the updates."""
        return self.alpha / self.rank

    @property
    def frozen(self) -> str:
        """The pattern of all parameters that are not trained."""
        trained = "|".join(f"(?:{pattern})" for pattern in (UPDATES, *self.trained))
        return rf"(?!(?:{trained})$).*"

    def chooses(self, path: str) -> bool:
        """Whether the kernel of that path gets an update."""
        return any(re.fullmatch(pattern, path) for pattern in self.patterns)


def with_lora(module: Any, config: LoraConfig, *, in_tower: bool = True) -> Any:
    """The same module with updates in its text model if it has one, and in its tower.

    Raises:
      UserError: if the tower or the text model has a LoRA of its own.
    """
    parts = {
        name: getattr(module, name)
        for name in ("text", "tower")
        # The blind model has no tower, a classifier no text model.
        if getattr(module, name, None) is not None and (in_tower or name == "text")
    }
    for name, part in parts.items():
        if getattr(part, "lora", None) not in (None, config):
            raise UserError(
                f"the {name} has {part.lora}, the model {config}. Set one of the two."
            )
    return module.clone(
        **{
            name: dataclasses.replace(part, lora=config)
            for name, part in parts.items()
            # A tower without such a field has no kernel that could be chosen:
            # `check_patterns` tells.
            if hasattr(part, "lora")
        }
    )


def check_patterns(config: LoraConfig, params: dict, *, in_tower: bool) -> None:
    """Raises UserError for a pattern that chose no kernel."""
    hint = "" if in_tower else "The tower is frozen, so it gets no updates. "
    flat = flatten_dict(params, sep="/")
    chosen = [n[: -len("lora_a")] + "kernel" for n in flat if n.endswith("/lora_a")]
    possible = [name for name in flat if re.fullmatch(POSSIBLE, name)]
    for pattern in config.patterns:
        if not any(re.fullmatch(pattern, name) for name in chosen):
            near = difflib.get_close_matches(pattern, possible, 3, cutoff=0.0)
            raise UserError(
                f"LoRA's pattern {pattern!r} chooses no kernel; patterns are regular "
                "expressions over whole paths of the kernels of attention and MLPs. "
                f"{hint}Nearest paths: {', '.join(near)}."
            )


def check_no_tower(config: LoraConfig, module: Any) -> None:
    """Raises UserError if kernels of the tower are chosen, which is not run."""
    tower = module.tower
    images = jax.ShapeDtypeStruct((1, *tower.image_size, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images, tokens, tokens)
    flat = flatten_dict(shapes["params"]["encoder"]["tower"], sep="/")
    chosen = [name for name in flat if name.endswith("lora_a")]
    if chosen:
        raise UserError(
            f"LoRA's patterns {config.patterns} choose kernels of the tower (such as "
            f"encoder/tower/{chosen[0]}), but training from cached features does not "
            "run it. Freeze the tower (models/frozen_tower.gin, in eval and infer as "
            "well), and the text model alone gets updates."
        )


def merged_kernel(kernel: Any, lora_a: Any, lora_b: Any, alpha: float) -> jax.Array:
    """`kernel + (alpha / rank) * lora_a @ lora_b`, of one layer or of stacked ones.

    Raises:
      UserError: for a kernel in int8, whose rounding would swallow the update.
    """
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise UserError(
            f"an update cannot be merged into a kernel stored as {kernel.dtype}; merge "
            "it into the kernel in floating point that this one was made of."
        )
    a, b = (jnp.asarray(x).astype(jnp.float32) for x in (lora_a, lora_b))
    update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    scale = jnp.float32(alpha / a.shape[-1])
    kernel = jnp.asarray(kernel)
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)
