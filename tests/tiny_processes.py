"""A tiny recipe, and processes on this machine that run the command on it together.

Each has a part of four simulated devices; they talk over the loopback interface.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEVICES = 4
LIMIT = 400  # seconds, on a machine with other things to do
# Each argument is a command as JSON; the first that fails is the last.
DRIVER = """
import json, sys
from vit22b_transfer import cli
for argument in sys.argv[1:]:
    if code := cli.main(json.loads(argument)):
        sys.exit(code)
"""
RECIPE = """
from __gin__ import dynamic_registration
from vit22b_transfer.models import t5
from vit22b_transfer.models import vit
from vit22b_transfer.training import optimizers
from vit22b_transfer.training import train

include 'gin_configs/recipes/scenes_captioning.gin'
include 'gin_configs/meshes/activations_2d_fsdp.gin'

BATCH_SIZE = 8
FEATURE_LENGTHS = {'images': %IMAGE_SIZE, 'inputs': 4, 'targets': 8}
vit.ViTConfig:
  width = 32
  depth = 1
  mlp_dim = 64
t5.T5Config:
  width = 32
  num_encoder_layers = 0
  num_decoder_layers = 1
  head_dim = 8
  mlp_dim = 64
WARMUP_STEPS = 1
# One program for any number of steps.
SCHEDULE = @optimizers.constant()
optimizers.constant.peak = 0.001
train.Periods.log = 1
train.fine_tune.keep = None
train.fine_tune.eval_data = None
"""


def command(name, folder, model_dir, *files, **values):
    values = {"MODEL_DIR": str(model_dir)} | values
    return [
        name,
        *(f"--gin_file={file}" for file in (folder / "recipe.gin", *files)),
        *(f"--gin.{name.replace('__', '.')}={v!r}" for name, v in values.items()),
    ]


def train(folder, model_dir, steps, period):
    return command(
        "train", folder, model_dir, TRAIN_STEPS=steps, Periods__checkpoint=period
    )


def infer_and_evaluate(folder, checkpoint, output):
    # On this mesh no sum has more than two parts, so rounding cannot differ.
    mesh = "gin_configs/meshes/model_parallel_2.gin"
    return [
        command(name, folder, output, mesh, CHECKPOINT=str(checkpoint))
        for name in ("infer", "eval")
    ]


@contextlib.contextmanager
def started(folder, name, count, commands):
    """The processes, which share `DEVICES`; killed at the end if they still run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [
        f"--xla_force_host_platform_device_count={DEVICES // count}",
        "--xla_backend_optimization_level=0",  # compiles faster
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled_{count}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "VIT22B_DATA_DIR": str(folder / "data"),
        "VIT22B_VOCABULARY": "",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
    }
    if count > 1:
        commands = [[name, "--distributed", *rest] for name, *rest in commands]
    children = []
    try:
        for number in range(count):
            with open(output_file(folder, name, number), "w") as output:
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-c", DRIVER, *map(json.dumps, commands)],
                        env=environment | {"JAX_PROCESS_ID": str(number)},
                        cwd=ROOT,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield children
    finally:
        for process in children:
            process.kill()
            process.wait()


def output_file(folder, name, number):
    return folder / f"{name}_{number}.txt"


def output(folder, name, number):
    return output_file(folder, name, number).read_text()


def finish(folder, name, children):
    for number, process in enumerate(children):
        assert process.wait(LIMIT) == 0, output(folder, name, number)


def wait_for(path, children):
    """Returns when `path` is there; the first process still runs then."""
    end = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < end
        with contextlib.suppress(subprocess.TimeoutExpired):
            children[0].wait(0.1)
            pytest.fail(f"ended without {path}")
