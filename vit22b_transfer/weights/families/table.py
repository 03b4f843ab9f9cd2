"""All families of public weights; to add one, write its file and name it here."""

from vit22b_transfer.weights.families import (
    gemma,
    pairs_big_vision,
    pairs_hugging_face,
    paligemma,
    t5,
    t5x,
    towers_big_vision,
    towers_dino,
    towers_hugging_face,
    towers_internvit,
    towers_timm,
)
from vit22b_transfer.weights.mapping import Family

FAMILIES: tuple[Family, ...] = (
    *towers_big_vision.FAMILIES,
    *towers_hugging_face.FAMILIES,
    *towers_dino.FAMILIES,
    *towers_internvit.FAMILIES,
    *towers_timm.FAMILIES,
    t5.HUGGING_FACE,
    gemma.HUGGING_FACE,
    *paligemma.FAMILIES,
    *pairs_hugging_face.FAMILIES,
    *pairs_big_vision.FAMILIES,
    *t5x.FAMILIES,
)
