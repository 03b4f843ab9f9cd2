"""What `vit22b import` wrote into a directory, read back for inference."""

import dataclasses
import os
from collections.abc import Iterable, Sequence

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files
from vit22b_transfer.host.file_errors import brief
from vit22b_transfer.weights.companions import RECORD
from vit22b_transfer.weights.mapping import Family

# Names and shapes of all tensors of a source.
_MAX_BYTES = 64 << 20
_TOKENIZER = ".model"


@dataclasses.dataclass(frozen=True)
class Imported:
    """An import.

    text: the family of its text model.
    vocabulary: the SentencePiece file that came with the weights, if one did.
    """

    model_gin: str
    text: Family
    vocabulary: str | None


def is_import(folder: str) -> bool:
    """Whether a directory is what `vit22b import` wrote."""
    return os.path.isfile(os.path.join(folder, "model.gin")) and bool(_folders(folder))


def read(folder: str, arrays: Iterable[str], families: Sequence[Family]) -> Imported:
    """The import in a directory.

    arrays: names of those of its checkpoint, as `checkpoints.reading` gives them.

    Raises:
      UserError: if it is not one, or has no tower or no text model that generates.
    """
    arrays = list(arrays)
    for scope, what in (("encoder/tower/", "image tower"), ("decoder/", "text model")):
        if not any(name.startswith(f"target/{scope}") for name in arrays):
            raise UserError(
                f"{folder} has no {what}; import a tower and a text model together, or "
                "a model that has both, such as PaliGemma."
            )
    known = {family.name: family for family in families}
    texts, vocabularies = [], []
    for inside in _folders(folder):
        path = os.path.join(inside, RECORD)
        advice = "Import the weights again."
        name = json_files.read_object(path, advice=advice, limit=_MAX_BYTES)
        family = known.get(str(name.get("family")))
        if family is None:
            raise UserError(
                f"{path} is of no family known: {brief(name.get('family'))}. {advice}"
            )
        found = sorted(x for x in os.listdir(inside) if x.endswith(_TOKENIZER))
        vocabularies += [os.path.join(inside, name) for name in found]
        texts.append(family)
    # A tower's family has the place of a text model by default; it has no tokenizer.
    with_text = [f for f in texts if not f.text_binding.startswith("encoder_decoder")]
    return Imported(
        os.path.join(folder, "model.gin"),
        (with_text or texts)[0],
        os.path.abspath(vocabularies[0]) if vocabularies else None,
    )


def _folders(folder: str) -> list[str]:
    """The directories of the families in an import."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    inside = [os.path.join(folder, name) for name in names]
    return [path for path in inside if os.path.isfile(os.path.join(path, RECORD))]
