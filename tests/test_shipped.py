"""Recipes and tasks of the package: found behind the user's own, and in a wheel."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shell_commands import no_tasks

from vit22b_transfer import cli
from vit22b_transfer.recipes import loading, shipped

ROOT = Path(__file__).parent.parent


@pytest.fixture
def own_folder(tmp_path):
    """The current directory, first on Python's path; no task is registered."""
    with no_tasks():
        os.chdir(tmp_path)
        sys.path.insert(0, str(tmp_path))
        importlib.invalidate_caches()
        shipped.offer_tasks()
        yield tmp_path


def file_of(module):
    spec = importlib.util.find_spec(module)
    return Path(spec.origin)


def test_a_clone_ships_the_repositorys_own_folders():
    assert Path(shipped.folder()) == ROOT
    assert shipped.search_paths() == ("", str(ROOT))


@pytest.mark.parametrize("is_package", [True, False], ids=["package", "plain folder"])
def test_the_users_tasks_come_first_and_the_shipped_fill_up(own_folder, is_package):
    own = own_folder / "tasks"
    own.mkdir()
    (own / "coco.py").write_text("")
    if is_package:
        (own / "__init__.py").write_text("MARK = 'own'")
    assert file_of("tasks.coco") == own / "coco.py"
    assert file_of("tasks.vqa") == ROOT / "tasks" / "vqa.py"
    assert hasattr(sys.modules["tasks"], "MARK") == is_package


def test_without_tasks_of_the_users_own_the_shipped_are_found(own_folder):
    (own_folder / "tasks.py").write_text("raise RuntimeError")  # of another program
    assert file_of("tasks.coco") == ROOT / "tasks" / "coco.py"


def test_tasks_lists_the_shipped_where_there_are_none(own_folder, capsys):
    assert cli.main(["tasks"]) == 0
    assert {"coco_captions", "scenes_mixture"} <= set(capsys.readouterr().out.split())


def test_a_recipe_of_the_users_own_hides_the_shipped_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "gin_configs/meshes/data_parallel.gin"
    paths = shipped.search_paths()
    assert loading.read([name], [], paths).bindings
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("")
    assert not loading.read([name], [], paths).bindings
    assert cli.main(["config", "path"]) == 0
    assert capsys.readouterr().out == f"{ROOT}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["show"], "arguments are required: --gin_file"),
        (["path", "--gin_file=x"], "config path takes no recipe"),
        (["path", "--gin.A=1"], "config path takes no recipe"),
    ],
)
def test_wrong_usage_of_config_is_told(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["config", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def setup_py(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_built_package_holds_recipes_and_tasks_and_nothing_at_its_top(tmp_path):
    """From an sdist, as an index would: what it lacks, the wheel lacks."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True
    )
    clone = tmp_path / "clone"
    for name in listed.stdout.splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    setup_py(clone, "sdist", "--dist-dir", tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    built = tmp_path / "built"
    setup_py(unpacked, "build_py", "--build-lib", built)
    assert [path.name for path in built.iterdir()] == ["vit22b_transfer"]
    shipped_files = built / "vit22b_transfer" / "shipped"
    for folder in ("gin_configs", "tasks"):
        there = {p.name for p in (shipped_files / folder).rglob("*") if p.is_file()}
        assert there == {
            Path(name).name
            for name in listed.stdout.splitlines()
            if name.startswith(f"{folder}/")
        }
