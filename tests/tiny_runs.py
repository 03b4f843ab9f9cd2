"""A model that compiles in no time, in-memory data, and tiny runs on them."""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models
from clu import metrics as clu_metrics
from flax.linen.partitioning import AxisMetadata
from flax.traverse_util import unflatten_dict

from vit22b_transfer.checkpoints import reading, restoring
from vit22b_transfer.models import losses
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, state
from vit22b_transfer.training.train import Periods, fine_tune

BATCH_SIZE = 16
ONE_DEVICE = Partitioning(data=1, model=1)


WIDTH, VOCAB = 8, tiny_models.VOCAB_SIZE
PIXELS = 3 * tiny_models.IMAGE_SIZE[0] * tiny_models.IMAGE_SIZE[1]
# name -> (shape, logical axes)
PARAMETERS = {
    "encoder/tower/kernel": ((PIXELS, WIDTH), ("patch", "embed")),
    "encoder/tower/bias": ((WIDTH,), ("embed",)),
    "token_embedder/embedding": ((VOCAB, WIDTH), ("vocab", "embed")),
    "decoder/kernel": ((WIDTH, VOCAB), ("embed", "vocab")),
}


class LinearModel:
    """The model contract over two matrices and a table, with dropout in training."""

    FEATURE_CONVERTER_CLS = None

    def __init__(
        self,
        optimizer_def=None,
        *,
        frozen=(),
        vocab_size=VOCAB,
        tower_dtype="float32",
        keep_rate=0.9,
    ):
        schedule = optimizers.rsqrt(1e-2, total_steps=100, warmup_steps=3)
        self.optimizer_def = optimizer_def or optimizers.adamw(schedule)
        self.frozen = frozen
        self.input_vocabulary = tiny_models.Vocabulary(vocab_size)
        self.output_vocabulary = tiny_models.Vocabulary(vocab_size)
        self.tower_dtype = jnp.dtype(tower_dtype)
        self.keep_rate = keep_rate

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        assert input_shapes["encoder_input_images"][1:] == (*tiny_models.IMAGE_SIZE, 3)
        params, axes = {}, {}
        for i, (name, (shape, names)) in enumerate(PARAMETERS.items()):
            value = 0.1 * quick_noise(rng, shape, i)
            dtype = self.tower_dtype if "tower" in name else jnp.float32
            params[name] = value.astype(dtype)
            axes[f"{name}_axes"] = AxisMetadata(names=names)
        params, axes = (unflatten_dict(tree, sep="/") for tree in (params, axes))
        return {"params": params, "params_axes": axes}

    def loss_fn(self, params, batch, dropout_rng):
        images = batch["encoder_input_images"].astype(jnp.float32) / 255.0 - 0.5
        tower = jax.tree.map(
            lambda x: x.astype(jnp.float32), params["encoder"]["tower"]
        )
        image = images.reshape(len(images), PIXELS) @ tower["kernel"]
        image = image + tower["bias"][None]
        table = params["token_embedder"]["embedding"]
        prompt = jnp.sum(table[batch["encoder_input_tokens"]], axis=1)
        x = jnp.tanh(
            table[batch["decoder_input_tokens"]] + image[:, None] + prompt[:, None]
        )
        if dropout_rng is not None:
            kept = quick_noise(dropout_rng, x.shape) < 2 * self.keep_rate - 1
            x = x * kept.astype(x.dtype)
        logits = x @ params["decoder"]["kernel"]
        weights = batch["decoder_loss_weights"].astype(jnp.float32)
        targets = batch["decoder_target_tokens"]
        terms = losses.terms_of_logits(logits, targets)
        loss, _, weight = losses.token_cross_entropy(
            terms, weights, vocab_size=logits.shape[-1]
        )
        hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        return loss, {
            "loss": clu_metrics.Average(total=loss, count=weight),
            "accuracy": clu_metrics.Average(
                total=jnp.sum(hits * weights), count=weight
            ),
        }

    def eval_fn(self, params, batch):
        return self.loss_fn(params, batch, None)


def quick_noise(rng, shape, salt=0):
    """Numbers in [-1, 1), a function of the key. JAX's own take long to compile."""
    key = jax.random.key_data(rng).astype(jnp.uint32)
    count = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    bits = (count + key[-1] + jnp.uint32(salt)) * jnp.uint32(2654435761)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(2246822519)
    return (bits >> 8).astype(jnp.float32) / 2**23 - 1.0


@dataclasses.dataclass
class Counters:
    examples: int = 0

    def counts(self):
        return dataclasses.asdict(self)


