"""Readers of experiments: heads, tables of attributes, judgements, the sixteen."""

import json
import os
from pathlib import Path

import numpy as np
from harness import Reader

from vit22b_transfer.evaluation import class_subsets
from vit22b_transfer.evaluation.sixteen_classes import NAMES
from vit22b_transfer.experiments import attributes, heads, humans, perceptual


def readers() -> list[Reader]:
    return [
        Reader("kept head", _head, _read_head, share=0.3),
        Reader("attributes", _attributes, _read_attributes, share=0.3),
        Reader("judgements", _judgements, _read_judgements, share=0.3),
        Reader("sixteen", _sixteen, _read_sixteen, share=0.3),
    ]


def _head(folder):
    arrays = {"kernel": np.ones((2, 3)), "bias": np.zeros(3), "train_counts": [1, 2, 3]}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    facts = {"settings": {"strength": 1.0}, "notes": {}}
    head = heads.Head("linear", arrays, 3, ("pooled",), ("a", "b", "c"), facts)
    head.write(os.path.join(folder, "head.npz"))


def _read_head(folder):
    heads.read(os.path.join(folder, "head.npz"))


def _attributes(folder):
    rows = ["image_id,Smiling,Male,partition", "1.jpg,-1,1,0", "2.jpg,1,-1,2"]
    Path(folder, "table.csv").write_text("\n".join(rows) + "\n")


def _read_attributes(folder):
    attributes.read(os.path.join(folder, "table.csv"))


def _judgements(folder):
    (Path(folder) / "judge").mkdir()
    np.save(Path(folder) / "judge" / "1.npy", np.array([0.2], np.float32))
    (Path(folder) / "real.json").write_text("[[1], [], [2, 999]]")


def _read_judgements(folder):
    perceptual.judgement(folder, "ref/1.png")
    class_subsets.read_judgements(os.path.join(folder, "real.json"), 3)


def _sixteen(folder):
    told = {name: [number, number + 16] for number, name in enumerate(NAMES)}
    (Path(folder) / "sixteen.json").write_text(json.dumps(told))


def _read_sixteen(folder):
    humans._sixteen((None, 32), os.path.join(folder, "sixteen.json"))
