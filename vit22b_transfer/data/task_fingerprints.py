"""What a task gives, as text and as hashes of text, for the keys of caches."""

import functools
import hashlib
import inspect
import os
import re
from typing import Any

import seqio

from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data import vocabularies
from vit22b_transfer.data.indexed_source import IndexedSource

# How many levels of functions within functions a fingerprint describes.
_DEPTH = 4


def records_digest(task: seqio.Task, split: str) -> str:
    """Hash of the source's records, or of their number where it tells no more."""
    source = task.source
    if not isinstance(source, IndexedSource):
        return f"{registered.num_records(task, split)} records"
    found = hashlib.sha256()
    for number in range(source.num_records(split)):
        record = source.record(split, number)
        # The same images may lie elsewhere on another machine.
        facts = [os.path.basename(record.image_path), record.references]
        facts += [record.image_id, record.question_id, record.question, record.target]
        facts += map(os.path.basename, record.image_paths)
        found.update(repr(facts).encode())
    return found.hexdigest()[:16]


def described(task: seqio.Task) -> str:
    """The task's preprocessors and features: names, arguments and source code."""
    lines = [_code(step) for step in task.preprocessors]
    for name, feature in sorted(task.output_features.items()):
        facts = (feature.dtype, feature.rank, feature.add_eos)
        vocabulary = vocabularies.fingerprint(feature.vocabulary)
        lines.append(f"{name}: {facts} {vocabulary}")
    return "\n".join(lines)


def _code(value: Any, depth: int = 0) -> str:
    """A function with all that is bound in it, or the repr of anything else."""
    if isinstance(value, functools.partial):
        bound = [*enumerate(value.args), *sorted(value.keywords.items())]
        bound = ", ".join(f"{name}={_code(x, depth)}" for name, x in bound)
        return f"{_code(value.func, depth)}({bound})"
    # Functions may refer to each other.
    if not inspect.isfunction(value) or depth == _DEPTH:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    try:
        source = inspect.getsource(value)
    except OSError:  # typed in by hand
        source = value.__code__.co_code.hex()
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    inside = ", ".join(_code(cell, depth + 1) for cell in cells)
    return f"{value.__module__}.{value.__qualname__}[{inside}] {source}"


def digest(text: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
