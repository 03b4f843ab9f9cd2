"""QK-clip: attention logits that grew too large are scaled back, head by head.

Another cure than QK-norm for the growth of attention logits (Dehghani et al. 2023,
section 2): the network stays as it is, and after an optimizer step the query and key
kernels of each head whose largest logit in that step exceeded a threshold are scaled
down, so that the same inputs would give the threshold (Kimi Team 2025, "Kimi K2",
section 2.1, there behind Muon). The largest logit is the instrument of that name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import freezing
from vit22b_transfer.models.instruments import COLLECTION, LARGEST_LOGIT

# The mean number of heads clipped in a step, among the metrics of a window.
CLIPPED = "clipped_heads"
_QUERY, _KEY = "/query/kernel", "/key/kernel"


@dataclasses.dataclass(frozen=True)
class QKClip:
    """When a head is clipped.

    threshold: of the absolute value of a logit, greater than 0. Logits are those of
      `instruments.record_attention`: scaled, with a position bias (which is not scaled
      down), before a softcap.

    The largest logit is needed in every step: where the attention is a fused kernel,
    its logits are computed once more.

    Raises:
      UserError: for a threshold out of its range.
    """

    threshold: float = 100.0

    def __post_init__(self):
        if not 0.0 < self.threshold < float("inf"):
            raise UserError(
                f"threshold={self.threshold} must be greater than 0; to let logits "
                "grow set train.fine_tune.qk_clip=None."
            )

    def describe(self, params: Any, frozen: Sequence[str]) -> str:
        """A line for the log: which attentions are clipped, and which cannot be.

        params: nested dicts, may be abstract. frozen: patterns of what is not trained.

        Raises:
          UserError: if no attention can be clipped.
        """
        clipped, normed, held = _attentions(params, frozen)
        others = [
            f"{len(paths)} {what}"
            for paths, what in ((normed, "with QK-norm"), (held, "not trained"))
            if paths
        ]
        if not clipped:
            raise UserError(
                "QK-clip has nothing to clip: of this model's attentions "
                f"{' and '.join(others) or 'none'} are found. It scales query and key "
                "kernels that are trained and not normalised. Leave "
                "gin_configs/runs/qk_clip.gin out, or set qk_norm to False."
            )
        line = f"QK-clip above {self.threshold:g}: {len(clipped)} attentions"
        return f"{line} (not {', '.join(others)})" if others else line

    def clip(
        self, params: Any, metrics: Mapping[str, Any], frozen: Sequence[str]
    ) -> tuple[Any, Float[Array, ""]]:
        """(parameters with clipped heads scaled, number of clipped heads).

        metrics: of `instruments.recorded_loss`; the others among them are not read. A
        head of queries with keys of its own is scaled by the root of threshold /
        largest logit in both; one that shares its keys in the queries alone. A largest
        logit that is not finite clips nothing: the loss is not finite either.
        """
        flat = flatten_dict(params, sep="/")
        count = jnp.zeros((), jnp.float32)
        for path in _attentions(params, frozen)[0]:
            largest = metrics[f"{COLLECTION}/{path}/{LARGEST_LOGIT}"].value
            above = (largest > self.threshold) & jnp.isfinite(largest)
            factor = jnp.where(above, self.threshold / jnp.where(above, largest, 1), 1)
            count = count + jnp.sum(above.astype(jnp.float32))
            parts = ("query",)
            if flat[path + _KEY].shape[-1] == flat[path + _QUERY].shape[-1]:
                parts, factor = ("query", "key"), jnp.sqrt(factor)
            for part in parts:
                for name in (f"{path}/{part}/kernel", f"{path}/{part}/bias"):
                    if name in flat:
                        flat[name] = _scaled(flat[name], factor)
        return unflatten_dict(flat, sep="/"), count


def _scaled(array, factor: Float[Array, "*layers heads"]):
    """A kernel [*layers, E, heads * kv] or a bias [*layers, heads * kv], by heads."""
    by_column = jnp.repeat(factor, array.shape[-1] // factor.shape[-1], axis=-1)
    if array.ndim > factor.ndim:
        by_column = by_column[..., None, :]
    return (array.astype(jnp.float32) * by_column).astype(array.dtype)


def _attentions(params, frozen) -> tuple[list[str], list[str], list[str]]:
    """Paths of attentions: (to be clipped, with QK-norm, with kernels not trained)."""
    flat = flatten_dict(params, sep="/")
    held = flatten_dict(freezing.frozen_mask(params, frozen), sep="/")
    clipped, normed, untrained = [], [], []
    for path in (name.removesuffix(_QUERY) for name in flat if name.endswith(_QUERY)):
        if f"{path}/query_norm/scale" in flat:
            normed.append(path)
        elif held[path + _QUERY] or held[path + _KEY]:
            untrained.append(path)
        else:
            clipped.append(path)
    return clipped, normed, untrained
