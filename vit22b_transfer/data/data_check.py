"""A data set looked at before training: records, images, duplicates, texts, speed."""

import collections
import concurrent.futures
import hashlib
import io
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit22b_transfer import UserError
from vit22b_transfer.data import (
    images,
    near_duplicates,
    packed_images,
    streams,
    text_checks,
)
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.indexed_source import IndexedSource
from vit22b_transfer.data.records import Record, printable
from vit22b_transfer.data.text_checks import TextFacts
from vit22b_transfer.host import progress

SHEET = 24
# Examples that are read to know how fast the pipeline is, and seconds at most.
_TIMED, _SECONDS = 256, 10.0
_ORIENTATION = 0x0112  # EXIF's tag
_SHOWN = 20
_QUANTILES = " / ".join(text_checks.QUANTILES)
# Of texts in the timed reading, where none is given.
_LENGTH = 256


class ImageFacts(NamedTuple):
    """One file. problem: why it cannot be read, and then nothing else is known."""

    path: str
    problem: str = ""
    mode: str = ""
    is_turned: bool = False
    width: int = 0
    height: int = 0
    digest: bytes = b""
    look: near_duplicates.Look | None = None


class SplitFacts(NamedTuple):
    """A split. left_out: reason -> records that its source would leave out.

    unread: path -> why; cmyk, turned: files of these kinds, which are read, in colours
    that differ a little, or turned upright. problem: why the split cannot be read.
    """

    split: str
    records: int = 0
    images: int = 0
    looked_at: int = 0
    left_out: dict[str, int] = {}
    said: str = ""
    unread: dict[str, str] = {}
    cmyk: list[str] = []
    turned: list[str] = []
    sizes: dict[str, int] = {}
    texts: dict[str, TextFacts] = {}
    problem: str = ""


class Pipeline(NamedTuple):
    """The first images as the task prepares them, examples a second; or a problem."""

    sheet: list[tuple[str, UInt8[np.ndarray, "height width 3"]]]
    examples_per_second: float = 0.0
    problem: str = ""


class Checked(NamedTuple):
    """All of it. duplicates: (split, path) of each group of near duplicates.

    leaks: the groups that are in several splits. plain: see `near_duplicates.Groups`.
    """

    task: str
    splits: list[SplitFacts]
    duplicates: list[list[tuple[str, str]]]
    leaks: list[list[tuple[str, str]]]
    plain: int
    pipeline: Pipeline


def check(
    task_name: str,
    splits: Sequence[str] | None,
    *,
    size: int,
    limits: dict[str, int | None],
    most_images: int | None = None,
) -> Checked:
    """Looks at the splits of a task, by default at all of them.

    size: the side that images are prepared to, in pixels. limits: tokens that the model
    takes of `inputs` and `targets`. most_images: of each split look at so many, drawn.

    Raises:
      UserError: for an unknown task or split, one whose source is none of
        `data.sources` or like them, or if no split can be read.
    """
    registered.check_name(task_name)
    task = registered.task_named(task_name)
    source = task.source
    if not isinstance(source, IndexedSource):
        raise UserError(
            f"the source of task {task_name!r}, a {type(source).__name__}, does not "
            "tell which image an example has; it cannot be checked."
        )
    for split in splits or ():
        if split not in task.splits:
            known = ", ".join(sorted(task.splits))
            raise UserError(
                f"task {task_name!r} has no split {split!r}; it has {known}."
            )
    found, everything = [], []
    for split in splits or list(task.splits):
        try:
            records, left_out, said = source.survey(split)
        except UserError as error:
            found.append(SplitFacts(split, problem=str(error)))
            continue
        facts = _looked_at(split, records, most_images)
        everything += [(split, one) for one in facts if one.look is not None]
        part = _split_facts(split, records, facts)._replace(
            left_out=left_out, said=said, texts=_texts(task_name, records, limits)
        )
        found.append(part)
    if all(part.problem for part in found):
        raise UserError(f"no split of {task_name!r} can be read: {found[0].problem}")
    looks = [one.look for _, one in everything if one.look is not None]
    grouped = near_duplicates.groups(looks, [one.digest for _, one in everything])
    duplicates = [
        [(everything[n][0], everything[n][1].path) for n in group]
        for group in grouped.groups
    ]
    leaks = [group for group in duplicates if len({split for split, _ in group}) > 1]
    readable = next(part.split for part in found if not part.problem)
    pipeline = _pipeline(task_name, readable, size, limits)
    return Checked(task_name, found, duplicates, leaks, grouped.plain, pipeline)


