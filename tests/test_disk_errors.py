"""Which errors are said to be of the disk that is written to."""

import errno
import os

import pytest

from vit22b_transfer import UserError
from vit22b_transfer.host import disk_errors


def test_only_what_is_written_below_is_said(tmp_path):
    def said(error, state=lambda: "all is kept"):
        with disk_errors.said(str(tmp_path), state):
            raise error

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match=f"{tmp_path} can no .* left on device. All is"):
        said(full)
    # An image that cannot be read is no fault of the disk that is written to.
    for error in (
        OSError(errno.ENOENT, "gone", "/elsewhere/image.png"),
        OSError(errno.ENOENT, "gone", f"{tmp_path}2/image.png"),
        OSError(errno.EIO, "input/output error"),
        ValueError("No space left on device"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as raised:
            said(error)
        assert raised.value is error
    inner = RuntimeError(f"writing {tmp_path}/x: No space left on device; at byte 3")
    outer = RuntimeError("a thread has failed")
    outer.__cause__ = inner
    with pytest.raises(UserError, match="No space left"):
        said(outer)

    # Only the number tells of others, as TensorStore writes it.
    stale = f"RESOURCE: {tmp_path}/d/1: [os_error_code='{errno.ESTALE}']"
    with pytest.raises(UserError, match=os.strerror(errno.ESTALE)):
        said(ValueError(stale))

    def unknown():
        raise full

    with pytest.raises(UserError, match="What is kept cannot be told"):
        said(full, unknown)
