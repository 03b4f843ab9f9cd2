"""`init` of the command: a project of the user's own, ready to edit."""

import argparse
import dataclasses
import os
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Mapping

from vit22b_transfer import UserError
from vit22b_transfer.commands import init_data
from vit22b_transfer.commands.arguments import Add

# Nothing heavy is imported here: `vit22b --help` must answer at once.

# The drawn data are too few words for a vocabulary of pieces.
_BYTES = "VIT22B_VOCABULARY=bytes"
_TRIAL = "gin_configs/runs/try.gin"
_SIZES = {"train": 64, "validation": 16, "test": 8}

_README = """# My project

`gin_configs/recipes/{name}.gin` says what is trained, `tasks/{name}.py` on what. Edit
both: `data/` is drawn, only to try the commands. What they include or import and is not
here comes from the package, `vit22b config path` says where; a copy here comes first.

```bash
export VIT22B_VOCABULARY=bytes   # or the file that `vit22b vocab` made of your texts
RECIPE="--gin_file=gin_configs/recipes/{name}.gin --gin.MODEL_DIR='model'"
TRY="--gin_file={trial} --gin.MODEL_DIR='trial'"   # then without
vit22b train $RECIPE $TRY && vit22b eval $RECIPE $TRY && vit22b infer $RECIPE $TRY
```

A checkpoint belongs to its vocabulary: with another, take another MODEL_DIR.
"""


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What `data/` holds, and the paths of the shipped task that it takes the place of.

    files: file of the drawn scenes -> its place in `data/`.
    """

    files: Mapping[str, str]
    paths: Mapping[str, str]


_SAMPLES = {
    "captions": _Sample(
        {
            "annotations/captions_train.json": "captions.json",
            "annotations/captions_validation.json": "validation.json",
            "images/train": "images",
            "images/validation": "images",
            "images/test": "new_images",
        },
        {
            "$MY_CAPTIONS_JSON": "data/captions.json",
            "$MY_VALIDATION_JSON": "data/validation.json",
            "$MY_IMAGES": "data/images",
            "$MY_NEW_IMAGES": "data/new_images",
        },
    ),
    "vqa": _Sample(
        {
            "annotations/questions_train.json": "questions.json",
            "annotations/answers_train.json": "answers.json",
            "annotations/questions_validation.json": "validation_questions.json",
            "annotations/answers_validation.json": "validation_answers.json",
            "annotations/questions_test.json": "new_questions.json",
            "images/train": "images",
            "images/validation": "images",
            "images/test": "images",
        },
        {
            "$MY_QUESTIONS_JSON": "data/questions.json",
            "$MY_ANSWERS_JSON": "data/answers.json",
            "$MY_VALIDATION_QUESTIONS_JSON": "data/validation_questions.json",
            "$MY_VALIDATION_ANSWERS_JSON": "data/validation_answers.json",
            "$MY_NEW_QUESTIONS_JSON": "data/new_questions.json",
            "$MY_IMAGES": "data/images",
        },
    ),
}


def add_to(add: Add) -> None:
    """Adds the command; `add(name, run, text, epilog)` makes it."""
    command = add(
        "init",
        _init,
        "Write a project of your own: a recipe and its task, ready to edit.",
    )
    command.add_argument("directory", metavar="DIR", help="where to write it")
    command.add_argument(
        "--task",
        choices=sorted(_SAMPLES),
        default="captions",
        help="captions of images, or questions about them (default: captions)",
    )
    command.add_argument(
        "--captions", metavar="JSON", help="your own, as COCO's; no samples are drawn"
    )
    command.add_argument(
        "--questions", metavar="JSON", help="your own, as VQAv2's, with --annotations"
    )
    command.add_argument("--annotations", metavar="JSON", help="their answers")
    command.add_argument("--images", metavar="FOLDER", help="the images of both")
    command.add_argument(
        "--from",
        dest="start",
        metavar="DIR",
        help="start from what `vit22b import` wrote there (default: a small new model)",
    )


def _init(args: argparse.Namespace) -> None:
    if args.captions or args.questions:
        init_data.write(args)
        return
    if args.annotations or args.images or args.start:
        raise UserError(
            "--annotations, --images and --from go with --captions or --questions."
        )
    from vit22b_transfer.recipes import shipped

    sample = _SAMPLES[args.task]
    name = f"my_{args.task}"
    task = f"{shipped.TASKS}/{name}.py"
    recipe = f"gin_configs/recipes/{name}.gin"
    source = pathlib.Path(shipped.folder())
    texts = {
        "README.md": _README.format(name=name, trial=_TRIAL),
        recipe: (source / recipe).read_text(encoding="utf-8"),
        task: init_data.filled(
            (source / task).read_text(encoding="utf-8"), sample.paths
        ),
    }
    project = pathlib.Path(args.directory)
    there = [file for file in [*texts, "data"] if os.path.lexists(project / file)]
    if there:
        raise UserError(
            f"{args.directory} holds {', '.join(there)} already, and nothing is "
            "overwritten; name another directory."
        )
    for file, text in texts.items():
        (project / file).parent.mkdir(parents=True, exist_ok=True)
        (project / file).write_text(text, encoding="utf-8")
        print(project / file)
    _draw(project / "data", sample)
    print(f"{project / 'data'}: drawn scenes, to be replaced by your data")
    enter = (
        ""
        if project.resolve() == pathlib.Path.cwd()
        else (f"cd {shlex.quote(args.directory)} && ")
    )
    print(
        f"\nNext, a short try:\n\n{enter}{_BYTES} vit22b train --gin_file={recipe} "
        f"--gin_file={_TRIAL} --gin.MODEL_DIR=\"'$PWD/trial'\""
    )


def _draw(target: pathlib.Path, sample: _Sample) -> None:
    from vit22b_transfer.demo import scenes

    with tempfile.TemporaryDirectory() as drawn:
        scenes.write_scenes(drawn, sizes=_SIZES)
        target.mkdir()
        for file, place in sample.files.items():
            origin = pathlib.Path(drawn, file)
            if origin.is_dir():
                shutil.copytree(origin, target / place, dirs_exist_ok=True)
            else:
                shutil.copy(origin, target / place)
