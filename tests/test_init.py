"""`vit22b init`: a project that runs as it is written, and never overwrites."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from shell_commands import (
    no_tasks,
    recorded_calls,
    run_in_process,
    use_one_device,
)

from vit22b_transfer import cli
from vit22b_transfer.recipes import loading, shipped
from vit22b_transfer.training import train


@pytest.fixture(autouse=True)
def path_as_it_was(monkeypatch):
    """The command puts the current directory on Python's path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def written(task, name, capsys):
    """The command that is printed."""
    assert cli.main(["init", name, f"--task={task}"]) == 0
    *_, command = capsys.readouterr().out.splitlines()
    return command


@pytest.mark.parametrize("task", ["captions", "vqa"])
def test_the_printed_command_has_a_complete_recipe(tmp_path, monkeypatch, capsys, task):
    monkeypatch.chdir(tmp_path)
    command = written(task, "my project", capsys)
    assert command.startswith(
        "cd 'my project' && VIT22B_VOCABULARY=bytes vit22b train "
    )
    ((directory, _, arguments),) = recorded_calls(command, tmp_path)
    args = cli.parsed(arguments)
    with no_tasks():
        os.chdir(directory)
        sys.path.insert(0, directory)
        shipped.offer_tasks()
        recipe = loading.read(args.gin_file, args.overrides, shipped.search_paths())
        task = importlib.import_module(f"tasks.my_{task}")
        assert Path(task.__file__).is_relative_to(tmp_path)
    loading.check_complete(recipe, train.fine_tune)
    there = [value for value in vars(task).values() if str(value).startswith("data/")]
    assert len(there) >= 4
    assert all((tmp_path / "my project" / path).exists() for path in there)


def test_no_caption_of_the_samples_is_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written("captions", "mine", capsys)
    recipe = loading.read(
        ["mine/gin_configs/recipes/my_captions.gin"], [], ["", *shipped.search_paths()]
    )
    lengths, _ = recipe.macros["FEATURE_LENGTHS"]
    longest = max(
        len(entry["caption"].encode()) + 1  # EOS
        for name in ("captions", "validation")
        for entry in json.loads(Path(f"mine/data/{name}.json").read_text())[
            "annotations"
        ]
    )
    assert longest <= lengths["targets"]


@pytest.mark.slow
def test_the_printed_command_works_and_the_readmes_go_on(tmp_path, monkeypatch, capsys):
    """Of `vqa`; .ci/run does the printed command with the captions."""
    monkeypatch.chdir(tmp_path)
    command = written("vqa", "my project", capsys)
    project = tmp_path / "my project"
    use_one_device(project)
    run_in_process(command, tmp_path)
    assert (project / "trial" / "checkpoint_20").is_dir()
    readme = (project / "README.md").read_text()
    assert len(readme.splitlines()) <= 16
    run_in_process(readme.split("```")[1].removeprefix("bash\n"), project)
    metrics = json.loads((project / "trial" / "metrics.json").read_text())
    # Of 16 images, 48 questions.
    assert metrics["my_vqa/validation/first_16"]["metrics"]
    (lines,) = (project / "trial").glob("my_*-test-checkpoint_20*.jsonl")
    assert len(lines.read_text().splitlines()) >= 8


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "my_captions.py").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    assert cli.main(["init", "."]) == 1
    error = capsys.readouterr().err
    assert ". holds README.md, tasks/my_captions.py already" in error
    assert "name another directory" in error
    assert (tmp_path / "tasks" / "my_captions.py").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "tasks"]
    assert error.count("\n") == 1
