"""What a recipe is run for: `train`, `eval`, `infer`, `cache-features` and others."""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.commands import folders, given, results
from vit22b_transfer.commands.arguments import (
    GIN_EPILOG,
    GIN_NOTE,
    Add,
    add_deterministic,
    add_gin_file,
    deterministic_files,
    shard_override,
    without_startup_notes,
)

# Nothing heavy is imported here: `vit22b --help` must answer at once.

# Command -> the function that a recipe configures for it.
FUNCTIONS = {
    "train": "vit22b_transfer.training.train.fine_tune",
    "eval": "vit22b_transfer.evaluation.evaluate.evaluate_checkpoint",
    "watch": "vit22b_transfer.evaluation.evaluate.evaluate_checkpoint",
    "infer": "vit22b_transfer.inference.infer.infer_split",
    "cache-features": "vit22b_transfer.inference.cache_features.cache_features",
    "bench": "vit22b_transfer.planning.bench.measure",
    "probe": "vit22b_transfer.experiments.probe.run_probe",
}
# Of `probe`: what each kind is; gin_configs/probes has a recipe of that name.
PROBES = {
    "linear": "a linear layer by SGD, at many rates at once",
    "logistic": "logistic regression at its optimum",
    "few_shot": "ridge regression on a few images of each class",
    "knn": "nearest neighbours",
    "attentive": "attention pooling of all tokens, learned",
    "zero_shot": "names of classes, by a model of image-text pairs",
    "segmentation_linear": "classes of pixels, a linear layer",
    "segmentation_upernet": "classes of pixels, UPerNet",
    "depth_linear": "depths of pixels, a linear layer",
    "depth_dpt": "depths of pixels, DPT",
    "video": "classes of clips, a transformer over frames",
}
# Kinds whose recipe configures another function than the others' `run_probe`.
_OWN_FUNCTIONS = {
    "segmentation_linear": "vit22b_transfer.experiments.segmentation.run_segmentation",
    "segmentation_upernet": "vit22b_transfer.experiments.segmentation.run_segmentation",
    "depth_linear": "vit22b_transfer.experiments.depth.run_depth",
    "depth_dpt": "vit22b_transfer.experiments.depth.run_depth",
    "video": "vit22b_transfer.experiments.video.run_video",
}
# Of `measure`: the function that a recipe configures, and what each kind is;
# gin_configs/measures has a recipe of that name.
MEASURES = {
    "accuracy": ("variants.accuracy", "of another split, or of a variant of ImageNet"),
    "several_labels": ("variants.several_labels", "of images that were judged again"),
    "calibration": ("reliability.calibrated", "before and after a temperature"),
    "selective": ("reliability.selected", "the least sure refused, or asked about"),
    "open_set": ("reliability.strangers", "images of no known class told from others"),
    "active_learning": ("reliability.to_label", "which images to label next"),
    "reliability_score": ("reliability_score.score", "one number of those before it"),
    "corruptions": ("corrupted.robustness", "error under ImageNet-C's corruptions"),
    "fairness": ("fair.parity", "accuracy of subgroups, and by parity"),
    "human_alignment": ("humans.alignment", "shape bias, errors beside people's"),
    "perceptual_similarity": ("perceptual.similarity", "which picture is nearer"),
    "saliency": ("saliency.overlays", "where the tower looks, drawn on images"),
}


def root_of(args: argparse.Namespace) -> Callable[..., Any]:
    """The function that the recipe of a command configures, imported."""
    kind = getattr(args, "kind", "")
    if args.command == "measure":
        path = f"vit22b_transfer.experiments.{MEASURES[kind][0]}"
    else:
        path = _OWN_FUNCTIONS.get(kind) or FUNCTIONS[args.command]
    module, _, function = path.rpartition(".")
    return getattr(importlib.import_module(module), function)


def add_to(add: Add) -> None:
    """Adds the commands; `add(name, run, text, epilog)` makes one."""
    for name, text in (
        ("train", "Fine-tune the model of a recipe."),
        ("eval", "Score a checkpoint with the metrics of the recipe's task."),
        ("watch", "Evaluate each new checkpoint of a run beside its training."),
        ("infer", "Write predictions for a whole split as JSON lines."),
        ("cache-features", "Run a tower or a teacher once, for training without it."),
    ):
        command = add(name, _run, text, GIN_EPILOG)
        has_folder = name != "cache-features"
        add_gin_file(command, required=not has_folder)
        if has_folder:
            command.add_argument(
                "folder",
                nargs="?",
                metavar="FOLDER",
                help="MODEL_DIR of a run, or a project of `vit22b init`, whose "
                f"{folders.RECIPE} is taken (default without --gin_file: this folder)",
            )
        if name == "train":
            command.add_argument(
                "--force",
                action="store_true",
                help="train even if the plan says that it does not fit",
            )
        if name == "eval":
            results.add_predictions(command)
        if name in ("eval", "watch"):
            add_deterministic(command)
        if name == "infer":
            command.add_argument(
                "--images",
                nargs="+",
                metavar="IMAGES",
                help="caption these by the model of the run in FOLDER, as `vit22b "
                "caption` does; the arguments below are of these",
            )
            given.add_output(command)
        if name != "watch":
            command.add_argument(
                "--distributed",
                action="store_true",
                help="this is one of several processes that run this command together: "
                "see gin_configs/launch",
            )
    command = add(
        "merge", _merge, "Merge what the shards of an inference have written."
    )
    command.add_argument("predictions", metavar="FILE.jsonl", help="their OUTPUT")
    command = add(
        "bench", _run, "Measure this device, and a model's speed on it.", GIN_EPILOG
    )
    command.add_argument(
        "--gin_file",
        action="append",
        default=["gin_configs/runs/bench.gin"],
        metavar="FILE",
        help="gin file of another tower, text model or mesh; may be repeated",
    )
    command.add_argument(
        "--compare-settings",
        dest="compare",
        action="store_true",
        help="measure a ViT scanned and unrolled, with more and less kept for the "
        "backward pass, on GPUs under flags of XLA; and say which is fastest",
    )

    measures = {kind: what for kind, (_, what) in MEASURES.items()}
    for name, text, kinds in (
        (
            "probe",
            "Judge a frozen tower by a probe on its features, which are computed once.",
            PROBES,
        ),
        (
            "measure",
            "Measure how far a frozen tower, and a head that a probe kept, can be "
            "relied on.",
            measures,
        ),
    ):
        command = add(name, _run, text, GIN_EPILOG)
        command.add_argument(
            "kind",
            choices=kinds,
            action=_Kind,
            const=f"{name}s",
            help="; ".join(f"{kind}: {what}" for kind, what in kinds.items()),
        )
        add_gin_file(command, required=False)


