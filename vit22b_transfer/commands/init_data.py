"""`init` of the command, from data that are there: a project ready to be trained."""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.commands import folders
from vit22b_transfer.commands.arguments import without_startup_notes

# Nothing heavy is imported here: `vit22b --help` must answer at once.

# Names of VQAv2's images, and simpler ones; the first that is there is taken.
_IMAGE_FILES = (
    "{image_id:012d}.jpg",
    "COCO_train2014_{image_id:012d}.jpg",
    "COCO_val2014_{image_id:012d}.jpg",
    "{image_id}.jpg",
    "{image_id}.png",
)
_MOST_PIECES = 8_000
_ROWS = 64  # the token table has a multiple of it
_LONGEST = 256  # tokens of a text that are not cut

_RECIPE = """# {what} by {model}.
# `vit22b train`, `eval` and `infer` in this folder read it; what it includes and is not
# here comes from the package (`vit22b config path`). All of it is yours to edit.
from __gin__ import dynamic_registration
import tasks.{name}

{includes}
MODEL_DIR = 'run'
BATCH_SIZE = {batch_size}
TRAIN_STEPS = {steps}  # {epochs} times all {examples} examples
WARMUP_STEPS = {warmup}
LEARNING_RATE = {rate}
FEATURE_LENGTHS = {{'images': %IMAGE_SIZE, 'inputs': {inputs}, 'targets': {targets}}}
INFER_TASK = '{name}'
INFER_SPLIT = 'validation'
{macros}"""

_README = """# {what}

`recipe.gin` says how, `tasks/{name}.py` on what; {held_out} of {images} images are held
out for validation (`data/`). In this folder:

```bash
vit22b train   # into run/; started again it goes on
vit22b eval    # scores of the images held out
vit22b {command} --model run
```
"""


@dataclasses.dataclass(frozen=True)
class _Data:
    """What a project is made of.

    files: name in the project -> content to be written as JSON.
    paths: text of the shipped task -> path that takes its place.
    texts: files to make a vocabulary of.
    """

    name: str
    what: str
    files: dict[str, Any]
    paths: dict[str, str]
    texts: list[str]
    images: int
    held_out: int
    command: str
    examples: int
    longest: tuple[list[str], list[str]]


def write(args: argparse.Namespace) -> None:
    """Writes the project of `init DIR --captions ...` or `--questions ...`."""
    from vit22b_transfer.host import whole_files

    if not args.images:
        raise UserError("--images is missing: the folder of the images.")
    with without_startup_notes():
        data = _captions(args) if args.captions else _questions(args)
        with whole_files.new_directory(args.directory) as written:
            _write(pathlib.Path(written), data, args.start)
    print(
        f"{args.directory}: {data.what.lower()}, {data.examples} examples; "
        f"{data.held_out} of {data.images} images are held out for validation"
    )
    print(f"\nNext:\n\ncd {shlex.quote(args.directory)}\nvit22b train\nvit22b eval")


def _write(project: pathlib.Path, data: _Data, start: str | None) -> None:
    from vit22b_transfer.recipes import shipped

    start = None if start is None else os.path.abspath(os.path.expanduser(start))
    model = _model_of(start)
    task = f"{shipped.TASKS}/{data.name}.py"
    source = pathlib.Path(shipped.folder())
    text = filled((source / task).read_text(encoding="utf-8"), data.paths)
    (project / "tasks").mkdir(parents=True)
    (project / "data").mkdir()
    for name, content in data.files.items():
        written = json.dumps(content)
        (project / name).write_text(written, encoding="utf-8")
    (project / task).write_text(text, encoding="utf-8")
    size = _write_vocabulary(project, data, model)
    lengths = [_length(project, texts) for texts in data.longest]
    recipe = _recipe(data, model, size, lengths)
    (project / folders.RECIPE).write_text(recipe, encoding="utf-8")
    readme = _README.format(**dataclasses.asdict(data))
    (project / "README.md").write_text(readme, encoding="utf-8")


def _model_of(start: str | None) -> Any:
    """The import to start from, None for a fresh small model."""
    if start is None:
        return None
    from vit22b_transfer.checkpoints import reading
    from vit22b_transfer.weights import imported
    from vit22b_transfer.weights.families import table

    if not imported.is_import(start):
        raise UserError(f"--from {start}: not what `vit22b import` wrote.")
    arrays = reading.saved_arrays(reading.resolve(start))
    return imported.read(start, arrays, table.FAMILIES)


