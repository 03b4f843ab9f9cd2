"""Sizes of T5-family text models by name."""

import dataclasses
import difflib

from vit22b_transfer import UserError


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes of one text model."""

    width: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int


# T5 v1.1 as in T5X's examples/t5/t5_1_1/*.gin (emb_dim, layers, heads, head_dim,
# mlp_dim); 32b: the text model of PaLI-X (Chen et al. 2023, arXiv 2305.18565).
VARIANTS = {
    "small": Variant(512, 8, 8, 6, 64, 1024),
    "base": Variant(768, 12, 12, 12, 64, 2048),
    "large": Variant(1024, 24, 24, 16, 64, 2816),
    "xl": Variant(2048, 24, 24, 32, 64, 5120),
    "xxl": Variant(4096, 24, 24, 64, 64, 10240),
    "32b": Variant(4096, 50, 50, 16, 256, 16384),
}


def sizes_of(name: str) -> dict[str, int]:
    """Sizes for a name such as "base", by the names of `T5Config`'s fields."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.0)
        raise UserError(
            f"unknown T5 variant {name!r}; nearest: {', '.join(near)}; "
            f"all: {', '.join(VARIANTS)}."
        )
    return dataclasses.asdict(VARIANTS[name])
