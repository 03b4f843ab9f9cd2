"""What a GPU reaches in towers, training steps and decoding, by setting.

Claim (H100, H200): a training step of blocks as wide as ViT-22B's at 60 % of the peak
in bfloat16, of g/14 at 50 %; forward So400m/14 at 50 %, B/16 at 40 %; greedy decoding
reads its weights and keys at 60 % of the memory's bandwidth.

Counted are the operations of matrix products that the model needs; rematerialisation is
none. Beside the peak stands the matrix product of 8192 x 8192 x 8192 of random numbers,
measured in the same rounds. `memory` is what the compiled program needs at once. The
programs are compiled some at a time, then measured one after the other. The first cases
say the most.

    python benchmarks/gpu_speed.py [--only g/14] [--rounds 5] [--peak 989e12]
    python benchmarks/gpu_speed.py --small     any device, tiny models: does it run?
"""

import argparse
import concurrent.futures
import dataclasses
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit22b_transfer.models import (
    classifier,
    encoder_decoder,
    gemma,
    multimodal,
    prefix_lm,
    t5,
    vit,
)
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.planning import bench
from vit22b_transfer.training import optimizers, state, steps

CLASSES, DECODED = 1000, 64
MEASURED_STEPS = 4
# Programs that are compiled side by side; nothing is measured meanwhile.
TOGETHER = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: a job, a tower or text model, its settings."""

    job: str
    name: str
    batch: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """As the table names it."""
        settings = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.name} {self.job}, batch {self.batch}, {settings}".rstrip(", ")


EINSUM = {"attention_form": "einsum"}
FUSED = {"fused_projections": True}
SCAN = {"scan_layers": True}
CASES = (
    Case("forward", "So400m/14", 128),
    Case("train", "22B/14", 64, {"depth": 2}),
    Case("train", "g/14", 128, SCAN | {"remat": "block"}),
    Case("decode", "base", 64),
    Case("train", "22B/14", 64, {"depth": 2} | FUSED),
    Case("train", "g/14", 64, SCAN),
    Case("decode", "gemma-2b", 32),
    Case("forward", "B/16", 256),
    Case("train", "g/14", 64),
    Case("train", "22B/14", 64, {"depth": 2} | EINSUM),
    Case("forward", "So400m/14", 128, EINSUM),
    Case("train", "B/16", 256),
    Case("train", "g/14", 128, {"remat": "dots"}),
    Case("forward", "B/16", 256, EINSUM),
    Case("forward", "B/16", 256, FUSED),
    Case("train", "g/14", 64, EINSUM),
)
SMALL = (
    Case("forward", "Ti/16", 2, {"image_size": (32, 32)}),
    Case("train", "Ti/16", 2, {"depth": 1, "image_size": (32, 32)} | FUSED),
    Case("decode", "small", 2),
)


def main() -> None:
    """Prints a line per case as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose title has this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s in bfloat16")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes/s")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    cases = [case for case in SMALL if args.small] or list(CASES)
    cases = [case for case in cases if args.only in case.title]
    partitioning = Partitioning()
    product = bench.matrix_product(256 if args.small else 8192, jnp.bfloat16)
    for i in range(0, len(cases), TOGETHER):
        some = cases[i : i + TOGETHER]
        with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
            programs = [pool.submit(build, case, partitioning) for case in some]
        for case, program in zip(some, programs, strict=True):
            try:
                print(measured(case, program.result(), product, args), flush=True)
            except Exception as error:
                traceback.print_exc()
                print(f"| {case.title} | failed: {type(error).__name__} |", flush=True)


@dataclasses.dataclass
class Program:
    """A compiled program, how its arguments are made, and what it does in one run.

    flops: of matrix products; read: bytes that it has to read; items: images or tokens.
    """

    compiled: jax.stages.Compiled
    start: Callable[[], tuple]
    flops: int
    read: int
    items: int
    compile_seconds: float = 0.0


def build(case: Case, partitioning: Partitioning) -> Program:
    """The compiled program of a case."""
    began = time.perf_counter()
    make = decoder if case.job == "decode" else tower
    program = make(case, partitioning)
    program.compile_seconds = time.perf_counter() - began
    return program


