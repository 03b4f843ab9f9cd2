"""What refilling finished rows could gain where answers end early, at the most.

A batch is decoded until its longest answer ends; with finished rows refilled it would
take as many steps as its answers have on average. This measures what a batch costs
before its first step (tower, encoder) and for each step, and says the gain of ideal
refilling for lengths of answers: one that costs nothing, encodes new rows as cheaply as
whole batches, and never waits for the host. What can be had is less.

Lengths are drawn: captions of about 10.5 words (COCO's) at 1.25 tokens a word, and
VQAv2's answers, of which nine in ten are one word. Images that five questions share are
encoded once.

    python benchmarks/refilling.py [--tower_layers 12] [--layers 12] [--batch 16]
"""

import argparse

import interleave
import jax
import jax.numpy as jnp
import numpy as np
import workload

from vit22b_transfer.planning import bench

SHORT, LONG = 4, 20


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tower_layers", type=int, default=12)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    runs = {steps: _decoder(steps, args) for steps in (SHORT, LONG)}
    samples = interleave.interleave(
        {str(steps): run for steps, run in runs.items()}, args.rounds
    )
    short, long = (interleave.median(samples[str(n)], "cpu") for n in (SHORT, LONG))
    step = (long - short) / (LONG - SHORT)
    before = short - SHORT * step
    print(f"before the first step {before:.2f}, each step {step:.3f} processor-s")
    draw = np.random.default_rng(0)
    for name, lengths, share in (
        ("captions", captions(draw, 50_000), 1.0),
        ("answers, each image encoded", answers(draw, 50_000), 1.0),
        ("answers, five to an image", answers(draw, 50_000), 0.2),
    ):
        rows = lengths[: len(lengths) // args.batch * args.batch]
        longest = rows.reshape(-1, args.batch).max(axis=1).mean()
        now = before * share + longest * step
        ideal = before * share + lengths.mean() * step
        print(
            f"{name}: {lengths.mean():.1f} tokens, the longest of {args.batch} "
            f"{longest:.1f}; ideal refilling {now / ideal:.2f}x"
        )


def captions(draw, count):
    """Tokens of captions, their end included."""
    words = 8 + draw.gamma(1.6, 1.55, count)
    return np.ceil(words * 1.25).astype(int) + 1


def answers(draw, count):
    """Tokens of VQAv2's answers, their end included."""
    words = draw.choice([1, 2, 3, 4], p=[0.89, 0.07, 0.03, 0.01], size=count)
    pieces = draw.choice([1, 2, 3], p=[0.75, 0.2, 0.05], size=(count, 4))
    return (pieces * (np.arange(4) < words[:, None])).sum(axis=1) + 1


def _decoder(steps, args):
    """A run of tower, encoder and exactly `steps` steps."""
    model = bench.endless(
        workload.build_model(
            jnp.float32,
            args.tower_layers,
            args.layers,
            max_decode_length=steps,
        )
    )
    batch = workload.build_batch(args.batch)
    params = workload.initial_params(model, batch)
    compiled = jax.jit(model.predict_batch).lower(params, batch).compile()
    return lambda: compiled(params, batch).block_until_ready()


if __name__ == "__main__":
    main()
