"""Your own questions about images: JSON files as VQAv2 has them, a folder of images.

`vit22b init DIR --task vqa` writes a copy of this file for you to edit: write your
paths below, or set the environment variables that stand there.
"""

from tasks.vqa import register_short_answers
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import VqaFiles, VqaSource

QUESTIONS = "$MY_QUESTIONS_JSON"  # to learn from
ANSWERS = "$MY_ANSWERS_JSON"
VALIDATION_QUESTIONS = "$MY_VALIDATION_QUESTIONS_JSON"  # to be scored against
VALIDATION_ANSWERS = "$MY_VALIDATION_ANSWERS_JSON"
NEW_QUESTIONS = "$MY_NEW_QUESTIONS_JSON"  # to answer
IMAGES = "$MY_IMAGES"  # the images of all
IMAGE_FILE = "{image_id:012d}.jpg"  # of an image's id, its file

register_short_answers(
    "my_vqa",
    VqaSource(
        {
            "train": VqaFiles(QUESTIONS, IMAGES, ANSWERS, IMAGE_FILE),
            "validation": VqaFiles(
                VALIDATION_QUESTIONS, IMAGES, VALIDATION_ANSWERS, IMAGE_FILE
            ),
            "test": VqaFiles(NEW_QUESTIONS, IMAGES, None, IMAGE_FILE),
        }
    ),
    # `register_vqa` has VQAv2's metric, which needs several answers to each question.
    options=ReadingOptions(
        # An unreadable image is left out, counted, and reported at the end.
        on_bad_image="skip",
        # A question without its end is another one: raise the feature length.
        on_long_text="error",
    ),
)
