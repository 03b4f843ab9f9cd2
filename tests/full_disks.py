"""Disks that become full in the middle of a run, and what has to be said of them.

A limit on the size of files stands for a full disk: the kernel refuses to write, to
Python and to the libraries in C++, as it does on one.
"""

import contextlib
import resource

import jax
import pytest

from vit22b_transfer.host import disk_errors

FULL = "File too large"


@contextlib.contextmanager
def full_disk():
    """What is entered may make the disk full, with files of so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Compiled programs would be cut in the cache that all tests share.
    least = "jax_persistent_cache_min_compile_time_secs"
    least_before = getattr(jax.config, least)
    jax.config.update(least, 1e9)

    def fill(num_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))

    try:
        yield fill
    finally:
        jax.config.update(least, least_before)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def refused(capfd, *parts):
    """One line with all of these parts, and no traceback of any thread."""
    with pytest.raises(disk_errors.DiskError) as error:
        yield
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and "the same command goes on" in message
    assert "Traceback" not in (written := capfd.readouterr().err), written
