"""`vit22b bench`: how fast these devices are, and how much of that our models reach.

Every figure is the median of rounds in which all contenders run one after the other,
as fractions of the rate of a plain matrix product measured in the same rounds. Counted
are the operations of matrix products that the model needs: rematerialisation is none.
Random parameters and batches; neither TensorFlow nor SeqIO is imported.
"""

import copy
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.host import tables, whole_files
from vit22b_transfer.inference import decoding
from vit22b_transfer.models import multimodal
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.planning import trace
from vit22b_transfer.training import optimizers, steps
from vit22b_transfer.training.state import (
    abstract_state,
    abstract_variables,
    fresh_state,
    init_params,
)

# A side of the square matrices: large enough for the full rate, small enough to wait.
_SIDES = {"cpu": 2048}
_SIDE = 8192
MATMUL = "matrix product"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one contender did in a run, and the median of its seconds.

    flops: of all devices; items: images, or decoded tokens.
    """

    name: str
    seconds: float
    flops: int
    items: int = 0
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A vocabulary without tokens: models ask for no more than its size."""

    vocab_size: int


@dataclasses.dataclass
class _Contender:
    run: Callable[[], Any]
    flops: int
    items: int = 0
    unit: str = ""


def measure(
    model: multimodal.ImageTextModel,
    *,
    partitioning: Partitioning,
    batch_size: int,
    input_length: int,
    target_length: int,
    rounds: int = 5,
    json_file: str | None = None,
) -> list[Measured]:
    """Matrix product, tower forward and gradients, train step and decoding; printed.

    The model decodes greedily and exactly `target_length` tokens; its frozen parameters
    and its optimizer are those of its train step. json_file: where the results are
    written as well: `platform` and `results`, name -> `seconds` and `of_product`, the
    fraction of the product's rate.

    Raises:
      UserError: if it has no tower, or there are no rounds.
    """
    if model.module.tower is None:
        raise UserError("the model has no tower; include a tower's file.")
    if rounds < 1:
        raise UserError(f"rounds={rounds} must be at least 1.")
    console = rich.console.Console()
    batch = _batch(model, partitioning, batch_size, input_length, target_length)
    contenders = _contenders(model, partitioning, batch, console)
    seconds = _interleaved(contenders, rounds)
    results = [
        Measured(name, seconds[name], c.flops, c.items, c.unit)
        for name, c in contenders.items()
    ]
    print_results(results, partitioning, console)
    if json_file is not None:
        rates = [result.flops / result.seconds for result in results]
        told = {
            result.name: {"seconds": result.seconds, "of_product": rate / rates[0]}
            for result, rate in zip(results, rates, strict=True)
        }
        platform = partitioning.mesh.devices.flat[0].platform
        with whole_files.replacing(json_file) as file:
            json.dump({"platform": platform, "results": told}, file, indent=2)
    return results


def _contenders(model, partitioning, batch, console):
    tower = model.module.tower
    rows, length = batch["decoder_target_tokens"].shape
    rng = jax.device_put(jax.random.key(0), partitioning.replicated)
    params = abstract_variables(model, partitioning, batch)
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    abstract = abstract_state(params, optimizer, partitioning)
    params = init_params(model, rng, batch, params, partitioning)
    # The one state: every train step gives its memory to the next.
    held = [fresh_state(params, optimizer, abstract)]
    del params
    # Without a pooling head, as in image-text models.
    module = tower.without_pooling().build()

    def forward(params, images):
        output: Any = module.apply({"params": params["encoder"]["tower"]}, images)
        return output.tokens

    def gradients(params, images):
        def loss(tower_params):
            tokens = forward({"encoder": {"tower": tower_params}}, images)
            return jnp.sum(jnp.square(tokens.astype(jnp.float32)))

        return jax.grad(loss)(params["encoder"]["tower"])

    def summed_loss(params, batch):
        return model.loss_fn(params, batch, None)[0]

    def compiled(name, function, *arguments, **options):
        console.print(f"compiling: {name}", style="dim")
        with partitioning.activate():
            return jax.jit(function, **options).lower(*arguments).compile()

    def reading(name, function, given, count, items=rows, unit="images"):
        step = compiled(name, function, abstract.params, given)
        return _Contender(lambda: step(held[0].params, given), count, items, unit)

    def train():
        held[0], metrics = step(held[0], batch, rng)
        return metrics

    images = batch["encoder_input_images"]
    update = steps.make_update(model, optimizer, partitioning)
    step = compiled("train step", update, abstract, batch, rng, donate_argnums=0)
    count = functools.partial(flops, params=abstract.params)
    # Each token is computed once, so that decoding costs what scoring does.
    decoded = count(model.score_batch, batch)
    # On one device; all are taken to be as fast.
    side = _SIDES.get(jax.default_backend(), _SIDE)
    product, count_of_one = matrix_product(side, tower.dtype)
    return {
        MATMUL: _Contender(product, count_of_one * partitioning.mesh.size),
        **{
            name: reading(name, function, images, count(function, images))
            for name, function in (
                ("tower forward", forward),
                ("tower forward and backward", gradients),
            )
        },
        "train step": _Contender(
            train, count(jax.grad(summed_loss), batch), rows, "images"
        ),
        "greedy decoding": reading(
            "greedy decoding",
            endless(model).predict_batch,
            batch,
            decoded,
            rows * length,
            "tokens",
        ),
    }


