"""What lines of predictions under T5X say, above all of an image that cannot be read.

Needs T5X beside the project.
"""

import json

import jax
import pytest
import tiny_captions
from tiny_captions import BAD_IMAGE, BATCH_SIZE, LENGTHS, NUM_IMAGES

from vit22b_transfer import UserError
from vit22b_transfer.inference import infer

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
t5x_adapter = pytest.importorskip("vit22b_transfer.t5x_adapter", reason=_REASON)

import t5x_gin  # noqa: E402

RECIPE = "gin_configs/recipes/scenes_vqa.gin"
TASK = "t5x_captions"


@pytest.fixture(autouse=True)
def settings_of_t5x():
    """JAX's default promotion, as T5X adds arrays of different types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, checkpoint of random parameters); the task is registered."""
    folder = tmp_path_factory.mktemp("captions")
    tiny_captions.write_folder(folder)
    tiny_captions.register(TASK, folder)
    (folder / "model").mkdir()
    model = tiny_captions.model()
    return model, tiny_captions.write_checkpoint(folder / "model", model)


def predicted(trained, folder, *bindings, mode="predict"):
    """The lines that T5X writes by `t5x_infer.gin`, in batches over two devices."""
    model, checkpoint = trained
    said = {
        "MODEL_DIR": "/nowhere",
        "CHECKPOINT": checkpoint,
        "OUTPUT": str(folder),
        "INFER_TASK": TASK,
        "INFER_SPLIT": "test",
        "FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": BATCH_SIZE,
        "infer.mode": mode,
        "infer.checkpoint_period": 2,  # two chunks
        "partitioning.PjitPartitioner.model_parallel_submesh": (1, 2, 1, 1),
    }
    bindings = [f"{name}={value!r}" for name, value in said.items()] + [*bindings]
    with t5x_gin.parsed("infer", [RECIPE], bindings) as launched:
        launched(model=t5x_adapter.for_t5x(model))
    (written,) = folder.glob(f"{TASK}-{mode}.jsonl-00000-of-00001")
    return [json.loads(line) for line in written.read_text().splitlines()]


def test_an_unreadable_image_has_an_error_and_no_prediction(trained, tmp_path):
    """As in our runtime, line by line; a caption of black would look like any other."""
    lines = predicted(trained, tmp_path)
    own = infer.infer_split(
        trained[0],
        partitioning=tiny_captions.ONE_DEVICE,
        checkpoint=trained[1],
        task=TASK,
        split="test",
        feature_lengths=LENGTHS,
        batch_size=BATCH_SIZE,
        output=str(tmp_path / "own"),
    )
    with open(own.path) as file:
        expected = [json.loads(line) for line in file]
    assert len(lines) == len(expected) == NUM_IMAGES
    for line, ours in zip(lines, expected, strict=True):
        for name in ("image_id", "prediction"):
            assert line.get(name) == ours.get(name)
        assert line.get("error") == ours.get("error")
        assert line["inputs"]["inputs_pretokenized"] == ours["prompt"]
        assert line["inputs"]["image_id"] == ours["image_id"]
    (bad,) = [line for line in lines if "error" in line]
    assert bad["image_id"] == f"{BAD_IMAGE}.png" and "prediction" not in bad
    assert all(isinstance(line["prediction"], str) for line in lines if line != bad)
    assert not any("image_error" in line["inputs"] for line in lines)


@pytest.mark.parametrize("mode", ["score", "predict_with_aux"])
def test_nor_has_it_a_score(trained, tmp_path, mode):
    """Whatever of an example T5X is told to write, and its tokens."""
    lines = predicted(
        trained,
        tmp_path,
        "write_inferences_to_file.input_fields_to_include=('image_id',)",
        "write_inferences_to_file.output_ids=True",
        mode=mode,
    )
    said = {
        "score": {"score"},
        "predict_with_aux": {"prediction", "prediction_tokens", "aux"},
    }[mode]
    for line in lines:
        is_bad = line["image_id"] == f"{BAD_IMAGE}.png"
        expected = {"error"} if is_bad else said
        assert line.keys() == {"image_id", "inputs"} | expected
        assert not any(line[name] is None for name in expected)


def test_an_output_file_is_refused_and_a_directory_made_absolute():
    with pytest.raises(UserError, match="Give the directory"):
        t5x_adapter.output_directory("/runs/predictions.jsonl")
    assert t5x_adapter.output_directory("gs://bucket/x") == "gs://bucket/x"
