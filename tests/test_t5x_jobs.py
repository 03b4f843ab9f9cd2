"""T5X's other jobs: compiling alone, exporting, and several processes.

Needs T5X beside the project. All are slow: each is a launcher or two.
"""

import importlib.util
import json
import os
import re
import socket

import numpy as np
import pytest
import t5x_launchers
from t5x_launchers import command

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
t5x = pytest.importorskip("t5x", reason=_REASON)

import tensorflow as tf  # noqa: E402

pytestmark = pytest.mark.slow
RECIPE = "--gin_file=gin_configs/recipes/scenes_vqa.gin"
TINY = [
    *(f"--gin.T5Config.num_{part}_layers=1" for part in ("encoder", "decoder")),
    "--gin.ViTConfig.depth=1",
]
# Long enough for any question of the scenes, in whatever pieces.
LENGTHS = "--gin.FEATURE_LENGTHS={'images': (64, 64), 'inputs': 64, 'targets': 16}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Drawn scenes and a vocabulary, as environment variables."""
    return t5x_launchers.draw(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory):
    """The folder of a run of our runtime, one step long."""
    folder = tmp_path_factory.mktemp("run")
    steps = ["--gin.TRAIN_STEPS=1", "--gin.WARMUP_STEPS=0", "--gin.BATCH_SIZE=16"]
    where = f"--gin.MODEL_DIR={str(folder)!r}"
    arguments = ["train", RECIPE, where, LENGTHS, *TINY, *steps]
    command(drawn, 1, "vit22b_transfer.cli", *arguments)
    return folder


def test_precompile_writes_the_compiled_step(drawn, tmp_path):
    """T5X imports the package t5 for it and uses nothing of it."""
    environment = drawn
    if importlib.util.find_spec("t5") is None:
        package = tmp_path / "empty/t5/data"
        package.mkdir(parents=True)
        for file in (package.parent / "__init__", package / "__init__"):
            file.with_suffix(".py").touch()
        (package / "mixtures.py").touch()
        environment = drawn | {"PYTHONPATH": str(tmp_path / "empty")}
    command(
        environment,
        4,
        "t5x.main",
        "--run_mode=precompile",
        "--gin_file=gin_configs/runs/t5x_precompile.gin",
        RECIPE,
        f"--gin.MODEL_DIR={str(tmp_path / 'hlo')!r}",
        "--gin.BATCH_SIZE=16",
        "--gin.partitioning.PjitPartitioner.model_parallel_submesh=(1,2,1,1)",
        *TINY,
    )
    for name in ("pre", "post"):
        path = tmp_path / f"hlo/lowered_hlo_{name}_optimization"
        assert path.stat().st_size > 100_000
    assert np.load(tmp_path / "hlo/assignment").shape == (2, 2)


def test_an_exported_model_predicts_what_our_runtime_does(drawn, trained, tmp_path):
    if importlib.util.find_spec("tensorflow_serving") is None:
        pytest.skip("T5X's export needs `pip install --no-deps tensorflow-serving-api`")
    saved = tmp_path / "saved"
    common = [RECIPE, f"--gin.MODEL_DIR={str(trained)!r}", LENGTHS, *TINY]
    command(
        drawn,
        1,
        "t5x.export",
        f"--gin_search_paths=.,{os.path.dirname(*t5x.__path__)}",
        "--gin_file=gin_configs/runs/t5x_export.gin",
        *common,
        f"--gin.MODEL_OUTPUT_DIR={{'cpu': {str(saved)!r}}}",
        "--gin.BATCH_SIZE=4",
    )
    command(
        drawn,
        1,
        "vit22b_transfer.cli",
        "infer",
        *common,
        "--gin.BATCH_SIZE=4",
        f"--gin.OUTPUT={str(tmp_path / 'own.jsonl')!r}",
    )
    lines = (tmp_path / "own.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines[:4]]
    images = [pixels_of(drawn, line["image_id"]) for line in lines]
    prompts = [line["prompt"] for line in lines]
    model = tf.saved_model.load(str(saved)).signatures["serving_default"]
    answer = model(images=tf.constant(np.stack(images)), inputs=tf.constant(prompts))
    told = [text.decode() for text in answer["prediction"].numpy()]
    assert told == [line["prediction"] for line in lines]
    scores = [line["score"] for line in lines]
    np.testing.assert_allclose(answer["score"].numpy(), scores, rtol=1e-4)
    too_long = tf.constant(["is there a triangle " * 20] * 4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most 64 tokens"):
        model(images=tf.constant(np.stack(images)), inputs=too_long)


def pixels_of(drawn, image_id):
    """Those of a drawn scene, which have the size of the task already."""
    import PIL.Image

    folder = os.path.join(drawn["VIT22B_DATA_DIR"])
    (path,) = (
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if re.search(rf"(^|\D)0*{image_id}\.", name)
    )
    return np.asarray(PIL.Image.open(path).convert("RGB"))


def test_two_processes_start_from_a_checkpoint_with_a_frozen_tower(
    drawn, trained, tmp_path
):
    """Each has two of four devices, and reads its part of the checkpoint."""
    from test_t5x_runs import arrays_of

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    arguments = [
        "--gin_file=gin_configs/runs/t5x_train.gin",
        RECIPE,
        "--gin_file=gin_configs/runs/from_checkpoint.gin",
        "--gin_file=gin_configs/models/frozen_tower.gin",
        f"--gin.INITIAL_CHECKPOINT={str(trained / 'checkpoint_1')!r}",
        f"--gin.MODEL_DIR={str(tmp_path / 'run')!r}",
        "--gin.BATCH_SIZE=16",
        "--gin.TRAIN_STEPS=2",
        "--gin.WARMUP_STEPS=1",
        "--gin.train.eval_period=2",
        "--gin.utils.SaveCheckpointConfig.period=2",
        "--gin.train.eval_steps=1",
        "--gin.partitioning.PjitPartitioner.model_parallel_submesh=(1,2,1,1)",
        LENGTHS,
        *TINY,
    ]
    together = ["--multiprocess_gpu", f"--coordinator_address=localhost:{port}"]
    together.append("--process_count=2")
    processes = [
        t5x_launchers.started(
            drawn, 2, "t5x.train", *together, f"--process_index={index}", *arguments
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            _, said = process.communicate(timeout=500)
            assert process.returncode == 0, said[-4000:]
    finally:
        for process in processes:
            process.kill()
    source, first, last = (
        arrays_of(tmp_path / "run" if step != 1 else trained, step)
        for step in (1, 0, 2)
    )
    moved = set()
    for name, value in source.items():
        if name.startswith("target/"):
            assert first[name].tobytes() == value.tobytes(), name
            if last[name].tobytes() != value.tobytes():
                moved.add(name)
    assert moved and not any("/tower/" in name for name in moved)
