"""Accelerators a run can be planned for: makers' figures, per device."""

import dataclasses
import difflib
import os

from vit22b_transfer import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    flops: operations per second of matrix products in bfloat16; float32_flops: in what
      JAX computes float32 products with by default.
    memory: bytes; bandwidth: of it, in bytes per second.
    link: bytes per second that a device can send to its neighbours of one mesh axis.
    """

    name: str
    flops: float
    float32_flops: float
    memory: float
    bandwidth: float
    link: float


GIB = 2.0**30
# Dense rates. GPUs: NVLink within a host, one way; float32 as TF32. TPUs: half of the
# bidirectional interconnect; float32 products run in bfloat16 by default.
_TABLE = (
    Device("h100", 989e12, 495e12, 80e9, 3.35e12, 450e9),
    Device("h200", 989e12, 495e12, 141e9, 4.8e12, 450e9),
    Device("a100", 312e12, 156e12, 80e9, 2.0e12, 300e9),
    Device("tpu-v4", 275e12, 275e12, 32 * GIB, 1.2e12, 150e9),
    Device("tpu-v5e", 197e12, 197e12, 16 * GIB, 0.82e12, 100e9),
    Device("tpu-v5p", 459e12, 459e12, 95 * GIB, 2.77e12, 300e9),
    Device("tpu-v6e", 918e12, 918e12, 32 * GIB, 1.6e12, 200e9),
)
NAMES = (*(device.name for device in _TABLE), "cpu")


def device(name: str) -> Device:
    """The accelerator of that name; `cpu` is this machine's memory, two Zen 4 cores.

    Raises:
      UserError: for an unknown name.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # Measured matrix product and memory rates; see benchmarks/.
        return Device("cpu", 400e9, 190e9, float(memory), 40e9, 10e9)
    for known in _TABLE:
        if known.name == name:
            return known
    near = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.0)
    raise UserError(
        f"no device {name!r}; nearest: {', '.join(near)}; all: {', '.join(NAMES)}."
    )
