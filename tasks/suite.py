"""Every set of class folders in a folder of standard layouts, for `vit22b suite`.

The environment variable VIT22B_SUITE_DATA names the folder (docs/suite.md says what may
lie in it); the suite sets it. Each set is a task of the name `suite_NAME_DIGEST` that
the suite prints, with the splits train and validation. Images of no class and files
that cannot be read are left out, counted and told.
"""

import os

from tasks.classification import register_classification
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.experiments import layouts

OPTIONS = ReadingOptions(on_bad_image="skip")
TRAINED = ("train", "validation")

if folder := os.environ.get(layouts.VARIABLE):
    for found in layouts.made_survey(folder).found.values():
        if {*TRAINED, "classes"} <= found.paths.keys():
            register_classification(
                found.task,
                ClassFolderSource(
                    {split: found.paths[split] for split in TRAINED},
                    classes=found.paths["classes"],
                    on_bad_record="skip",
                ),
                options=OPTIONS,
            )
