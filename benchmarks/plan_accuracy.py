"""What `vit22b plan` says against what the compiler and a real run take, on this CPU.

Three sizes, each in a process of its own. Planned: bytes at the worst moment of a step.
Compiled: arguments + outputs - aliased + temporaries of the true step. Resident: the
most memory the process held while it took two steps, less what it held before the
state was made.

    python benchmarks/plan_accuracy.py
"""

import argparse
import json
import resource
import subprocess
import sys
import types

import interleave
import jax
import jax.numpy as jnp
import workload

from vit22b_transfer.models import encoder_decoder, multimodal, vit
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.planning import devices, jobs, planner
from vit22b_transfer.training import optimizers

# Variant, layers, rows: as shipped for training at scale, scanned with remat per block.
SIZES = {
    "small": ("S/16", 6, 8),
    "base": ("B/16", 6, 8),
    "large": ("L/16", 6, 8),
}


def job_of(size: str) -> jobs.Job:
    """A tower of that size before two layers of T5-v1.1-base."""
    variant, depth, rows = SIZES[size]
    stacked = dict(scan_layers=True, remat="block")
    side = (workload.SIDE, workload.SIDE)
    tower = vit.vit22b_config(variant, depth=depth, image_size=side, **stacked)
    text = workload.build_text(jnp.float32, 2)
    vocabulary = types.SimpleNamespace(vocab_size=workload.VOCABULARY)
    model = multimodal.ImageTextModel(
        encoder_decoder.ImageTextModule(tower, text),
        vocabulary,
        vocabulary,
        optimizers.adamw(1e-4, weight_decay=0.05),
    )
    batch = jax.eval_shape(lambda: workload.build_batch(rows))
    return jobs.Job(model, batch, Partitioning(data=1, model=1))


def resident_bytes() -> int:
    """What this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(size: str) -> dict[str, float]:
    """GB planned, compiled, and held."""
    job = job_of(size)
    mesh = planner.planned(job.partitioning, 1)
    plan = planner.Plan(job.run(), mesh, devices.device("cpu"))
    compiled = jobs.compile_step(job, job.partitioning)
    memory = compiled.memory_analysis()
    assert memory is not None
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes

    _, abstract = jobs.abstract_step(job, job.partitioning)
    before = resident_bytes()
    new_state, window, batch, rng = jax.tree.map(_made, abstract)
    for _ in range(2):
        new_state, window = compiled(new_state, window, batch, rng)
        jax.block_until_ready(new_state)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    parameters = sum(count for count, _ in plan.run.count().values())
    return {
        "parameters": parameters / 1e6,
        "arguments": plan.arguments / 1e9,
        "planned": plan.total / 1e9,
        "compiled": total / 1e9,
        "resident": held / 1e9,
    }


def _made(array):
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jax.device_put(jnp.ones(array.shape, array.dtype), array.sharding)


def row(size: str) -> list[str]:
    """One line of the table: a process of its own."""
    command = [sys.executable, __file__, "--size", size]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        size,
        f"{found['parameters']:.0f} M",
        *(f"{found[name]:.3f}" for name in list(found)[1:]),
        f"{found['planned'] / found['compiled']:.3f}",
        f"{found['planned'] / found['resident']:.3f}",
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES)
    options = parser.parse_args()
    if options.size:
        print(json.dumps(measure(options.size)))
        return
    header = ["size (GB)", "parameters", "arguments", "planned", "compiled"]
    header += ["resident", "of compiled", "of resident"]
    interleave.print_table(header, (row(size) for size in SIZES))


if __name__ == "__main__":
    main()