def _merge(args: argparse.Namespace) -> None:
    from vit22b_transfer.inference import prediction_shards

    summary = prediction_shards.merge_file(args.predictions)
    print(f"{summary['num_examples']} predictions in {args.predictions}")


def _plan(arguments: Mapping[str, Any], force: bool) -> None:
    """Says what the training will take; a UserError if it cannot fit."""
    import jax

    from vit22b_transfer.host import progress
    from vit22b_transfer.planning import ahead

    console = progress.console(quiet=jax.process_index() > 0)
    for line in ahead.check(arguments, force=force):
        console.print(line, markup=False)


def _recipe(args: argparse.Namespace, paths: Sequence[str]) -> Any:
    """The recipe of --gin_file, or of the folder, with what the command line sets."""
    from vit22b_transfer.recipes import loading

    files, behind = args.gin_file, deterministic_files(args)
    overrides = [*args.overrides, *shard_override(getattr(args, "shard", None))]
    folder = getattr(args, "folder", None)
    if folder is None and (files or not hasattr(args, "folder")):
        if hasattr(args, "folder") and os.path.isfile(folders.RECIPE):
            print(
                f"vit22b: note: {folders.RECIPE} of this folder is not read, since "
                "--gin_file is given; name this folder, '.', to take both",
                file=sys.stderr,
            )
        return loading.read([*files, *behind], overrides, paths)
    files = [folders.recipe_of(folder), *files, *behind]
    folders.use_vocabulary(folder or "")
    unset = loading.read(files, overrides, paths).required()
    overrides = [*folders.opened(folder or "", unset), *overrides]
    return loading.read(files, overrides, paths)


class _Kind(argparse.Action):
    """Puts the recipe of a kind, in the folder `const`, before the other gin files."""

    def __call__(self, parser, namespace, values, option_string=None):
        recipe = f"gin_configs/{self.const}/{values}.gin"
        namespace.gin_file = [recipe, *namespace.gin_file]
        namespace.kind = values


def _compare_settings(args: argparse.Namespace) -> None:
    from vit22b_transfer.planning import bench_settings
    from vit22b_transfer.recipes import shipped

    recipe = _recipe(args, shipped.search_paths())
    _, tower, _ = recipe.statements()["TOWER"]
    # The first file is the command's own.
    files = [f"--gin_file={name}" for name in args.gin_file[1:]]
    given = [*files, *(f"--gin.{override}" for override in args.overrides)]
    name = str(tower).removeprefix("@").removesuffix("()")
    bench_settings.compare(given, name, shipped.folder())


def _run(args: argparse.Namespace) -> None:
    from vit22b_transfer.recipes import loading, shipped

    if args.command == "eval" and results.asked(args):
        results.score(args)
        return
    if getattr(args, "images", None):
        if not args.folder:
            raise UserError("--images needs the FOLDER of a run, whose model is taken.")
        given.run(args, args.folder, args.images, asked=False)
        return
    if getattr(args, "compare", False):
        _compare_settings(args)
        return
    if args.command == "infer":
        given.check_unused(args)
    if args.distributed:
        from vit22b_transfer.partitioning import processes

        processes.join()  # before anything asks JAX for devices
    paths = shipped.search_paths()
    with without_startup_notes():
        recipe = _recipe(args, paths)
        if "tensorflow" in sys.modules:
            from vit22b_transfer.data import streams

            streams.keep_tensorflow_off_accelerators()
    root = root_of(args)
    call = loading.install(recipe, root, paths)
    if args.command == "infer":
        told = given.as_command(list(recipe.files), list(recipe.overrides))
        call = functools.partial(call, recipe=told)
    if args.command == "train":
        call = functools.partial(call, run_files=folders.of_run(recipe, root))
    if args.command == "train" and (said := loading.trial(recipe, paths)):
        import jax

        from vit22b_transfer.host import progress

        console = progress.console(quiet=jax.process_index() > 0)
        console.print(said, markup=False)
    if args.command == "train":
        _plan(loading.arguments(recipe, root, paths), args.force)
    if args.command == "watch":
        from vit22b_transfer.evaluation import watching

        run = loading.arguments(recipe, root, paths)["output_dir"]
        call = functools.partial(watching.watch, run, call)
    try:
        call()
    except UserError as error:
        from vit22b_transfer.data.records import MissingSplitError

        if not isinstance(error, MissingSplitError):
            raise
        problem = str(error).partition(GIN_NOTE)[0]
        advice = loading.other_data(recipe, root, error.split)
        raise UserError(f"{problem} {advice}".rstrip()) from error
