"""Every set of images in a folder of standard layouts, for `vit22b suite`.

The environment variable VIT22B_SUITE_DATA names the folder (docs/suite.md says what may
lie in it); the suite sets it. Each set is a task of the name `suite_NAME_DIGEST` that
the suite prints: with the splits train and validation, or with one, test. Images of no
class and files that cannot be read are left out, counted and told.
"""

import functools
import os

from tasks.classification import register_classification
from vit22b_transfer.data import class_lists
from vit22b_transfer.data.label_preprocessors import without_border
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import ImageFolderSource
from vit22b_transfer.evaluation.class_subsets import OBJECTNET
from vit22b_transfer.experiments import layouts, surveys

OPTIONS = ReadingOptions(on_bad_image="skip")
TRAINED = ("train", "validation")
# Test sets whose classes are those of `imagenet`, or some of them.
VARIANTS = ("imagenet_v2", "imagenet_r", "imagenet_a", "objectnet")
FRAME = 2  # pixels of ObjectNet's red frame, on each side


def variant_classes(found, classes):
    """The classes of a test set by the names of its folders.

    classes: of `imagenet`. Numbers are ids of these; otherwise all of them where every
    folder has a name among them and there are 1000, else the folders' own.
    """
    own = found.classes["test"]
    if found.name == "objectnet":
        return tuple(OBJECTNET)
    if all(name.isascii() and name.isdecimal() for name in own):
        return tuple(sorted(own, key=int))
    if found.name == "imagenet_v2" or len(classes) == 1000:
        return classes
    return tuple(name for name in classes if name in own)


def register(survey):
    """Registers a task for each set of a `surveys.Survey`."""
    imagenet = survey.found.get("imagenet")
    for found in survey.found.values():
        before = []
        if {*TRAINED, "classes"} <= found.paths.keys():
            splits = {split: found.paths[split] for split in TRAINED}
            source = ClassFolderSource(
                splits, classes=found.paths["classes"], on_bad_record="skip"
            )
        elif found.name in VARIANTS and imagenet is not None:
            names = class_lists.names(imagenet.paths["classes"])
            source = ClassFolderSource(
                {"test": found.paths["test"]},
                classes=variant_classes(found, names),
                on_bad_record="skip",
            )
            if found.name == "objectnet":
                before = [functools.partial(without_border, pixels=FRAME)]
        elif found.kind in layouts.UNLABELLED:
            path = found.paths[layouts.UNLABELLED[found.kind]]
            beside = (".npy",) if found.kind == "bapps" else ()  # what people said
            source = ImageFolderSource({"test": path}, beside=beside)
        else:
            continue
        register_classification(found.task, source, options=OPTIONS, before=before)


if folder := os.environ.get(surveys.VARIABLE):
    register(surveys.made_survey(folder))
