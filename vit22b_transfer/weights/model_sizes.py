"""Whether a model that a config describes can be in the files at all.

A table has a row for every layer, and shapes are compared tensor by tensor: with 3e8
layers that never ends. So the sizes that a config says are compared with the number of
tensors and of their elements first.
"""

import math
from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.weights.files import config_values
from vit22b_transfer.weights.mapping import Model

# 8192 x 8192 pixels in patches of 16. No tensor says how many there are where positions
# are computed.
_MOST_PATCHES = 2**18
# Elements: what takes no more is compared tensor by tensor, which says more.
_SMALL = 2**20
_ADVICE = "The config is not that of these files: fetch them again, all of one model."
_DEPTHS = ("depth", "num_encoder_layers", "num_decoder_layers")


def check(model: Model, tensors: Mapping[str, Any]) -> None:
    """Raises UserError for more layers or wider ones than the tensors can be.

    tensors: of the source: anything with a `.shape`; where there are none, sizes have
      the bounds of `config_values` alone.
    """
    elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
    for config in (model.tower, model.text):
        if config is None:
            continue
        depth = sum(getattr(config, name, 0) for name in _DEPTHS)
        if depth > 2 * config_values.MOST_LAYERS:
            raise UserError(f"{depth} layers are more than any model has. {_ADVICE}")
        rows = 0
        if hasattr(config, "grid_of"):
            rows = math.prod(config.grid_of(*config.image_size))
        if rows > _MOST_PATCHES:
            raise UserError(
                f"images of {config.image_size} are {rows} patches, more than the "
                f"{_MOST_PATCHES} that are computed. {_ADVICE}"
            )
        if not tensors:
            continue
        # Each layer has a norm, and an MLP.
        least = {
            f"a depth of {depth}": depth * config.width,
            f"an MLP of {config.mlp_dim}": config.width * config.mlp_dim,
        }
        if vocabulary := getattr(config, "vocab_size", 0):
            least[f"a vocabulary of {vocabulary}"] = config.width * vocabulary
        if head_dim := getattr(config, "head_dim", 0):
            heads = config.num_heads * head_dim
            least[f"{config.num_heads} heads of {head_dim}"] = config.width * heads
        if patch_size := getattr(config, "patch_size", 0):
            least[f"patches of {patch_size}"] = config.width * 3 * patch_size**2
        if registers := getattr(config, "num_registers", 0):
            least[f"{registers} registers"] = config.width * registers
        if getattr(config, "positions", None) == "learned":
            least[f"{rows} positions"] = config.width * rows
        for what, needed in least.items():
            if needed > max(elements, _SMALL):
                raise UserError(
                    f"{what} with a width of {config.width} take {needed} elements or "
                    f"more, but all {len(tensors)} tensors have {elements}. {_ADVICE}"
                )
