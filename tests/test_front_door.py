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


def test_a_folder_becomes_captions_in_order_with_an_error_for_a_broken_file(captioned):
    lines = lines_of(captioned)
    assert [line["image_id"] for line in lines] == [f"photos/{x}" for x in IMAGES]
    assert "truncated" in lines[0]["error"] and "prediction" not in lines[0]
    assert all(isinstance(line["prediction"], str) for line in lines[1:])
    assert {line["prompt"] for line in lines} == {"caption en"}


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
        (["caption", "photos", "--model", "source_0"], "first `vit22b import source_0"),
        (["caption", "photos", "--model", "photos"], "neither what `vit22b import`"),
        (["caption", "photos", "--model", "imported"], "came without a SentencePiece"),
        (["caption", "photos", *IMPORTED, "--out", "x.json"], "ends in .jsonl"),
        (["answer", "photos", *IMPORTED], "has no question; give one"),
        (["train"], "no recipe is named"),
        (["eval", "photos"], "photos holds no recipe.gin"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(arguments, message, capfd):
    vit22b(*arguments, code=1)
    assert message in capfd.readouterr().err


# ----- A run's folder says all it needs -------------------------------------------


TRAINING = [
    "--gin_file=gin_configs/recipes/my_captions.gin",
    "--gin_file=gin_configs/runs/try.gin",
    "--gin.vit.vit22b_config.depth=1",
    "--gin.t5.T5Config.num_encoder_layers=1",
    "--gin.t5.T5Config.num_decoder_layers=1",
    "--gin.multimodal.ImageTextModel.decode_fn=@decoding.greedy",
    "--gin.IMAGE_SIZE=(32, 32)",
    "--gin.VOCAB_SIZE=320",
    "--gin.TRAIN_STEPS=2",
    "--gin.WARMUP_STEPS=1",
    "--gin.BATCH_SIZE=2",
]


@pytest.fixture(scope="module")
def run(home):
    """The MODEL_DIR of a short training on the photographs, moved since."""
    images = [{"id": n, "file_name": name} for n, name in enumerate(IMAGES)]
    captions = [
        {"id": n, "image_id": n, "caption": f"a photograph, the {n}th"}
        for n in range(len(IMAGES))
    ]
    content = json.dumps({"images": images, "annotations": captions})
    (home / "train.json").write_text(content)
    names = {"MY_CAPTIONS_JSON": "train.json", "MY_VALIDATION_JSON": "train.json"}
    names |= {"MY_IMAGES": "photos", "MY_NEW_IMAGES": "photos"}
    names["VIT22B_VOCABULARY"] = str(home / "my.model")
    with contextlib.chdir(home), no_tasks(), pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        vit22b("vocab", "--out", "my.model", "--vocab_size", "300", "train.json")
        vit22b("train", *TRAINING, "--gin.MODEL_DIR='made'")
    shutil.move(home / "made", home / "run")
    os.rename(home / "my.model", home / "away.model")
    return home / "run"


def test_a_run_is_evaluated_and_captions_from_its_folder_alone(run, home, monkeypatch):
    assert {"recipe.gin", "predict.gin", "vocabulary.json", "vocabulary.model"} <= set(
        os.listdir(run)
    )
    recipe = (run / "recipe.gin").read_text()
    assert "import tasks.my_captions\n" in recipe
    assert "MODEL_DIR = %gin.REQUIRED" in recipe and "include" not in recipe
    for name in ("MY_CAPTIONS_JSON", "MY_VALIDATION_JSON"):
        monkeypatch.setenv(name, "train.json")
    monkeypatch.setenv("MY_IMAGES", "photos")
    vit22b("eval", "run")
    scores = json.loads((run / "metrics.json").read_text())
    assert scores["my_captions/validation"]["num_bad_images"] == 1
    # Predictions of given images need no task, nor the folder of its module.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(home)])
    monkeypatch.delitem(sys.modules, "tasks.my_captions", raising=False)
    vit22b("infer", "run", "--images", "photos", "--out", "of_run.jsonl")
    lines = lines_of(home / "of_run.jsonl")
    assert len(lines) == 5 and lines[1]["prompt"] == "caption en"
    assert "tasks" not in (run / "predict.gin").read_text()
    # The whole recipe reads back as it was.
    stored = recipe.partition("MODEL_DIR")[2].splitlines()
    assert "BATCH_SIZE = 2" in recipe.splitlines() and len(stored) > 20


def test_the_stored_vocabulary_is_looked_at_before_it_is_used(run, tmp_path, capfd):
    copied = shutil.copytree(run, tmp_path / "copied")
    said = {"file": "../away.model", "extra_ids": 0}
    (copied / folders.VOCABULARY).write_text(json.dumps(said))
    vit22b("caption", "photos", "--model", str(copied), code=1)
    assert "names no vocabulary" in capfd.readouterr().err
