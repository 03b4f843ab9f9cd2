"""T5 checkpoints of T5X (its `examples/t5`): our names, but for one scope.

T5X writes no config: sizes are read from the arrays. No array says which activation the
gate has, so that is the user's to say: `t5x-t5` is gelu (T5 v1.1, mT5, ByT5; relu where
there is no gate), `t5x-ul2` is silu. A T5X with scanned layers stacks them on axis 1
and is not read.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.models import t5
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.families.t5 import shapes
from vit22b_transfer.weights.mapping import Family, Model, Row

_TARGET = "target"
_LAYER = f"{_TARGET}/encoder/layers_0"
_QUERY = f"{_LAYER}/attention/query/kernel"
_BIAS = f"{_TARGET}/encoder/relpos_bias/rel_embedding"


def _recognises(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> bool:
    return _QUERY in tensors and _BIAS in tensors


def _read(gate: Any, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Model:
    gated = f"{_LAYER}/mlp/wi_0/kernel" in tensors
    hidden = f"{_LAYER}/mlp/wi_0/kernel" if gated else f"{_LAYER}/mlp/wi/kernel"
    table = f"{_TARGET}/token_embedder/embedding"
    for name in (table, _QUERY, _BIAS, hidden):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UserError(f"{name} is missing or no matrix: this is no T5 of T5X.")
        tr.shape(tensors, name, 2)
    (vocab_size, width), (heads, buckets) = (tensors[n].shape for n in (table, _BIAS))
    if buckets != 32:
        raise UserError(f"{_BIAS} has {buckets} buckets, but models/t5.py has 32.")
    text = t5.T5Config(
        vocab_size=vocab_size,
        width=width,
        num_encoder_layers=_depth("encoder", tensors),
        num_decoder_layers=_depth("decoder", tensors),
        num_heads=heads,
        head_dim=tensors[_QUERY].shape[1] // heads,
        mlp_dim=tensors[hidden].shape[1],
        tied_logits=f"{_TARGET}/decoder/logits_dense/kernel" not in tensors,
        activation=gate if gated else "relu",
        gated_mlp=gated,
    )
    rows = (Row(name, _theirs(name)) for name in shapes(None, text))
    return Model(
        tuple(rows),
        text=text,
        dropped={"state/.*": "the step and the optimizer's state"},
        vocabulary={"token_embedder/embedding": 0}
        | ({} if text.tied_logits else {"decoder/logits_dense/kernel": 1}),
        facts=(f"the MLP's activation is taken to be {text.activation}",),
    )


def _theirs(name: str) -> str:
    return f"{_TARGET}/{name.replace('encoder/text/', 'encoder/')}"


def _depth(side: str, tensors: Mapping[str, Any]) -> int:
    pattern = re.compile(rf"{_TARGET}/{side}/layers_(\d+)/.*")
    return len({match[1] for name in tensors if (match := pattern.fullmatch(name))})


FAMILIES = tuple(
    Family(
        name, _recognises, functools.partial(_read, gate), shapes, file_format="orbax"
    )
    for name, gate in (("t5x-t5", "gelu"), ("t5x-ul2", "silu"))
)
