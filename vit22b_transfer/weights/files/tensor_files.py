"""Files of tensors, read one tensor at a time: safetensors, npz, Orbax checkpoints.

Opening a source reads headers only, and checks all they say (sizes, offsets, dtypes,
overlap, the files' lengths) before any memory is taken for a tensor. Nothing that could
run code on loading, a pickle, is ever opened.
"""

import os
import re

from vit22b_transfer import UserError
from vit22b_transfer.weights.files import npz_files, orbax_files, safetensors_files
from vit22b_transfer.weights.files.stored_tensors import (
    GET_AGAIN,
    StoredTensor,
    listed,
)

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_WEIGHTS = (".safetensors", ".npz")
# What a folder of data holds, named here by mistake.
_PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
_FOLDERS = 20  # so many folders in it are looked into
_INDEX = ".safetensors.index.json"


def open_tensors(source: str) -> dict[str, StoredTensor]:
    """All tensors of a file or directory, by name, unread.

    source: a `.safetensors` or `.npz` file, a shard index, a directory that holds one
      of these, or a checkpoint (of ours or of T5X) in Orbax's format.

    Raises:
      UserError: if it is no such thing or its headers contradict the files; the
        message says what to do.
    """
    path = find_weights(source)
    if os.path.isdir(path):
        return orbax_files.open_orbax(path)
    if path.endswith(_INDEX):
        return safetensors_files.open_shards(path)
    return (
        npz_files.open_npz(path)
        if path.endswith(".npz")
        else safetensors_files.open_safetensors(path)
    )


def find_weights(source: str) -> str:
    """The file to open for a source; a directory if it is an Orbax checkpoint.

    Raises:
      UserError: if there is none, more than one, or only pickles.
    """
    path = os.path.abspath(os.path.expanduser(source))
    if not os.path.exists(path):
        raise UserError(f"there is no file or directory {source}.")
    if not os.path.isdir(path):
        _refuse_pickle(path)
        if not path.endswith((*_WEIGHTS, _INDEX)):
            raise UserError(
                f"{source} is not a file of weights that can be read; these are "
                f"*.safetensors, *{_INDEX} and *.npz."
            )
        return path
    if checkpoint := orbax_files.orbax_directory(path):
        return checkpoint
    names = sorted(os.listdir(path))
    for found in (
        [name for name in names if name.endswith(_INDEX)],
        [name for name in names if name.endswith(_WEIGHTS)],
    ):
        if len(found) == 1:
            return os.path.join(path, found[0])
        if len(found) > 1:
            shards = any(re.search(r"-\d+-of-\d+\.", name) for name in found)
            raise UserError(
                f"{source} holds shards but no *{_INDEX}. {GET_AGAIN}"
                if shards
                else f"{source} holds several files of weights: {listed(found)}. "
                "Name the file instead of the directory."
            )
    _refuse_repository(source, path)
    for name in names:
        _refuse_pickle(os.path.join(path, name))
    _refuse_pictures(source, path, names)
    raise UserError(
        f"{source} holds no weights (*.safetensors, *.npz or a finished checkpoint); "
        f"it holds: {listed(names) or 'nothing'}. {GET_AGAIN}"
    )


# --- What is refused unread ---


def _refuse_repository(source: str, path: str) -> None:
    """Says where the files of a downloaded repository are, given its root."""
    inner = os.path.join(path, "snapshots")
    shown = os.path.join(source, "snapshots")
    if os.path.basename(path) == "snapshots":
        inner, shown = path, source
    if os.path.isdir(inner) and (revisions := sorted(os.listdir(inner))):
        raise UserError(
            f"{source} is the root of a downloaded repository, whose files lie below "
            f"it in a folder for each revision: name "
            f"{listed([os.path.join(shown, name) for name in revisions])}."
        )


def _refuse_pictures(source: str, path: str, names: list[str]) -> None:
    """Says what is read here, given a folder of images or of folders of them.

    A repository of weights may have pictures too: it has a config.json.
    """
    if "config.json" in names:
        return
    folders = [name for name in names if os.path.isdir(os.path.join(path, name))]
    inner = [
        os.path.join(folder, name)
        for folder in folders[:_FOLDERS]
        if os.access(os.path.join(path, folder), os.R_OK)
        for name in sorted(os.listdir(os.path.join(path, folder)))
    ]
    pictures = [name for name in names + inner if name.lower().endswith(_PICTURES)]
    if pictures:
        raise UserError(
            f"{source} holds pictures ({listed(pictures)}) and no weights. What is "
            "read here is a folder with config.json and *.safetensors, a .safetensors "
            "or .npz file, or a checkpoint; pictures to learn from are named in a task "
            "(`vit22b init` writes one)."
        )


def _refuse_pickle(path: str) -> None:
    if path.endswith(_PICKLES):
        raise UserError(
            f"{path} is a pickle: to load one runs whatever code it holds, so it is "
            "not opened. Take the .safetensors file of the same model; or, if you "
            "trust its author, convert it where PyTorch is installed: "
            "safetensors.torch.save_file({k: v.contiguous() for k, v in torch.load("
            f"{os.path.basename(path)!r}, weights_only=True).items()}}, "
            "'model.safetensors')."
        )
