"""A kept head's logits of a split: computed once, kept, read by every trust measure."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_probabilities
from vit22b_transfer.experiments import heads
from vit22b_transfer.experiments.features import FeatureSource, Split
from vit22b_transfer.host import whole_files
from vit22b_transfer.host.file_errors import quoted

_FACTS = {"what", "notes", "num_classes", "ids", "every_id"}


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a head says of the images of a split.

    logits: finite, in float32. labels: ids of the split's own classes; -1 where nothing
    is told of them. ids: names of the images, in their order; every_id: those without
    logits as well. class_names: of the split's own classes. notes: images that were
    left out, by reason. path: the file of all this.
    """

    head: heads.Head
    logits: Float[np.ndarray, "images classes"]
    labels: Int[np.ndarray, " images"]
    ids: tuple[str, ...]
    every_id: tuple[str, ...]
    num_classes: int
    class_names: tuple[str, ...] | None
    what: str
    notes: Mapping[str, Any]
    path: str

    def labels_of_head(self) -> Int[np.ndarray, " images"]:
        """The labels as ids of the head's classes, whose list the split's must be.

        A split whose classes are called by the head's ids (ImageNet-v2's folders `0` to
        `999`) has those, in whatever order its list has them.

        Raises:
          UserError: if the two lists differ, with the first difference; if a label is
            out of range.
        """
        ours, theirs = self.head.class_names, self.class_names
        labels = self.labels
        if ours != theirs and theirs is not None:
            if all(re.fullmatch("[0-9]{1,9}", name) for name in theirs):
                ids = np.array([int(name) for name in theirs])
                if ids.max() < self.head.classes:
                    return ids[labels]
            if ours is not None:
                raise _other_classes(self.what, ours, theirs)
        if ours is None or theirs is None:
            if self.num_classes != self.head.classes:
                raise UserError(
                    f"{self.what} has {self.num_classes} classes, the head "
                    f"{self.head.classes}: both must have one class list."
                )
        return class_probabilities.checked_labels(
            labels, len(labels), self.head.classes
        )


@dataclasses.dataclass(frozen=True)
class Judge:
    """A kept head, features of its tower, and where its logits are kept.

    head: a file that `probe.kept_head` made. source: of the tower that the head was
    learned on; its image_size may be another.
    """

    head: str
    source: FeatureSource
    output_dir: str

    def before(self, split: Split) -> tuple[heads.Head, tuple[str, ...]]:
        """The head, and the names of a split's images: what may be checked first.

        Names are as `FeatureSource.names`; the tower is run on nothing.

        Raises:
          UserError: if the head cannot be read, or there is no such split.
        """
        return heads.read(self.head), self.source.names(split.task, split.split)

    def of(
        self,
        split: Split,
        *,
        labelled: bool = True,
        change: Any = None,
        towers: dict[Any, Any] | None = None,
    ) -> Judged:
        """The head's logits of a split, read if they are there.

        They lie in `output_dir/logits`, under a name of all that decides them. The
        arguments are those of `FeatureSource.read`.

        Raises:
          UserError: if the head is of another tower; as `FeatureSource.read`.
        """
        head = heads.read(self.head)
        self._check_tower(head)
        vectors = list(head.features) or None
        asked = {"labelled": labelled, "change": change}
        told = self.source.identity(split.task, split.split, vectors, **asked)
        digest = hashlib.sha256(f"{head.digest} {told}".encode()).hexdigest()[:16]
        parts = (split.task, split.split, *([change.name] if change else []))
        stem = "-".join(re.sub(r"[^\w.+]+", "_", part) for part in parts)
        folder = whole_files.writable_directory(
            os.path.join(self.output_dir, "logits"), "output directory"
        )
        path = os.path.join(folder, f"{stem}-{digest}.npz")
        if not os.path.exists(path):
            found = self.source.read(
                split.task, split.split, vectors, towers=towers, **asked
            )
            data = found.flat(head.features) if vectors else found.vectors
            facts = {
                "what": found.what,
                "notes": dict(found.notes),
                "num_classes": found.num_classes,
                "ids": list(found.ids),
                "every_id": list(found.every_id),
            }
            with whole_files.replacing(path, "wb") as file:
                np.savez(
                    file,
                    logits=head.logits(data, found.what),
                    labels=found.labels,
                    facts=heads.as_bytes(facts),
                )
        names = self.source.class_names(split.task) if labelled else None
        return _read(path, head, None if names is None else tuple(names))

    def facts(self, **splits: Split) -> dict[str, Any]:
        """What a result line tells of the head, the tower and the splits."""
        head = heads.read(self.head)
        told = {name: dataclasses.asdict(split) for name, split in splits.items()}
        kept = ("probe", "protocol", "train")
        of_head = {name: head.facts[name] for name in kept if name in head.facts}
        of_head |= {"file": self.head, "classes": head.classes}
        return {"head": of_head, "features": self.source.facts(), **told}

    def _check_tower(self, head: heads.Head) -> None:
        # Another resolution has another position table, resampled from the same.
        theirs, ours = (
            {**told, "tower": {**told.get("tower", {}), "image_size": None}}
            for told in (head.facts.get("features", {}), self.source.facts())
        )
        for name in ("weights", "tower"):
            if theirs.get(name) != ours[name]:
                raise UserError(
                    f"the head {self.head} was learned on features of another tower: "
                    f"{name} {quoted(theirs.get(name))} there, {quoted(ours[name])} "
                    "here. Take its own tower, or learn a head on this one."
                )


def _read(path: str, head: heads.Head, names: tuple[str, ...] | None) -> Judged:
    advice = "Remove it, and it is made anew."
    content, facts = heads.read_arrays(path, advice)
    if content.keys() != {"logits", "labels"} or facts.keys() != _FACTS:
        raise UserError(f"{path} holds no logits of a head. {advice}")
    logits, labels = content["logits"], content["labels"]
    ids, every_id = (tuple(map(str, facts[name])) for name in ("ids", "every_id"))
    if logits.shape != (len(labels), head.classes) or len(ids) != len(labels):
        raise UserError(f"{path} holds other numbers of images and logits. {advice}")
    class_probabilities.checked_scores(logits, f"logits in {path}")
    told = (facts["num_classes"], names, facts["what"], facts["notes"])
    return Judged(head, logits, labels, ids, every_id, *told, path)


def _other_classes(what: str, ours: tuple, theirs: tuple) -> UserError:
    """An error that says where two class lists differ."""
    places = range(min(len(ours), len(theirs)))
    first = next((n for n in places if ours[n] != theirs[n]), None)
    said = f"{len(theirs)} names there, {len(ours)} here"
    if first is not None:
        said += f"; id {first} is {quoted(theirs[first])} there, {quoted(ours[first])}"
    return UserError(
        f"{what} has another class list than the head was learned with ({said} here). "
        "Give its task the head's list; for a data set of some of its classes take "
        "`vit22b measure accuracy` with LABELS."
    )
