"""What a network tells of itself in training: logits, entropies, activations.

Modules put numbers into a collection of flax beside the parameters, when whoever calls
them asks for it by making it mutable (`Recorded`). Otherwise nothing is computed: the
compiled program is the same. All numbers are kept so that those of several batches,
microbatches and stacked layers can be merged; nothing of them is differentiated.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vit22b_transfer import UserError
from vit22b_transfer.models import products
from vit22b_transfer.models.attention import MASKED_LOGIT

COLLECTION = "instruments"
LARGEST_LOGIT = "largest_logit"
ENTROPY, EVEN_ENTROPY = "entropy", "even_entropy"
# Mean squares, of which the root is told.
QUERY, KEY, RESIDUAL = "query_rms", "key_rms", "residual_rms"


@flax.struct.dataclass
class Largest(clu_metrics.Metric):
    """The largest of the values that were merged, element by element."""

    # Any: under jax.eval_shape and in tree operations the leaf is no array.
    value: Any

    def merge(self, other: "Largest") -> "Largest":
        """The larger of both."""
        return Largest(jnp.maximum(self.value, other.value))

    def compute(self) -> Any:
        """The value."""
        return self.value


def is_recorded(module: nn.Module) -> bool:
    """Whether somebody wants the numbers of this call."""
    return not module.is_initializing() and module.is_mutable_collection(COLLECTION)


def record_rms(module: nn.Module, name: str, x: Float[Array, "..."]) -> None:
    """Keeps the mean square of all elements, in float32; its root is told."""
    if is_recorded(module):
        squares = jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))
        count = jnp.asarray(x.size, jnp.float32)
        _keep(module, name, clu_metrics.Average(total=jnp.sum(squares), count=count))


def record_attention(
    module: nn.Module,
    query: Float[Array, "batch queries heads kv"],
    key: Float[Array, "batch keys kv_heads kv"],
    *,
    mask: Bool[Array, "#batch 1 #queries keys"] | None = None,
    bias: Float[Array, "1 heads #queries keys"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Keeps, of each head, the largest logit and the mean entropy of its weights.

    query, key: as they are multiplied, normalised and rotated; `kv_heads` divides
      `heads`, whose groups share a key.
    The largest logit is that of |scale * query key^T + bias| over all pairs that the
    mask lets through, before a softcap. The entropy is in nats, that of the weights
    that are used, meaned over the queries that may attend to something; beside it the
    mean of the logarithm of the number of keys, which is that of even weights.

    The logits are computed from queries and keys here, in whatever form and order the
    attention computes its own; XLA joins the two where they are the same.
    """
    if not is_recorded(module):
        return
    query, key = jax.lax.stop_gradient((query, key))
    batch, queries, heads, _ = query.shape
    keys, kv_heads = key.shape[1:3]
    query = query * jnp.asarray(scale, query.dtype)
    if kv_heads == heads:
        logits = products.einsum("BQNH,BKNH->BNQK", query, key)
    else:
        grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, -1)
        logits = products.einsum("BQKGH,BSKH->BKGQS", grouped, key)
        logits = logits.reshape(batch, heads, queries, keys)
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits = logits + jax.lax.stop_gradient(bias).astype(jnp.float32)
    sizes = jnp.abs(logits)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    allowed = jnp.full((1, 1, 1, 1), keys, jnp.float32)
    if mask is not None:
        sizes = jnp.where(mask, sizes, 0.0)
        logits = jnp.where(mask, logits, jnp.float32(MASKED_LOGIT))
        allowed = jnp.sum(mask.astype(jnp.float32), axis=-1, keepdims=True)
    allowed = jnp.broadcast_to(allowed, (batch, 1, queries, 1))
    attends = (allowed > 0).astype(jnp.float32)
    count = jnp.sum(attends)
    # From the largest logit down: the entropy is no difference of large numbers.
    lower = logits - jnp.max(logits, axis=-1, keepdims=True)
    powers = jnp.exp(lower)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    sums = jnp.sum(powers * lower, axis=-1, keepdims=True)
    entropies = (jnp.log(total) - sums / total) * attends
    even = jnp.log(jnp.maximum(allowed, 1.0))
    average = clu_metrics.Average
    _keep(module, LARGEST_LOGIT, Largest(jnp.max(sizes, axis=(0, 2, 3))))
    _keep(
        module,
        ENTROPY,
        average(
            total=jnp.sum(entropies, axis=(0, 2, 3)),
            count=jnp.broadcast_to(count, (heads,)),
        ),
    )
    _keep(module, EVEN_ENTROPY, average(total=jnp.sum(even), count=count))


def _keep(module: nn.Module, name: str, metric: clu_metrics.Metric) -> None:
    module.sow(
        COLLECTION,
        name,
        metric,
        init_fn=lambda: None,
        # A module may be called more than once.
        reduce_fn=lambda old, new: new if old is None else old.merge(new),
    )


class Recorded:
    """A module that keeps what it tells in `told`; else it is the module.

    module: flax's, or whatever has `apply` as they have it (`mixed_module`).
    """

    def __init__(self, module: Any):
        self._module = module
        self.told: dict[str, clu_metrics.Metric] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def apply(self, variables: Mapping[str, Any], *inputs: Any, **options: Any) -> Any:
        """What the module's own `apply` returns."""
        result, state = self._module.apply(
            variables, *inputs, mutable=[COLLECTION], **options
        )
        for path, metric in _metrics(state.get(COLLECTION, {})):
            if path in self.told:
                metric = self.told[path].merge(metric)
            self.told[path] = metric
        return result


def recorded_loss(model: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`model.loss_fn` with what the network tells among the metrics.

    It is told by the same network: its `apply` is asked for the collection as well.
    Names are those of the metrics of the loss, and `COLLECTION/PATH/NAME` with the path
    of the module, or of the stack of modules if layers are scanned: then the metric's
    arrays have the layers on their first axis.

    Raises:
      UserError: if the model has no `module` to be asked.
    """
    if not hasattr(model, "module"):
        raise UserError(
            f"{type(model).__name__} has no module, so nothing can be told of its "
            "layers. Leave gin_configs/runs/instruments.gin out."
        )

    def loss_fn(params, batch, rng):
        module = Recorded(model.module)
        recorded = copy.copy(model)
        recorded.module = module
        loss, metrics = recorded.loss_fn(params, batch, rng)
        told = {f"{COLLECTION}/{path}": m for path, m in module.told.items()}
        return loss, dict(metrics) | told

    return loss_fn


def _metrics(tree: Mapping[str, Any], path: str = ""):
    """('/'-joined path, metric) of all metrics in nested dicts."""
    for name, value in tree.items():
        if isinstance(value, clu_metrics.Metric):
            yield path + name, value
        else:
            yield from _metrics(value, f"{path}{name}/")
