"""`serve` of the command: a model behind a local page and JSON endpoints."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.commands import given
from vit22b_transfer.commands.arguments import GIN_EPILOG, Add, without_startup_notes

# Nothing heavy is imported here: `vit22b --help` must answer at once.

_SERVE = "gin_configs/runs/serve.gin"
_EXPORT = "gin_configs/runs/export_jax.gin"
_PORT, _BATCH_SIZE, _QUEUE = 8000, 16, 64


def add_to(add: Add) -> None:
    """Adds the command; `add(name, run, text, epilog)` makes one."""
    command = add(
        "serve",
        _run,
        "Serve a model on this machine: a page to drop images on, and JSON endpoints.",
        GIN_EPILOG,
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help="what `vit22b import` or `export` wrote, or the MODEL_DIR of a training",
    )
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: this machine alone)",
    )
    command.add_argument(
        "--port", type=int, default=_PORT, help=f"default: {_PORT}; 0: a free one"
    )
    command.add_argument(
        "--prompt",
        action="append",
        help='such as "caption en"; again for questions: "answer en {question}"',
    )
    command.add_argument(
        "--vocabulary", help="SentencePiece file, if none is with the model"
    )
    command.add_argument(
        "--batch_size",
        type=int,
        default=_BATCH_SIZE,
        help=f"the most images at a time (default: {_BATCH_SIZE})",
    )
    command.add_argument(
        "--queue",
        type=int,
        default=_QUEUE,
        help=f"requests that may wait; more are told to come again (default: {_QUEUE})",
    )
    command.set_defaults(gin_file=[])


def _run(args: argparse.Namespace) -> None:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
        import werkzeug  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"`vit22b serve` needs {error.name}, which is not installed: "
            "pip install 'vit22b_transfer[serve]'."
        ) from error
    from vit22b_transfer.host import progress

    if args.queue < 1:
        raise UserError(f"--queue {args.queue}: at least one request has to wait.")
    console = progress.console()
    with without_startup_notes():
        from vit22b_transfer.serving import app, limits, server

    local = limits.is_loopback(args.host)
    with (
        server.bound_socket(args.host, args.port) as bound,
        given.model_directory(args.model) as args.model,
    ):
        if not local:
            print(
                f"vit22b: warning: --host {args.host}: whoever reaches this machine "
                "over the network can send it images and questions, without a password "
                "and unencrypted. Leave --host out, or stand behind a proxy that has "
                "both.",
                file=sys.stderr,
            )
        predictor = load(args)
        predictor.compile(console)
        served = app.App(predictor, queue=args.queue, local=local)
        server.run(served, bound, console)


def load(args: argparse.Namespace):
    """The `serving.predictor.Predictor` of the arguments."""
    from vit22b_transfer.serving import predictor

    overrides = [f"BATCH_SIZE={args.batch_size}"]
    if args.prompt:
        overrides.append(f"PROMPTS={given.literal(tuple(args.prompt))}")
    overrides += args.overrides
    call = _installed(args.model, args.vocabulary, _SERVE, overrides, predictor.load)
    return call()


def export(folder: str, vocabulary: str | None, out: str) -> list[str]:
    """Writes the model of a folder for processes that have JAX alone; lines to show."""
    from vit22b_transfer.serving import artifacts

    overrides = [f"OUTPUT={given.literal(os.path.abspath(out))}"]
    with given.model_directory(folder) as directory:
        call = _installed(directory, vocabulary, _EXPORT, overrides, artifacts.write)
        return [f"wrote {call()}; {artifacts.MANIFEST} there says how it is called"]


def _installed(
    folder: str,
    vocabulary: str | None,
    run: str,
    overrides: list[str],
    root: Callable[..., Any],
) -> Callable[..., Any]:
    """`root` with its arguments bound, of the model in a folder."""
    from vit22b_transfer.recipes import loading, shipped

    with without_startup_notes():
        files = [*given.model_files(folder, vocabulary), run]
        model = f"MODEL_DIR={given.literal(os.path.abspath(folder))}"
        from vit22b_transfer.data import streams

        streams.keep_tensorflow_off_accelerators()
        paths = shipped.search_paths()
        recipe = loading.read(files, [model, *overrides], paths)
        return loading.install(recipe, root, paths)
