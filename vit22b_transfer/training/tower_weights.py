"""The tower of a checkpoint: what it is, by its weights, and tasks cached with it."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit22b_transfer.inference import fingerprints
from vit22b_transfer.training import checkpoints

# Arrays that are on the devices at a time while a tower is looked at.
_GROUP_BYTES = 1 << 28


def digest(path: str) -> str:
    """Hash of the tower's arrays in a checkpoint, as they are stored.

    Raises:
      ValueError: if it holds no tower.
    """
    path = checkpoints.resolve(path)
    # A checkpoint is renamed into place, so another one there is another directory.
    return _digest(path, os.stat(path).st_ino, os.stat(path).st_mtime_ns)


@functools.cache
def _digest(path: str, inode: int, time: int) -> str:
    del inode, time
    saved = checkpoints.tower_arrays(path)
    if not saved:
        raise ValueError(
            f"checkpoint {path} holds no tower (encoder/tower/...). Name one that "
            "does, such as that of `vit22b import`."
        )
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), "all"), PartitionSpec())
    rows, group, size = [], {}, 0
    for number, name in enumerate(sorted(saved, key=lambda name: name.split("/")), 1):
        leaf = saved[name]
        group[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
        size += leaf.dtype.itemsize * int(np.prod(leaf.shape))
        if size >= _GROUP_BYTES or number == len(saved):
            tree = traverse_util.unflatten_dict(group, sep="/")
            arrays = checkpoints.read_arrays(path, tree)
            rows += fingerprints.parameter_rows(arrays)
            group, size = {}, 0
    return fingerprints.digest_of_rows(rows)


def record_of(cache: Any) -> dict[str, Any]:
    """What a checkpoint records of a tower that it lacks: where it is, and its hash."""
    if cache is None:
        return {}
    path = checkpoints.resolve(cache.tower)
    return {"tower": {"checkpoint": path, "digest": digest(path)}}


def description(config: Any) -> dict[str, str]:
    """What a tower's configuration sets of all that decides the tokens."""
    plain = {"pooling": "none", "lora": None, "scan_layers": False, "remat": "none"}
    config = dataclasses.replace(config, **plain)
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.endswith("dtype"):  # by name, or as a class
            fields[field.name] = np.dtype(value).name
        # A field that later versions add leaves older caches as good as they were.
        elif value != field.default:
            fields[field.name] = str(value)
    return fields


def wanted_features(
    cache: Any, model: Any, name: str, split: str, feature_lengths: Mapping[str, Any]
) -> list[Any]:
    """`feature_cache.Wanted` of each task of a mixture, or of the task itself."""
    from vit22b_transfer.data import feature_cache, task_access

    if model.module.tower is None:
        raise ValueError("the model has no tower, so there are no features to cache.")
    return [
        feature_cache.Wanted(
            cache=cache,
            task=task,
            split=split,
            feature_lengths=feature_lengths,
            converter_cls=model.FEATURE_CONVERTER_CLS,
            weights=digest(cache.tower),
            tower=description(model.module.tower),
        )
        for task in task_access.tasks_of(name, split)
    ]


def batch_arguments(
    cache: Any, model: Any, name: str, split: str, feature_lengths: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `batches.train_batches` and `eval_batches`: live or from a cache."""
    if cache is None:
        return {
            "feature_lengths": feature_lengths,
            "converter_cls": model.FEATURE_CONVERTER_CLS,
        }
    from vit22b_transfer.data import feature_cache

    wanted = wanted_features(cache, model, name, split, feature_lengths)
    cached = feature_cache.open_tasks(wanted)
    return {
        "feature_lengths": cached.lengths(feature_lengths),
        "converter_cls": cached.converter_cls,
        "instead": cached.tasks,
    }
