"""A tiny classifier and a task of labels: nothing in them is text."""

import functools

import numpy as np
import PIL.Image
import seqio
import tensorflow as tf
import tiny_models
from array_tasks import ArraySource

from vit22b_transfer.data import label_converters
from vit22b_transfer.data.label_preprocessors import label_features
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.models.classifier import ClassificationModel, ClassifierModule

SIZE = tiny_models.IMAGE_SIZE[0]
NUM_CLASSES = 4
LENGTHS = {"images": SIZE, "labels": 1}


# As a run asks it of the model: a converter that knows how many classes there are.
LabelConverter = functools.partial(
    label_converters.ImageLabelFeatureConverter, num_classes=NUM_CLASSES
)


def classifier(tower=None, optimizer_def=None, *, num_classes=NUM_CLASSES, **arguments):
    """A `ClassificationModel`; arguments are its own, but for `head_bias`."""
    tower = tower or tiny_models.tower_config(depth=1, pooling="gap")
    head = {n: arguments.pop(n) for n in ("head_bias",) if n in arguments}
    return ClassificationModel(
        ClassifierModule(tower, num_classes, **head),
        optimizer_def,
        label_converters.ImageLabelFeatureConverter,
        **arguments,
    )


def register_folders(name, root):
    """Registers a task of folders of classes, which skips bad images.

    They are root/train and root/validation, the class list is root/classes.txt. Returns
    the function that registers.
    """
    # Of the tasks that were offered, which each test file does for itself.
    from tasks.classification import register_classification

    splits = {split: root / split for split in ("train", "validation")}
    register_classification(
        name,
        ClassFolderSource(splits, classes=root / "classes.txt"),
        options=ReadingOptions(on_bad_image="skip"),
    )
    return register_classification


# Classes of drawn stripes: no colour and no single pixel tells them, their angle does.
ANGLES = {"flat": 0.0, "rising": np.pi / 4, "upright": np.pi / 2, "falling": -np.pi / 4}


def stripes(name, rng, size=SIZE):
    """Stripes at the angle of a class, of a random phase and two random colours."""
    across = np.stack(np.mgrid[:size, :size].astype(np.float64))
    direction = np.array([np.cos(ANGLES[name]), np.sin(ANGLES[name])])
    wave = np.sin(np.tensordot(direction, across, 1) * np.pi / 2 + rng.uniform(0, 6.28))
    dark, light = rng.integers(0, 90, 3), rng.integers(165, 256, 3)
    return np.where(wave[..., None] > 0, light, dark).astype(np.uint8)


def draw_folders(root, *, train=24, validation=6, size=SIZE):
    """A folder of pictures for each class and split, and `classes.txt`; the root."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for name in ANGLES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture = PIL.Image.fromarray(stripes(name, rng, size))
                picture.save(root / split / name / f"{number:03}.png")
    (root / "classes.txt").write_text("".join(f"{n}\n" for n in sorted(ANGLES)))
    return root


def example(number):
    """Example `number`: a picture in one of four greys, and which of them it is."""
    label = tf.cast(number % NUM_CLASSES, tf.int32)
    return {
        "images": tf.fill([SIZE, SIZE, 3], tf.cast(60 * label, tf.uint8)),
        "labels": label[None],
        "true_label": label,
        "image_id": tf.strings.as_string(number),
        "image_error": tf.constant(""),
    }


def true_label(prediction, *, example=None, is_target=False):
    """The example's label as the target: postprocessors see the example."""
    return int(example["true_label"]) if is_target else prediction


def accuracy(targets, predictions):
    return {"accuracy": float(np.mean(np.equal(targets, predictions)))}


def mean_likelihood(targets, predictions, aux_values):
    """Probability of the true label: a metric that needs more than the prediction."""
    rows = np.arange(len(targets))
    return {"likelihood": float(np.exp(aux_values["all_scores"][rows, targets]).mean())}


def register(name, size=21, *, features=("images", "labels"), make=example):
    """A task whose features are none of a text task's."""
    every = label_features()
    seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=ArraySource(size, make),
        preprocessors=[],
        output_features={feature: every[feature] for feature in features},
        postprocess_fn=true_label,
        metric_fns=(accuracy, mean_likelihood),
    )
