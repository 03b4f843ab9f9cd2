"""ObjectNet, as downloaded: a folder for each class, pictures with a red frame.

`objectnet` has the split test: the 113 folders that ImageNet has classes for. Others
are left out and counted (`unknown class`). A class list of the 113 is written by

    python -c "from vit22b_transfer.evaluation.class_subsets import OBJECTNET; \
        print(*OBJECTNET, sep='\\n')" > objectnet.txt

Write your paths below, or set the environment variables that stand there. For
`vit22b measure accuracy` with LABELS = 'objectnet'.
"""

import functools

from tasks.classification import register_classification
from vit22b_transfer.data.label_preprocessors import without_border
from vit22b_transfer.data.labelled_sources import ClassFolderSource
from vit22b_transfer.data.preprocessors import ReadingOptions

IMAGES = "$OBJECTNET_FOLDER"
CLASSES = "$OBJECTNET_CLASSES"
FRAME = 2  # pixels on each side

register_classification(
    "objectnet",
    ClassFolderSource({"test": IMAGES}, classes=CLASSES, on_bad_record="skip"),
    options=ReadingOptions(on_bad_image="skip"),
    before=[functools.partial(without_border, pixels=FRAME)],
)
