"""All families of public weights; to add one, write its file and name it here."""

from vit22b_transfer.weights import t5
from vit22b_transfer.weights.mapping import Family

FAMILIES: tuple[Family, ...] = (t5.HUGGING_FACE,)
