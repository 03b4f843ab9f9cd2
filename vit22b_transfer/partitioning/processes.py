"""The processes of one run: each drives the devices of its host, or some of them."""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit22b_transfer import UserError

# After so many seconds without a sign of life of a process the others end. A thread of
# its own gives them, so that a process may be busy for as long as it likes.
_HEARTBEAT_SECONDS = 30

# Where process 0 listens (host:port), how many processes there are, which one this is.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Makes this process one of a run's; does nothing the second time.

    To be called before JAX is used otherwise. The environment's `VARIABLES` say who
    takes part; without them JAX asks the cluster: Slurm, Open MPI, Kubernetes (with
    `jax[k8s]`), Cloud TPU. After five minutes without the others JAX ends the process.

    Raises:
      UserError: if neither knows, or the variables do not fit together.
    """
    if jax.distributed.is_initialized():
        return
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    if not any(values.values()):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
        except ValueError as error:
            raise UserError(
                f"JAX knows no cluster here ({error}). Set {', '.join(VARIABLES)} in "
                "every process, or leave out --distributed."
            ) from error
        return
    address, count, number = values.values()
    fits = ":" in address and count.isdecimal() and number.isdecimal()
    if not fits or int(number) >= int(count):
        shown = " ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"{shown}: needed are host:port of process 0, the number of processes, and "
            "one of 0, 1, ... for each process."
        )
    # JAX says nothing while it waits, nor whom it missed when it gives up.
    print(
        f"vit22b: process {number} of {count} looks for the others at {address}",
        file=sys.stderr,
        flush=True,
    )
    jax.distributed.initialize(
        address,
        int(count),
        int(number),
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )


def wait_for_all(name: str) -> None:
    """Returns when every process of the run is at the point of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gathered(data: bytes) -> list[bytes]:
    """What every process gave, in their order; all of them call it."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def leave(code: int) -> None:
    """Ends a process that failed, if it had joined others, so that they end as well.

    At an ordinary exit JAX would wait for them, who wait for what this one no longer
    does.
    """
    if not jax.distributed.is_initialized():
        return
    print(
        f"vit22b: process {jax.process_index()} of {jax.process_count()} has failed. "
        "If it lost the connection, the output of the process that failed first says "
        "why. Start all of them again to go on from what is saved.",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
