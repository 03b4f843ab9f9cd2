"""Low-rank updates of a checkpoint: which there are, and kernels with them added."""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.models import lora
from vit22b_transfer.weights.files import tensor_files
from vit22b_transfer.weights.files.stored_tensors import StoredTensor


def updated_kernels(params: Mapping[str, Any]) -> list[str]:
    """Names of the kernels that have an update."""
    found = (name.removesuffix("lora_a") for name in params if _is_a(name))
    return [f"{scope}kernel" for scope in found]


def _is_a(name: str) -> bool:
    return name.endswith("/lora_a")


def matrices(kernel: str) -> tuple[str, str]:
    """The two matrices of a kernel's update."""
    scope = kernel.removesuffix("kernel")
    return f"{scope}lora_a", f"{scope}lora_b"


def lora_alpha(checkpoint: str, given: float | None) -> float:
    """The `alpha` of a checkpoint's updates, which its arrays do not tell.

    Raises:
      UserError: if neither the checkpoint nor `given` says it, or they differ.
    """
    folder = os.path.dirname(tensor_files.find_weights(checkpoint))
    record = reading.read_record(folder) if reading.is_complete(folder) else {}
    recorded = record.get("lora", {}).get("alpha", given)
    if recorded is None:
        raise UserError(
            f"{checkpoint} has low-rank updates and does not say their alpha (T5X "
            "records none); give --lora_alpha, the LoraConfig.alpha of its training."
        )
    if given not in (None, recorded):
        raise UserError(
            f"{checkpoint} was trained with alpha {recorded}, not {given}; leave "
            "--lora_alpha out."
        )
    return float(recorded)


def merged(params: Mapping[str, StoredTensor], alpha: float) -> dict[str, StoredTensor]:
    """The parameters without updates, which are added to the kernels as they are read.

    In float32, rounded once to the dtype of the kernel.
    """
    result = {
        name: tensor
        for name, tensor in params.items()
        if not re.fullmatch(lora.UPDATES, name)
    }
    for kernel in updated_kernels(params):
        parts = [params[name] for name in (kernel, *matrices(kernel))]
        read = functools.partial(_read_merged, parts, alpha)
        result[kernel] = dataclasses.replace(parts[0], read=read)
    return result


def _read_merged(
    parts: Sequence[StoredTensor], alpha: float, layer: int | None = None
) -> np.ndarray:
    kernel, a, b = (part.read(layer) for part in parts)
    return np.asarray(lora.merged_kernel(kernel, a, b, alpha))
