"""Your own questions about several images at once: JSON lines and a folder of images.

Write your paths below, or set the environment variables that stand there. A line of the
files is

    {"file_names": ["left.png", "right.png"], "question": "same?", "target": "yes"}

with the same number of file names in each, which the recipe names too: its feature
length of `images` is (number, height, width).
"""

from tasks.vqa import register_short_answers
from vit22b_transfer.data.image_sets import ImageSetSource
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import CaptionFiles

IMAGES = "$MY_IMAGES"
TRAIN = "$MY_TRAIN_JSONL"
VALIDATION = "$MY_VALIDATION_JSONL"
IMAGES_PER_EXAMPLE = 2

register_short_answers(
    "my_image_sets",
    ImageSetSource(
        {
            "train": CaptionFiles(TRAIN, IMAGES),
            "validation": CaptionFiles(VALIDATION, IMAGES),
        },
        images_per_example=IMAGES_PER_EXAMPLE,
    ),
    several_images=True,
    # An example with an unreadable image is left out, counted, and reported at the end.
    options=ReadingOptions(on_bad_image="skip"),
)
