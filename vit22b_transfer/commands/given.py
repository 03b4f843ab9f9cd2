"""`caption` and `answer` of the command: images in, texts out, no recipe to write."""

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.commands import folders
from vit22b_transfer.commands.arguments import (
    GIN_EPILOG,
    Add,
    add_deterministic,
    add_shard,
    deterministic_files,
    shard_override,
    without_startup_notes,
)

# Nothing heavy is imported here: `vit22b --help` must answer at once.

_GIVEN_IMAGES = "gin_configs/runs/given_images.gin"
# Files of an import's text model: by the module that the family binds it to.
_TEXT_MODELS = {
    "prefix_lm": "gin_configs/models/prefix_lm.gin",
    "encoder_decoder": "gin_configs/models/image_text.gin",
}
_BATCH_SIZE = 16


def add_to(add: Add) -> None:
    """Adds the commands; `add(name, run, text, epilog)` makes one."""
    for name, text in (
        ("caption", "Caption images by a model of public weights, or one of your own."),
        ("answer", "Answer questions about images, by such a model."),
    ):
        command = add(name, _run, text, GIN_EPILOG)
        command.add_argument(
            "images",
            nargs="+",
            metavar="IMAGES",
            help="files, folders, patterns; lists (.jsonl, .csv, COCO's or VQAv2's "
            ".json); archives (.tar, .parquet); OpenAI's batch requests (.jsonl)",
        )
        command.add_argument(
            "--model",
            required=True,
            metavar="DIR",
            help="what `vit22b import` or `export` wrote, or the MODEL_DIR of a "
            "training",
        )
        if name == "answer":
            command.add_argument(
                "--answers",
                metavar="FILE.txt",
                help="answer with one of its lines, and nothing else",
            )
            command.add_argument(
                "--question",
                default="",
                help="asked of every image (default: a list's)",
            )
        add_output(command)
        command.set_defaults(gin_file=[], question="", distributed=False)


def add_output(command: argparse.ArgumentParser) -> None:
    """The arguments of given images that `infer RUN --images` has as well."""
    command.add_argument(
        "--prompt", help='such as "caption en" or "answer en {question}"'
    )
    command.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="a line for each image, in order; a run that was stopped goes on there "
        "(default: texts are only shown)",
    )
    command.add_argument(
        "--openai",
        metavar="FILE.jsonl",
        help="also write the answers as OpenAI's batches have them",
    )
    command.add_argument(
        "--images_root",
        metavar="DIR",
        help="what names in lists are relative to (default: each list's own)",
    )
    command.add_argument(
        "--image_file",
        metavar="PATTERN",
        help="the file of an image id of VQAv2, such as "
        "COCO_val2014_{image_id:012d}.jpg",
    )
    command.add_argument(
        "--vocabulary", help="SentencePiece file, if none is with them"
    )
    command.add_argument("--batch_size", type=int, help="images at a time")
    command.add_argument(
        "--paths_outside",
        action="store_true",
        help="names in lists may lead out of their folder",
    )
    add_shard(command)
    add_deterministic(command)


# Of `add_output`, what the inference of a recipe has no use for.
_OF_IMAGES = (
    "prompt out openai images_root image_file vocabulary batch_size paths_outside"
).split()


def check_unused(args: argparse.Namespace) -> None:
    """Raises a UserError if an argument of given images is set and no image is."""
    if unused := [f"--{name}" for name in _OF_IMAGES if getattr(args, name)]:
        raise UserError(
            f"without --images {', '.join(unused)} would have no effect. Name the "
            "images, or set what the recipe has for it, such as --gin.OUTPUT."
        )


def _run(args: argparse.Namespace) -> None:
    asked = args.command == "answer"
    run(args, args.model, args.images, asked=asked)


def run(
    args: argparse.Namespace, folder: str, images: list[str], *, asked: bool
) -> None:
    """Captions or answers of images by the model in a folder."""
    for name in ("out", "openai"):
        value = getattr(args, name)
        if value and not value.endswith(".jsonl"):
            raise UserError(f"--{name} {value}: a file whose name ends in .jsonl.")
    if args.shard and not args.out:
        raise UserError("--shard needs --out, the file that all shards fill.")
    with model_directory(folder) as directory:
        _run_in(args, directory, images, asked, named=folder)


def _run_in(
    args: argparse.Namespace, folder: str, images: list[str], asked: bool, named: str
) -> None:
    """`run` of a directory that restores. named: what the user calls it."""
    with without_startup_notes():
        files = model_files(folder, args.vocabulary)
        overrides = _overrides(args, folder, images, asked)
        overrides += [*args.overrides, *shard_override(args.shard)]
    with _output(args.out) as output:
        overrides.append(f"OUTPUT={literal(output)}")
        if getattr(args, "answers", None):
            files.append("gin_configs/models/answer_list.gin")
            overrides.append(f"ANSWERS={literal(os.path.abspath(args.answers))}")
        files += [*deterministic_files(args), *args.gin_file]
        recipe = as_command(files, overrides)
        if folder != named:  # what this command alone has imported will be gone
            recipe = recipe.replace(folder, "imported")
            recipe = f"vit22b import {shlex.quote(named)} --out imported && {recipe}"
        print(f"as a recipe: {recipe}", file=sys.stderr)
        # Without a file only the texts are for whoever reads the output.
        told = contextlib.redirect_stdout(sys.stdout if args.out else sys.stderr)
        with told:
            result = _infer(files, overrides, recipe)
        if result is None:
            return  # other shards are still at work
        if args.openai:
            from vit22b_transfer.inference import batch_requests

            batch_requests.write_responses(result.path, args.openai, model=named)
            print(f"written to {args.openai} as OpenAI's batch responses")
        if not args.out:
            _show(result.path)


