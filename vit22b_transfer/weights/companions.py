"""What an import writes beside the checkpoint: for recipes, and for the export."""

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from vit22b_transfer.checkpoints import reading
from vit22b_transfer.host import whole_files
from vit22b_transfer.weights import gin_files, mapping, sources
from vit22b_transfer.weights.files import tensor_writing
from vit22b_transfer.weights.files.tensor_writing import LazyTensor
from vit22b_transfer.weights.import_plan import Part

# In the directory of a family: names and shapes of the source's tensors.
RECORD = "import.json"
# The tensors that only the source's own class has; see `mapping.Model`.
CARRIED = "carried"


def model_gin(parts: Sequence[Part], out: str, updates: Mapping[str, Any]) -> str:
    """The text of `OUT/model.gin`; to be made before hours of work.

    updates: fields of the `LoraConfig` of an adapter, empty without one.

    Raises:
      UserError: if a source says something that must not get into a gin file.
    """
    comments = []
    for part in parts:
        if tokenizer := part.source.tokenizer():
            path = os.path.join(out, part.source.family.name, tokenizer)
            quoted = shlex.quote(path)
            comments.append(f"Vocabulary: export VIT22B_VOCABULARY={quoted}")
    fresh = fresh_parameters(parts)
    return gin_files.gin_text(
        [(part.source.family, part.resized) for part in parts],
        [os.path.basename(os.path.normpath(part.source.name)) for part in parts],
        comments,
        reading.checkpoint_path(out, 0),
        ((fresh, None),) if fresh else (),
        updates,
    )


def write_companions(parts: Sequence[Part], out: str, gin: str) -> None:
    """Writes for each source `OUT/FAMILY`, then `gin` as `OUT/model.gin`."""
    for part in parts:
        folder = os.path.join(out, part.source.family.name)
        shutil.rmtree(folder, ignore_errors=True)
        part.source.copy_companions(folder)
        _record_sizes(part, folder)
        _carry(part, os.path.join(folder, CARRIED))
    with whole_files.replacing(os.path.join(out, "model.gin")) as file:
        file.write(gin)


def fresh_parameters(parts: Sequence[Part]) -> str | None:
    """A pattern of what a training run that starts from the import has of its own."""
    names = [name for part in parts for name in part.shapes]
    if all(part.model.text is None for part in parts):
        return r"(?!encoder/tower/).*"
    if all(part.model.tower is None for part in parts):
        return r"encoder/(tower|projection)/.*"
    if not any("projection/" in name for name in names):
        return r"encoder/projection/.*"
    return None


def _record_sizes(part: Part, folder: str) -> None:
    """Writes what the export needs: configs and the tensors' shapes, as resized."""
    sources.write_sizes(folder, part.model, part.resized)
    shapes = {name: tensor.shape for name, tensor in part.source.tensors.items()}
    shapes |= mapping.expected_shapes(part.plan, part.shapes)
    shapes |= {n: shapes[of] for n, of in part.model.copies.items() if n in shapes}
    kept = {name: shape for name, shape in shapes.items() if not part.model.drops(name)}
    with open(os.path.join(folder, RECORD), "w", encoding="utf-8") as file:
        json.dump({"family": part.source.family.name, "tensors": kept}, file)


def _carry(part: Part, folder: str) -> None:
    """Keeps the tensors that only their class has."""
    tensors = [
        LazyTensor(name, tensor.shape, tensor.dtype, tensor.read)
        for name, tensor in part.source.tensors.items()
        if part.model.carries(name)
    ]
    if tensors:
        os.makedirs(folder)
        tensor_writing.write_safetensors(
            folder, tensors, max_shard_bytes=2**40, done=lambda count: None
        )
