"""What several commands share: their arguments, and a quiet start of TensorFlow."""

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator

from vit22b_transfer import UserError

# Nothing heavy is imported here: `vit22b --help` must answer at once.

# Of `add(name, run, text, epilog)`, which makes a command.
Add = Callable[..., argparse.ArgumentParser]

GIN_EPILOG = "--gin.NAME=VALUE sets a macro or a parameter; repeat it as needed."

# gin appends to each message the configurables on the way, one to a line.
GIN_NOTE = "\n  In call to configurable "

# The last is said on a machine without a GPU.
_STARTUP_NOTE = re.compile(
    r"WARNING: All log messages before absl|I0000 .*\.cc:\d+\]"
    r"|E0000 .*failed call to cuInit"
)


def add_gin_file(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --gin_file, and with it --gin.NAME=VALUE."""
    command.add_argument(
        "--gin_file",
        action="append",
        required=required,
        default=[],
        metavar="FILE",
        help="gin file, for example gin_configs/recipes/NAME.gin, looked for in the "
        "current directory, then among those of the package; may be repeated",
    )


def add_shard(command: argparse.ArgumentParser) -> None:
    """Adds --shard."""
    command.add_argument(
        "--shard",
        metavar="I/N",
        help="be the I-th (from 0) of N jobs that fill one file of predictions, each "
        "on its own; the last one merges",
    )


def add_deterministic(command: argparse.ArgumentParser) -> None:
    """Adds --deterministic."""
    command.add_argument(
        "--deterministic",
        action="store_true",
        help="each example alone, so that its prediction is equal to the bit whatever "
        "batch size and number of devices; slower",
    )


def deterministic_files(args: argparse.Namespace) -> list[str]:
    """The gin files that --deterministic stands for."""
    wanted = getattr(args, "deterministic", False)
    return ["gin_configs/runs/deterministic.gin"] if wanted else []


def shard_override(shard: str | None) -> list[str]:
    """The override that --shard stands for."""
    if shard is None:
        return []
    numbers = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", shard)
    if numbers is None:
        raise UserError(f"--shard {shard}: I/N is expected, such as 0/8.")
    index, count = map(int, numbers.groups())
    return [f"infer.infer_split.shard=({index}, {count})"]


@contextlib.contextmanager
def without_startup_notes() -> Iterator[None]:
    """Context that drops the notes TensorFlow prints when it is imported and starts.

    They are written to the file descriptor before any log level takes effect.
    """
    with tempfile.TemporaryFile() as written:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                text = line.decode(errors="replace")
                if not _STARTUP_NOTE.match(text):
                    sys.stderr.write(text)
