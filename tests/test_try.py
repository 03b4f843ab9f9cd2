"""gin_configs/runs/try.gin: a trial of any recipe, never taken for the whole."""

import importlib
import json

import gin
import pytest
from gin_files import CONFIGS, RECIPES, ROOT, read_recipe
from shell_commands import no_tasks

from vit22b_transfer import cli
from vit22b_transfer.commands import runs
from vit22b_transfer.demo import scenes
from vit22b_transfer.inference.prediction_files import read_lines
from vit22b_transfer.recipes import loading, shipped
from vit22b_transfer.training import inputs

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

TRY = CONFIGS / "runs/try.gin"


@pytest.fixture(autouse=True)
def no_gin_left_over():
    yield
    gin.clear_config()


def root_of(command):
    module, _, function = runs.FUNCTIONS[command].rpartition(".")
    return getattr(importlib.import_module(module), function)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_behind_every_recipe_it_shortens_all_three_commands(path):
    recipe = read_recipe(path, behind=[TRY])
    values = {name: value for name, (value, _) in recipe.macros.items()}
    assert values["WARMUP_STEPS"] < values["TRAIN_STEPS"] == 20
    for command in ("train", "eval", "infer"):
        root = root_of(command)
        arguments = loading.arguments(recipe, root, [str(ROOT)])
        if command == "train":
            told = loading.trial(recipe, [str(ROOT)])
            steps = read_recipe(path).macros["TRAIN_STEPS"][0]
            assert f"a trial: 20 of the recipe's {steps} steps" in told
            assert arguments["total_steps"] == 20
            assert arguments["data"].batch_size == 8
            assert isinstance(arguments["eval_data"], inputs.EvalData)
            assert arguments["eval_data"].max_examples == 16
            rates = arguments["model"].optimizer_def.learning_rate
            assert float(rates(4)) > 0 and float(rates(20)) < float(rates(6))
        else:
            assert (arguments["max_examples"], arguments["batch_size"]) == (16, 8)


# What compiles in seconds, of each recipe.
SMALL = {
    "scenes_vqa": ("T5Config.num_encoder_layers=1", "T5Config.num_decoder_layers=1"),
    "scenes_paligemma": ("GemmaConfig.depth=1",),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_trial_runs_and_says_that_it_is_one(name, tmp_path, monkeypatch, capsys):
    sizes = {"train": 20, "validation": 20, "test": 20}
    scenes.write_scenes(tmp_path / "data", sizes=sizes)
    monkeypatch.setenv("VIT22B_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("VIT22B_VOCABULARY", raising=False)
    common = [f"--gin_file=gin_configs/recipes/{name}.gin"]
    common += ["--gin_file=gin_configs/runs/try.gin", "--gin.TRAIN_STEPS=2"]
    common += ["--gin.WARMUP_STEPS=1", f"--gin.MODEL_DIR='{tmp_path}/trial'"]
    common += ["--gin.IMAGE_SIZE=(32, 32)", "--gin.ViTConfig.depth=1"]
    common += [f"--gin.{setting}" for setting in SMALL[name]]
    for command in ("train", "eval", "infer"):
        assert cli.main([command, *common]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "a trial: 2 of the recipe's " in shown
    written = tmp_path / "trial" / "scenes_vqa-test-checkpoint_2-first_16.jsonl"
    assert len(list(read_lines(str(written)))) == 16
    record = json.loads((tmp_path / "trial" / f"{written.name}.run.json").read_text())
    assert record["fingerprint"]["max_examples"] == 16
    assert record["fingerprint"]["num_examples"] >= 20
    metrics = json.loads((tmp_path / "trial" / "metrics.json").read_text())
    tasks = {"scenes_vqa"}
    tasks |= {"scenes_captioning"} if name == "scenes_paligemma" else set()
    assert set(metrics) == {f"{task}/test/first_16" for task in tasks}
    assert {entry["num_scored"] for entry in metrics.values()} == {16}
    assert f"16 predictions in {written}, of the first 16 of" in shown
    assert f"reusing the predictions in {written}, of the first 16 of" in shown
    whole = [*common, "--gin.infer_split.max_examples=None"]
    into = [f"--gin.OUTPUT='{written}'"]
    assert cli.main(["infer", *whole, *into]) == 1
    assert "max_examples was 16 and is None" in capsys.readouterr().err


# ----- Files of a split that are not there --------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    with no_tasks():
        monkeypatch.chdir(tmp_path)
        shipped.offer_tasks()
        yield tmp_path


NOT_THERE = {
    "vqav2": ("infer", "'test' of task 'vqav2'", "INFER_SPLIT", "INFER_TASK"),
    "my_captions": ("infer", "'test' of task 'my_new", "INFER_SPLIT", "INFER_TASK"),
    "coco_captions": ("eval", "'validation' of task", "EVAL_SPLIT", "EVAL_TASKS"),
    "scenes_vqa": ("train", "'train' of", "inputs.TrainData.split", "TRAIN_TASK"),
}


@pytest.mark.parametrize("recipe", NOT_THERE)
def test_files_that_are_not_there_name_what_chooses_others(elsewhere, recipe, capsys):
    command, split, *options = NOT_THERE[recipe]
    arguments = [f"--gin_file=gin_configs/recipes/{recipe}.gin"]
    arguments += [f"--gin.MODEL_DIR='{elsewhere}/model'"]
    if recipe == "vqav2":
        arguments.append("--gin.INITIAL_CHECKPOINT='/nowhere'")
    assert cli.main([command, *arguments]) == 1
    error = capsys.readouterr().err
    assert "environment variable" in error and error.count("\n") == 1
    assert f"Split {split}" in error
    assert f"--gin.{options[0]} chooses another split, --gin.{options[1]} " in error


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("command", ["eval", "infer"])
def test_every_recipe_has_a_macro_for_its_split(path, command):
    recipe = read_recipe(path)
    name = {"eval": "EVAL_SPLIT", "infer": "INFER_SPLIT"}[command]
    split = recipe.macros[name][0]
    said = loading.other_data(recipe, root_of(command), split)
    assert said.startswith(f"--gin.{name} chooses another split, ")


def test_a_missing_split_of_evaluation_is_told_before_the_first_step(
    elsewhere, monkeypatch, capsys
):
    drawn = scenes.write_scenes(elsewhere / "data", sizes={"train": 10})
    assert drawn
    monkeypatch.setenv("VIT22B_DATA_DIR", str(elsewhere / "data"))
    arguments = ["--gin_file=gin_configs/recipes/scenes_vqa.gin"]
    arguments += [f"--gin.MODEL_DIR='{elsewhere}/model'"]
    assert cli.main(["train", *arguments]) == 1
    error = capsys.readouterr().err
    assert "questions_validation.json does not exist" in error
    assert (
        "--gin.inputs.EvalData.split chooses another split, --gin.EVAL_TASKS" in error
    )
