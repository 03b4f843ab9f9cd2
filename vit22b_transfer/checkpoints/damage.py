"""Checkpoints that cannot be read: one error for whatever their readers raise."""

import contextlib
import os
from collections.abc import Iterator

import jax
import tensorstore

from vit22b_transfer import UserError
from vit22b_transfer.host import file_errors

ADVICE = "It is damaged: copy the checkpoint again, or take an older one."


class UnreadableCheckpointError(UserError):
    """A checkpoint whose files are damaged, cut off, or not there any more."""


@contextlib.contextmanager
def said(path: str) -> Iterator[None]:
    """Turns what reading raises into an error that names the checkpoint and the place.

    Raises:
      UnreadableCheckpointError: in place of any other exception, but for those of a
        lack of memory, of the host or of a device.
    """
    try:
        yield
    except (UnreadableCheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except UserError as error:
        where = "" if f"checkpoint {path}" in str(error) else f"checkpoint {path}: "
        raise UnreadableCheckpointError(f"{where}{error}") from error
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Orbax wraps what TensorStore says
            cause = cause.__cause__
        raise UnreadableCheckpointError(
            f"checkpoint {path} cannot be read: {file_errors.told(cause)}. {ADVICE}"
        ) from error


def check_index(path: str) -> None:
    """Reads which arrays there are, of a checkpoint with Orbax's index.

    Done before Orbax reads arrays: the file that is damaged is then the one named.
    """
    folder = os.path.join(path, "state")
    if os.path.isfile(os.path.join(folder, "manifest.ocdbt")):
        with said(path):
            spec = {"driver": "ocdbt", "base": f"file://{folder}/"}
            tensorstore.KvStore.open(spec).result().list().result()
