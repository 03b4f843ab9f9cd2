"""The `vit22b` command."""

import argparse
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

from vit22b_transfer import UserError
from vit22b_transfer.commands import (
    check,
    config,
    data,
    demo,
    given,
    init,
    plan,
    results,
    runs,
    serving,
    suite,
    weights,
)
from vit22b_transfer.commands.arguments import GIN_NOTE

# Nothing heavy is imported here: `vit22b --help` must answer at once.


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 if the work failed.

    2 if the recipe or usage is wrong, 3 if numbers stopped being finite.
    """
    from vit22b_transfer.recipes import shipped

    args = parsed(sys.argv[1:] if argv is None else argv)
    # TensorFlow's warnings are stack traces of what our errors say in a line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(format="vit22b: %(levelname)s: %(message)s")
    # As `python -m` does, so that the user's own `tasks` is found; then the shipped.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    shipped.offer_tasks()
    code = _exit_code(args)
    if code and args.distributed:
        from vit22b_transfer.partitioning import processes

        processes.leave(code)
    return code


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, its --gin.NAME=VALUE as `overrides`.

    Wrong usage is told, and ends the process.
    """
    parser = _parser()
    # Apart from the others: argparse takes what holds a space for no option.
    overrides = [argument for argument in argv if argument.startswith("--gin.")]
    args, rest = parser.parse_known_args([a for a in argv if a not in overrides])
    args.overrides = [_override(parser, args, a) for a in [*rest, *overrides]]
    return args


def _exit_code(args: argparse.Namespace) -> int:
    """Runs the command; prints its error, if it has one."""
    try:
        args.run(args)
        return 0
    except KeyboardInterrupt:
        print("vit22b: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # what reads our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _message(error)
        if message is None or args.traceback or os.environ.get("VIT22B_TRACEBACK"):
            traceback.print_exc()
        else:
            print(f"vit22b: error: {message}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 1


class _Versions(argparse.Action):
    """Prints what is installed, without importing any of it, and ends."""

    def __call__(self, parser, namespace, values, option_string=None):
        for name in ("vit22b_transfer", "jax", "flax"):
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                version = "not installed"
            print(f"{name} {version}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vit22b",
        description="Fine-tune image-text models, evaluate them, and run inference.",
        epilog="Start with `vit22b demo`; `vit22b COMMAND --help` tells more. A run: "
        "vit22b train --gin_file=gin_configs/recipes/my_captions.gin "
        "--gin.MODEL_DIR='\"/path/to/model\"'",
    )
    parser.add_argument(
        "--version",
        action=_Versions,
        nargs=0,
        help="show the versions of this package, JAX and flax",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name, run, text, epilog=None):
        command = commands.add_parser(
            name, help=text, description=text, epilog=epilog, allow_abbrev=False
        )
        command.add_argument(
            "--traceback", action="store_true", help="show where an error was raised"
        )
        command.set_defaults(run=run, distributed=False)
        return command

    demo.add_to(add, main)
    given.add_to(add)
    serving.add_to(add)
    init.add_to(add)
    data.add_to(add)
    runs.add_to(add)
    suite.add_to(add)
    results.add_to(add)
    check.add_to(add)
    weights.add_to(add)
    plan.add_to(add)
    config.add_to(add)
    return parser


def _override(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argument: str
) -> str:
    """`NAME=VALUE` of the argument `--gin.NAME=VALUE`."""
    if not argument.startswith("--gin.") or not hasattr(args, "gin_file"):
        parser.error(f"unknown argument {argument}")
    override = argument.removeprefix("--gin.")
    if "=" not in override:
        parser.error(f"{argument} needs a value: {argument}=VALUE")
    return override


def _message(error: Exception) -> str | None:
    """What the user can do about an error, None if it is a fault of ours."""
    if not isinstance(error, UserError | OSError):
        return None
    message = re.sub(f"{GIN_NOTE}.*", "", str(error))
    if isinstance(error, UserError) and error.exit_code == 2:
        return message  # a recipe says itself where
    return f"{message} (--traceback shows where)"


if __name__ == "__main__":
    sys.exit(main())
