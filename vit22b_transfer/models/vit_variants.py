"""Sizes of image towers by name."""

import dataclasses
import difflib

from vit22b_transfer import UserError


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes of one row of the published tables."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


# Zhai et al. 2022 (arXiv 2106.04560) table 2; So400m: Alabdulmohsin et al. 2023;
# e: Chen et al. 2022 (PaLI); 22B: Dehghani et al. 2023 table 1.
VARIANTS = {
    "Ti": Variant(192, 12, 768, 3),
    "S": Variant(384, 12, 1536, 6),
    "B": Variant(768, 12, 3072, 12),
    "L": Variant(1024, 24, 4096, 16),
    "So400m": Variant(1152, 27, 4304, 16),
    "H": Variant(1280, 32, 5120, 16),
    "g": Variant(1408, 40, 6144, 16),
    "G": Variant(1664, 48, 8192, 16),
    "e": Variant(1792, 56, 15360, 16),
    "22B": Variant(6144, 48, 24576, 48),
}


def parse_variant(name: str) -> dict[str, int]:
    """Sizes for a name such as "B/16": width, depth, mlp_dim, num_heads, patch_size."""
    size, _, patch = name.partition("/")
    if size not in VARIANTS or not (patch.isdecimal() and int(patch)):
        near = difflib.get_close_matches(size, VARIANTS, n=3, cutoff=0.0)
        raise UserError(
            f"unknown ViT variant {name!r}: write SIZE/PATCH, for example 'B/16'. "
            f"Nearest sizes: {', '.join(near)}; all: {', '.join(VARIANTS)}."
        )
    return dataclasses.asdict(VARIANTS[size]) | {"patch_size": int(patch)}
