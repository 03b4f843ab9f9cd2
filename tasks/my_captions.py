"""Your own captions: a COCO-format JSON file and a folder of images.

`vit22b init DIR` writes a copy of this file for you to edit: write your paths below, or
set the environment variables that stand there. Captions in a `.jsonl`, `.csv` or `.txt`
file need the source `CaptionFileSource` of `vit22b_transfer.data.sources`; another kind
of target needs only another prompt.
"""

from tasks.captioning import register_captioning
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import (
    CaptionFiles,
    CocoCaptionsSource,
    ImageFolderSource,
)

CAPTIONS = "$MY_CAPTIONS_JSON"  # to learn from
VALIDATION = "$MY_VALIDATION_JSON"  # to be scored against
IMAGES = "$MY_IMAGES"  # the images of both
NEW_IMAGES = "$MY_NEW_IMAGES"  # a folder of images to caption

# An unreadable image is left out, counted, and reported at the end.
OPTIONS = ReadingOptions(on_bad_image="skip")

register_captioning(
    "my_captions",
    CocoCaptionsSource(
        {
            "train": CaptionFiles(CAPTIONS, IMAGES),
            "validation": CaptionFiles(VALIDATION, IMAGES),
        }
    ),
    options=OPTIONS,
)
register_captioning(
    "my_new_images",
    ImageFolderSource({"test": NEW_IMAGES}),
    options=OPTIONS,
    metric_fns=(),  # nothing to score against
)
