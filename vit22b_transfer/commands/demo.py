"""`demo` of the command."""

import argparse
from collections.abc import Callable, Sequence

from vit22b_transfer.commands.arguments import Add, without_startup_notes

# Nothing heavy is imported here: `vit22b --help` must answer at once.


def add_to(add: Add, main: Callable[[Sequence[str]], int]) -> None:
    """Adds the command, which runs others through `main`."""

    def run(args):
        _PARTS[args.part](args, main)

    command = add("demo", run, "Run the main job on drawn scenes; needs no data.")
    command.add_argument(
        "--part",
        choices=sorted(_PARTS),
        default="main",
        help="main: captions and questions (default); recipe: how stable training is "
        "with and without QK-norm, over a sweep of learning rates",
    )
    command.add_argument(
        "--out", help="directory for results (vit22b_demo, or vit22b_demo_recipe)"
    )
    command.add_argument("--steps", type=int, help="training steps of each training")
    command.add_argument("--seed", type=int, default=0)


def _main_job(args: argparse.Namespace, main: Callable[[Sequence[str]], int]) -> None:
    with without_startup_notes():
        from vit22b_transfer.demo import demo

    demo.run(main, out=args.out or "vit22b_demo", steps=args.steps, seed=args.seed)


def _recipe(args: argparse.Namespace, main: Callable[[Sequence[str]], int]) -> None:
    with without_startup_notes():
        from vit22b_transfer.demo import stability

    stability.demo(
        main, out=args.out or "vit22b_demo_recipe", steps=args.steps, seed=args.seed
    )


_PARTS = {"main": _main_job, "recipe": _recipe}