def endless(model: multimodal.ImageTextModel) -> multimodal.ImageTextModel:
    """The model, decoding greedily without ever ending."""

    def decode(init_cache, step_fn, *, eos_id, **options):
        del eos_id
        return decoding.greedy(init_cache, step_fn, eos_id=-1, **options)

    copied = copy.copy(model)
    copied.decode_fn = decode
    return copied


def matrix_product(side: int, dtype: Any) -> tuple[Callable[[], jax.Array], int]:
    """The product of two square matrices on one device, and its operations.

    Of random numbers: of equal ones a GPU computes it an eighth faster.
    """
    left, right = (
        jax.random.normal(key, (side, side), dtype)
        for key in jax.random.split(jax.random.key(0))
    )
    product = jax.jit(jnp.matmul).lower(left, right).compile()
    return lambda: product(left, right), 2 * side**3


def _batch(model, partitioning, batch_size, input_length, target_length):
    """Random images and tokens, without padding, on the devices."""
    random = np.random.default_rng(0)
    size = model.input_vocabulary.vocab_size

    def tokens(length):
        return random.integers(2, size, (batch_size, length)).astype(np.int32)

    targets = tokens(target_length)
    shape = (batch_size, *model.module.tower.image_size, 3)
    batch = {
        "encoder_input_images": random.integers(0, 256, shape, np.uint8),
        "encoder_input_tokens": tokens(input_length),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": np.ones_like(targets),
    }
    return {
        name: jax.device_put(array, partitioning.batch_sharding(array.ndim))
        for name, array in batch.items()
    }


def _interleaved(contenders, rounds):
    """Median seconds of each, after one run of each that is not counted."""
    samples = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, contender in contenders.items():
            began = time.perf_counter()
            jax.block_until_ready(contender.run())
            if i:
                samples[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in samples.items()}


def print_results(
    results: list[Measured],
    partitioning: Partitioning,
    console: rich.console.Console,
) -> None:
    """Prints a table of the results, of which the first is the matrix product."""
    mesh = partitioning.mesh
    device = mesh.devices.flat[0].device_kind
    rates = [result.flops / result.seconds for result in results]
    speeds = [
        f"{result.items / result.seconds:,.1f} {result.unit}" if result.items else ""
        for result in results
    ]
    columns = {
        "ms": [f"{result.seconds * 1e3:,.1f}" for result in results],
        "a second": speeds,
        "TFLOP/s": [f"{rate / 1e12:,.3f}" for rate in rates],
        "of the product's rate": [f"{rate / rates[0]:.1%}" for rate in rates],
    }
    names = [result.name for result in results]
    tables.print_table(console, names, columns, title=f"{mesh.size} x {device}")


def flops(function: Callable[..., Any], *arguments: Any, params: Any) -> int:
    """Operations of the matrix products of `function(params, *arguments)`.

    What is computed again, to save memory, is left out.
    """
    abstract = jax.eval_shape(lambda *x: x, params, *arguments)
    unnamed = jax.tree.map(lambda _: (), abstract)
    program = trace.trace(function, abstract, unnamed)
    return sum(
        step.flops * times
        for step, times in program.all_steps()
        if step.phase != "recomputed"
    )
