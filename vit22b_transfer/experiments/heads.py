"""Heads that were learned once: kept in a file, and asked for logits of any features.

A file is a NumPy archive of a head's arrays and one text, a JSON object: its kind, the
names of its classes and of the tower's vectors that it reads, its protocol, and what
tower and images it was learned from. Nothing in it is executed.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.experiments.labelled import Labelled, unseen
from vit22b_transfer.experiments.outcomes import Outcome
from vit22b_transfer.experiments.split_features import Tokens
from vit22b_transfer.host import json_files, whole_files
from vit22b_transfer.host.file_errors import brief
from vit22b_transfer.models import attentive_head, contrastive_losses
from vit22b_transfer.weights.files import npz_files

LINEAR, ATTENTIVE, TEXTS = "linear", "attentive", "texts"
_FACTS = "facts"
_ADVICE = "Give a file that `vit22b probe` has kept, or run the probe again."
# Bytes of the features whose logits are computed at a time.
_BLOCK_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Head:
    """What gives logits of classes for the features of an image.

    kind: `linear` (features @ kernel + bias), `attentive` (of all tokens) or `texts`
      (scale times the cosine of an image and the mean of a class's prompts).
    arrays: by name, as the kind reads them.
    features: names of the tower's vectors that it reads, joined; none for all tokens.
    class_names: by id; None where the training data told only ids.
    facts: protocol, tower and data, as JSON values.
    """

    kind: str
    arrays: Mapping[str, np.ndarray]
    classes: int
    features: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def logits(
        self, data: Float[np.ndarray, "images *shape"] | Tokens, what: str
    ) -> Float[np.ndarray, "images classes"]:
        """Logits of all images in float32; their softmax is probabilities.

        data: vectors of the tower, joined, or tokens. what: what messages call them.

        Raises:
          UserError: if there is none, they are of another width, or not finite.
        """
        count = len(data.rows) if isinstance(data, Tokens) else len(data)
        shape = data.shape if isinstance(data, Tokens) else data.shape[1:]
        if not count or shape[-1] != self.width:
            raise UserError(
                f"{what} has {count} images with vectors of {shape[-1]} numbers, but "
                f"the head reads {self.width}. Take images, and features of the tower "
                "that it was learned on."
            )
        found = []
        function = jax.jit(self.function())
        step = max(1, min(count, _BLOCK_BYTES // (4 * int(np.prod(shape)))))
        for start in range(0, count, step):
            rows = np.arange(start, min(start + step, count))
            x = data[rows].astype(np.float32)
            _check_finite(x, start, what)
            x = np.pad(x, [(0, step - len(rows))] + [(0, 0)] * (x.ndim - 1))
            found.append(np.asarray(function(x))[: len(rows)])
        return np.concatenate(found)

    def outcome(
        self,
        logits: Float[np.ndarray, "images classes"],
        labels: Int[np.ndarray, " images"],
    ) -> Outcome:
        """Accuracy on labelled images, with what was told when it was learned.

        Images of a class without training images count as wrong, and are counted.
        """
        right = np.argmax(logits, axis=1) == labels
        scores = (right & np.isfinite(logits).all(axis=1)).astype(np.float64)
        notes = dict(self.facts.get("notes", {}))
        if "train_counts" in self.arrays:
            notes |= unseen(self.arrays["train_counts"], labels)
        found = Outcome(self.facts.get("settings", {}), scores, notes)
        return found.with_features(self.features) if self.features else found

    @property
    def width(self) -> int:
        """Numbers of a vector, or of a token, that it reads."""
        if self.kind == TEXTS and "projection" not in self.arrays:
            return self.arrays["classes"].shape[1]
        return self.arrays[_WIDTH_OF[self.kind]].shape[-2]

    def function(self) -> Callable[[Float[Array, "batch *shape"]], Any]:
        """Features of a batch to logits, both in float32; for use under `jax.jit`."""
        arrays = {name: jnp.asarray(x, jnp.float32) for name, x in self.arrays.items()}
        if self.kind == LINEAR:
            kernel, bias = arrays["kernel"], arrays["bias"]
            return lambda x: jnp.matmul(x, kernel, precision="highest") + bias[None]
        if self.kind == ATTENTIVE:
            head = attentive_head.AttentiveHead(self.width, self.classes)
            del arrays["train_counts"]
            params = unflatten_dict(arrays, sep="/")
            return lambda x: head.apply({"params": params}, x)
        dtype = jnp.dtype(self.facts["dtype"])

        def of_texts(x):
            x = x.astype(dtype)
            if "projection" in arrays:
                x = jnp.matmul(x, arrays["projection"].astype(dtype))
            x = contrastive_losses.normalized(x)
            cosines = jnp.matmul(x, arrays["classes"].T, precision="highest")
            return arrays["scale"] * cosines

        return of_texts

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of all arrays and facts."""
        found = hashlib.sha256(as_bytes(self._told()).tobytes())
        for name, array in sorted(self.arrays.items()):
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()[:16]

    def _told(self) -> dict[str, Any]:
        names = self.class_names
        return {
            "kind": self.kind,
            "classes": self.classes,
            "features": list(self.features),
            "class_names": None if names is None else list(names),
            "facts": dict(self.facts),
        }

    def write(self, path: str) -> None:
        """Writes it, whole or not at all."""
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        arrays: Any = {_FACTS: as_bytes(self._told()), **self.arrays}
        with whole_files.replacing(path, "wb") as file:
            np.savez(file, **arrays)


# The array of a kind whose last but one size is the width of its input.
_WIDTH_OF = {LINEAR: "kernel", ATTENTIVE: "head/kernel", TEXTS: "projection"}
_NEEDED = {
    LINEAR: {"kernel", "bias", "train_counts"},
    ATTENTIVE: {"head/kernel", "head/bias", "train_counts"},
    TEXTS: {"classes", "scale"},
}


def linear(
    train: Labelled,
    features: tuple[str, ...],
    kernel: Float[np.ndarray, "width classes"],
    bias: Float[np.ndarray, " classes"],
    settings: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> Head:
    """A linear head that was learned from `train`, on the vectors `features`.

    settings, notes: what was chosen and what was counted on the way.
    """
    arrays = {"kernel": kernel, "bias": bias, "train_counts": train.counts()}
    facts = {"settings": dict(settings), "notes": dict(notes)}
    return Head(LINEAR, arrays, train.num_classes, features, None, facts)


def of_params(params: Any) -> dict[str, np.ndarray]:
    """The arrays of an attentive head by '/'-joined names."""
    flat = flatten_dict(flax.core.unfreeze(params), sep="/")
    return {str(name): np.asarray(array) for name, array in flat.items()}


def read(path: str) -> Head:
    """The head in a file.

    Raises:
      UserError: if it cannot be read, or holds anything else.
    """
    content, fields = read_arrays(path, _ADVICE)
    expected = {
        "kind": str,
        "classes": int,
        "features": list,
        "facts": dict,
        "class_names": (list, type(None)),
    }
    for name, kind in expected.items():
        if not isinstance(fields.get(name), kind):
            raise UserError(f"{path} holds no head: {name} is missing. {_ADVICE}")
    kind, classes, names = (fields[n] for n in ("kind", "classes", "class_names"))
    good = kind in _NEEDED and _NEEDED[kind] <= content.keys()
    good = good and (names is None or len(names) == classes)
    if good:
        columns = {LINEAR: ("kernel", -1), ATTENTIVE: ("head/kernel", -1)}
        name, axis = columns.get(kind, ("classes", 0))
        good = content[name].ndim == 2 and content[name].shape[axis] == classes
    if not good:
        raise UserError(
            f"{path} holds no head: {brief(kind)} of {brief(classes)} classes with the "
            f"arrays {', '.join(map(brief, sorted(content)))}. {_ADVICE}"
        )
    for name, array in content.items():
        if array.dtype.kind not in "fi" or not np.isfinite(array).all():
            raise UserError(f"{path}: {brief(name)} holds no finite numbers. {_ADVICE}")
    features = tuple(map(str, fields["features"]))
    listed = None if names is None else tuple(map(str, names))
    return Head(kind, content, classes, features, listed, fields["facts"])


def as_bytes(value: Any) -> UInt8[np.ndarray, " bytes"]:
    """A JSON value as an array, to stand in an archive of arrays."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return np.frombuffer(text.encode(), np.uint8)


def read_arrays(
    path: str, advice: str
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """The arrays of a NumPy archive, and the JSON object `facts` that is among them.

    advice: a sentence for the end of a message.

    Raises:
      UserError: if it cannot be read, or has no such object. Nothing is unpickled, and
        no more memory taken than the file's size warrants.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} is no file. {advice}")
    content = {name: x.read() for name, x in npz_files.open_npz(path).items()}
    told = content.pop(_FACTS, np.zeros(0))
    if told.dtype != np.uint8 or told.ndim != 1:
        raise UserError(f"{path} says nothing of itself. {advice}")
    facts = json_files.parse(told.tobytes(), path, advice=advice)
    if not isinstance(facts, dict):
        raise UserError(f"{path} says of itself: {brief(facts)}. {advice}")
    return content, facts


def _check_finite(x: np.ndarray, start: int, what: str) -> None:
    bad = ~np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if bad.any():
        raise UserError(
            f"the features of image {start + int(np.argmax(bad))} of {what} hold "
            "numbers that are not finite. The tower or its checkpoint is broken, or "
            "its dtype too narrow: try float32."
        )
