"""`vit22b init`: a project that runs as it is written, and never overwrites."""

import json

import pytest
from shell_commands import run_in_process

from vit22b_transfer import cli


@pytest.mark.parametrize("task", ["captions", "vqa"])
def test_the_printed_next_command_works(tmp_path, monkeypatch, capsys, task):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "my project", f"--task={task}"]) == 0
    printed = capsys.readouterr().out
    _, _, command = printed.partition("Next, a short try:\n\n")
    assert command.startswith("cd 'my project' && vit22b train ")
    run_in_process(command, tmp_path)
    project = tmp_path / "my project"
    assert (project / "model" / "checkpoint_20").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["captions", "vqa"])
def test_the_commands_of_its_readme_work(tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", ".", f"--task={task}"]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert len(readme.splitlines()) <= 16
    run_in_process(readme.split("```")[1].removeprefix("bash\n"), tmp_path)
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics[f"my_{task}/validation"]["examples"]
    (written,) = (tmp_path / "model").glob("my_*-test-checkpoint_20.jsonl")
    assert len(written.read_text().splitlines()) >= 8


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