class Killed(Exception):
    """Stands for the death of the process, at the moment a batch is asked for."""


class Stream:
    """Random batches, a function of seed and step alone; may die, or call something."""

    def __init__(self, partitioning, seed, step, data):
        self._partitioning, self._seed, self._data = partitioning, seed, data
        self._step = step
        self.counters = Counters()

    def __iter__(self):
        return self

    def __next__(self):
        if self._step == self._data.dies_at:
            raise Killed
        if self._step in self._data.events:
            self._data.events[self._step]()
        batch = self._data.batch(1000 * self._seed + self._step)
        if self._step in self._data.broken:
            batch["decoder_loss_weights"] = np.full_like(
                batch["decoder_loss_weights"], np.nan, np.float32
            )
        self._step += 1
        self.counters.examples += BATCH_SIZE
        return on_device(batch, self._partitioning)

    def close(self):
        pass


def text_batch(seed):
    """A batch of images and texts, as the converter and T5X hand them out."""
    batch = tiny_models.batch(BATCH_SIZE, seed=seed)
    weights = batch["decoder_loss_weights"].astype(np.float32)
    return batch | {"decoder_loss_weights": weights}


@dataclasses.dataclass(frozen=True)
class Data:
    """In place of `inputs.TrainData`: no files, no TensorFlow.

    dies_at: the step whose batch is not given any more. events: functions called when
    the batch of a step is asked for. broken: steps whose loss weights are not numbers.
    batch: what makes the batch of a seed.
    """

    dies_at: int | None = None
    events: Any = dataclasses.field(default_factory=dict)
    broken: tuple[int, ...] = ()
    batch: Callable[[int], dict] = text_batch

    def batches(self, model, partitioning, *, seed, start_step):
        return Stream(partitioning, seed, start_step, self)


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    features: Any


@dataclasses.dataclass(frozen=True)
class EvalData:
    """In place of `inputs.EvalData`: `examples` of one batch, dealt out in batches."""

    examples: int = 20
    batch_size: int = 8
    tasks: tuple[str, ...] = ("tiny",)
    split: str = "validation"

    def batches(self, task, model, partitioning):
        rows = tiny_models.batch(self.examples, seed=99)
        for start in range(0, self.examples, self.batch_size):
            part = {
                name: padded(array[start : start + self.batch_size], self.batch_size)
                for name, array in rows.items()
            }
            yield EvalBatch(on_device(part, partitioning))


def padded(rows, size):
    missing = size - len(rows)
    return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))


def on_device(batch, partitioning):
    return {
        name: jax.device_put(array, partitioning.batch_sharding(array.ndim))
        for name, array in batch.items()
    }


def run(model_dir, model=None, *, data=None, total_steps=12, **arguments):
    """`fine_tune` with short periods that do not divide each other."""
    defaults = {
        "partitioning": ONE_DEVICE,
        "eval_data": EvalData(),
        "periods": Periods(log=4, evaluate=3, checkpoint=5),
    }
    return fine_tune(
        model or LinearModel(),
        model_dir=str(model_dir),
        data=data or Data(),
        total_steps=total_steps,
        **(defaults | arguments),
    )


def logged(model_dir):
    """The lines of metrics.jsonl without what depends on the clock."""
    with open(os.path.join(model_dir, "metrics.jsonl"), encoding="utf-8") as lines:
        return [
            {k: v for k, v in json.loads(line).items() if not k.startswith("timing/")}
            for line in lines
        ]


def abstract_params(model, partitioning=ONE_DEVICE):
    """Shapes, dtypes and shardings of the model's parameters."""
    return state.abstract_variables(model, partitioning, tiny_models.batch(BATCH_SIZE))


def saved_params(path, model=None, partitioning=ONE_DEVICE):
    """The parameters of a checkpoint or of the latest in a directory, as NumPy."""
    abstract = abstract_params(model or LinearModel(), partitioning)
    shardings = state.shardings_of(abstract)
    params = restoring.restore_params(str(path), abstract, shardings)
    return jax.tree.map(np.asarray, params)


def arrays_of(path):
    """Every array of a checkpoint, or of the latest in a directory, by name."""
    path = reading.resolve(str(path))
    abstract = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=ONE_DEVICE.replicated
        )
        for name, leaf in reading.saved_arrays(path).items()
    }
    read = reading.read_arrays(path, unflatten_dict(abstract, sep="/"))
    return reading.flatten(jax.tree.map(np.asarray, read))


def assert_same_bits(actual, expected):
    """Equal trees of arrays: structure, dtypes and every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
