"""Your own classes: a folder of images for each, and a list of their names.

    train/cat/1.jpg   train/dog/7.jpg   validation/cat/2.jpg ...

The list has one name per line (`ls train > classes.txt` writes it); the class of line n
has the id n - 1. Write your paths below, or set the environment variables that stand
there. Labels in a CSV or JSON lines file need the source `LabelFileSource`; a file of
child,parent lines, `hierarchy=`, makes the ancestors of a label labels as well.
"""

from tasks.classification import register_classification
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import ImageFolderSource

TRAIN = "$MY_TRAIN_FOLDER"
VALIDATION = "$MY_VALIDATION_FOLDER"
NEW_IMAGES = "$MY_NEW_IMAGES"  # a folder of images to classify
CLASSES = "$MY_CLASSES"  # the recipe names it, too

# An unreadable image is left out, counted, and reported at the end.
OPTIONS = ReadingOptions(on_bad_image="skip")

register_classification(
    "my_image_folder",
    ClassFolderSource({"train": TRAIN, "validation": VALIDATION}, classes=CLASSES),
    options=OPTIONS,
)
register_classification(
    "my_unlabelled_images",
    ImageFolderSource({"test": NEW_IMAGES}),
    options=OPTIONS,
    metric_fns=(),  # nothing to score against
)
