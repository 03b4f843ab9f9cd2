"""The two roads of a newcomer, on photographs: to captions, and to a tuned model."""

import contextlib
import json
import os
import shlex
import shutil
import sys

import photographs
import pytest
import tiny_imports
from shell_commands import no_tasks, use_one_device

from vit22b_transfer import cli
from vit22b_transfer.commands import folders


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with photographs, one of them cut off, and an imported PaliGemma."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "photos").mkdir()
    paths = photographs.write(folder / "photos")
    for name in set(paths) - {"square.png", "tiny.png", "grey.png", "wide.jpg"}:
        os.remove(paths[name])
    with open(folder / "photos" / "cut.jpg", "wb") as file:
        file.write((folder / "photos" / "wide.jpg").read_bytes()[:2000])
    use_one_device(folder)
    with contextlib.redirect_stdout(sys.stderr):
        tiny_imports.paligemma(folder)
    return folder


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    """As a new shell in that folder, without any variable of ours."""
    monkeypatch.chdir(home)
    monkeypatch.delenv("VIT22B_VOCABULARY", raising=False)
    monkeypatch.delenv("VIT22B_EXTRA_IDS", raising=False)
    with no_tasks():
        yield


def vit22b(*arguments, code=0):
    assert cli.main(list(arguments)) == code


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


IMPORTED = ["--model", "imported", "--vocabulary", "bytes"]
IMAGES = ["cut.jpg", "grey.png", "square.png", "tiny.png", "wide.jpg"]


@pytest.fixture(scope="module")
def captioned(home):
    """The captions of the folder, and what was said."""
    with contextlib.chdir(home), no_tasks():
        vit22b("caption", "photos", *IMPORTED, "--out", "captions.jsonl")
    return home / "captions.jsonl"


@pytest.mark.slow
def test_a_folder_becomes_captions_in_order_with_an_error_for_a_broken_file(captioned):
    lines = lines_of(captioned)
    assert [line["image_id"] for line in lines] == [f"photos/{x}" for x in IMAGES]
    assert "truncated" in lines[0]["error"] and "prediction" not in lines[0]
    assert all(isinstance(line["prediction"], str) for line in lines[1:])
    assert {line["prompt"] for line in lines} == {"caption en"}


@pytest.mark.slow
def test_the_printed_recipe_gives_the_same_file(captioned, home, capfd):
    before = captioned.read_bytes()
    vit22b("caption", "photos", *IMPORTED, "--out", "captions.jsonl")
    shown = capfd.readouterr()
    assert "reusing the predictions" in shown.out
    (told,) = [x for x in shown.err.splitlines() if x.startswith("as a recipe: ")]
    variable, command, *arguments = shlex.split(told.removeprefix("as a recipe: "))
    assert (variable, command) == ("VIT22B_VOCABULARY=bytes", "vit22b")
    again = [
        argument.replace("captions.jsonl", "again.jsonl") for argument in arguments
    ]
    vit22b(*again)
    assert (home / "again.jsonl").read_bytes() == before
    # Other images into the same file are refused, and harm nothing.
    vit22b("caption", "photos/grey.png", *IMPORTED, "--out", "captions.jsonl", code=1)
    assert "was begun by another run: " in capfd.readouterr().err
    assert captioned.read_bytes() == before


@pytest.mark.slow
def test_an_exported_folder_gives_the_captions_of_what_it_was_made_of(
    captioned, home, capfd
):
    vit22b("export", "imported", "--format", "hf-paligemma", "--out", "exported")
    exported = ["--model", "exported", "--vocabulary", "bytes"]
    vit22b("caption", "photos", *exported, "--out", "of_export.jsonl")
    assert (home / "of_export.jsonl").read_bytes() == captioned.read_bytes()
    # The folder of the import is gone; what is told begins with one that stays.
    made_with = json.loads((home / "of_export.jsonl.run.json").read_text())["made_with"]
    assert made_with["recipe"].startswith("vit22b import exported --out imported && ")
    assert f"as a recipe: {made_with['recipe']}\n" in capfd.readouterr().err
    assert "vit22b_imported_" not in made_with["recipe"]
    assert "--gin_file=imported/model.gin" in made_with["recipe"]


