"""Several processes on this machine do together what one does alone.

Each has a part of four simulated devices; they talk over the loopback interface. They
run the commands that a user types, on drawn scenes.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
import tiny_models
import yaml
from flax import traverse_util
from tiny_captions import ONE_DEVICE
from tiny_processes import (
    LIMIT,
    RECIPE,
    ROOT,
    finish,
    infer_and_evaluate,
    output,
    started,
    train,
    wait_for,
)

from vit22b_transfer import cli
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.demo import scenes
from vit22b_transfer.partitioning import processes
from vit22b_transfer.recipes import loading

STEPS = 4
PERIOD = 10  # of the checkpoints of the run in which a process is killed
TASK = "scenes_captioning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    sizes = {"train": 24, "validation": 8, "test": 11}
    scenes.write_scenes(folder / "data", seed=3, sizes=sizes)
    (folder / "recipe.gin").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def survivors(folder):
    """Two processes train, infer and evaluate; then one is killed in a longer run.

    Exit codes of both, and the seconds that the survivor needed to end.
    """
    two, killed = folder / "two", folder / "killed"
    commands = [
        train(folder, two, STEPS, 2),
        *infer_and_evaluate(folder, two, two),
        train(folder, killed, 10**6, PERIOD),
    ]
    with started(folder, "two", 2, commands) as children:
        wait_for(killed / f"checkpoint_{PERIOD}", children)
        children[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        codes = [process.wait(LIMIT) for process in children]
    return codes, time.monotonic() - began


@pytest.fixture(scope="module")
def one(folder, survivors):
    """One process: trains, does the same to their checkpoint, and goes on for them.

    The step at which it went on.
    """
    step = reading.latest_step(str(folder / "killed"))
    commands = [
        train(folder, folder / "one", STEPS, 2),
        *infer_and_evaluate(folder, folder / "two", folder / "one_of_two"),
        train(folder, folder / "killed", step + 2, PERIOD),
    ]
    with started(folder, "one", 1, commands) as children:
        finish(folder, "one", children)
    return step


def arrays(path):
    """Every array of a checkpoint, or of the latest in a directory."""
    saved = reading.saved_arrays(reading.resolve(str(path)))
    abstract = {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=ONE_DEVICE.replicated
        )
        for name, array in saved.items()
    }
    abstract = traverse_util.unflatten_dict(abstract, sep="/")
    return jax.device_get(reading.restore_tree(str(path), abstract))


def logged(folder):
    """{step: loss} of every line of a log, of which no step has two."""
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    losses = {line["step"]: line["train/loss"] for line in lines}
    assert len(losses) == len(lines)
    return losses


def assert_same_training(folder, other, steps=(2, STEPS)):
    assert list(logged(folder)) == list(range(1, STEPS + 1))
    assert logged(folder) == pytest.approx(logged(other), rel=1e-5)
    for step in steps:
        trees = [arrays(path / f"checkpoint_{step}") for path in (folder, other)]
        params = [tree["target"] for tree in trees]
        assert tiny_models.relative_difference(*params) < 1e-5


def assert_same_predictions(folder, other):
    """The bytes of the predictions, and the scores."""
    name = f"{TASK}-test-checkpoint_{STEPS}.jsonl"
    lines = (folder / name).read_bytes()
    assert lines == (other / name).read_bytes()
    assert lines.count(b"\n") == 11
    assert not list(folder.glob("*.host-*"))
    results = [
        json.loads((path / "metrics.json").read_text())[f"{TASK}/test"]
        for path in (folder, other)
    ]
    assert results[0]["num_scored"] == results[1]["num_scored"] == 11
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_do_what_one_does(folder, survivors, one):
    assert_same_training(folder / "two", folder / "one")
    assert_same_predictions(folder / "two", folder / "one_of_two")
    # Only process 0 speaks.
    assert "loss" in output(folder, "two", 0) and "loss" not in output(folder, "two", 1)


@pytest.mark.slow
def test_when_a_process_dies_the_others_end_and_the_run_goes_on(folder, survivors, one):
    (code, killed), seconds = survivors
    assert killed == -signal.SIGKILL
    # It is told at once, or within the time in which JAX misses a sign of life.
    assert code != 0 and seconds < 120
    message = output(folder, "two", 0)
    assert "Start all of them again" in message or "another task died" in message
    # What was saved is whole and was gone on with, in one process.
    assert one % PERIOD == 0
    assert reading.latest_step(str(folder / "killed")) == one + 2
    losses = logged(folder / "killed")
    assert list(losses) == list(range(1, one + 3))
    early = {step: losses[step] for step in range(1, STEPS + 1)}
    assert early == pytest.approx(logged(folder / "one"), rel=1e-5)


@pytest.mark.slow
def test_four_processes_do_what_one_does(folder, one):
    four, on_one, on_two = (folder / name for name in ("four", "on_one", "on_two"))
    # A device each: both mesh axes go across processes, and pairs of them share rows.
    commands = [
        train(folder, four, STEPS, 2),
        *infer_and_evaluate(folder, four, four),
    ]
    with started(folder, "four", 4, commands) as children:
        finish(folder, "four", children)
    assert_same_training(four, folder / "one")

    # What four have saved is read, and gone on with, by one and by two.
    for path in (on_one, on_two):
        shutil.copytree(four / "checkpoint_2", path / "checkpoint_2")
        shutil.copy(four / "metrics.jsonl", path)
    commands = [
        train(folder, on_one, STEPS, STEPS),
        *infer_and_evaluate(folder, four, folder / "one_of_four"),
    ]
    with started(folder, "on_one", 1, commands) as children:
        finish(folder, "on_one", children)
    commands = [
        train(folder, on_two, STEPS, STEPS),
        train(folder, folder / "stopped", 10**6, 10**6),
    ]
    with started(folder, "on_two", 2, commands) as children:
        wait_for(folder / "stopped" / "metrics.jsonl", children)
        # The wish that one of them stops is told to all; they end together, and save.
        children[1].send_signal(signal.SIGTERM)
        finish(folder, "on_two", children)
    assert_same_training(on_one, folder / "one", steps=(STEPS,))
    assert_same_training(on_two, folder / "one", steps=(STEPS,))
    assert_same_predictions(four, folder / "one_of_four")
    step = reading.latest_step(str(folder / "stopped"))
    assert step == max(logged(folder / "stopped"))


# --- Who takes part ---


@pytest.mark.parametrize(
    "values",
    [
        ("10.0.0.1:1234", "2", ""),
        ("10.0.0.1", "2", "0"),
        ("10.0.0.1:1234", "two", "0"),
        ("10.0.0.1:1234", "2", "2"),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(values, monkeypatch):
    for name, value in zip(processes.VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="needed are host:port of process 0") as error:
        processes.join()
    assert f"JAX_PROCESS_ID={values[-1]}" in str(error.value)


def test_without_a_cluster_the_command_says_what_to_set():
    hidden = {*processes.VARIABLES, "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"}
    result = subprocess.run(
        [sys.executable, "-m", "vit22b_transfer.cli"]
        + ["eval", "--distributed", "--gin_file=any.gin"],
        env={k: v for k, v in os.environ.items() if k not in hidden},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "JAX knows no cluster here" in result.stderr
    assert "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES" in result.stderr
    assert "Traceback" not in result.stderr


def test_launch_examples_use_what_there_is():
    script = (ROOT / "gin_configs/launch/slurm.sh").read_text()
    words = shlex.split(script[script.index("\nsrun") :].replace("\\\n", " "))
    slurm = words[words.index("vit22b") + 1 :]
    array = (ROOT / "gin_configs/launch/slurm_array.sh").read_text()
    line = array[array.index("\nvit22b infer") :].replace("\\\n", " ")
    args = cli.parsed(shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "0"))[1:])
    assert args.command == "infer" and args.shard == "0/$SLURM_ARRAY_TASK_COUNT"
    assert args.overrides == ["OUTPUT='$OUTPUT'"]
    manifest = (ROOT / "gin_configs/launch/kubernetes.yaml").read_text()
    service, job = yaml.safe_load_all(manifest)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    name, *kubernetes = container["command"]
    assert name == "vit22b"
    for command_line in (slurm, kubernetes):
        args = cli.parsed(command_line)
        assert args.command == "train" and args.distributed
        assert all((ROOT / file).is_file() for file in args.gin_file)
        assert [text.partition("=")[0] for text in args.overrides] == ["MODEL_DIR"]
        loading.read(args.gin_file, args.overrides, [str(ROOT)])
    names = {variable["name"]: variable for variable in container["env"]}
    assert set(processes.VARIABLES) <= set(names)
    assert names["JAX_NUM_PROCESSES"]["value"] == str(job["spec"]["completions"])
    host = names["JAX_COORDINATOR_ADDRESS"]["value"].partition(":")[0]
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