def look_at(path: str) -> ImageFacts:
    """What a file is, decoded as training decodes it."""
    try:
        data = packed_images.read(path)
        pixels = images.decode(data, name=printable(path))
    except (UserError, OSError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        return ImageFacts(path, said or str(error))
    with Image.open(io.BytesIO(data), formats=[*images.IMAGE_FORMATS.values()]) as file:
        mode = file.mode
        try:
            turned = file.getexif().get(_ORIENTATION, 1) not in (0, 1)
        except Exception:  # broken EXIF: taken to be upright, as `images` does
            turned = False
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(data).digest()
    look = near_duplicates.look(pixels)
    return ImageFacts(path, "", mode, turned, width, height, digest, look)


def _looked_at(
    split: str, records: Sequence[Record], most: int | None
) -> list[ImageFacts]:
    """The facts of the split's files, each once, in the order of the records."""
    known = {r.image_path: r.image_problem for r in records if r.image_path}
    for record in records:
        known |= dict.fromkeys(record.image_paths, "")
    paths = list(known)
    if most is not None and most < len(paths):
        chosen = np.random.default_rng(0).choice(len(paths), most, replace=False)
        paths = [paths[place] for place in sorted(chosen)]
    found = []
    bar = progress.Progress(
        progress.console(), f"images of {split}", total=len(paths), unit="images"
    )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for facts in pool.map(look_at, paths):
            found.append(facts)
            bar.add(1)
    return found


def _split_facts(
    split: str, records: Sequence[Record], facts: Sequence[ImageFacts]
) -> SplitFacts:
    paths = {path for r in records for path in (r.image_path, *r.image_paths) if path}
    unread = {one.path: one.problem for one in facts if one.problem}
    for record in records:
        if record.image_problem:
            unread[record.image_path or record.image_id] = record.image_problem
    read = [one for one in facts if not one.problem]
    sizes = {}
    if read:
        areas = sorted(read, key=lambda one: one.width * one.height)
        for name, one in (("smallest", areas[0]), ("largest", areas[-1])):
            sizes |= {f"{name} width": one.width, f"{name} height": one.height}
    return SplitFacts(
        split,
        records=len(records),
        images=len(paths),
        looked_at=len(facts),
        unread=unread,
        cmyk=[one.path for one in read if one.mode == "CMYK"],
        turned=[one.path for one in read if one.is_turned],
        sizes=sizes,
    )


def _texts(
    task_name: str, records: Sequence[Record], limits: dict[str, int | None]
) -> dict[str, TextFacts]:
    """Of the prompts with their questions, and of what is to be learned."""
    features = registered.task_named(task_name).output_features
    prompt = (registered.prompts(task_name) or ["{question}"])[0]
    texts = {
        "inputs": [prompt.replace("{question}", record.question) for record in records],
        "targets": [record.target for record in records],
    }
    if not any(texts["targets"]):  # images without texts, such as new ones
        del texts["targets"]
    found = {}
    for name, values in texts.items():
        if name in features and features[name].rank == 1:
            feature = features[name]
            found[name] = text_checks.check(
                values,
                feature.vocabulary,
                limit=limits.get(name),
                eos=bool(getattr(feature, "add_eos", False)),
            )
    return found


def _pipeline(
    task_name: str, split: str, size: int, limits: dict[str, int | None]
) -> Pipeline:
    """Reads examples as a training does, but for the order and a recipe's drawing."""
    task = registered.task_named(task_name)
    lengths: dict[str, int] = {"images": size}
    for name in ("inputs", "targets"):
        lengths[name] = limits.get(name) or _LENGTH
    lengths = {n: x for n, x in lengths.items() if n in task.output_features}
    sheet: list[tuple[str, np.ndarray]] = []
    count, started, first = 0, time.perf_counter(), 0.0
    try:
        streams.keep_tensorflow_off_accelerators()
        dataset = task.get_dataset(lengths, split=split, shuffle=False)
        for example in streams.as_numpy(dataset.take(_TIMED)):
            count += 1
            if count == 1:
                first = time.perf_counter()
            pixels = example["images"]
            name = example.get("image_id", b"")
            title = _text(name)
            if error := _text(example.get("image_error", b"")):
                title += f": {error}"
            if len(sheet) < SHEET and pixels.dtype == np.uint8:
                sheet.append((title, pixels if pixels.ndim == 3 else pixels[0]))
            if time.perf_counter() - started > _SECONDS:
                break
    except UserError as error:
        return Pipeline(sheet, problem=str(error))
    elapsed = time.perf_counter() - first
    speed = (count - 1) / elapsed if count > 1 and elapsed > 0 else 0.0
    return Pipeline(sheet, speed)


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def counts(checked: Checked) -> dict[str, dict[str, str]]:
    """Split -> what was counted -> how often, in words; for tables."""
    return {part.split: _counts(part) for part in checked.splits if not part.problem}


def _counts(part: SplitFacts) -> dict[str, str]:
    found = {
        "records": f"{part.records:,}",
        "left out by the source": f"{sum(part.left_out.values()):,}",
        "images": f"{part.images:,}",
        "looked at": f"{part.looked_at:,}",
        "not read": f"{len(part.unread):,}",
        "CMYK": f"{len(part.cmyk):,}",
        "turned by EXIF": f"{len(part.turned):,}",
    }
    for name, texts in part.texts.items():
        lengths = " / ".join(f"{count}" for count in texts.lengths.values())
        found |= {
            f"{name}: texts": f"{texts.count:,}",
            f"{name}: tokens, {_QUANTILES}": lengths,
            f"{name}: empty": f"{texts.empty:,}",
        }
        if texts.past is not None:
            share = 100 * texts.past / max(texts.count, 1)
            found[f"{name}: cut at {texts.limit}"] = f"{texts.past:,} ({share:.2f} %)"
        found |= {
            f"{name}: with unknown pieces": f"{texts.unknown:,}",
            f"{name}: changed by tokenising": f"{texts.changed:,}",
            f"{name}: control characters": f"{texts.control:,}",
            f"{name}: look like tokens": f"{texts.special:,}",
            f"{name}: pieces used": f"{texts.pieces:,} of {texts.vocabulary_size:,}",
        }
    return found


def sampled(values: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    shown = list(values[:_SHOWN])
    more = len(values) - len(shown)
    return [*shown, f"and {more:,} more"] if more else shown


def as_json(checked: Checked) -> dict[str, object]:
    """All but the pictures, as JSON has it."""
    splits = []
    for part in checked.splits:
        said = part._asdict() | {
            "texts": {name: texts._asdict() for name, texts in part.texts.items()}
        }
        splits.append(said)
    reasons = collections.Counter(
        reason for part in checked.splits for reason in part.left_out
    )
    return {
        "task": checked.task,
        "splits": splits,
        "left_out_reasons": sorted(reasons),
        "near_duplicates": checked.duplicates,
        "in_several_splits": checked.leaks,
        "near_bits": near_duplicates.NEAR_BITS,
        "near_levels": near_duplicates.NEAR_LEVELS,
        "plain": checked.plain,
        "examples_per_second": checked.pipeline.examples_per_second,
        "pipeline_problem": checked.pipeline.problem,
    }
