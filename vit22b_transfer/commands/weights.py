"""Public weights in and out: `import`, `export` and `inspect` of the command."""

import argparse
import functools
import os

from vit22b_transfer import UserError
from vit22b_transfer.commands.arguments import Add

# Nothing heavy is imported here: `vit22b --help` must answer at once.

_JAX = "jax"


def add_to(add: Add) -> None:
    """Adds the commands; `add(name, run, text, epilog)` makes one."""
    command = add(
        "import",
        _import,
        "Make a checkpoint of public weights, to start training from.",
        "SOURCE is a directory with config.json and safetensors, a .safetensors or "
        ".npz file, or a checkpoint of T5X; beside these, one adapter in PEFT's "
        "format. Behind a recipe, --gin_file=OUT/model.gin "
        "makes it a run from OUT/checkpoint_0. A tower and a text model that were not "
        "trained together need training first; a PaliGemma can infer at once.",
    )
    command.add_argument(
        "source", nargs="+", help="weights; several, such as a tower and a text model"
    )
    command.add_argument("--out", required=True, help="directory to write")
    command.add_argument(
        "--family",
        action="append",
        default=[],
        help="what the source is, if it does not say; repeat it for each source",
    )
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the parameters (default: the source's)",
    )
    command.add_argument(
        "--image_size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="resample the position tables: one side, or height and width",
    )
    command.add_argument(
        "--vocab_size", type=int, help="resize the token table; new rows are the mean"
    )
    command.add_argument(
        "--scan_layers",
        action="store_true",
        help="stack layers, for scanned models",
    )
    command = add(
        "export",
        _export,
        "Write a checkpoint in the format of a public family.",
    )
    command.add_argument("checkpoint", help="directory of checkpoints, or one of them")
    command.add_argument("--out", required=True, help="directory to write")
    command.add_argument(
        "--format",
        required=True,
        help="family, such as hf-t5; a wrong one lists all. Or jax: programs that a "
        "process with JAX alone runs, of an import or the MODEL_DIR of a training",
    )
    command.add_argument(
        "--config",
        metavar="DIR",
        help="directory with the config.json of the family (default: FORMAT beside the "
        "checkpoint, where import puts it)",
    )
    command.add_argument(
        "--adapter",
        action="store_true",
        help="write the low-rank updates alone, in PEFT's format (default: merge them)",
    )
    command.add_argument(
        "--lora_alpha",
        type=float,
        help="alpha of the updates, for a checkpoint that T5X wrote",
    )
    command.add_argument(
        "--vocabulary", help="of --format jax: SentencePiece file, if none is with it"
    )
    command = add(
        "inspect", _inspect, "Show the tensors of weights, or how two sources differ."
    )
    command.add_argument("source", help="file or directory of weights, or a checkpoint")
    command.add_argument("other", nargs="?", help="show the differences to this one")
    command.add_argument(
        "--stats", action="store_true", help="mean, deviation, range, and NaN count"
    )


def _import(args: argparse.Namespace) -> None:
    from vit22b_transfer.weights import convert, import_plan
    from vit22b_transfer.weights.adapters import peft_adapters
    from vit22b_transfer.weights.families import table

    size = args.image_size
    if size and len(size) > 2:
        raise UserError(f"--image_size {size}: give one side, or height and width.")
    options = import_plan.ImportOptions(
        dtype=args.dtype,
        image_size=(size[0], size[-1]) if size else None,
        vocab_size=args.vocab_size,
        scan_layers=args.scan_layers,
    )
    adapters = [name for name in args.source if peft_adapters.is_adapter(name)]
    if len(adapters) > 1 or len(adapters) == len(args.source):
        raise UserError(
            f"{', '.join(adapters)}: import one adapter, together with the weights "
            "that it belongs to."
        )
    for line in convert.import_weights(
        [name for name in args.source if name not in adapters],
        args.out,
        table.FAMILIES,
        family_names=args.family,
        options=options,
        adapter=peft_adapters.open_adapter(adapters[0]) if adapters else None,
        open_tensors=_open_tensors,
    ):
        print(line)


def _open_tensors(source: str):
    """The tensors of a source, in whichever format."""
    from vit22b_transfer.checkpoints import legacy, stored_sizes
    from vit22b_transfer.weights.files import stored_tensors, tensor_files

    path = os.path.abspath(os.path.expanduser(source))
    if not legacy.is_legacy(path):
        return tensor_files.open_tensors(source)
    tensors = {
        name: stored_tensors.StoredTensor(
            tuple(array.shape),
            array.dtype,
            path,
            functools.partial(legacy.read_array, path, name),
        )
        for name, array in legacy.saved_arrays(path).items()
    }
    needed = sum(tensor.nbytes for tensor in tensors.values())
    stored_tensors.check_inflated(path, stored_sizes.of_directory(path), needed)
    return tensors


def _export(args: argparse.Namespace) -> None:
    if args.format == _JAX:
        _export_jax(args)
        return
    if args.vocabulary:
        raise UserError("--vocabulary is of --format jax; leave it out.")
    from vit22b_transfer.weights import export
    from vit22b_transfer.weights.families import table

    for line in export.export_weights(
        args.checkpoint,
        args.out,
        table.FAMILIES,
        family=args.format,
        config_folder=args.config,
        adapter=args.adapter,
        alpha=args.lora_alpha,
    ):
        print(line)


def _export_jax(args: argparse.Namespace) -> None:
    from vit22b_transfer.commands import serving

    for name in ("config", "adapter", "lora_alpha"):
        if getattr(args, name):
            raise UserError(f"--{name} would have no effect with --format jax.")
    for line in serving.export(args.checkpoint, args.vocabulary, args.out):
        print(line)


def _inspect(args: argparse.Namespace) -> None:
    from vit22b_transfer.weights import inspection

    tensors = _open_tensors(args.source)
    if args.other:
        other = _open_tensors(args.other)
        lines = inspection.differences(args.source, tensors, args.other, other)
    else:
        lines = inspection.inspect(tensors, stats=args.stats)
    for line in lines:
        print(line)
