"""A checkpoint in our layout, written array by array, in memory of two blocks.

Orbax writes a checkpoint of the same tree whose arrays are single zeros; TensorStore
then puts the real arrays in their places. So all but the arrays is Orbax's own writing,
and both our runtime and T5X restore the result.
"""

import collections
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit22b_transfer.weights import blocks
from vit22b_transfer.weights.mapping import Shape, Slot

_PENDING_BYTES = 2 * blocks.BLOCK_BYTES
_RECORD = "import_progress.jsonl"


class CheckpointOutput:
    """`OUT/checkpoint_0`, under another name until `finish` renames it.

    arrays: parameter -> (shape, dtype).
    origin: a text that is equal if and only if the same import is started again. Then
      arrays that are already there are kept, once their checksums have been compared.
    """

    def __init__(
        self, out: str, arrays: Mapping[str, tuple[Shape, np.dtype]], origin: str
    ):
        self.final = os.path.join(out, "checkpoint_0")
        self.path = self.final + ".importing"
        self._arrays = arrays
        self._record = os.path.join(self.path, _RECORD)
        self._checksums = self._checksums_of(origin)
        self._pending: collections.deque[tuple[Any, int, Any]] = collections.deque()
        self._pending_bytes = 0
        if not self._checksums:
            self._create(origin)

    def _checksums_of(self, origin: str) -> dict[Slot, int]:
        """What an interrupted import of the same origin had written."""
        if not os.path.isfile(self._record):
            return {}
        with open(self._record, encoding="utf-8") as file:
            lines = file.read().split("\n")[:-1]  # a line without an end is unfinished
        if not lines or json.loads(lines[0]) != origin:
            return {}
        found = (json.loads(line) for line in lines[1:])
        return {Slot(name, layer): checksum for name, layer, checksum in found}

    def _create(self, origin: str) -> None:
        import jax.numpy as jnp
        import orbax.checkpoint as ocp
        import tensorstore
        from flax import traverse_util

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
                    spec, create=True, delete_existing=True, transaction=transaction
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
        import tensorstore

        store: Any = tensorstore.open(self._spec(slot.name)).result()
        chunks = self._chunks(slot.name)
        return (
            (store, chunks) if slot.layer is None else (store[slot.layer], chunks[1:])
        )

    def has(self, slot: Slot) -> bool:
        """Whether an earlier run wrote this array, and it is what it was."""
        if slot not in self._checksums:
            return False
        store, chunks = self._store(slot)
        checksum = 0
        for region in blocks.regions(tuple(store.shape), chunks):
            block = np.ascontiguousarray(store[region].read().result())
            checksum = blocks.checksum(block, checksum)
        return checksum == self._checksums[slot]

    def write(self, slot: Slot, array: np.ndarray, name: str) -> None:
        """Starts writing an array, converted to its dtype; `name` is for errors.

        Raises:
          ValueError: if an element is, or becomes, infinite or not a number.
        """
        store, chunks = self._store(slot)
        dtype = self._arrays[slot.name][1]
        checksum, future = 0, None
        for region in blocks.regions(array.shape, chunks):
            block = blocks.contiguous(array[region])
            if block.base is not None and array.nbytes > blocks.BLOCK_BYTES:
                block = block.copy()  # or pending blocks would keep the whole array
            if not blocks.is_finite(block):
                raise ValueError(
                    f"{name} holds NaN or infinite values; expected are finite "
                    "weights. The file is damaged or its training diverged: fetch it "
                    "again, or take another checkpoint."
                )
            if block.dtype != dtype:
                block = self._converted(block, dtype, name)
            checksum = blocks.checksum(block, checksum)
            self._make_room(block.nbytes)
            future = store[region].write(
                block, can_reference_source_data_indefinitely=True
            )
            self._pending.append((future, block.nbytes, None))
            self._pending_bytes += block.nbytes
        line = json.dumps([slot.name, slot.layer, checksum])
        self._pending.append((future, 0, line))

    def _converted(self, block: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            block = block.astype(dtype)
        if not blocks.is_finite(block):
            raise ValueError(
                f"{name} holds values that {dtype} cannot; take --dtype bfloat16 or "
                "float32."
            )
        return block

    def _make_room(self, count: int) -> None:
        while self._pending and self._pending_bytes + count > _PENDING_BYTES:
            self._finish_first()

    def _finish_first(self) -> None:
        future, count, line = self._pending.popleft()
        if future is not None:
            future.result()
        self._pending_bytes -= count
        if line is not None:
            with open(self._record, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def finish(self) -> str:
        """The path of the checkpoint, which now is complete."""
        while self._pending:
            self._finish_first()
        os.remove(self._record)
        os.rename(self.path, self.final)
        return self.final

    def discard(self) -> None:
        """Removes what was written: the source turned out not to be usable."""
        for future, _, _ in self._pending:
            if future is not None:
                future.exception()  # waits
        self._pending.clear()
        shutil.rmtree(self.path, ignore_errors=True)
