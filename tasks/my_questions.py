"""Your own questions about images: VQAv2-format JSON files and a folder of images.

Copy this file, rename the task, and write your paths into it, or set the variables:

    MY_QUESTIONS              questions to learn from, MY_ANSWERS their answers
    MY_VALIDATION_QUESTIONS   MY_VALIDATION_ANSWERS    to be scored against
    MY_QUESTION_IMAGES        the images, called IMAGE_ID.jpg

A recipe: copy my_captions.gin, import this file in it, and name the task.
"""

from tasks.vqa import register_short_answers
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.data.sources import VqaFiles, VqaSource


def _files(questions, answers):
    return VqaFiles(questions, "$MY_QUESTION_IMAGES", answers, "{image_id}.jpg")


register_short_answers(
    "my_questions",
    VqaSource(
        {
            "train": _files("$MY_QUESTIONS", "$MY_ANSWERS"),
            "validation": _files("$MY_VALIDATION_QUESTIONS", "$MY_VALIDATION_ANSWERS"),
        }
    ),
    options=ReadingOptions(
        # An unreadable image is left out, counted, and reported at the end.
        on_bad_image="skip",
        # As CLIP, SigLIP and PaliGemma were shown their images.
        resize_method="bicubic",
        # A question without its end is another one: raise the feature length.
        on_long_text="error",
    ),
)