def test_an_answer_is_shown_and_no_file_is_left(home, capfd):
    before = sorted(os.listdir(home))
    question = ["--question", "What is there?"]
    vit22b("answer", "photos/grey.png", "photos/cut.jpg", *question, *IMPORTED)
    shown = capfd.readouterr()
    grey, cut = shown.out.splitlines()
    assert grey.startswith("photos/grey.png\t")
    assert cut.startswith("photos/cut.jpg\terror: ")
    assert sorted(os.listdir(home)) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["caption", "photos", "--model", "source_0"], "came without a SentencePiece"),
        (["caption", "photos", "--model", "photos"], "neither what `vit22b import`"),
        (["caption", "photos", "--model", "imported"], "came without a SentencePiece"),
        (["caption", "photos", *IMPORTED, "--out", "x.json"], "ends in .jsonl"),
        (["answer", "photos", *IMPORTED], "has no question; give one"),
        (["train"], "no recipe is named"),
        (["eval", "photos"], "photos holds no recipe.gin"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(arguments, message, capfd):
    vit22b(*arguments, code=1 if "--model" in arguments else 2)
    assert message in capfd.readouterr().err


# ----- From a file of captions to a tuned model, and what its folder says ----------


# What a user might edit in the recipe, for a training of a second.
SMALL = """
from vit22b_transfer.models import vit
from vit22b_transfer.models import t5
from vit22b_transfer.models import multimodal
from vit22b_transfer.inference import decoding
vit.vit22b_config.depth = 1
t5.T5Config:
  num_encoder_layers = 1
  num_decoder_layers = 1
multimodal.ImageTextModel.decode_fn = @decoding.greedy
IMAGE_SIZE = (32, 32)
TRAIN_STEPS = 2
WARMUP_STEPS = 1
BATCH_SIZE = 2
"""


@pytest.fixture(scope="module")
def project(home):
    """A project on the photographs, trained and evaluated."""
    images = [{"id": n, "file_name": name} for n, name in enumerate(IMAGES)]
    captions = [
        {"id": n, "image_id": n % 5, "caption": f"a photograph, the {n}th"}
        for n in range(10)
    ]
    content = json.dumps({"images": images, "annotations": captions})
    (home / "train.json").write_text(content)
    use_one_device(home / "mesh")
    with contextlib.chdir(home), no_tasks():
        vit22b("init", "project", "--captions", "train.json", "--images", "photos")
        with open("project/recipe.gin", "a") as file:
            file.write(SMALL)
        shutil.move("mesh/gin_configs", "project/gin_configs")
        os.chdir("project")
        sys.path.insert(0, str(home / "project"))
        vit22b("train")
        vit22b("eval")
    return home / "project"


@pytest.mark.slow
def test_a_project_holds_out_whole_images_and_has_its_vocabulary(project, home):
    parts = [
        json.loads((project / "data" / f"{name}.json").read_text())
        for name in ("train", "validation")
    ]
    ids = [{x["image_id"] for x in part["annotations"]} for part in parts]
    assert [len(part) for part in ids] == [4, 1] and not ids[0] & ids[1]
    assert [{x["id"] for x in part["images"]} for part in parts] == ids
    together = [x for part in parts for x in part["annotations"]]
    given = json.loads((home / "train.json").read_text())["annotations"]
    assert sorted(together, key=lambda x: x["id"]) == given
    scores = json.loads((project / "run" / "metrics.json").read_text())
    (entry,) = scores.values()
    assert "cider_d" in entry["metrics"] and entry["num_scored"] <= 1
    assert (project / "vocabulary.model").is_file()


@pytest.mark.slow
def test_a_run_is_evaluated_from_its_folder_alone(project, capfd, monkeypatch):
    run = project / "run"
    stored = {"recipe.gin", "predict.gin", "vocabulary.json", "vocabulary.model"}
    assert stored <= set(os.listdir(run))
    recipe = (run / "recipe.gin").read_text()
    assert "import tasks.my_captions\n" in recipe and "include" not in recipe
    assert "MODEL_DIR = %gin.REQUIRED" in recipe.splitlines()
    assert "BATCH_SIZE = 2" in recipe.splitlines()
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    (project / "recipe.gin").rename(project / "edited.gin")
    vit22b("eval", "run")
    # The predictions of the project's own evaluation are those of this recipe.
    assert "reusing the predictions" in capfd.readouterr().out


@pytest.mark.slow
def test_a_moved_run_captions_without_its_tasks(project, home):
    shutil.copytree(project / "run", home / "moved")
    assert "tasks" not in (home / "moved" / "predict.gin").read_text()
    vit22b("infer", "moved", "--images", "photos", "--out", "of_run.jsonl")
    lines = lines_of(home / "of_run.jsonl")
    assert len(lines) == 5 and lines[1]["prompt"] == "caption en"
    # Names in a list are relative to the list, or to a root; never to the run.
    (home / "named.jsonl").write_text('{"image": "grey.png"}\n')
    root = ["--images_root", str(home / "photos")]
    vit22b(
        "infer", "moved", "--images", "named.jsonl", *root, "--out", "named_out.jsonl"
    )
    assert [line.get("error") for line in lines_of(home / "named_out.jsonl")] == [None]
    assert not [name for name in sys.modules if name.startswith("tasks.my")]


def test_arguments_of_images_without_images_are_errors(tmp_path, capfd):
    set_anyway = ["--out", "o.jsonl", "--paths_outside"]
    vit22b("infer", str(tmp_path), *set_anyway, code=1)
    assert "--out, --paths_outside would have no effect" in capfd.readouterr().err


@pytest.mark.slow
def test_the_stored_vocabulary_is_looked_at_before_it_is_used(project, tmp_path, capfd):
    copied = shutil.copytree(project / "run", tmp_path / "copied")
    for said in ({"file": "../vocabulary.model"}, {"file": "bytes", "extra_ids": "1"}):
        (copied / folders.VOCABULARY).write_text(json.dumps(said))
        vit22b("caption", "photos", "--model", str(copied), code=1)
        assert "names no vocabulary" in capfd.readouterr().err


def test_a_project_of_questions_starts_from_an_import(home, tmp_path, capfd):
    asked = [
        {"question_id": n, "image_id": n % 2, "question": f"Which is the {n}th?"}
        for n in range(6)
    ]
    answers = [
        {
            "question_id": n,
            "image_id": n % 2,
            "answers": [{"answer": "this", "answer_id": 1}],
            "multiple_choice_answer": "this",
        }
        for n in range(6)
    ]
    for n, name in enumerate(("grey.png", "tiny.png")):
        shutil.copy(home / "photos" / name, tmp_path / f"{n}.png")
    (tmp_path / "q.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
    files = ["--questions", str(tmp_path / "q.json")]
    images = ["--images", str(tmp_path)]
    vit22b("init", "asked", *files, *images, code=1)
    assert "--questions needs --annotations" in capfd.readouterr().err
    files += ["--annotations", str(tmp_path / "a.json"), "--from", "imported"]
    vit22b("init", "asked", *files, *images)
    assert "3 examples; 1 of 2 images" in capfd.readouterr().out
    with contextlib.chdir(home / "asked"):
        sys.path.insert(0, str(home / "asked"))
        vit22b("config", "show", "--gin_file=recipe.gin")
    shown = capfd.readouterr().out
    assert "ImageTextModel.module = @prefix_lm.PrefixLMModule()" in shown
    task = (home / "asked" / "tasks" / "my_vqa.py").read_text()
    assert 'IMAGE_FILE = "{image_id}.png"' in task
    vit22b("init", "asked", *files, *images, code=1)
    assert "is not an empty directory" in capfd.readouterr().err
