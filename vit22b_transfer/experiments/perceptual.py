"""Perceptual similarity: which of two pictures is nearer to a third, as people say.

The two-alternative forced choice of BAPPS (Zhang et al. 2018, arXiv 1801.03924): each
folder has `ref/`, `p0/` and `p1/` with pictures of the same names, and `judge/` with a
NumPy file for each, whose one number is the share of people who found p1 nearer.
Kumar et al. 2022 measured ViTs so, on frozen features.
"""

import math
import os
from typing import Any

import numpy as np
from jaxtyping import Float

from vit22b_transfer import UserError
from vit22b_transfer.experiments import measured
from vit22b_transfer.experiments.features import FeatureSource, Split
from vit22b_transfer.experiments.split_features import Tokens
from vit22b_transfer.host.file_errors import brief, damaged

DISTANCES = ("pooled", "mean", "tokens")
_SIDES = ("ref", "p0", "p1")
_MOST_BYTES = 4096


def similarity(
    *,
    source: FeatureSource,
    images: Split,
    judgements: str,
    distance: str,
    output_dir: str,
) -> list[dict]:
    """The 2AFC score of a frozen tower's distance, with its interval over triplets.

    A triplet scores the share of people who agree with the tower: j if it finds p1
    nearer, 1 - j if p0, 1/2 if neither. Told are the mean over all triplets, over those
    of each folder that has `ref/` (`traditional`, `cnn`, ...), and what people reach
    among each other: the mean of j^2 + (1 - j)^2.

    images: an unlabelled split of the pictures in all `ref`, `p0`, `p1` folders.
    judgements: the folder that the names of pictures are relative to, in which the
      `judge` folders lie.
    distance: 1 - cosine of the `pooled` vector; of the `mean` of the patch tokens; or
      of the `tokens` at each place, all of length one, the mean over places.

    Raises:
      UserError: for an unknown distance, a picture or judgement that is missing, a
        judgement that is no number from 0 to 1, or features that are not finite.
    """
    if distance not in DISTANCES:
        raise UserError(f"distance={distance!r} is none of {', '.join(DISTANCES)}.")
    vectors = None if distance == "tokens" else [distance]
    # Before the tower is run on anything: all triplets, and all judgements of them.
    names = source.names(images.task, images.split)
    every = _triplets(names, f"{images.task} {images.split}")
    told = {name: judgement(judgements, name) for name in every}
    split = source.read(images.task, images.split, vectors, labelled=False)
    triplets = _triplets(split.ids, split.what)
    if not names:
        told = {name: judgement(judgements, name) for name in triplets}
    shares = np.array([told[name] for name in triplets])
    data: Any = split.vectors if vectors is None else split.flat(vectors)
    near = np.array([_distances(data, rows, split.what) for rows in triplets.values()])
    first, second = near.T
    agreed = np.where(second < first, shares, 1 - shares)
    agreed = np.where(first == second, 0.5, agreed)
    people = shares**2 + (1 - shares) ** 2
    folders = [os.path.dirname(os.path.dirname(name)) or "." for name in triplets]
    findings = [measured.mean("two_afc", agreed), measured.mean("people", people)]
    for folder in sorted({*folders}):
        some = np.array([name == folder for name in folders])
        if len({*folders}) > 1 and some.sum() > 1:
            settings = {"folder": folder}
            findings.append(measured.mean("two_afc", agreed[some], settings))
    return measured.report(
        "perceptual_similarity",
        findings,
        protocol={"distance": f"1 - cosine, {distance}", "judgements": judgements},
        facts={
            "features": source.facts(),
            "images": {"task": images.task, "split": images.split},
        },
        notes={"triplets": len(triplets), **split.notes},
        output_dir=output_dir,
    )


def judgement(folder: str, picture: str) -> float:
    """The share of people who found p1 nearer, in [0, 1], of a picture in `ref`.

    Raises:
      UserError: if the file is missing, holds pickled objects, or anything but one
        number from 0 to 1.
    """
    parts = picture.split("/")
    stem = os.path.splitext(parts[-1])[0]
    path = os.path.join(folder, *parts[:-2], "judge", f"{stem}.npy")
    advice = "It is to hold one number from 0 to 1, as np.save writes it."
    if not os.path.isfile(path) or os.path.getsize(path) > _MOST_BYTES:
        raise UserError(f"{path} is missing or larger than {_MOST_BYTES} bytes.")
    with open(path, "rb") as file, damaged(path, advice):
        # The shape is looked at before anything of that size is made.
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"it is of version {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        content = file.read()
    if math.prod(shape) != 1 or dtype.kind not in "fiu":
        raise UserError(f"{path} has the shape {brief(shape)} of {dtype}. {advice}")
    if len(content) != dtype.itemsize:
        raise UserError(f"{path} holds {len(content)} bytes of a number. {advice}")
    value = float(np.frombuffer(content, dtype)[0])
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise UserError(f"{path} holds {value}. {advice}")
    return value


def _triplets(ids: tuple[str, ...], what: str) -> dict[str, list[int]]:
    """The rows of ref, p0 and p1 by the path of the reference."""
    rows = {name: row for row, name in enumerate(ids)}
    stems: dict[tuple[str, str, str], int] = {}
    for name, row in rows.items():
        folder, _, file = name.rpartition("/")
        outer, _, side = folder.rpartition("/")
        stems[(outer, side, os.path.splitext(file)[0])] = row
    found = {}
    for (outer, side, stem), row in sorted(stems.items()):
        if side not in _SIDES:
            raise UserError(
                f"{what}: {ids[row][:200]!r} lies in none of the folders ref, p0 and "
                "p1 of BAPPS."
            )
        missing = [one for one in _SIDES if (outer, one, stem) not in stems]
        if missing:
            raise UserError(
                f"{what}: {ids[row][:200]!r} has no picture of its name in "
                f"{missing[0]}/. A picture that cannot be read is none."
            )
        if side == "ref":
            found[ids[row]] = [stems[(outer, one, stem)] for one in _SIDES]
    return found


def _distances(
    data: Float[np.ndarray, "images width"] | Tokens, rows: list[int], what: str
) -> tuple[float, float]:
    """The distances of p0 and of p1 from the reference, each in [0, 2]."""
    x = data[np.array(rows)].astype(np.float64)
    x = x.reshape(3, -1, x.shape[-1])
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    if not np.isfinite(x).all() or not lengths.all():
        raise UserError(
            f"the features of a picture of {what} are not finite, or all zero. The "
            "tower or its checkpoint is broken, or its dtype too narrow: try float32."
        )
    x = x / lengths
    near = 1 - np.mean(np.sum(x[:1] * x[1:], axis=-1), axis=-1)
    return float(near[0]), float(near[1])
