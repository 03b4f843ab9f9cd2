"""Readers with every fault that the harness must see; `test_fuzz.py` runs them."""

import os
import time
from pathlib import Path

from harness import Reader

from vit22b_transfer import UserError


def readers() -> list[Reader]:
    faults = {
        "raw": lambda path: {}[path],
        "unnamed": _refuse,
        "memory": lambda path: bytearray((1 << 30) + (200 << 20)),
        "slow": lambda path: time.sleep(60),
        "died": lambda path: os.abort(),
    }
    return [
        Reader(name, _make, lambda folder, fault=fault: _read(folder, fault))
        for name, fault in faults.items()
    ]


def _make(folder):
    Path(folder, "some.json").write_text('{"a": [1, 2]}')


def _read(folder, fault):
    path = Path(folder, "some.json")
    if not path.exists() or path.read_bytes() != b'{"a": [1, 2]}':
        fault(path)


def _refuse(path):
    raise UserError("something is wrong.")
