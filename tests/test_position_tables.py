"""Training that goes on with images of another size: the position table resampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf
import tiny_classifier
import tiny_models
import tiny_runs

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import position_tables, reading, restoring, writing
from vit22b_transfer.training import optimizers, state
from vit22b_transfer.training.inputs import TrainData
from vit22b_transfer.training.train import InitialCheckpoint, Periods, fine_tune

OLD, NEW = (16, 16), (32, 24)  # 2 x 2 and 4 x 3 patches
TABLE = position_tables.TABLE


def model_of(size, **tower):
    config = tiny_models.tower_config(depth=1, pooling="gap", image_size=size, **tower)
    return tiny_classifier.classifier(config, optimizers.adamw(1e-2))


def abstract_of(model, size=NEW):
    images = jax.ShapeDtypeStruct((2, *size, 3), "uint8")
    batch = {"encoder_input_images": images}
    return state.abstract_variables(model, tiny_runs.ONE_DEVICE, batch)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """(path of a checkpoint of small images, its parameters)."""
    folder, model = str(tmp_path_factory.mktemp("before")), model_of(OLD)
    pictures = tiny_models.images(2, *OLD, 3)
    params = tiny_models.random_params(model.module, pictures, seed=3)
    made = state.fresh_state(
        params,
        model.optimizer_def,
        state.abstract_state(
            abstract_of(model, OLD), model.optimizer_def, tiny_runs.ONE_DEVICE
        ),
    )
    writer = writing.CheckpointWriter(folder)
    writer.save(7, state.to_checkpoint_tree(made), {})
    writer.close()
    return f"{folder}/checkpoint_7", params


def restored(path, model, rules=(), image_size=OLD):
    return restoring.restore_initial(
        path, abstract_of(model), rules, image_size=image_size, model=model
    )


@pytest.mark.slow
def test_the_table_is_resampled_and_all_else_is_as_it_was(before):
    path, params = before
    model = model_of(NEW)
    found = restored(path, model)
    old, new = (
        reading.flatten(jax.device_get(some)) for some in (params, found.params)
    )
    grid = old.pop(TABLE).reshape(2, 2, -1)
    expected = np.asarray(scipy.ndimage.zoom(grid, (2, 1.5, 1), order=1))
    table = np.asarray(new.pop(TABLE)).reshape(4, 3, -1)
    np.testing.assert_allclose(table, expected, atol=1e-6)
    tiny_runs.assert_same_bits(new, old)
    assert "resampled from 16x16 pixels" in found.loaded[TABLE]
    # What the old model makes of larger images is what the new one makes of them.
    pictures = jnp.asarray(tiny_models.images(2, *NEW, 3))
    ours, theirs = (
        np.asarray(made.module.apply({"params": some}, pictures))
        for made, some in ((model, found.params), (model_of(OLD), params))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def larger_example(number):
    example = tiny_classifier.example(number)
    larger = tf.image.resize_with_pad(example["images"], *NEW)
    return example | {"images": tf.cast(larger, tf.uint8)}


@pytest.mark.slow
def test_training_goes_on_with_larger_images(before, tmp_path, capsys):
    tiny_classifier.register("larger", 8, make=larger_example)
    result = fine_tune(
        model_of(NEW),
        model_dir=str(tmp_path),
        data=TrainData("larger", "train", {"images": NEW, "labels": 1}, 4),
        total_steps=2,
        partitioning=tiny_runs.ONE_DEVICE,
        initial=InitialCheckpoint(before[0], image_size=OLD),
        periods=Periods(log=1, evaluate=2, checkpoint=2),
    )
    assert result.step == 2 and np.isfinite(result.metrics["train/loss"])
    assert f"{TABLE}, resampled from" in capsys.readouterr().out
    trained = reading.saved_arrays(result.checkpoint)[f"target/{TABLE}"]
    assert tuple(trained.shape) == (12, 32)


@pytest.mark.parametrize(
    "tower, rules, image_size, message",
    [
        ({}, (), None, r"(?s)shape \(4, 32\) in .*runs/from_other_size.gin"),
        ({}, (), NEW, "has no effect: the model's is the same"),
        ({}, (), (16, 20), "16x20 but patch_size 8 needs"),
        ({}, (), (8, 8), r"shape \(4, 32\) in the checkpoint, \(1, 32\)"),
        ({}, ((".*/position_embedding/.*", None),), OLD, "the rules do not load"),
        ({"positions": "rotary"}, (), OLD, "the model has no .*position_embedding"),
    ],
)
def test_a_size_that_does_not_fit_or_does_nothing_is_an_error(
    before, tower, rules, image_size, message
):
    with pytest.raises(UserError, match=message):
        restored(before[0], model_of(NEW, **tower), rules, image_size)
