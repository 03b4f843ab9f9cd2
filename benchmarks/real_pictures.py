"""A tower on real pictures against scikit-learn, and a taught student against labels.

Claim: a small tower that is trained from nothing on a folder of pictures is right more
often than scikit-learn's classifiers on their pixels; and a smaller one that a teacher
teaches is right more often than the same one that learns from labels, as long and on
the same crops and blends, in each of several seeds. The tower, which is the teacher,
has no blends.

    python benchmarks/lay_out_pictures.py digits digits
    python benchmarks/real_pictures.py digits --side 8 --patch 4
    python benchmarks/real_pictures.py fashion --side 28 --patch 7 --flip \
        --steps 6000 --student-steps 6000 --limit 1000

Takes a folder of lay_out_pictures.py. Accuracies are of its validation split, after the
last step; nothing was chosen by them.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
import warnings

import interleave
import numpy as np
import PIL.Image

from vit22b_transfer.data import augmentation, class_lists, label_converters
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.models import vit
from vit22b_transfer.models.classifier import ClassificationModel, ClassifierModule
from vit22b_transfer.models.distillation import Distillation
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.recipes import shipped
from vit22b_transfer.training import inputs, optimizers
from vit22b_transfer.training.train import InitialCheckpoint, Periods, fine_tune

TASK, ONE_DEVICE = "pictures", Partitioning(data=1, model=1)
RULES = (("teacher/(.*)", r"\1"), (".*", None))
# Width and depth.
TEACHER, STUDENT = (96, 2), (24, 1)


def register(folder):
    """The task of a folder; its class names."""
    shipped.offer_tasks()
    from tasks.classification import register_classification

    splits = {name: str(folder / name) for name in ("train", "validation")}
    classes = folder / "classes.txt"
    register_classification(TASK, ClassFolderSource(splits, classes=str(classes)))
    return class_lists.read(classes).names


def optimizer(rate, steps):
    """AdamW up to a rate and down by a cosine."""
    schedule = optimizers.cosine(rate, total_steps=steps, warmup_steps=steps // 10)
    return optimizers.adamw(schedule, weight_decay=0.05)


def tower(size, args):
    """A tower in ViT-22B's form, of a width and a depth."""
    width, depth = size
    return vit.ViTConfig(
        width=width,
        depth=depth,
        mlp_dim=4 * width,
        num_heads=width // 12,
        patch_size=args.patch,
        image_size=(args.side, args.side),
        pooling="gap",
    )


def train(args, size, classes, seed, steps, *, mixup=None, teacher=None):
    """Accuracy in % of a classifier, and its directory."""
    taught = None
    if teacher is not None:
        taught = Distillation(tower(TEACHER, args), args.temperature)
    model = ClassificationModel(
        ClassifierModule(tower(size, args), classes),
        optimizer(args.rate, steps),
        label_converters.ImageLabelFeatureConverter,
        mixup=mixup,
        distillation=taught,
    )
    lengths = {"images": (args.side, args.side), "labels": 1}
    drawn = augmentation.Augmentation(crop_area=(args.crop, 1.0), flip=args.flip)
    directory = tempfile.mkdtemp(dir=args.work)
    result = fine_tune(
        model,
        model_dir=directory,
        data=inputs.TrainData(TASK, "train", lengths, args.batch, augmentation=drawn),
        eval_data=inputs.EvalData([TASK], "validation", lengths, args.batch),
        total_steps=steps,
        partitioning=ONE_DEVICE,
        initial=None if teacher is None else InitialCheckpoint(teacher, RULES),
        periods=Periods(log=max(steps // 10, 1), evaluate=steps, checkpoint=steps),
        seed=seed,
    )
    return 100 * result.metrics[f"eval/{TASK}/accuracy"], directory


def pixels_of(folder, names, limit):
    """Grey levels in [0, 1] and labels, of the first `limit` pictures of each class."""
    pixels, labels = [], []
    for number, name in enumerate(names):
        for path in sorted((folder / name).iterdir())[:limit]:
            picture = PIL.Image.open(path).convert("L")
            pixels.append(np.asarray(picture, np.float32).ravel() / 255)
            labels.append(number)
    return np.stack(pixels), np.array(labels)


def scikit_learn(folder, names, limit):
    """Accuracy in % of two classifiers of pixels, by name."""
    from sklearn import linear_model, svm

    pixels, labels = pixels_of(folder / "train", names, limit)
    held_out, expected = pixels_of(folder / "validation", names, None)
    found = {}
    for name, model in (
        ("logistic regression", linear_model.LogisticRegression(max_iter=300)),
        ("support vectors, RBF", svm.SVC(C=10.0)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that more iterations would fit better
            score = model.fit(pixels, labels).score(held_out, expected)
        found[f"{name}, {len(labels)} pictures"] = [100 * score]
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--patch", type=int, required=True)
    parser.add_argument("--steps", type=int, default=1200, help="of the teacher")
    parser.add_argument("--student-steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--crop", type=float, default=0.4, help="least area of crops")
    parser.add_argument("--mixup", type=float, default=1.0, help="alpha of students")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--limit", type=int, help="pictures per class, scikit-learn")
    args = parser.parse_args(arguments)
    args.folder = args.folder.resolve()
    names, began = register(args.folder), time.perf_counter()
    rows = scikit_learn(args.folder, names, args.limit)
    with tempfile.TemporaryDirectory() as args.work:
        rows |= trained(args, len(names))
    table = [
        [name, ", ".join(f"{x:.1f}" for x in found), f"{statistics.mean(found):.2f}"]
        for name, found in rows.items()
        if found
    ]
    interleave.print_table(["trained", "accuracy, %, by seed", "mean"], table)
    print(f"{time.perf_counter() - began:.0f} s")
    return rows


def trained(args, classes):
    """Accuracies in % by seed, of each way."""
    steps = args.student_steps
    accuracy, teacher = train(args, TEACHER, classes, 0, args.steps)
    rows = {f"tower, {args.steps} steps (the teacher)": [accuracy]}
    for name, options in (
        ("student, labels alone", {}),
        ("student, distilled", {"teacher": teacher}),
    ):
        found = [
            train(args, STUDENT, classes, 1 + seed, steps, mixup=args.mixup, **options)
            for seed in range(args.seeds)
        ]
        rows[f"{name}, {steps} steps"] = [accuracy for accuracy, _ in found]
    return rows


if __name__ == "__main__":
    main()
