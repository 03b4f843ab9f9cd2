"""One training step in bfloat16 against the same step in float32.

Claim: the bfloat16 step takes at most 0.67x the float32 step (0.62x in processor time)
on a CPU whose bfloat16 matrix multiplication is at least twice as fast as its float32
one. Where it is not, no step can be; so the table gives the ratio of the matmul rates
of the same run as well.

Peer: the same step with products that are rounded as they are written, the form of
GPUs and TPUs (`models/products.py`). Full fine-tuning of a tower of B/16 width on 256
tokens and a text model of T5-v1.1-base width and vocabulary; AdamW; float32 parameters.

    python benchmarks/bfloat16_step.py [--tower-layers 4] [--text-layers 2] [--rounds 5]
"""

import functools

import interleave
import jax
import jax.numpy as jnp
import optax
import workload

from vit22b_transfer.models import products

GEMM = 2048


class Step:
    """A full fine-tuning step, compiled; every call advances the state it keeps."""

    def __init__(self, dtype, tower_layers, text_layers, batch_size):
        model = workload.build_model(dtype, tower_layers, text_layers)
        self.batch = workload.build_batch(batch_size)
        optimizer = optax.adamw(1e-3)
        params = workload.initial_params(model, self.batch)
        self.state = params, optimizer.init(params)

        def step(state, batch):
            params, moments = state
            (loss, metrics), grads = jax.value_and_grad(model.loss_fn, has_aux=True)(
                params, batch, None
            )
            grads = jax.tree.map(lambda g: g / metrics["loss"].count, grads)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        jitted = jax.jit(step, donate_argnums=0)
        self.compiled = jitted.lower(self.state, self.batch).compile()

    def __call__(self):
        self.state, loss = self.compiled(self.state, self.batch)
        loss.block_until_ready()

    @property
    def temp_megabytes(self):
        return self.compiled.memory_analysis().temp_size_in_bytes / 1e6


def gemm(dtype):
    x = jnp.ones((GEMM, GEMM), dtype)
    multiply = jax.jit(
        functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    )
    return lambda: multiply(x, x).block_until_ready()


def main():
    parser = interleave.arguments(__doc__, rounds=5)
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--text-layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    sizes = options.tower_layers, options.text_layers, options.batch
    steps = {
        "float32": Step(jnp.float32, *sizes),
        "bfloat16": Step(jnp.bfloat16, *sizes),
    }
    with products.as_on_accelerators():
        steps["bfloat16, rounded at once"] = Step(jnp.bfloat16, *sizes)
    matmuls = {f"matmul {d}": gemm(jnp.dtype(d)) for d in ("float32", "bfloat16")}
    samples = interleave.interleave(steps | matmuls, options.rounds)
    rows = []
    for name in [*steps, *matmuls]:
        base = "matmul float32" if name in matmuls else "float32"
        rows.append(
            [
                name,
                f"{interleave.median(samples[name], 'wall') * 1e3:.0f}",
                f"{interleave.median(samples[name], 'cpu') * 1e3:.0f}",
                f"{interleave.ratio(samples, name, base, 'wall'):.2f}",
                f"{interleave.ratio(samples, name, base, 'cpu'):.2f}",
                f"{steps[name].temp_megabytes:.0f}" if name in steps else "",
            ]
        )
    interleave.print_table(
        ["step", "wall ms", "cpu ms", "x float32", "(cpu)", "temp MB"], rows
    )
    interleave.print_conditions(options.rounds)


if __name__ == "__main__":
    main()
