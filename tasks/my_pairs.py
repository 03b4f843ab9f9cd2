"""Your own image-text pairs: a COCO-format JSON file and a folder of images.

`vit22b init DIR` writes a copy of this folder for you to edit: write your paths below,
or set the environment variables that stand there. Captions in a `.jsonl`, `.csv` or
`.txt` file need the source `CaptionFileSource` of `vit22b_transfer.data.sources`.

A split of images whose captions are names of classes is scored without any training on
them by `register_zero_shot`:

    register_zero_shot(
        "my_classes",
        CaptionFileSource({"test": CaptionFiles("labels.csv", "images")}),
        class_names=["cat", "dog", "hot_air_balloon"],
    )
"""

from tasks.contrastive import register_pairs
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import CaptionFiles, CocoCaptionsSource

CAPTIONS = "$MY_CAPTIONS_JSON"  # to learn from
VALIDATION = "$MY_VALIDATION_JSON"  # to be scored against
IMAGES = "$MY_IMAGES"  # the images of both

register_pairs(
    "my_pairs",
    CocoCaptionsSource(
        {
            "train": CaptionFiles(CAPTIONS, IMAGES),
            "validation": CaptionFiles(VALIDATION, IMAGES),
        }
    ),
    # An unreadable image is left out, counted, and reported at the end.
    options=ReadingOptions(on_bad_image="skip"),
)
