"""A checkpoint in our layout, written array by array in little memory.

Orbax writes a checkpoint of the same tree whose arrays are single zeros; TensorStore
then puts the real arrays in their places. So all but the arrays is Orbax's own writing,
and both our runtime and T5X restore the result.
"""

import glob
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.host import json_files, whole_files
from vit22b_transfer.host.file_errors import damaged
from vit22b_transfer.weights.files import blocks
from vit22b_transfer.weights.mapping import Shape, Slot

_RECORD = "import_progress.jsonl"
_LOG = logging.getLogger(__name__)


class CheckpointOutput:
    """`OUT/checkpoint_0`, under another name until `finish` renames it.

    Whoever makes one holds the lock of OUT.

    arrays: parameter -> (shape, dtype).
    origin: a text that is equal if and only if the same import is started again. Then
      arrays that are already there are kept, once their checksums have been compared.
    """

    def __init__(
        self, out: str, arrays: Mapping[str, tuple[Shape, np.dtype]], origin: str
    ):
        self.final = reading.checkpoint_path(out, 0)
        self.path = self.final + ".importing"
        self._arrays = arrays
        # One for all arrays, so that their writes are committed together. Files are
        # synced at the end: to wait for the disk after each block halves the rate.
        self._context: Any = tensorstore.Context({"file_io_sync": False})
        self._record = os.path.join(self.path, _RECORD)
        self._remove_left()
        self._checksums = self._checksums_of(origin)
        self._lock = threading.Lock()
        if not self._checksums or not self._opens():
            self._checksums = {}
            self._create(origin)

    def _checksums_of(self, origin: str) -> dict[Slot, int]:
        """What an interrupted import of the same origin had written."""
        if not os.path.isfile(self._record):
            return {}
        with open(self._record, "rb") as file:
            first, *lines = file.read().split(b"\n")[:-1] or [b""]
        # A line without an end is unfinished. A power cut leaves zeros, and worse.
        if _parsed(first) != origin:
            return {}
        found = [line for line in map(_parsed, lines) if _is_entry(line)]
        if bad := len(lines) - len(found):
            _LOG.warning(
                "%s has %d damaged lines; what they tell of is written again",
                self._record,
                bad,
            )
        with whole_files.replacing(self._record) as file:
            file.writelines(json.dumps(line) + "\n" for line in [origin, *found])
        return {Slot(name, layer): checksum for name, layer, checksum in found}

    def _remove_left(self) -> None:
        """Removes what killed imports left, but for what this one goes on with."""
        folder, name = os.path.split(self.path)
        for left in glob.glob(f"{glob.escape(name)}?*", root_dir=folder):
            shutil.rmtree(os.path.join(folder, left))
        for file in (os.path.join(folder, "model.gin"), self._record):
            whole_files.remove_unfinished(file)

    def _create(self, origin: str) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        places = {
            f"target/{name}": np.zeros(1, dtype)
            for name, (_, dtype) in self._arrays.items()
        }
        tree = traverse_util.unflatten_dict(places, sep="/")
        tree["state"] = {"step": jnp.zeros((), jnp.int32)}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
            orbax.save(
                self.path, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree))
            )
        with tensorstore.Transaction(atomic=True) as transaction:
            for name, (shape, dtype) in self._arrays.items():
                metadata = {
                    "shape": shape,
                    "chunks": self._chunks(name),
                    "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
                    # Weights do not compress, and to try takes longer than to write.
                    "compressor": None,
                    "fill_value": None,
                }
                spec = self._spec(name) | {"metadata": metadata}
                tensorstore.open(
                    spec,
                    create=True,
                    delete_existing=True,
                    transaction=transaction,
                    context=self._context,
                ).result()
        with open(self._record, "w", encoding="utf-8") as file:
            file.write(json.dumps(origin) + "\n")

    def _spec(self, name: str) -> dict[str, Any]:
        key = "target." + name.replace("/", ".")
        base = f"file://{self.path}/state/"
        return {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/"},
            # As Orbax does: an absent chunk is then a damaged checkpoint, not zeros.
            "store_data_equal_to_fill_value": True,
        }

    def _chunks(self, name: str) -> Shape:
        shape, dtype = self._arrays[name]
        if name in self._stacked:
            return (1, *blocks.block_shape(shape[1:], dtype.itemsize))
        return blocks.block_shape(shape, dtype.itemsize)

    @property
    def _stacked(self) -> frozenset[str]:
        return frozenset(name for name in self._arrays if "/layers/" in name)

    def _store(self, slot: Slot) -> tuple[Any, Shape]:
        """The array of a slot and the shape of its chunks."""
        with damaged(self.path, f"Remove {self.path} and start the import again."):
            store: Any = tensorstore.open(
                self._spec(slot.name), context=self._context
            ).result()
            shape, dtype = self._arrays[slot.name]
            if tuple(store.shape) != tuple(shape) or store.dtype.name != dtype.name:
                raise ValueError(f"{slot.name} is of {store.dtype.name} {store.shape}")
        chunks = self._chunks(slot.name)
        return (
            (store, chunks) if slot.layer is None else (store[slot.layer], chunks[1:])
        )

    def _opens(self) -> bool:
        """Whether what is there can be gone on with, be it without some arrays."""
        try:
            for name in self._arrays:
                self._store(Slot(name))
        except ValueError:  # after a power cut
            return False
        return True

    def has(self, slot: Slot) -> bool:
        """Whether an earlier run wrote this array, and it is what it was."""
        if slot not in self._checksums:
            return False
        store, chunks = self._store(slot)
        checksum = 0
        try:
            for region in blocks.regions(tuple(store.shape), chunks):
                block = np.ascontiguousarray(store[region].read().result())
                checksum = blocks.checksum(block, checksum)
        except ValueError:
            return False
        return checksum == self._checksums[slot]

    def write(self, slot: Slot, array: np.ndarray, name: str) -> None:
        """Writes an array, converted to its dtype; `name` is for errors.

        Several threads may write at a time.

        Raises:
          UserError: if an element is, or becomes, infinite or not a number.
        """
        store, chunks = self._store(slot)
        dtype = self._arrays[slot.name][1]
        checksum, pending = 0, []
        for region in blocks.regions(array.shape, chunks):
            block = blocks.contiguous(array[region])
            if not blocks.is_finite(block):
                raise UserError(
                    f"{name} holds NaN or infinite values; expected are finite "
                    "weights. The file is damaged or its training diverged: fetch it "
                    "again, or take another checkpoint."
                )
            if block.dtype != dtype:
                block = self._converted(block, dtype, name)
            checksum = blocks.checksum(block, checksum)
            if pending:
                pending.pop().result()
            pending.append(
                store[region].write(block, can_reference_source_data_indefinitely=True)
            )
        for future in pending:
            future.result()
        with self._lock, open(self._record, "r+", encoding="utf-8") as file:
            # Not made anew: TensorStore would go on in a directory that was removed.
            file.seek(0, os.SEEK_END)
            file.write(json.dumps([slot.name, slot.layer, checksum]) + "\n")
            self._checksums[slot] = checksum

    def _converted(self, block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            block = block.astype(dtype)
        if not blocks.is_finite(block):
            raise UserError(
                f"{name} holds values that {dtype} cannot; take --dtype bfloat16 or "
                "float32."
            )
        return block

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Writes what the arrays do not tell where a run's checkpoints have it."""
        file = reading.record_file(self.path)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "w", encoding="utf-8") as stream:
            json.dump({"imported": True, **record}, stream)

    def kept(self) -> str:
        """Half a sentence on what the same import, started again, need not write."""
        return f"{len(self._checksums)} arrays in {self.path} are kept"

    def finish(self) -> str:
        """The path of the checkpoint, which now is complete."""
        whole_files.sync_tree(self.path)
        # Last, and not before what takes long: without it all is written again.
        os.remove(self._record)
        os.rename(self.path, self.final)
        whole_files.sync_directory(os.path.dirname(self.final))
        return self.final

    def discard(self) -> None:
        """Removes what was written: the source turned out not to be usable."""
        shutil.rmtree(self.path, ignore_errors=True)


def _parsed(line: bytes) -> Any:
    """The JSON value of a line, None if it is none."""
    try:
        return json_files.parse(line, _RECORD)
    except UserError:
        return None


def _is_entry(line: Any) -> bool:
    """Whether it is the name, layer and checksum of an array."""
    if not (isinstance(line, list) and len(line) == 3):
        return False
    name, layer, checksum = map(type, line)
    return name is str and layer in (int, type(None)) and checksum is int
