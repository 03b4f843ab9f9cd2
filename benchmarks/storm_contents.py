"""What a command of a kill storm left, in a form that can be compared."""

import glob
import hashlib
import json

import numpy as np


def read(command, out):
    """`exact`: name -> what is equal to the bit; `numbers`: what rounding may change.

    Nothing that is temporary may be left in the directory `out`.
    """
    left = [
        path
        for pattern in ("*tmp*", "*unfinished*", "*being-deleted*", ".lock")
        for path in glob.glob(
            f"{out}/**/{pattern}", recursive=True, include_hidden=True
        )
    ]
    assert not left, left
    readers = {
        "train": _trained,
        "infer": _predicted,
        "import": _imported,
        "cache-features": _cached,
    }
    exact, numbers = readers[command](out)
    return {"exact": exact, "numbers": numbers}


def _arrays(path):
    """Digests of all arrays of a checkpoint; the mean and norm of each parameter."""
    from vit22b_transfer.weights.files import tensor_files

    exact, numbers = {}, {}
    for name, tensor in tensor_files.open_tensors(str(path)).items():
        array = np.ascontiguousarray(tensor.read())
        exact[name] = hashlib.sha256(array.tobytes()).hexdigest()
        if name.startswith("target/"):
            values = array.astype(np.float64)
            numbers[name] = [float(values.mean()), float(np.linalg.norm(values))]
    return exact, numbers


def _trained(out):
    (checkpoint,) = out.glob("checkpoint_*")
    exact, numbers = _arrays(checkpoint)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    for number, line in enumerate(map(json.loads, lines)):
        kept = {k: v for k, v in line.items() if not k.startswith("timing/")}
        exact[f"metrics.jsonl {number}"] = json.dumps(kept)
        if "train/loss" in kept:
            numbers[f"loss {line['step']}"] = [kept["train/loss"]]
    return exact, numbers


def _predicted(out):
    (path,) = out.glob("*.jsonl")
    assert len(list(out.iterdir())) == 2, sorted(out.iterdir())
    lines = path.read_text().splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    return {path.name: lines}, {"scores": scores}


def _imported(out):
    exact, numbers = _arrays(out / "checkpoint_0")
    for path in sorted(out.rglob("*")):
        if path.is_file() and "checkpoint_0" not in path.parts:
            exact[str(path.relative_to(out))] = _digest(path)
    return exact, numbers


def _cached(out):
    from vit22b_transfer.data.feature_shards import Shard

    exact, numbers = {}, {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        exact[name] = _digest(path)
        if path.suffix == ".array_record":
            shard = Shard(str(path))
            rows = [
                np.frombuffer(shard.row(n), np.float32) for n in range(len(shard.rows))
            ]
            numbers[name] = [float(row.mean()) for row in rows]
    return exact, numbers


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
