"""A tower on real pictures against scikit-learn, and a taught student against labels.

Claim: a small tower that is trained from nothing on a folder of pictures is right more
often than scikit-learn's classifiers on their pixels; and a smaller one that a teacher
teaches is right more often than the same one that learns from labels, as long and on
the same crops and blends, in the mean of several seeds. The tower, which is the
teacher, has no blends.

    python benchmarks/lay_out_pictures.py digits digits
    python benchmarks/real_pictures.py digits --side 8 --patch 4
    python benchmarks/real_pictures.py fashion --side 28 --patch 7 --flip \
        --steps 6000 --student-steps 6000 --limit 1000

Takes a folder of lay_out_pictures.py, which it holds in memory; random crops are of the
area of `Augmentation`, but square. Accuracies are of the validation split, after the
last step. How long, how fast and on which crops students learn was chosen by a few
trials on the digits, by that split, for both alike.
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
import types
import warnings

import interleave
import jax
import numpy as np
import PIL.Image

from vit22b_transfer.data import label_converters
from vit22b_transfer.models import vit
from vit22b_transfer.models.classifier import ClassificationModel, ClassifierModule
from vit22b_transfer.models.distillation import Distillation
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.train import InitialCheckpoint, Periods, fine_tune

ONE_DEVICE = Partitioning(data=1, model=1)
RULES = (("teacher/(.*)", r"\1"), (".*", None))
# Width and depth.
TEACHER, STUDENT = (96, 2), (24, 1)


# Rows of a batch that is evaluated.
MOST_ROWS = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures and labels in memory, in place of `inputs.EvalData`."""

    images: np.ndarray
    labels: np.ndarray
    tasks: tuple[str, ...] = ("pictures",)
    split: str = "validation"

    def batches(self, task, model, partitioning):
        for start in range(0, len(self.labels), MOST_ROWS):
            rows = slice(start, start + MOST_ROWS)
            features = batch_of(self.images[rows], self.labels[rows])
            yield types.SimpleNamespace(features=features)


@dataclasses.dataclass(frozen=True, eq=False)
class Crops:
    """Random crops of `Pictures`, in place of `inputs.TrainData`.

    They are a function of seed and step. least: area of a crop, as a share of all.
    """

    pictures: Pictures
    batch_size: int
    least: float
    flip: bool

    def batches(self, model, partitioning, *, seed, start_step):
        return Stream(self, seed, start_step)

    def drawn(self, seed, step):
        rng, all_of = np.random.default_rng([seed, step]), self.pictures
        rows = rng.integers(0, len(all_of.labels), self.batch_size)
        images = np.stack([self._cropped(all_of.images[row], rng) for row in rows])
        return batch_of(images, all_of.labels[rows])

    def _cropped(self, image, rng):
        side = len(image)
        part = side * np.sqrt(rng.uniform(self.least, 1.0))
        left, top = rng.uniform(0.0, side - part, 2)
        box = (left, top, left + part, top + part)
        resized = PIL.Image.fromarray(image).resize(
            (side, side), PIL.Image.Resampling.BILINEAR, box
        )
        image = np.asarray(resized)
        return image[:, ::-1] if self.flip and rng.random() < 0.5 else image


class Stream:
    def __init__(self, crops, seed, step):
        self._crops, self._seed, self._step = crops, seed, step
        self.counters = types.SimpleNamespace(counts=lambda: {})

    def __next__(self):
        self._step += 1
        return self._crops.drawn(self._seed, self._step - 1)

    def close(self):
        pass


def batch_of(images, labels):
    """What the converter of labelled images makes, on the device."""
    batch = {
        "encoder_input_images": images,
        "labels": labels[:, None].astype(np.int32),
        "label_weights": np.ones((len(labels), 1), np.float32),
    }
    return {
        name: jax.device_put(array, ONE_DEVICE.batch_sharding(array.ndim))
        for name, array in batch.items()
    }