def _infer(files: list[str], overrides: list[str], told: str) -> Any:
    from vit22b_transfer.inference import infer
    from vit22b_transfer.recipes import loading, shipped

    paths = shipped.search_paths()
    with without_startup_notes():
        from vit22b_transfer.data import streams

        streams.keep_tensorflow_off_accelerators()
        recipe = loading.read(files, overrides, paths)
        call = loading.install(recipe, infer.infer_split, paths)
    return call(recipe=told)


@contextlib.contextmanager
def model_directory(folder: str) -> Iterator[str]:
    """Context with the directory that a model is restored from.

    Weights in a public format, as `vit22b export` writes them, are imported for as long
    as the context lasts; any other folder is that directory itself.
    """
    from vit22b_transfer.weights import imported

    of_run = os.path.isfile(os.path.join(folder, folders.PREDICT))
    public = os.path.isfile(os.path.join(folder, "config.json"))
    if of_run or imported.is_import(folder) or not public:
        yield folder
        return
    from vit22b_transfer.weights import convert
    from vit22b_transfer.weights.families import table

    with tempfile.TemporaryDirectory(prefix="vit22b_imported_") as place:
        out = os.path.join(place, "imported")
        print(
            f"importing {folder} for this command alone; `vit22b import` does it once",
            file=sys.stderr,
        )
        with without_startup_notes():
            convert.import_weights([folder], out, table.FAMILIES)
        yield out


def model_files(folder: str, vocabulary: str | None) -> list[str]:
    """The gin files of the model in a folder; its vocabulary is used from now on.

    Raises:
      UserError: if the folder holds no model that could be used as it is.
    """
    from vit22b_transfer.checkpoints import identity, reading
    from vit22b_transfer.weights import imported
    from vit22b_transfer.weights.families import table

    variable = identity.VOCABULARY_VARIABLE
    predict = os.path.join(folder, folders.PREDICT)
    if os.path.isfile(predict):
        if vocabulary:
            raise UserError(
                f"{folder} has the vocabulary of its training; leave --vocabulary out."
            )
        folders.use_vocabulary(folder)
        return [predict]
    if imported.is_import(folder):
        arrays = reading.saved_arrays(reading.resolve(folder))
        found = imported.read(folder, arrays, table.FAMILIES)
        taken = vocabulary or found.vocabulary
        if taken is None:
            raise UserError(
                f"{folder} came without a SentencePiece file: give --vocabulary FILE, "
                "or --vocabulary bytes for a model that reads bytes."
            )
        taken = taken if taken == folders.BYTES else os.path.abspath(taken)
        folders.set_vocabulary(taken, 0, variable=variable)
        text = _TEXT_MODELS[found.text.text_binding.partition(".")[0]]
        return [_GIVEN_IMAGES, text, found.model_gin]
    raise UserError(
        f"{folder} is neither what `vit22b import` or `vit22b export` wrote nor the "
        f"MODEL_DIR of a run that left its {folders.PREDICT} there. For an older run "
        "name its recipe: `vit22b infer --help`."
    )


def _overrides(
    args: argparse.Namespace, folder: str, images: list[str], asked: bool
) -> list[str]:
    """What is said of the given images, as `--gin.NAME=VALUE` has it."""
    import jax

    from vit22b_transfer.data import given_images

    options: dict[str, Any] = {}
    if args.images_root:
        options["folder"] = args.images_root
    if args.image_file:
        options["image_file"] = args.image_file
    if args.paths_outside:
        options["paths_outside"] = True
    question = getattr(args, "question", "")
    source = given_images.GivenImagesSource(
        images, asked=asked, question=question, **options
    )
    size = args.batch_size or _batch_size(
        source.num_records(given_images.SPLIT), jax.device_count()
    )
    said = [
        f"MODEL_DIR={literal(os.path.abspath(folder))}",
        f"IMAGES={literal(tuple(images))}",
        f"BATCH_SIZE={size}",
    ]
    if asked:
        said.append("ASKED=True")
    if question:
        said.append(f"QUESTION={literal(question)}")
    if args.prompt:
        said.append(f"PROMPTS={literal((args.prompt,))}")
    return said + [f"given_images.task.{n}={literal(v)}" for n, v in options.items()]


def _batch_size(images: int, devices: int) -> int:
    """16, or less for few images; each device has as many."""
    size = _BATCH_SIZE
    while size // 2 >= images:
        size //= 2
    return -(-size // devices) * devices


@contextlib.contextmanager
def _output(out: str | None) -> Iterator[str]:
    if out:
        yield os.path.abspath(out)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield os.path.join(folder, "given_images.jsonl")


def as_command(files: list[str], overrides: list[str]) -> str:
    """The command that does the same, for those who go on with gin."""
    from vit22b_transfer.checkpoints import identity

    variable = identity.VOCABULARY_VARIABLE
    words = [f"--gin_file={file}" for file in files]
    words += [f"--gin.{override}" for override in overrides]
    value = shlex.quote(os.environ.get(variable) or folders.BYTES)
    return f"{variable}={value} vit22b infer " + " ".join(map(shlex.quote, words))


def literal(value: Any) -> str:
    """As gin reads it; with double quotes, which a shell's single ones may hold."""
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))},)"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _show(path: str) -> None:
    """The texts, each behind what its image is called."""
    with open(path, encoding="utf-8") as lines:
        for text in lines:
            line = json.loads(text)
            said = line.get("prediction", f"error: {line.get('error')}")
            name = line.get("image_id", "")
            told = f"{name}\t{said}"
            print("".join(c if c.isprintable() or c == "\t" else "?" for c in told))
    sys.stdout.flush()
