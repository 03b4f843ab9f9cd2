"""A training step with a frozen tower against the sum of what it has to compute.

Claim: with clipping and gradient-norm logging on, the step costs at most 1.05x (tower
forward + the same step on given image tokens); the tower has no bytes of optimizer
state; the step's temporary memory is no more than that of the two parts.

The peer to avoid, in the table for its size: differentiating everything and setting
the tower's updates to zero, where the gradient norm is taken over all parameters.

    python benchmarks/frozen_step.py [--tower-layers 12] [--dtype bfloat16] [--rounds 9]
"""

import dataclasses
import functools
import statistics

import interleave
import jax
import jax.numpy as jnp
import workload

from vit22b_transfer.models import multimodal, vit
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, steps
from vit22b_transfer.training.state import TrainState

FROZEN = ("encoder/tower/.*",)
FROZEN_STEP, TOWER, DECODER = "frozen step", "tower forward", "step on tokens"


class Forward:
    """The tower alone, compiled; returns its tokens."""

    def __init__(self, config, params, batch):
        tower = vit.VisionTower(dataclasses.replace(config, pooling="none"))
        self.arguments = params, batch["encoder_input_images"]
        forward = jax.jit(lambda params, x: tower.apply({"params": params}, x).tokens)
        self.compiled = forward.lower(*self.arguments).compile()

    def __call__(self):
        return self.compiled(*self.arguments).block_until_ready()


class Step:
    """A compiled step; every call advances the state that it keeps."""

    def __init__(self, model, optimizer, params, batch):
        update = steps.make_update(model, optimizer, Partitioning(data=1, model=1))
        params = jax.tree.map(jnp.copy, params)  # the step reuses their memory
        state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))
        self.state, self.batch, self.rng = state, batch, jax.random.key(0)
        jitted = jax.jit(update, donate_argnums=0)
        self.compiled = jitted.lower(state, batch, self.rng).compile()

    def __call__(self):
        self.state, metrics = self.compiled(self.state, self.batch, self.rng)
        jax.block_until_ready(metrics)


def optimizer_megabytes(step, *, of_tower):
    """Size of the optimizer state, all of it or what belongs to the tower."""
    leaves = jax.tree_util.tree_leaves_with_path(step.state.opt_state)
    sizes = (
        leaf.nbytes
        for path, leaf in leaves
        if not of_tower or "tower" in jax.tree_util.keystr(path)
    )
    return sum(sizes) / 1e6


def main():
    parser = interleave.arguments(__doc__, rounds=5)
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--text-layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()

    optimizer = optimizers.adamw(1e-3, clip_norm=1.0)
    build = functools.partial(
        workload.build_model,
        jnp.dtype(options.dtype),
        options.tower_layers,
        options.text_layers,
        optimizer_def=optimizer,
    )
    model, everything = build(frozen=FROZEN), build()
    batch = workload.build_batch(options.batch)
    params = workload.initial_params(model, batch)
    optimizer = optimizers.freeze(optimizer, params, FROZEN)

    tower = Forward(model.module.tower, params["encoder"]["tower"], batch)
    tokens = batch | {multimodal.FEATURES: tower()}
    runs = {
        FROZEN_STEP: Step(model, optimizer, params, batch),
        TOWER: tower,
        DECODER: Step(model, optimizer, params, tokens),
        "all differentiated": Step(everything, optimizer, params, batch),
    }
    samples = interleave.interleave(runs, options.rounds)
    header = ["run", "wall ms", "cpu ms", "temp MB", "optimizer MB", "of the tower"]
    interleave.print_table(header, (row(name, runs, samples) for name in runs))
    for field in ("wall", "cpu"):
        print(
            f"frozen step / (tower forward + step on tokens), {field} time: "
            f"{cost(samples, field):.3f}"
        )
    interleave.print_conditions(options.rounds)


def row(name, runs, samples):
    cells = [
        name,
        f"{interleave.median(samples[name], 'wall') * 1e3:.0f}",
        f"{interleave.median(samples[name], 'cpu') * 1e3:.0f}",
        f"{runs[name].compiled.memory_analysis().temp_size_in_bytes / 1e6:.0f}",
    ]
    if name == TOWER:
        return [*cells, "", ""]
    sizes = (optimizer_megabytes(runs[name], of_tower=part) for part in (False, True))
    return [*cells, *(f"{size:.0f}" for size in sizes)]


def cost(samples, field):
    """The step's time by that of its parts, the median over the rounds."""
    return statistics.median(
        getattr(whole, field) / (getattr(first, field) + getattr(second, field))
        for whole, first, second in zip(
            samples[FROZEN_STEP], samples[TOWER], samples[DECODER], strict=True
        )
    )


if __name__ == "__main__":
    main()
