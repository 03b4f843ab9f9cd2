"""Accelerators a run can be planned for: makers' figures, per device."""

import dataclasses
import difflib
import os
import re

import jax

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


def here() -> Device | None:
    """The device of this process, with the memory that it says it has.

    None for one whose memory is not known. Rates are 0 of one that is in no table, and
    of CPUs, which differ.
    """
    local = jax.local_devices()
    if local[0].platform == "cpu":
        known = device("cpu")
        memory = known.memory / len(local)
        return dataclasses.replace(known, flops=0.0, memory=memory)
    kind = local[0].device_kind
    told = re.sub(r"[^a-z0-9]", "", kind.lower()).replace("lite", "e")
    found = [x for x in _TABLE if x.name.replace("-", "") in told]
    stats = local[0].memory_stats() or {}
    memory = float(stats.get("bytes_limit", found[0].memory if found else 0.0))
    if not memory:
        return None
    rates = found[0] if found else Device(kind, 0.0, 0.0, 0.0, 0.0, 0.0)
    return dataclasses.replace(rates, memory=memory)


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
