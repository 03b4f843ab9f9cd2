"""The embedded data set: drawn scenes on disk in COCO captions and VQAv2 format.

Scene `index` of a split is a pure function of (config, seed, split, index). Nothing is
downloaded. Layout of a data directory:

    manifest.json                         what was drawn (config, seed, sizes)
    images/<split>/<image_id:012d>.jpg
    annotations/captions_<split>.json     COCO captions
    annotations/questions_<split>.json    VQAv2 questions
    annotations/answers_<split>.json      VQAv2 annotations
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit22b_transfer import UserError
from vit22b_transfer.demo import scene_text
from vit22b_transfer.demo.scene_layout import Scene, SceneConfig, draw, sample_scene
from vit22b_transfer.host import json_files, progress, whole_files

COMPOSITIONAL = "test_compositional"
SPLITS = ("train", "validation", "test", COMPOSITIONAL)
DEFAULT_CONFIG = SceneConfig()
IMAGE_FILE = "{image_id:012d}.jpg"
DEFAULT_SIZES: Mapping[str, int] = {
    "train": 8000,
    "validation": 500,
    "test": 500,
    COMPOSITIONAL: 500,
}

# Raise when the same config and seed would draw or say something else.
_FORMAT = 1
_MAX_SPLIT_SIZE = 1_000_000


@dataclasses.dataclass(frozen=True)
class DescribedScene:
    """A scene with its pixels, five captions, and questions with their true answers."""

    scene: Scene
    image: UInt8[np.ndarray, "side side 3"]
    captions: list[str]
    questions: list[scene_text.Question]
    answers: list[list[dict]]


@dataclasses.dataclass(frozen=True)
class ScenePaths:
    """Where one split lies: an image folder and three JSON files."""

    images: pathlib.Path
    captions: pathlib.Path
    questions: pathlib.Path
    answers: pathlib.Path


def scene_paths(directory: str | os.PathLike, split: str) -> ScenePaths:
    """The paths of a split below `directory`, whether or not it has been drawn."""
    root = pathlib.Path(directory)
    return ScenePaths(
        images=root / "images" / split,
        captions=root / "annotations" / f"captions_{split}.json",
        questions=root / "annotations" / f"questions_{split}.json",
        answers=root / "annotations" / f"answers_{split}.json",
    )


def describe_scene(
    config: SceneConfig, *, seed: int, split: str, index: int
) -> DescribedScene:
    """Scene `index` of a split, drawn and described."""
    entropy = [seed, SPLITS.index(split), index]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    scene, questions = _sample_with_questions(rng, config, split == COMPOSITIONAL)
    return DescribedScene(
        scene=scene,
        image=draw(scene),
        captions=scene_text.caption_scene(rng, scene),
        questions=questions,
        answers=[scene_text.annotator_answers(rng, q, config) for q in questions],
    )


def _sample_with_questions(rng, config, held_out):
    """A scene made for one question whose answer was drawn first, uniformly.

    Asking whatever a random scene offers would give mostly 'no', '0' and '1'.
    """
    while True:
        kind = config.question_types[rng.integers(len(config.question_types))]
        forms = scene_text.question_forms(kind)
        form = forms[rng.integers(len(forms))]
        answers = scene_text.possible_answers(form, config)
        answer = answers[rng.integers(len(answers))]
        for _ in range(25):  # some plans cannot be met: then make another
            scene = sample_scene(rng, config, held_out=held_out)
            asked = scene_text.candidate_questions(scene, config, held_out=held_out)
            first = scene_text.pick(rng, asked, form, answer)
            if first is not None:
                return scene, scene_text.choose_questions(rng, asked, first, config)


def write_scenes(
    directory: str | os.PathLike,
    *,
    config: SceneConfig = DEFAULT_CONFIG,
    seed: int = 0,
    sizes: Mapping[str, int] = DEFAULT_SIZES,
) -> dict[str, ScenePaths]:
    """The paths of every split, drawn to `directory` unless they are there already.

    Raises:
      UserError: the directory holds something else, or `sizes` is out of range.
    """
    target = pathlib.Path(directory).absolute()
    for split, size in sizes.items():
        if split not in SPLITS or not 1 <= size <= _MAX_SPLIT_SIZE:
            raise UserError(
                f"sizes[{split!r}] = {size}: splits are {', '.join(SPLITS)}, with 1 to "
                f"{_MAX_SPLIT_SIZE} scenes each."
            )
    if COMPOSITIONAL in sizes and not config.held_out_pairs:
        raise UserError(
            f"split {COMPOSITIONAL!r} needs held_out_pairs; none are given."
        )
    manifest = json.loads(
        json.dumps(
            {
                "format": _FORMAT,
                "seed": seed,
                "sizes": dict(sizes),
                "config": dataclasses.asdict(config),
            }
        )
    )
    if not _is_complete(target, manifest):
        try:
            with whole_files.new_directory(str(target)) as folder:
                partial = pathlib.Path(folder)
                for split, size in sizes.items():
                    _write_split(scene_paths(partial, split), config, seed, split, size)
                text = json.dumps(manifest, indent=1)
                (partial / "manifest.json").write_text(text)
        except UserError:
            # Another process may have finished the same data set meanwhile.
            if not _is_complete(target, manifest):
                raise
    return {split: scene_paths(target, split) for split in sizes}


def _is_complete(target, manifest):
    """Whether `target` holds exactly this data set; UserError if it holds another."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    path = target / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"{target} exists, is not empty and holds no scenes (no manifest.json): "
            "choose another directory."
        )
    found = json_files.read(path, advice="Draw elsewhere.")
    if found != manifest:
        differing = [
            key
            for key in manifest
            if not isinstance(found, dict) or found.get(key) != manifest[key]
        ]
        raise UserError(
            f"{target} holds scenes drawn with another {', '.join(differing)} than "
            f"asked for (see {path}): choose another directory or delete this one."
        )
    return True