def tower(case, partitioning):
    """Forward pass, or training step with AdamW, of a tower with a head to classes."""
    config = vit.vit22b_config(case.name, dtype=jnp.bfloat16, **case.settings)
    model = classifier.ClassificationModel(
        classifier.ClassifierModule(config, CLASSES),
        optimizers.adamw(learning_rate=1e-4, clip_norm=1.0),
    )
    random = np.random.default_rng(0)
    shape = (case.batch, *config.image_size, 3)
    batch = {
        "encoder_input_images": random.integers(0, 256, shape, np.uint8),
        "labels": random.integers(0, CLASSES, (case.batch, 1)).astype(np.int32),
        "label_weights": np.ones((case.batch, 1), np.float32),
    }
    abstract_params, optimizer, abstract = abstract_of(model, batch, partitioning)
    rng = jax.random.key(0)
    if case.job == "forward":

        def forward(params, batch):
            return model.predict_batch(params, batch)

        return Program(
            jax.jit(forward).lower(abstract_params, batch).compile(),
            lambda: (*fresh(model, batch, partitioning), jax.device_put(batch)),
            bench.flops(forward, batch, params=abstract_params),
            0,
            case.batch,
        )

    def loss(params, batch):
        return model.loss_fn(params, batch, None)[0]

    update = steps.make_update(model, optimizer, partitioning)
    step = jax.jit(update, donate_argnums=0).lower(abstract, batch, rng).compile()

    def start():
        (params,) = fresh(model, batch, partitioning)
        begun = state.fresh_state(params, optimizer, abstract)
        return begun, jax.device_put(batch), rng

    count = bench.flops(jax.grad(loss), batch, params=abstract_params)
    return Program(step, start, count, 0, case.batch)


def decoder(case, partitioning):
    """Greedy decoding of `DECODED` tokens without an end, from the tokens of B/16."""
    picture = vit.vit22b_config("B/16", dtype=jnp.bfloat16)
    form: Any = encoder_decoder.ImageTextModule
    options: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    if case.name.startswith("gemma"):
        form, text = prefix_lm.PrefixLMModule, gemma.gemma_config(case.name, **options)
    else:
        text = t5.t5_config(case.name, vocab_size=32128, **options)
    vocabulary = bench.Vocabulary(text.vocab_size)

    model = multimodal.ImageTextModel(form(picture, text), vocabulary, vocabulary)
    model = bench.endless(model)
    random = np.random.default_rng(0)
    inputs = random.integers(2, 1000, (case.batch, 16)).astype(np.int32)
    targets = random.integers(2, 1000, (case.batch, DECODED)).astype(np.int32)
    batch = {
        "encoder_input_images": random.integers(
            0, 256, (case.batch, *picture.image_size, 3), np.uint8
        ),
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": targets,
        "decoder_loss_weights": np.ones_like(targets),
    }
    abstract_params = state.abstract_variables(model, partitioning, batch)
    compiled = jax.jit(model.predict_batch).lower(abstract_params, batch).compile()
    read = sum(
        leaf.size * leaf.dtype.itemsize
        for name in ("decoder", "token_embedder")
        for leaf in jax.tree.leaves(abstract_params.get(name, {}))
    )
    return Program(
        compiled,
        lambda: (*fresh(model, batch, partitioning), jax.device_put(batch)),
        bench.flops(model.score_batch, batch, params=abstract_params),
        (read + keys_and_values(text, case.batch)) * DECODED,
        case.batch * DECODED,
    )


def keys_and_values(text, batch) -> int:
    """Bytes of the keys and values of the 196 image tokens and 16 of the prompt."""
    heads = getattr(text, "num_kv_heads", text.num_heads)
    layers = getattr(text, "depth", 0) or text.num_decoder_layers
    return 2 * 2 * batch * layers * heads * text.head_dim * (196 + 16)


def abstract_of(model, batch, partitioning):
    """Abstract parameters, the optimizer, the abstract state."""
    params = state.abstract_variables(model, partitioning, batch)
    optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
    return params, optimizer, state.abstract_state(params, optimizer, partitioning)


def fresh(model, batch, partitioning):
    """Fresh parameters, alone in a tuple."""
    params = state.abstract_variables(model, partitioning, batch)
    rng = jax.random.key(0)
    return (state.init_params(model, rng, batch, params, partitioning),)


def measured(case, program, product, args) -> str:
    """A row: what one run takes, as fractions of the product's rate and of the peak."""
    arguments = program.start()
    updates = case.job == "train"
    run, flops = product
    samples: dict[str, list[float]] = {"case": [], "product": []}
    for i in range(args.rounds + 1):
        for name in samples:
            began = time.perf_counter()
            for _ in range(MEASURED_STEPS):
                if name == "product":
                    out = run()
                else:
                    out = program.compiled(*arguments)
                    if updates:
                        arguments = (out[0], *arguments[1:])
            jax.block_until_ready(out)
            if i:
                passed = time.perf_counter() - began
                samples[name].append(passed / MEASURED_STEPS)
    seconds, reference = (statistics.median(samples[name]) for name in samples)
    rate = program.flops / seconds
    memory = program.compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    cells = [
        case.title,
        f"{seconds * 1e3:.2f} ms",
        f"{program.items / seconds:,.0f} a second",
        f"{rate / 1e12:.1f} TFLOP/s",
        f"{rate * reference / flops:.1%} of the product's {flops / reference:.3g}",
        f"{rate / args.peak:.1%} of the peak",
        f"{needed / 2**30:.1f} GiB",
        f"compiled in {program.compile_seconds:.0f} s",
    ]
    if program.read:
        cells.append(f"{program.read / seconds / args.bandwidth:.1%} of the bandwidth")
    stats = jax.devices()[0].memory_stats()
    if stats:
        cells.append(f"{stats['peak_bytes_in_use'] / 2**30:.1f} GiB at most so far")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
