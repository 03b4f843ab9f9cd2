"""Your own captions: a COCO-format JSON file and a folder of images.

Copy this file, rename the tasks, and write your paths into it, or set the variables:

    MY_CAPTIONS_JSON    captions to learn from        MY_IMAGES    their images
    MY_VALIDATION_JSON  captions to be scored against (images also in MY_IMAGES)
    MY_NEW_IMAGES       a folder of images to caption

Captions in a `.jsonl`, `.csv` or `.txt` file need the source `CaptionFileSource` of
`vit22b_transfer.data.sources`; another kind of target needs only another prompt.
"""

from tasks.captioning import register_captioning
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import (
    CaptionFiles,
    CocoCaptionsSource,
    ImageFolderSource,
)

# An unreadable image is left out, counted, and reported at the end.
OPTIONS = ReadingOptions(on_bad_image="skip")

register_captioning(
    "my_captions",
    CocoCaptionsSource(
        {
            "train": CaptionFiles("$MY_CAPTIONS_JSON", "$MY_IMAGES"),
            "validation": CaptionFiles("$MY_VALIDATION_JSON", "$MY_IMAGES"),
        }
    ),
    options=OPTIONS,
)
register_captioning(
    "my_new_images",
    ImageFolderSource({"test": "$MY_NEW_IMAGES"}),
    options=OPTIONS,
    metric_fns=(),  # nothing to score against
)
