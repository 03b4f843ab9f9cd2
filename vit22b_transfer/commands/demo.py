"""`demo` of the command."""

from collections.abc import Callable, Sequence

from vit22b_transfer.commands.arguments import Add, without_startup_notes

# Nothing heavy is imported here: `vit22b --help` must answer at once.


def add_to(add: Add, main: Callable[[Sequence[str]], int]) -> None:
    """Adds the command, which runs others through `main`."""

    def run(args):
        with without_startup_notes():
            from vit22b_transfer.demo import demo

        demo.run(main, out=args.out, steps=args.steps, seed=args.seed)

    command = add("demo", run, "Run the main job on drawn scenes; needs no data.")
    command.add_argument("--out", default="vit22b_demo", help="directory for results")
    command.add_argument("--steps", type=int, help="training steps")
    command.add_argument("--seed", type=int, default=0)