def _write_split(paths, config, seed, split, size):
    paths.images.mkdir(parents=True)
    paths.captions.parent.mkdir(exist_ok=True)
    images, captions, questions, answers = [], [], [], []
    console = progress.console(stderr=True)
    label = f"drawing {split} scenes"
    if not console.is_terminal:
        console.print(f"{label}: {size}")
    with progress.Progress(console, label, total=size, unit="scenes") as bar:
        for index in range(size):
            described = describe_scene(config, seed=seed, split=split, index=index)
            # Ids are unique over all splits, as in COCO.
            image_id = SPLITS.index(split) * _MAX_SPLIT_SIZE + index + 1
            file_name = IMAGE_FILE.format(image_id=image_id)
            Image.fromarray(described.image).save(
                paths.images / file_name, quality=config.jpeg_quality
            )
            images.append(
                {
                    "id": image_id,
                    "file_name": file_name,
                    "width": config.image_size,
                    "height": config.image_size,
                }
            )
            for caption in described.captions:
                captions.append(
                    {"id": len(captions) + 1, "image_id": image_id, "caption": caption}
                )
            pairs = zip(described.questions, described.answers, strict=True)
            for number, (question, given) in enumerate(pairs):
                ids = {"image_id": image_id, "question_id": image_id * 10 + number}
                questions.append({**ids, "question": question.text})
                answers.append(
                    {
                        **ids,
                        "question_type": question.question_type,
                        "answer_type": question.answer_type,
                        "multiple_choice_answer": question.answer,
                        "answers": given,
                    }
                )
            bar.show(index + 1)
    info = {"info": {"description": "scenes drawn by vit22b_transfer", "split": split}}
    _dump(paths.captions, {**info, "images": images, "annotations": captions})
    _dump(paths.questions, {**info, "questions": questions})
    _dump(paths.answers, {**info, "annotations": answers})


def _dump(path, content):
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file)
