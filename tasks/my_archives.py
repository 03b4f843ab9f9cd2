"""Your own captions in archives: WebDataset's tar, parquet, TFRecord, ArrayRecord.

Set the environment variables that stand below; or copy this file into ./tasks of your
own and write your paths there, patterns such as `pairs/train-*.tar` among them. What
captions are called in each format says `vit22b_transfer.data.packed_texts`.
"""

from tasks.captioning import register_captioning
from vit22b_transfer.data.archive_source import ArchiveSource
from vit22b_transfer.data.preprocessors import ReadingOptions

ARCHIVES = "$MY_ARCHIVES"  # to learn from
VALIDATION = "$MY_VALIDATION_ARCHIVES"  # to be scored against

register_captioning(
    "my_archives",
    ArchiveSource({"train": ARCHIVES, "validation": VALIDATION}, on_bad_record="skip"),
    # An unreadable image is left out, counted, and reported at the end.
    options=ReadingOptions(on_bad_image="skip"),
)
