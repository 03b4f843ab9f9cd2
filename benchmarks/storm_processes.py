"""Processes of a kill storm: forks of one that has imported all and used nothing.

So kills hit the work and not the start, most of which is importing.
"""

import importlib
import os
import pathlib
import sys

from vit22b_transfer.commands import arguments as command_arguments

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPE = """
from __gin__ import dynamic_registration
from vit22b_transfer.models import t5
from vit22b_transfer.models import vit
from vit22b_transfer.partitioning import rules
from vit22b_transfer.training import optimizers
from vit22b_transfer.training import train
from vit22b_transfer.inference import cache_features

include 'gin_configs/recipes/scenes_captioning.gin'

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
SCHEDULE = @optimizers.constant()
optimizers.constant.peak = 0.001
train.Periods.log = 1
train.Periods.evaluate = 4
train.Periods.checkpoint = 2
cache_features.cache_features.examples_per_shard = 4
"""


def prepare(work, devices, sizes):
    """Imports, and draws scenes; nothing starts threads here."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags(devices),
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "VIT22B_DATA_DIR": str(work / "data"),
        "VIT22B_VOCABULARY": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    os.chdir(ROOT)
    with command_arguments.without_startup_notes():
        for module in (
            "tensorboard.summary.writer.record_writer",
            "vit22b_transfer.data.batches",
            "vit22b_transfer.data.feature_cache",
            "vit22b_transfer.demo.scenes",
            "vit22b_transfer.inference.cache_features",
            "vit22b_transfer.inference.infer",
            "vit22b_transfer.training.train",
            "vit22b_transfer.weights.convert",
        ):
            importlib.import_module(module)
    (work / "recipe.gin").write_text(RECIPE)
    do(work / "data.txt", lambda: _write_scenes(work, sizes))


def flags(devices):
    return (
        f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0"
    )


def child(output, function):
    """The process id of a fork that runs `function` and ends with its exit code."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def do(output, function):
    """Runs `function`, which has to end well, in a child."""
    _, status = os.waitpid(child(output, function), 0)
    assert status == 0, output.read_text()


def _write_scenes(work, sizes):
    from vit22b_transfer.demo import scenes

    scenes.write_scenes(work / "data", seed=3, sizes=sizes)
