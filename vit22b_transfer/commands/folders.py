"""A folder that says what is run in it: a project, or the MODEL_DIR of a run.

    recipe.gin         the whole recipe; a run's leaves MODEL_DIR open: it is the folder
    vocabulary.json    {"file": "vocabulary.model" or "bytes", "extra_ids": 0}
    vocabulary.model   the SentencePiece file, if it is none of bytes
    predict.gin        of a run: its model and prompts, without its tasks

A training writes them into its MODEL_DIR. A recipe is code, as everywhere; the rest is
data, and no file of Python is ever read from there.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from vit22b_transfer import UserError

# Nothing heavy is imported here: `vit22b --help` must answer at once.

RECIPE, PREDICT = "recipe.gin", "predict.gin"
VOCABULARY, VOCABULARY_FILE = "vocabulary.json", "vocabulary.model"
BYTES = "bytes"
_GIVEN_IMAGES = "gin_configs/runs/given_images.gin"
# Of a vocabulary's JSON and of a SentencePiece file: Gemma's has 4 MB.
_MAX_JSON, _MAX_BYTES = 1 << 12, 1 << 26


def recipe_of(folder: str | None) -> str:
    """The gin file of a folder; None: of the current one.

    Raises:
      RecipeError: if there is none.
    """
    from vit22b_transfer.recipes.reader import RecipeError

    path = os.path.join(folder or "", RECIPE)
    if not os.path.isfile(path):
        what = f"{folder} holds no {RECIPE}" if folder else "no recipe is named"
        raise RecipeError(
            f"{what}. Give --gin_file, or a folder that holds a {RECIPE}: that of a "
            "run, or one that `vit22b init` made."
        )
    return path


def opened(folder: str, unset: list[str]) -> list[str]:
    """The override that makes a run's recipe run in its folder, if it is a run's.

    unset: what its recipe leaves open, as `Recipe.required` says it.
    """
    is_run = any(text.split()[0] == "MODEL_DIR" for text in unset)
    return [f"MODEL_DIR={os.path.abspath(folder)!r}"] if is_run else []


def use_vocabulary(folder: str) -> None:
    """Lets this process take the vocabulary of a folder, if it has one.

    Raises:
      UserError: if what should say which one does not.
    """
    from vit22b_transfer.checkpoints import identity
    from vit22b_transfer.host import json_files

    path = os.path.join(folder, VOCABULARY)
    if not os.path.isfile(path):
        return
    advice = "Restore it, or set $VIT22B_VOCABULARY and remove this file."
    said = json_files.read_object(path, advice=advice, limit=_MAX_JSON)
    file, extra_ids = said.get("file"), said.get("extra_ids", 0)
    if file not in (VOCABULARY_FILE, BYTES) or type(extra_ids) is not int:
        raise UserError(
            f"{path} names no vocabulary: file is to be {VOCABULARY_FILE!r}, beside "
            f"it, or {BYTES!r}, and extra_ids a number. {advice}"
        )
    set_vocabulary(
        BYTES if file == BYTES else os.path.abspath(os.path.join(folder, file)),
        extra_ids,
        variable=identity.VOCABULARY_VARIABLE,
    )


def set_vocabulary(name: str, extra_ids: int, *, variable: str) -> None:
    """Sets the variables that name the vocabulary, for this process."""
    import sys

    before = os.environ.get(variable)
    if before and before != name:
        print(
            f"vit22b: note: ${variable} is {before}; {name} is taken", file=sys.stderr
        )
    os.environ[variable] = name
    os.environ["VIT22B_EXTRA_IDS"] = str(extra_ids)


def write_vocabulary(folder: pathlib.Path, content: bytes | None) -> None:
    """Puts a vocabulary into a folder; None: bytes."""
    for name, text in vocabulary_files(content, 0).items():
        (folder / name).write_bytes(text)


def vocabulary_files(content: bytes | None, extra_ids: int) -> dict[str, bytes]:
    """Name -> content of the files that say which vocabulary a folder has."""
    said = {"file": BYTES if content is None else VOCABULARY_FILE}
    text = json.dumps(said | {"extra_ids": extra_ids}) + "\n"
    files = {} if content is None else {VOCABULARY_FILE: content}
    return files | {VOCABULARY: text.encode()}


def of_run(recipe: Any, root: Callable[..., Any]) -> dict[str, bytes]:
    """Name -> content of what a training puts into its MODEL_DIR.

    recipe: complete, its tasks imported. root: what it is a recipe of.
    """
    from vit22b_transfer.recipes import loading, writing

    reached = loading.reachable(recipe, root)
    comments = [
        "The whole recipe of this run, for `vit22b train`, `eval` and `infer` of this",
        "folder. Its tasks are modules of Python, found where the command is started;",
        f"this run was started in {os.getcwd()}",
    ]
    text = writing.whole(recipe, comments, open_macros=("MODEL_DIR",))
    files = {RECIPE: text.encode()}
    if "RUN_MODEL" in recipe.macros:
        prompts = _prompts(recipe, reached)
        beside: Mapping[str, Any] = {"PROMPTS": prompts} if prompts else {}
        text = writing.part(
            recipe,
            ["The model of this run, for images that are given: `vit22b caption`."],
            include=_GIVEN_IMAGES,
            macros=("RUN_MODEL", "FEATURE_LENGTHS"),
            beside=beside,
        )
        files[PREDICT] = text.encode()
    return files | _vocabulary(reached)


def _vocabulary(reached: list[Any]) -> dict[str, bytes]:
    """The files of the vocabulary that the run takes from the environment."""
    from vit22b_transfer.data import vocabularies

    if all(one.target is not vocabularies.from_environment for one in reached):
        return {}
    used = vocabularies.from_environment()
    extra_ids = int(os.environ.get(vocabularies.EXTRA_IDS_VARIABLE) or 0)
    file = getattr(used, "sentencepiece_model_file", None)
    content = None
    if file is not None:
        with open(file, "rb") as opened_file:
            content = opened_file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(
                f"{file} has more than {_MAX_BYTES >> 20} MiB: no SentencePiece file "
                "that a run keeps. Check $VIT22B_VOCABULARY."
            )
    return vocabulary_files(content, extra_ids)


def _prompts(recipe: Any, reached: list[Any]) -> tuple[str, ...]:
    """Those of all tasks that the recipe trains on."""
    from vit22b_transfer.data import tasks

    prompts: dict[str, None] = {}
    for reference in reached:
        bound = recipe.bound_to(reference.name, reference.scope)
        if "task" in bound:
            name = recipe.resolved(bound["task"].value)
            if isinstance(name, str) and name in tasks.names():
                prompts |= dict.fromkeys(tasks.prompts(name))
    return tuple(prompts)
