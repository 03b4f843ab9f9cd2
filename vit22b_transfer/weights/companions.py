"""What an import writes beside the checkpoint: for recipes, and for the export."""

import json
import os
import shutil
from collections.abc import Sequence

from vit22b_transfer.weights import gin_files, mapping, sources
from vit22b_transfer.weights.files import tensor_writing
from vit22b_transfer.weights.files.tensor_writing import LazyTensor
from vit22b_transfer.weights.import_plan import Part

# In the directory of a family: names and shapes of the source's tensors.
RECORD = "import.json"
# The tensors that only the source's own class has; see `mapping.Model`.
CARRIED = "carried"


def write_companions(parts: Sequence[Part], out: str) -> None:
    """Writes `OUT/model.gin` and, for each source, `OUT/FAMILY`."""
    comments = []
    for part in parts:
        folder = os.path.join(out, part.source.family.name)
        shutil.rmtree(folder, ignore_errors=True)
        part.source.copy_companions(folder)
        _record_sizes(part, folder)
        _carry(part, os.path.join(folder, CARRIED))
        if tokenizer := part.source.tokenizer():
            path = os.path.join(folder, tokenizer)
            comments.append(f"Vocabulary: export VIT22B_VOCABULARY={path}")
    models = [(part.source.family, part.resized) for part in parts]
    origins = [os.path.basename(os.path.normpath(part.source.name)) for part in parts]
    text = gin_files.gin_text(
        models,
        origins,
        comments,
        os.path.join(out, "checkpoint_0"),
        f"(({fresh!r}, None),)" if (fresh := fresh_parameters(parts)) else "()",
    )
    with open(os.path.join(out, "model.gin"), "w", encoding="utf-8") as file:
        file.write(text)


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
