"""What the adapter adds to T5X: optimizers, T5X's own decoding, images by hand.

Needs T5X beside the project.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tiny_captions
import tiny_models
from flax.core import FrozenDict, freeze, unfreeze

from vit22b_transfer.inference import decoding
from vit22b_transfer.models import multimodal
from vit22b_transfer.training import optimizers

_REASON = "T5X is not importable: pip install --no-deps -r requirements-t5x.txt"
t5x_adapter = pytest.importorskip("vit22b_transfer.t5x_adapter", reason=_REASON)

from t5x import adafactor  # noqa: E402
from t5x import models as t5x_models  # noqa: E402
from t5x import partitioning as t5x_partitioning  # noqa: E402
from t5x import utils as t5x_utils  # noqa: E402


@pytest.fixture(autouse=True)
def settings_of_t5x():
    """JAX's default promotion, as T5X adds arrays of different types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def partitioner():
    return t5x_partitioning.PjitPartitioner(model_parallel_submesh=(1, 2))


# --- The model and its optimizer ---


def test_t5x_compares_the_vocabularies_of_our_models():
    model = tiny_models.image_text_model(optimizer_def=optimizers.adamw(0.1))
    adapted = t5x_adapter.for_t5x(model)
    assert isinstance(adapted, t5x_models.BaseTransformerModel)
    assert isinstance(adapted.optimizer_def, t5x_adapter.Optimizer)
    assert adapted.get_initial_variables.__self__ is adapted
    assert not isinstance(model.optimizer_def, t5x_adapter.Optimizer)


def test_parameters_come_back_in_the_structure_they_were_given_in():
    params = freeze({"a": {"kernel": jnp.ones((2, 2))}, "b": jnp.ones(2)})
    optimizer = t5x_adapter.Optimizer(optimizers.adamw(0.1), ("a/.*",)).create(params)
    stepped = optimizer.apply_gradient(params, learning_rate=0.0)
    assert isinstance(stepped.target, FrozenDict)
    assert jax.tree.structure(unfreeze(stepped.target)) == (
        jax.tree.structure(unfreeze(params))
    )
    assert int(stepped.state.step) == 1


def test_a_frozen_parameter_keeps_its_negative_zeros():
    """Adding the zero of `set_to_zero` would make them positive."""
    params = {"a": jnp.asarray([-0.0, 1.0]), "b": jnp.ones(2)}
    optimizer = t5x_adapter.Optimizer(optimizers.sgd(0.1), ("a",)).create(params)
    stepped = optimizer.apply_gradient(params, learning_rate=0.0)
    before, after = np.asarray(params["a"]), np.asarray(stepped.target["a"])
    assert after.tobytes() == before.tobytes()
    assert not np.array_equal(stepped.target["b"], params["b"])


def train_state_of(definition):
    """(shapes of the train state, its layout on 4 x 2 devices)."""
    model = t5x_adapter.for_t5x(tiny_models.image_text_model())
    initializer = t5x_utils.TrainStateInitializer(
        optimizer_def=definition,
        init_fn=model.get_initial_variables,
        input_shapes={k: v.shape for k, v in tiny_models.batch(8).items()},
        partitioner=partitioner(),
    )
    return initializer.global_train_state_shape, initializer.train_state_axes


def test_adafactor_of_t5x_takes_every_axis_of_ours():
    rules = t5x_adapter.adafactor_rules()
    definition = adafactor.Adafactor(1e-3, logical_factor_rules=rules)
    shapes, _ = train_state_of(definition)
    assert jax.tree.leaves(shapes.param_states)
    with pytest.raises(KeyError):
        train_state_of(
            adafactor.Adafactor(
                1e-3, logical_factor_rules=adafactor.standard_logical_factor_rules()
            )
        )


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_optimizer_state_is_laid_out_like_its_parameters(name):
    """Adafactor's state too, which T5X's wrapper of optax does not know."""
    definition = t5x_adapter.Optimizer(getattr(optimizers, name)(1e-3))
    shapes, axes = train_state_of(definition)
    params = jax.tree.leaves(unfreeze(axes.params))
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(axes.param_states)
        if any(getattr(entry, "name", "") in ("mu", "trace", "ema") for entry in path)
    ]
    assert moments == params
    assert jax.sharding.PartitionSpec(None, "model") in params


def test_paths_are_made_absolute_and_addresses_left():
    assert t5x_adapter.absolute_path("runs/vqa") == os.path.abspath("runs/vqa")
    assert t5x_adapter.absolute_path("gs://bucket/vqa") == "gs://bucket/vqa"


# --- Decoding ---


@pytest.mark.parametrize("num_beams", [1, 3])
def test_beam_search_of_t5x_over_our_cache_finds_what_ours_finds(num_beams):
    decoded = {}
    for name, function in (
        ("theirs", t5x_adapter.beam_search),
        ("ours", decoding.beam_search),
    ):
        decode_fn = functools.partial(function, num_beams=num_beams, alpha=0.6)
        model = tiny_models.image_text_model(decode_fn=decode_fn, max_decode_length=6)
        params = tiny_models.model_params(model, seed=4)
        predict = jax.jit(model.predict_batch_with_aux)
        decoded[name] = predict(params, tiny_models.batch(4))
    tokens, aux = decoded["theirs"]
    np.testing.assert_array_equal(tokens, decoded["ours"][0])
    # T5X leaves the length penalty off where no beam came to an end.
    ended = np.any(np.asarray(tokens) == multimodal.EOS_ID, axis=1)
    penalty = ((5.0 + 6.0) / 6.0) ** 0.6
    scores = np.asarray(decoded["ours"][1]["scores"])
    expected = np.where(ended, scores, scores * penalty)
    np.testing.assert_allclose(aux["scores"], expected, rtol=1e-5)
    assert len({tuple(row) for row in np.asarray(tokens).tolist()}) > 1


# --- The interactive model ---


def test_the_interactive_model_takes_images(tmp_path):
    (tmp_path / "model").mkdir()
    path = tiny_captions.write_checkpoint(tmp_path / "model")
    model = tiny_captions.model(optimizer_def=optimizers.adamw(0.1))
    size, lengths = tiny_captions.SIZE, tiny_captions.LENGTHS
    interactive = t5x_adapter.InteractiveModel(
        model,
        partitioner(),
        checkpoint=path,
        output_dir=str(tmp_path / "interactive"),
        feature_lengths=lengths,
        batch_size=8,
    )
    images = tiny_models.images(3, size, size, 3)
    prompts = ["one", "two", "three"]
    texts = interactive.predict_images(images, prompts)
    vocabulary = seqio.ByteVocabulary()
    tokens = np.zeros((3, lengths["inputs"]), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = [*vocabulary.encode(prompt), vocabulary.eos_id]
        row[: len(ids)] = ids
    batch = {
        "encoder_input_images": images,
        "encoder_input_tokens": tokens,
        "decoder_target_tokens": np.zeros((3, lengths["targets"]), np.int32),
    }
    params = tiny_models.model_params(tiny_captions.model())
    expected = tiny_captions.model().predict_batch(params, batch)
    assert texts == [vocabulary.decode(row.tolist()) for row in np.asarray(expected)]
    assert len(set(texts)) == 3
    with pytest.raises(ValueError, match="3 images.*2 prompts"):
        interactive.predict_images(images, prompts[:2])