def _write_vocabulary(project: pathlib.Path, data: _Data, model: Any) -> int:
    """Puts the vocabulary of the weights, or one of the texts, there; its size."""
    from vit22b_transfer.data import vocabularies

    if model is not None:
        if model.vocabulary is None:
            folders.write_vocabulary(project, None)
            return vocabularies.load().vocab_size
        content = pathlib.Path(model.vocabulary).read_bytes()
        folders.write_vocabulary(project, content)
        return vocabularies.load(project / folders.VOCABULARY_FILE).vocab_size
    path = project / folders.VOCABULARY_FILE
    texts = [str(project / name) for name in data.texts]
    try:
        made = vocabularies.train(texts, path, vocab_size=_MOST_PIECES)
    except vocabularies.TooManyPieces as error:
        made = vocabularies.train(texts, path, vocab_size=error.at_most)
    folders.write_vocabulary(project, path.read_bytes())
    return made.vocab_size


def _length(project: pathlib.Path, texts: list[str]) -> int:
    """Tokens of the longest of the texts and EOS, up to a multiple of 8."""
    from vit22b_transfer.data import vocabularies

    path = project / folders.VOCABULARY_FILE
    vocabulary = vocabularies.load(path if path.exists() else folders.BYTES)
    longest = 1 + max(len(vocabulary.encode(text)) for text in texts)
    return min(_LONGEST, -(-longest // 8) * 8)


def _recipe(data: _Data, model: Any, size: int, lengths: list[int]) -> str:
    base = f"gin_configs/recipes/{data.name}.gin"
    includes, macros, rate, what = [base], "", 3e-4, "a small model, from nothing"
    if model is None:
        macros = f"VOCAB_SIZE = {-(-size // _ROWS) * _ROWS}\n"
    else:
        is_prefix_lm = model.text.text_binding.startswith("prefix_lm")
        # Gemma's are trained together already; else the projection is new.
        rate = 1e-5 if is_prefix_lm else 1e-4
        if is_prefix_lm:
            includes.append("gin_configs/models/prefix_lm.gin")
        includes.append(model.model_gin)
        what = "imported weights"
    batch_size = 64 if data.examples >= 1_000 else 8
    epochs = 10 if model is not None else 30
    steps = max(20, epochs * data.examples // batch_size)
    return _RECIPE.format(
        what=data.what,
        model=what,
        name=data.name,
        includes="".join(f"include {name!r}\n" for name in includes),
        batch_size=batch_size,
        steps=steps,
        epochs=round(steps * batch_size / data.examples),
        examples=data.examples,
        warmup=max(1, min(1_000, steps // 10)),
        rate=rate,
        inputs=lengths[0],
        targets=lengths[1],
        macros=macros,
    )


def _captions(args: argparse.Namespace) -> _Data:
    from vit22b_transfer.data import holding_out
    from vit22b_transfer.data.annotations import json_list, read_json
    from vit22b_transfer.data.records import resolve_path

    if args.questions or args.annotations:
        raise UserError("give --captions, or --questions and --annotations; not both.")
    path = resolve_path(args.captions)
    if path.suffix.lower() != ".json":
        raise UserError(
            f"--captions {args.captions}: COCO's JSON is read here; lines or a table "
            "are of `CaptionFileSource` (docs/data.md)."
        )
    content = read_json(path)
    images = json_list(content, "images", path, "COCO captions")
    annotations = json_list(content, "annotations", path, "COCO captions")
    out = holding_out.held_out(holding_out.ids(annotations))
    keys = {"images": "id", "annotations": "image_id"}
    train, validation = holding_out.divided(content, keys, out)
    names = [x["file_name"] for x in images if isinstance(x, dict) and "file_name" in x]
    folder = _folder(args.images, names[:1])
    texts = [x["caption"] for x in annotations if _has_text(x, "caption")]
    if not texts:
        raise UserError(f"{args.captions} has no caption.")
    return _Data(
        name="my_captions",
        what="Captions of images",
        files={"data/train.json": train, "data/validation.json": validation},
        paths={
            "$MY_CAPTIONS_JSON": "data/train.json",
            "$MY_VALIDATION_JSON": "data/validation.json",
            "$MY_IMAGES": folder,
            "$MY_NEW_IMAGES": folder,
        },
        texts=["data/train.json"],
        images=len(holding_out.ids(annotations)),
        held_out=len(out),
        command="caption IMAGES",
        examples=len(train["annotations"]),
        longest=(["caption en"], texts),
    )


def _questions(args: argparse.Namespace) -> _Data:
    from vit22b_transfer.data import holding_out
    from vit22b_transfer.data.annotations import json_list, read_json
    from vit22b_transfer.data.records import resolve_path

    if not args.annotations:
        raise UserError("--questions needs --annotations, the file of their answers.")
    path, answers_path = map(resolve_path, (args.questions, args.annotations))
    content, answers = read_json(path), read_json(answers_path)
    questions = json_list(content, "questions", path, "VQAv2 questions")
    entries = json_list(answers, "annotations", answers_path, "VQAv2 annotations")
    out = holding_out.held_out(holding_out.ids(questions))
    train, validation = holding_out.divided(content, {"questions": "image_id"}, out)
    known, held = holding_out.divided(answers, {"annotations": "image_id"}, out)
    first = next(iter(holding_out.ids(questions)))
    pattern, folder = _pattern(args.images, first)
    asked = [
        f"answer en {x['question']}" for x in questions if _has_text(x, "question")
    ]
    said = [
        answer["answer"]
        for entry in entries
        for answer in entry.get("answers", [])
        if _has_text(answer, "answer")
    ]
    if not (asked and said):
        raise UserError(f"{args.questions} and {args.annotations} ask nothing.")
    return _Data(
        name="my_vqa",
        what="Answers to questions about images",
        files={
            "data/questions.json": train,
            "data/answers.json": known,
            "data/validation_questions.json": validation,
            "data/validation_answers.json": held,
        },
        paths={
            "$MY_QUESTIONS_JSON": "data/questions.json",
            "$MY_ANSWERS_JSON": "data/answers.json",
            "$MY_VALIDATION_QUESTIONS_JSON": "data/validation_questions.json",
            "$MY_VALIDATION_ANSWERS_JSON": "data/validation_answers.json",
            "$MY_NEW_QUESTIONS_JSON": "data/validation_questions.json",
            "$MY_IMAGES": folder,
            "{image_id:012d}.jpg": pattern,
        },
        texts=["data/questions.json", "data/answers.json"],
        images=len(holding_out.ids(questions)),
        held_out=len(out),
        command="answer IMAGE --question 'What is this?'",
        examples=len(train["questions"]),
        longest=(asked, said),
    )


def filled(text: str, paths: Mapping[str, str]) -> str:
    """The shipped task with other paths."""
    for variable, path in paths.items():
        assert text.count(f'"{variable}"') == 1, variable
        # As a text of Python, whatever the path holds.
        text = text.replace(f'"{variable}"', _quoted(path))
    return text


def _quoted(text: str) -> str:
    """A literal, in double quotes where that is as good."""
    plain = text.isprintable() and not set(text) & set('"\\')
    return f'"{text}"' if plain else repr(text)


def _has_text(entry: Any, field: str) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get(field), str)


def _folder(images: str, names: list[Any]) -> str:
    """The absolute folder of the images, which holds the first of them."""
    from vit22b_transfer.data.image_folders import ImageFolder
    from vit22b_transfer.data.records import resolve_path

    folder = resolve_path(images)
    found = ImageFolder(folder)
    for name in names:
        path, problem = found.find(str(name))
        if path is None:
            raise UserError(f"--images {images}: {str(name)!a}: {problem}.")
    return str(folder)


def _pattern(images: str, image_id: Any) -> tuple[str, str]:
    """(how files are called by the ids of their images, the folder)."""
    folder = _folder(images, [])
    number = str(image_id)
    number = int(number) if re.fullmatch(r"[0-9]+", number) else image_id
    for pattern in _IMAGE_FILES:
        if "012d" in pattern and not isinstance(number, int):
            continue
        if os.path.isfile(os.path.join(folder, pattern.format(image_id=number))):
            return pattern, folder
    raise UserError(
        f"--images {images} has no file for the image id {image_id!a} under any of the "
        f"names {', '.join(_IMAGE_FILES)}."
    )
