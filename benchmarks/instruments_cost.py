"""What the instruments cost: a step with them against a step without, in turns.

Claim: read every 100 steps, as gin_configs/runs/instruments.gin has it, they take at
most 2 % of the time of a training.

The step with instruments is another compiled program, taken once in so many steps, so
that its surplus is divided by them. Beside it stands what the spike guard adds to every
step.

    python benchmarks/instruments_cost.py [--tower-layers 4] [--batch 8] [--rounds 11]
"""

import interleave
import jax
import jax.numpy as jnp
import workload

from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import compiling, optimizers, spike_guard, steps
from vit22b_transfer.training.instruments import Instruments
from vit22b_transfer.training.state import (
    abstract_state,
    abstract_variables,
    fresh_state,
    init_params,
)

PLAIN, READ, GUARDED = "plain step", "step with instruments", "guarded step"
EVERY = Instruments().every
ONE_DEVICE = Partitioning(data=1, model=1)


class Step:
    def __init__(self, model, batch, *, instrumented=False, guard=None):
        rng = jax.device_put(jax.random.key(0), ONE_DEVICE.replicated)
        params = abstract_variables(model, ONE_DEVICE, batch)
        optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
        abstract = abstract_state(params, optimizer, ONE_DEVICE)
        fresh = init_params(model, rng, batch, params, ONE_DEVICE)
        self.state = fresh_state(fresh, optimizer, abstract)
        update = steps.make_update(
            model, optimizer, ONE_DEVICE, instrumented=instrumented
        )
        plain = steps.make_update(model, optimizer, ONE_DEVICE)
        window = compiling.empty_window(plain, abstract, batch, rng, ONE_DEVICE)
        if guard is not None:
            empty = spike_guard.empty_guard(50, ONE_DEVICE)
            window = {**window, spike_guard.KEY: empty}
        self.window = window
        self.arguments = batch, rng
        self.step = compiling.compile_train_step(
            steps.make_train_step(update, 50, guard=guard, instrumented=instrumented),
            abstract,
            window,
            *self.arguments,
            ONE_DEVICE,
            instrumented=instrumented,
        )

    def __call__(self):
        self.state, self.window, *told = self.step(
            self.state, self.window, *self.arguments
        )
        jax.block_until_ready((self.window, told))


def main():
    parser = interleave.arguments(__doc__, rounds=11)
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--text-layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    model = workload.build_model(
        jnp.dtype(options.dtype),
        options.tower_layers,
        options.text_layers,
        optimizer_def=optimizers.adamw(1e-4),
    )
    batch = jax.device_put(workload.build_batch(options.batch), ONE_DEVICE.replicated)
    runs = {
        PLAIN: Step(model, batch),
        READ: Step(model, batch, instrumented=True),
        GUARDED: Step(model, batch, guard=spike_guard.SpikeGuard()),
    }
    samples = interleave.interleave(runs, options.rounds)
    header = ["run", "wall ms", "cpu ms", "temp MB"]
    interleave.print_table(header, (row(name, runs, samples) for name in runs))
    for field in ("wall", "cpu"):
        surplus = interleave.ratio(samples, READ, PLAIN, field) - 1
        guarded = interleave.ratio(samples, GUARDED, PLAIN, field) - 1
        print(
            f"{field} time: a step with instruments takes {surplus:+.1%}, so every "
            f"{EVERY} steps {surplus / EVERY:+.3%} of a training; "
            f"the guard {guarded:+.1%} of every step"
        )
    interleave.print_conditions(options.rounds)


def row(name, runs, samples):
    return [
        name,
        f"{interleave.median(samples[name], 'wall') * 1e3:.0f}",
        f"{interleave.median(samples[name], 'cpu') * 1e3:.0f}",
        f"{runs[name].step.memory_analysis().temp_size_in_bytes / 1e6:.0f}",
    ]


if __name__ == "__main__":
    main()
