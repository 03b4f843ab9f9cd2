"""A SeqIO source of images and texts that lie together in archives."""

import dataclasses
import glob
import os
import pathlib
from collections.abc import Sequence

from vit22b_transfer import UserError
from vit22b_transfer.data import answers, packed_images
from vit22b_transfer.data.indexed_source import IndexedSource
from vit22b_transfer.data.records import (
    BadRecords,
    MissingFilesError,
    PathLike,
    Record,
    printable,
    resolve_path,
)
from vit22b_transfer.data.sources import PER_CAPTION_SPLIT
from vit22b_transfer.host import progress

Archives = PathLike | Sequence[PathLike]


class ArchiveSource(IndexedSource):
    """WebDataset's tar, parquet, TFRecord and ArrayRecord files, images inside.

    Files of a split are a name, a pattern such as `$PAIRS/train-*.tar`, or several of
    them; they are read in that order, those of a pattern sorted by name. The formats
    are `packed_images`' and `packed_examples`'; what stands beside an image is called
    as `packed_texts` says, and KEY.txt of a tar file is a caption.

    In the split "train" every caption of an image is a record; in other splits every
    image is one, with its first caption as `target`. `references` are all. With a
    question every record is one, as of `VqaSource`: `target` is the answer that VQA
    accuracy rewards most. Files are read once through when a split is first used.
    """

    def _resolved(self, files: Archives) -> tuple[pathlib.Path, ...]:
        if isinstance(files, str | os.PathLike):
            files = [files]
        return tuple(map(resolve_path, files))

    def _origin(self, files: Sequence[pathlib.Path]) -> str:
        shown = ", ".join(printable(str(path)) for path in files[:3])
        return shown + (", ..." if len(files) > 3 else "")

    def _read(
        self, split: str, files: Sequence[pathlib.Path], bad: BadRecords
    ) -> list[Record]:
        paths = [path for name in files for path in _archives(name)]
        records = []
        with progress.Progress(
            progress.console(stderr=True),
            f"archives of {split}",
            total=len(paths),
            unit="files",
        ) as shown:
            for path in paths:
                for record in packed_images.records(path, beside="caption"):
                    records += _learned(split, record, path, bad)
                shown.add(1)
        return records


def _archives(name: pathlib.Path) -> list[pathlib.Path]:
    """The files of a name or pattern."""
    found = (
        [name] if name.is_file() else sorted(map(pathlib.Path, glob.glob(str(name))))
    )
    if not found:
        raise MissingFilesError(
            f"there is no archive {printable(str(name))}; a pattern is one such as "
            "'pairs/train-*.tar'."
        )
    for path in found:
        if not packed_images.is_archive(path):
            raise UserError(
                f"{printable(str(path))} is no archive that is read: "
                f"{', '.join(packed_images.SUFFIXES)}."
            )
    return found


def _learned(
    split: str, record: Record, path: pathlib.Path, bad: BadRecords
) -> list[Record]:
    """What is learned of an image: a record for each caption, or for its question."""
    where = f"{record.image_id} of {path}"
    if record.image_problem:
        bad.add("entry that cannot be used", f"{where}: {record.image_problem}")
        return []
    texts = record.references
    if not texts:
        bad.add("image without a text", where)
        return []
    if record.question:
        return [dataclasses.replace(record, target=answers.most_rewarded(texts))]
    targets = texts if split == PER_CAPTION_SPLIT else texts[:1]
    return [dataclasses.replace(record, target=text) for text in targets]
