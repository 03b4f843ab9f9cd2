"""Every set of class folders in a folder of standard layouts, for `vit22b suite`.

The environment variable VIT22B_SUITE_DATA names the folder (docs/suite.md says what may
lie in it); the suite sets it. Each set is a task `suite_NAME` with the splits that it
has, such as `suite_imagenet` with train and validation, `suite_few_shot_pets`. Images
of no class and files that cannot be read are left out, counted and told.
"""

import os

from tasks.classification import register_classification
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.experiments import layouts

OPTIONS = ReadingOptions(on_bad_image="skip")

if folder := os.environ.get(layouts.VARIABLE):
    for name, paths in layouts.class_folders(folder).items():
        register_classification(
            f"suite_{name.replace('/', '_')}",
            ClassFolderSource(
                {part: paths[part] for part in ("train", "validation")},
                classes=paths["classes"],
                on_bad_record="skip",
            ),
            options=OPTIONS,
        )
