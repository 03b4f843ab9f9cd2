"""What is checked before a state is saved: that its numbers are finite.

Loss and gradients of a step are those of the parameters before it, so they do not tell
what the update made of them.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit22b_transfer import NotFiniteError
from vit22b_transfer.checkpoints import reading, writing
from vit22b_transfer.training.state import TrainState, to_checkpoint_tree

_SHOWN = 3
_ADVICE = (
    "Try a lower learning rate or a longer warmup, or look for broken examples among "
    "the batches before this step."
)


def not_finite(state: TrainState) -> str:
    """Names of arrays with NaN or infinite values, a few of them; "" if all are finite.

    One fused pass over the parameters and the optimizer's arrays, of which one truth
    value is fetched; with several processes each gets the same. Numbers beside the
    arrays, such as a best loss that starts at infinity, may be anything.
    """
    arrays = {
        name: leaf
        for name, leaf in reading.flatten(to_checkpoint_tree(state)).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        and (leaf.ndim or name.startswith("target/"))
    }
    if not arrays:
        return ""
    replicated = state.step.sharding
    if jax.device_get(_jitted(_all_finite, replicated)(arrays)):
        return ""
    flags = jax.device_get(_jitted(_each_finite, replicated)(arrays))
    bad = [name for name, is_finite in flags.items() if not is_finite]
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return f"{', '.join(bad[:_SHOWN])}{more} (of {len(arrays)} arrays)"


def check_state(state: TrainState, step: int, writer: writing.CheckpointWriter) -> None:
    """To be called before a state is saved, and so before an older one is removed.

    Raises:
      NotFiniteError: naming the first few arrays and the last good checkpoint.
    """
    if names := not_finite(state):
        writer.wait()
        raise NotFiniteError(
            f"after step {step} there are NaN or infinite values in {names}; nothing "
            f"is saved and {last_good(writer.model_dir)}. {_ADVICE}"
        )


def check_window(
    window: Mapping[str, Any], step: int, writer: writing.CheckpointWriter
) -> None:
    """Raises NotFiniteError if the mean loss or gradient norm of a window is not.

    window: may be empty, if no step in it counted.
    """
    for name in ("loss", "grad_norm") if window else ():
        value = float(window[name].compute())
        if not math.isfinite(value):
            writer.wait()
            raise NotFiniteError(
                f"the mean {name} since the last log is {value} at step {step}; "
                f"{last_good(writer.model_dir)}. {_ADVICE}"
            )


def last_good(model_dir: str) -> str:
    """Half a sentence on the newest checkpoint."""
    good = reading.latest_step(model_dir)
    if good is None:
        return "there is no checkpoint yet"
    return f"checkpoint_{good} is untouched"


@functools.cache
def _jitted(function, sharding):
    """One program for all runs of a process on the same mesh."""
    return jax.jit(function, out_shardings=sharding)


def _all_finite(arrays):
    return jnp.all(jnp.stack(list(_each_finite(arrays).values())))


def _each_finite(arrays):
    return {name: jnp.all(jnp.isfinite(array)) for name, array in arrays.items()}
