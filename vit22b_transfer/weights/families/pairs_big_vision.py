"""Whole SigLIP, SigLIP 2 and LiT in big_vision's npz: both towers, `t` and `b`.

There is no config: sizes are read from the tensors. It is only taken where it is asked
for by name; else a file is that of its image tower.
"""

import functools
from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.models import text_towers
from vit22b_transfer.weights.families import pairs_hugging_face as hf_pairs
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.families import towers_big_vision as towers
from vit22b_transfer.weights.mapping import Family, Model, Row
from vit22b_transfer.weights.transforms import leading_ones

Tensors = Mapping[str, Any]
_ROOTS = ("params/", "")
_TABLE = "txt/Embed_0/embedding"


def _read(config: Mapping[str, Any], tensors: Tensors, *, has_bias: bool) -> Model:
    tr.need_tensors(tensors, "big_vision's towers")
    root = tr.find_prefix(tensors, _TABLE, _ROOTS)
    image = towers.read(config, tensors)
    if f"{root}img/head/kernel" in tensors:
        raise UserError(
            f"{root}img/head/kernel: the image tower has a projection with a bias, "
            "which models of pairs here have not. Import the towers apart."
        )
    text, rows = _text(tensors, f"{root}txt")
    rows.append(Row("logit_scale/value", f"{root}t", leading_ones(0, 1)))
    bindings: dict[str, Any] = {}
    if (f"{root}b" in tensors) != has_bias:
        raise UserError(
            "the file has no b, so it was trained with softmax: name "
            "--family big_vision-pairs-softmax."
            if has_bias
            else "the file has b, the bias of the sigmoid loss: name --family "
            "big_vision-pairs."
        )
    if has_bias:
        rows.append(Row("logit_bias/value", f"{root}b", leading_ones(0, 1)))
    else:
        bindings["contrastive.ContrastiveModule.first_bias"] = None
        bindings["contrastive.ContrastiveModel.loss"] = "softmax"
    return Model(
        (*image.rows, *rows),
        image.tower,
        text,
        dropped={r"opt/.*": "the optimizer's state"},
        vocabulary={hf_pairs.TABLE: 0},
        positions=image.positions,
        resample=image.resample,
        bindings=bindings,
        facts=(
            *image.facts,
            f"texts: lower case, an end (1), padded with {text.pad_id} to "
            f"{text.max_length} tokens",
        ),
    )


def _text(
    tensors: Tensors, root: str
) -> tuple[text_towers.TransformerConfig, list[Row]]:
    """The text tower, and its rows."""
    sizes, rows = towers.encoder_part(tensors, f"{root}/Encoder_0", hf_pairs.TOWER)
    vocab_size, width = tr.shape(tensors, f"{root}/Embed_0/embedding", 2)
    _, length, _ = tr.shape(tensors, f"{root}/pos_embedding", 3)
    _, embed_dim = tr.shape(tensors, f"{root}/head/kernel", 2)
    fields: dict[str, Any] = tr.SEQUENTIAL | dict(
        width=width,
        vocab_size=vocab_size,
        max_length=length,
        embed_dim=embed_dim,
        pad_id=0 if vocab_size >= hf_pairs.GEMMA_TOKENS else 1,
    )
    fields |= sizes
    text = text_towers.TransformerConfig(**fields)
    positions = f"{hf_pairs.TOWER}/position_embedding/embedding"
    return text, [
        Row(hf_pairs.TABLE, f"{root}/Embed_0/embedding"),
        Row(positions, f"{root}/pos_embedding", leading_ones(0, 1)),
        *rows,
        Row("text/projection/kernel", f"{root}/head/kernel"),
        Row("text/projection/bias", f"{root}/head/bias"),
    ]


def _shapes(tower: Any, text: Any, *, has_bias: bool) -> Any:
    return hf_pairs.shapes(tower, text, image_projection=False, has_bias=has_bias)


FAMILIES = tuple(
    Family(
        name,
        hf_pairs.by_name_alone,
        functools.partial(_read, has_bias=has_bias),
        functools.partial(_shapes, has_bias=has_bias),
        hf_pairs.TEXT_BINDING,
        file_format="npz",
    )
    for name, has_bias in (
        ("big_vision-pairs", True),
        ("big_vision-pairs-softmax", False),
    )
)
