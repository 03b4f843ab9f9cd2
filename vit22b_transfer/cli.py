"""The `vit22b` command."""

import argparse
import contextlib
import importlib
import logging
import os
import pkgutil
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence

from vit22b_transfer import UserError
from vit22b_transfer.commands import plan, weights

# Nothing heavy is imported here: `vit22b --help` must answer at once.

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(_PACKAGE)
# Where gin files are looked for; "" is the current directory.
_SEARCH_PATHS = ("", _ROOT)

_RUNS = {
    "train": ("vit22b_transfer.training.train", "fine_tune"),
    "eval": ("vit22b_transfer.evaluation.evaluate", "evaluate_checkpoint"),
    "infer": ("vit22b_transfer.inference.infer", "infer_split"),
    "bench": ("vit22b_transfer.planning.bench", "measure"),
    "cache-features": ("vit22b_transfer.inference.cache_features", "cache_features"),
}

# The last is said on a machine without a GPU.
_STARTUP_NOTE = re.compile(
    r"WARNING: All log messages before absl|I0000 .*\.cc:\d+\]"
    r"|E0000 .*failed call to cuInit"
)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 if the work failed, 2 if the recipe or usage is wrong."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    args.overrides = [_override(parser, args, argument) for argument in rest]
    # TensorFlow's warnings are stack traces of what our errors say in a line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(format="vit22b: %(levelname)s: %(message)s")
    # As `python -m` does, so that the user's own `tasks` is found; then the
    # repository's, for an editable install.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if _ROOT not in sys.path:
        sys.path.append(_ROOT)
    code = _exit_code(args)
    if code and args.distributed:
        from vit22b_transfer.partitioning import processes

        processes.leave(code)
    return code


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vit22b",
        description="Fine-tune image-text models, evaluate them, and run inference.",
        epilog="Start with `vit22b demo`; `vit22b COMMAND --help` tells more. A run: "
        "vit22b train --gin_file=gin_configs/recipes/my_captions.gin "
        "--gin.MODEL_DIR='\"/path/to/model\"'",
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

    command = add("demo", _demo, "Run the main job on drawn scenes; needs no data.")
    command.add_argument("--out", default="vit22b_demo", help="directory for results")
    command.add_argument("--steps", type=int, help="training steps")
    command.add_argument("--seed", type=int, default=0)
    gin_epilog = "--gin.NAME=VALUE sets a macro or a parameter; repeat it as needed."
    for name, text in (
        ("train", "Fine-tune the model of a recipe."),
        ("eval", "Score a checkpoint with the metrics of the recipe's task."),
        ("infer", "Write predictions for a whole split as JSON lines."),
        ("cache-features", "Run a frozen tower once, for training without it."),
    ):
        command = add(name, _run, text, gin_epilog)
        _add_gin_file(command)
        command.add_argument(
            "--distributed",
            action="store_true",
            help="this is one of several processes that run this command together: "
            "see gin_configs/launch",
        )
    command = add(
        "bench", _run, "Measure this device, and a model's speed on it.", gin_epilog
    )
    command.add_argument(
        "--gin_file",
        action="append",
        default=["gin_configs/runs/bench.gin"],
        metavar="FILE",
        help="gin file of another tower, text model or mesh; may be repeated",
    )
    command = add("vocab", _vocab, "Train a SentencePiece vocabulary on captions.")
    command.add_argument("--out", required=True, help="file to write")
    command.add_argument("--vocab_size", type=int, required=True)
    command.add_argument(
        "captions", nargs="+", help="COCO or VQAv2 .json, .jsonl, or .txt files"
    )
    command = add("tasks", _tasks, "List the registered tasks and mixtures.")
    command.add_argument(
        "--import",
        dest="modules",
        action="append",
        metavar="MODULE",
        help="module that registers tasks (default: every module in ./tasks)",
    )
    weights.add_to(add)
    plan.add_to(add, _add_gin_file, _SEARCH_PATHS, _without_startup_notes)
    command = add("config", _config, "Show what a recipe resolves to.", gin_epilog)
    command.add_argument("action", choices=["show"])
    _add_gin_file(command)
    return parser


def _add_gin_file(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--gin_file",
        action="append",
        required=True,
        metavar="FILE",
        help="gin file, for example gin_configs/recipes/NAME.gin; may be repeated",
    )


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
    # gin appends to each message the configurables on the way.
    message = re.sub(r"\n  In call to configurable .*", "", str(error))
    if isinstance(error, UserError) and error.exit_code == 2:
        return message  # a recipe says itself where
    return f"{message} (--traceback shows where)"


@contextlib.contextmanager
def _without_startup_notes() -> Iterator[None]:
    """Context that drops the notes TensorFlow prints when it is imported and starts.

    They are written to the file descriptor before any log level is looked at.
    """
    with tempfile.TemporaryFile() as written:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written.read().decode(errors="replace").splitlines():
                if not _STARTUP_NOTE.match(line):
                    print(line, file=sys.stderr)


def _demo(args: argparse.Namespace) -> None:
    with _without_startup_notes():
        from vit22b_transfer.demo import demo

    demo.run(main, out=args.out, steps=args.steps, seed=args.seed)


def _run(args: argparse.Namespace) -> None:
    from vit22b_transfer.recipes import loading

    if args.distributed:
        from vit22b_transfer.partitioning import processes

        processes.join()  # before anything asks JAX for devices
    with _without_startup_notes():
        recipe = loading.read(args.gin_file, args.overrides, _SEARCH_PATHS)
        if "tensorflow" in sys.modules:
            from vit22b_transfer.data import streams

            streams.keep_tensorflow_off_accelerators()
    module, function = _RUNS[args.command]
    root = getattr(importlib.import_module(module), function)
    loading.install(recipe, root, _SEARCH_PATHS)()


def _config(args: argparse.Namespace) -> None:
    from vit22b_transfer.recipes import loading

    with _without_startup_notes():
        recipe = loading.read(args.gin_file, args.overrides, _SEARCH_PATHS)
    for line in loading.show(recipe):
        print(line)


def _vocab(args: argparse.Namespace) -> None:
    with _without_startup_notes():
        from vit22b_transfer.data import vocabularies

    made = vocabularies.train(args.captions, args.out, vocab_size=args.vocab_size)
    print(f"{args.out}: {made.vocab_size} pieces")


def _tasks(args: argparse.Namespace) -> None:
    with _without_startup_notes():
        from vit22b_transfer.data import tasks as registered

        for module in args.modules or _modules_in("tasks"):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name not in (module, module.partition(".")[0]):
                    raise
                raise UserError(
                    f"there is no module {module} in {os.getcwd()} or on Python's path."
                ) from error
    for line in registered.describe():
        print(line)


def _modules_in(folder: str) -> Iterator[str]:
    if not os.path.isdir(folder):
        raise UserError(
            f"there is no folder {folder} in {os.getcwd()}; go to where it is or name "
            "the modules with --import."
        )
    for module in pkgutil.iter_modules([folder]):
        yield f"{folder}.{module.name}"


if __name__ == "__main__":
    sys.exit(main())