def read(folder, names, limit=None):
    """The first `limit` pictures of each class."""
    images, labels = [], []
    for number, name in enumerate(names):
        for path in sorted((folder / name).iterdir())[:limit]:
            images.append(np.asarray(PIL.Image.open(path).convert("RGB")))
            labels.append(number)
    return Pictures(np.stack(images), np.array(labels))


def optimizer(rate, steps):
    """AdamW up to a rate and down by a cosine."""
    schedule = optimizers.cosine(rate, total_steps=steps, warmup_steps=steps // 10)
    return optimizers.adamw(schedule, weight_decay=0.05)


def train(args, size, classes, data, seed, steps, *, mixup=None, teacher=None):
    """Accuracy in % of a classifier, and its directory."""

    def tower(size):
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

    taught, initial = None, None
    if teacher is not None:
        taught = Distillation(tower(TEACHER), args.temperature)
        initial = InitialCheckpoint(teacher, RULES)
    model = ClassificationModel(
        ClassifierModule(tower(size), classes),
        optimizer(args.rate, steps),
        label_converters.ImageLabelFeatureConverter,
        mixup=mixup,
        distillation=taught,
    )
    directory = tempfile.mkdtemp(dir=args.work)
    result = fine_tune(
        model,
        model_dir=directory,
        data=Crops(data["train"], args.batch, args.crop, args.flip),
        eval_data=data["validation"],
        total_steps=steps,
        partitioning=ONE_DEVICE,
        initial=initial,
        periods=Periods(log=max(steps // 10, 1), evaluate=steps, checkpoint=steps),
        seed=seed,
    )
    return 100 * result.metrics["eval/pictures/accuracy"], directory


def scikit_learn(train, validation):
    """Accuracy in % of two classifiers of grey levels, by name."""
    from sklearn import linear_model, svm

    def grey(pictures):
        return pictures.images[..., 0].reshape(len(pictures.labels), -1) / 255

    found = {}
    for name, model in (
        ("logistic regression", linear_model.LogisticRegression(max_iter=300)),
        ("support vectors, RBF", svm.SVC(C=10.0)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that more iterations would fit better
            model.fit(grey(train), train.labels)
        score = model.score(grey(validation), validation.labels)
        found[f"{name}, {len(train.labels)} pictures"] = [100 * score]
    return found


def trained(args, classes, data):
    """Accuracies in % by seed, of each way."""
    steps = args.student_steps
    accuracy, teacher = train(args, TEACHER, classes, data, 0, args.steps)
    rows = {f"tower, {args.steps} steps (the teacher)": [accuracy]}
    for name, taught_by in (("labels alone", None), ("distilled", teacher)):
        found = [
            train(
                args,
                STUDENT,
                classes,
                data,
                1 + seed,
                steps,
                mixup=args.mixup,
                teacher=taught_by,
            )
            for seed in range(args.seeds)
        ]
        rows[f"student, {name}, {steps} steps"] = [accuracy for accuracy, _ in found]
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--patch", type=int, required=True)
    parser.add_argument("--steps", type=int, default=1200, help="of the teacher")
    parser.add_argument("--student-steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--crop", type=float, default=0.4, help="least area of crops")
    parser.add_argument("--mixup", type=float, default=1.0, help="of students: alpha")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--limit", type=int, help="pictures per class, scikit-learn")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    names = (args.folder / "classes.txt").read_text().splitlines()
    data = {name: read(args.folder / name, names) for name in ("train", "validation")}
    few = read(args.folder / "train", names, args.limit)
    rows = scikit_learn(few, data["validation"])
    with tempfile.TemporaryDirectory() as args.work:
        rows |= trained(args, len(names), data)
    table = [
        [name, ", ".join(f"{x:.1f}" for x in found), f"{statistics.mean(found):.2f}"]
        for name, found in rows.items()
        if found
    ]
    interleave.print_table(["trained", "accuracy, %, by seed", "mean"], table)
    print(f"{time.perf_counter() - began:.0f} s")
    return rows


if __name__ == "__main__":
    main()
