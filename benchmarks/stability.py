"""Losses, attention logits and entropies over learning rates, with and without QK-norm.

Claim: without QK-norm attention logits grow with the learning rate and attention
collapses; with it the loss stays lower at high rates, and is less sensitive to the rate
(Wortsman et al. 2023). Parallel and sequential blocks reach the same loss.

What `vit22b demo --part recipe` shows, of more seeds. Started again, it
goes on where it was; with more --seeds or --rates it trains only those.

    python benchmarks/stability.py --out DIR
"""

import argparse
import os

import jax

from vit22b_transfer import cli
from vit22b_transfer.demo import stability


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="directory for all trainings")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=stability.STEPS)
    parser.add_argument("--rates", type=float, nargs="+", default=stability.RATES)
    parser.add_argument(
        "--sequential", type=float, nargs="*", default=stability.SEQUENTIAL_RATES
    )
    args = parser.parse_args()
    # Seeds share what is compiled.
    folder = os.path.join(os.path.abspath(args.out), "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    todo = stability.cells(args.rates, range(args.seeds), args.steps, args.sequential)
    stability.run(cli.main, todo, out=args.out)


if __name__ == "__main__":
    main()
