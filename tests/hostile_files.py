"""What tests of hostile files share: a bound of memory, places in JSON."""

import copy
import tracemalloc
from collections.abc import Iterator
from typing import Any

PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 16, "width": 16},
    "crop_size": {"height": 16, "width": 16},
    "do_center_crop": True,
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def measured():
    """For a fixture: a test takes under 100 MB of Python's and NumPy's memory."""
    tracemalloc.start()
    yield
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all parts and leaves of nested dicts and lists, the whole first."""
    yield path
    if isinstance(value, dict):
        for key, child in value.items():
            yield from places(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from places(child, (*path, index))


def replaced(value: Any, path: tuple, other: Any) -> Any:
    """A copy of nested dicts and lists with another value at a path that is not ()."""
    value = copy.deepcopy(value)
    part = value
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = other
    return value
