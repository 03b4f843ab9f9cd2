"""`vit22b bench`: what it counts, what it measures, and on what it runs."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib
import pytest
import tiny_models

from vit22b_transfer import cli
from vit22b_transfer.models import vit
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.planning import bench, bench_settings
from vit22b_transfer.training import optimizers

ROOT = str(Path(__file__).parent.parent)
ROWS, PATCH_VALUES = 4, 8 * 8 * 3
SIZES = dict(batch_size=ROWS, input_length=3, target_length=5, rounds=1)
WIDTH, DEPTH, MLP, TOKENS = 32, 2, 64, 4


def model_of(**options):
    return tiny_models.image_text_model(
        tiny_models.tower_config(depth=1),
        tiny_models.text_config(num_encoder_layers=1, num_decoder_layers=1),
        optimizer_def=optimizers.sgd(1e-3),
        frozen=("encoder/tower/.*",),
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", ["none", "block"])
def test_what_is_counted_is_what_the_tower_needs(remat, scan_layers):
    config = tiny_models.tower_config(
        **tiny_models.TWO_BLOCKS, pooling="none", remat=remat, scan_layers=scan_layers
    )
    tower, images = vit.VisionTower(config), tiny_models.images(ROWS, 16, 16, 3)
    params = jax.eval_shape(tower.init, jax.random.key(0), images)["params"]

    def forward(params, images):
        return tower.apply({"params": params}, images).tokens

    def gradients(params, images):
        return jax.grad(lambda params: forward(params, images).sum())(params)

    kernels = DEPTH * (4 * WIDTH**2 + 2 * WIDTH * MLP)
    attention = DEPTH * 2 * TOKENS * WIDTH
    patches = PATCH_VALUES * WIDTH
    per_token = 2 * (kernels + attention + patches)
    count = bench.flops(forward, images, params=params)
    assert count == ROWS * TOKENS * per_token
    # Twice as much, but pixels need no gradient.
    both = bench.flops(gradients, images, params=params)
    assert both == 3 * count - ROWS * TOKENS * 2 * patches


@pytest.mark.parametrize(
    "model, sizes, message",
    [
        (model_of(blind=True), SIZES, "the model has no tower"),
        (model_of(), SIZES | {"rounds": 0}, "rounds=0 must be at least 1"),
    ],
    ids=["blind", "no rounds"],
)
def test_what_cannot_be_measured_is_refused(model, sizes, message):
    with pytest.raises(ValueError, match=message):
        bench.measure(model, partitioning=Partitioning(data=1, model=1), **sizes)


TINY = ["vit22b_config.depth=2", "vit22b_config.width=24", "IMAGE_SIZE=(32,32)"]
TINY += ["vit22b_config.mlp_dim=8", "vit22b_config.num_heads=2", "VOCAB_SIZE=64"]
TINY += ["t5_config.num_encoder_layers=1", "t5_config.num_decoder_layers=1"]
TINY += ["t5_config.width=16", "BATCH_SIZE=8", "measure.rounds=1"]


@pytest.mark.slow
def test_settings_are_compared_and_the_fastest_is_named(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(
        bench_settings,
        "FORMS",
        {name: bench_settings.FORMS[name] for name in ("unrolled", "scanned")}
        | {"wrong": dict(scan_layers=True, remat="all")},
    )
    arguments = [f"--gin.{size}" for size in TINY]
    assert cli.main(["bench", "--compare-settings", *arguments]) == 0
    out = capsys.readouterr().out
    steps = {}
    for name in ("unrolled", "scanned"):
        found = re.search(rf"│ {name} +│ +[\d.,]+ │ [^│]+│ +([\d.,]+) │", out)
        steps[name] = float(found[1].replace(",", ""))
    fastest = min(steps, key=steps.get)
    assert f"Fastest training step: {fastest}" in out
    assert f"--gin.vit.vit22b_config.scan_layers={fastest == 'scanned'}" in out
    assert "wrong: failed: " in out and "got 'all'" in out
    assert "gpu_*.sh are for NVIDIA GPUs and were not tried" in out


def test_launch_files_compose_with_what_the_user_has_set():
    flags = "--xla_force_host_platform_device_count=2"
    files = sorted((Path(ROOT) / "gin_configs/launch").glob("gpu_*.sh"))
    assert len(files) == 3
    script = "; ".join(f". {file}" for file in files) + "; env"
    done = subprocess.run(
        ["sh", "-euc", script], capture_output=True, text=True, env={"XLA_FLAGS": flags}
    )
    # A strict shell (-u) has no flags either: nothing is set.
    bare = subprocess.run(
        ["sh", "-euc", script], capture_output=True, text=True, env={}
    )
    assert (bare.returncode, bare.stderr) == (0, "")
    said = dict(line.split("=", 1) for line in done.stdout.splitlines())
    found = said["XLA_FLAGS"].split()
    assert found[0] == flags and len(set(found)) == len(found) == 8
    assert said["JAX_OPTIMIZATION_LEVEL"] == "O1"
    library = next(Path(jaxlib.__file__).parent.glob("libjax_common*"), None)
    content = library.read_bytes() if library else b""
    for flag in found:
        name = flag.partition("=")[0].removeprefix("--").encode()
        assert not content or name + b"\0" in content, flag


@pytest.mark.slow
def test_the_command_measures_all_parts_on_a_mesh_without_tensorflow():
    arguments = [f"--gin.{size}" for size in TINY]
    arguments.append("--gin_file=gin_configs/meshes/model_parallel_2.gin")
    code = (
        "import sys; from vit22b_transfer import cli\n"
        f"assert cli.main(['bench', *{arguments!r}]) == 0\n"
        "assert 'tensorflow' not in sys.modules and 'seqio' not in sys.modules"
    )
    devices = "--xla_force_host_platform_device_count=8"
    devices += " --xla_backend_optimization_level=0"  # compiles faster
    devices += " --xla_cpu_parallel_codegen_split_count=1"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ROOT, "XLA_FLAGS": devices, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 x cpu" in done.stdout
    rows = ["matrix product", "tower forward", "tower forward and backward"]
    for row in [*rows, "train step", "greedy decoding"]:
        assert re.search(rf"│ {row} +│ +[0-9.,]+ │.*[0-9.]+% │", done.stdout), row
