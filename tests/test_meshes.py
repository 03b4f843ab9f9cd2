"""A shipped mesh file trains, evaluates and infers what one device does."""

import json
from pathlib import Path

import gin
import jax
import numpy as np
import pytest
import seqio
import tiny_captions
import tiny_models
from tiny_captions import BATCH_SIZE, LENGTHS, ONE_DEVICE

from vit22b_transfer.checkpoints import reading, restoring
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.partitioning import rules
from vit22b_transfer.recipes import loading
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.inputs import EvalData, TrainData
from vit22b_transfer.training.state import abstract_variables, shardings_of
from vit22b_transfer.training.train import Periods, fine_tune

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "gin_configs" / "meshes"
# The one with the most to go wrong; test_partitioning.py and test_t5x_contract.py check
# the layout of every mesh, test_sharding.py its arithmetic.
MESH = "activations_2d_async"
TASK = "mesh_test"
STEPS = 2
ROWS = 2 * BATCH_SIZE  # divides by eight devices


def exact(targets, predictions):
    """A metric that sees every changed letter."""
    hits = [p in references for p, references in zip(predictions, targets, strict=True)]
    return {"exact": float(np.mean(hits)), "letters": float(len("".join(predictions)))}


def partitioning_of(mesh):
    """What a gin mesh file configures."""
    name = (FOLDER / f"{mesh}.gin").relative_to(ROOT).as_posix()
    recipe = loading.read([name], [], [str(ROOT)])
    try:
        return loading.install(recipe, rules.Partitioning, [str(ROOT)])()
    finally:
        gin.clear_config()


def train_and_evaluate(folder, partitioning):
    """Logged values, final parameters, scores, and lines of predictions of one run."""
    # SGD: Adam divides by gradients of almost zero, which blows up rounding.
    optimizer = optimizers.sgd(optimizers.constant(0.1))
    model = tiny_captions.model(optimizer_def=optimizer)
    data = dict(feature_lengths=LENGTHS, batch_size=ROWS)
    result = fine_tune(
        model,
        model_dir=str(folder),
        data=TrainData(TASK, "train", **data),
        eval_data=EvalData([TASK], "test", **data),
        total_steps=STEPS,
        partitioning=partitioning,
        periods=Periods(log=1, evaluate=STEPS, checkpoint=STEPS),
    )
    return result.metrics, *evaluate_checkpoint(folder, folder, partitioning, model)


def evaluate_checkpoint(folder, output, partitioning, model):
    scores = evaluate.evaluate_checkpoint(
        model,
        partitioning=partitioning,
        checkpoint=str(folder),
        tasks=[TASK],
        split="test",
        output_dir=str(output),
        feature_lengths=LENGTHS,
        batch_size=ROWS,
    )
    (path,) = Path(output).glob(f"{TASK}*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    abstract = abstract_variables(model, partitioning, tiny_models.batch(8))
    params = restoring.restore_params(
        reading.resolve(str(folder)), abstract, shardings_of(abstract)
    )
    return params, scores[TASK].metrics, lines


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    tiny_captions.write_folder(folder)
    tiny_captions.register(TASK, folder, metric_fns=(exact,))
    yield folder / "one", train_and_evaluate(folder / "one", ONE_DEVICE)
    seqio.TaskRegistry.remove(TASK)


def assert_same(actual, expected):
    for name, value in expected.items():
        if "timing" not in name:
            np.testing.assert_allclose(actual[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_mesh_trains_evaluates_and_infers_like_one_device(one_device, tmp_path):
    _, (metrics, params, scores, lines) = one_device
    partitioning = partitioning_of(MESH)
    assert partitioning.mesh.size == 8
    ours = train_and_evaluate(tmp_path, partitioning)
    assert_same(ours[0], metrics)
    assert tiny_models.relative_difference(*jax.device_get((ours[1], params))) < 1e-5
    assert_same(ours[2], scores)
    assert [x.get("prediction") for x in ours[3]] == [
        x.get("prediction") for x in lines
    ]


@pytest.mark.slow
def test_a_checkpoint_of_one_device_evaluates_on_a_mesh(one_device, tmp_path):
    folder, (_, _, scores, lines) = one_device
    partitioning = partitioning_of("activations_2d")
    _, ours, theirs = evaluate_checkpoint(
        folder, tmp_path, partitioning, tiny_captions.model()
    )
    assert_same(ours, scores)
    assert [x.get("prediction") for x in theirs] == [x.get("prediction") for x in lines]
