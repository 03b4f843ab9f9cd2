"""A short form of the storm of kills that benchmarks/inference_storm.py is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_three_kills_of_one_file_made_in_four_ways():
    # Its own number of devices, not that of the tests.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/inference_storm.py",
            "--examples=40",
            "--kills=3",
            "--storm=--deterministic, all kinds",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    # Of several processes of a job, or shards, more than one may be killed at a time.
    assert row.startswith("| --deterministic, all kinds | 3 |")
    assert "to the bit" in row
