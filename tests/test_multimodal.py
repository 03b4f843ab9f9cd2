"""The image-text model as both runtimes use it: losses, predictions, scores."""

import functools
import inspect

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import (
    TWO_BLOCKS,
    VOCAB_SIZE,
    Vocabulary,
    assert_within,
    batch,
    image_text_model,
    images,
    jit,
    model_params,
    relative_difference,
    stack_layers,
    text_config,
    tower_config,
)

from vit22b_transfer.inference import decoding
from vit22b_transfer.models import multimodal, stacking

BATCH = batch(4)
LOSS_OPTIONS = dict(label_smoothing=0.1, z_loss=1e-3)


def model_of(*, scan_layers=False, remat="none", **arguments):
    return image_text_model(
        tower_config(**TWO_BLOCKS, scan_layers=scan_layers, remat=remat),
        text_config(num_decoder_layers=2, scan_layers=scan_layers, remat=remat),
        **arguments,
    )


def everything(model):
    """Jitted (params, batch) -> all that the model computes from targets, by name."""

    def run(params, batch):
        (loss, metrics), gradients = jax.value_and_grad(model.loss_fn, has_aux=True)(
            params, batch, None
        )
        scores, kept = model.score_batch(params, batch, return_intermediates=True)
        return dict(
            loss=loss,
            gradients=gradients,
            metrics=metrics,
            evaluated=model.eval_fn(params, batch),
            scores=scores,
            logits=kept["logits"],
        )

    return jit(run)


@pytest.fixture(scope="module")
def params():
    return model_params(model_of(), seed=5)


@pytest.fixture(scope="module")
def run(params):
    """batch -> everything, with the parameters of the tests."""
    return functools.partial(everything(model_of(**LOSS_OPTIONS)), params)


@pytest.fixture(scope="module")
def plain(run):
    return run(BATCH)


def predictor(decode_fn, **options):
    """Jitted (params, batch) -> token ids, {"scores"}."""
    return jit(model_of(decode_fn=decode_fn, **options).predict_batch_with_aux)


@pytest.fixture(scope="module")
def greedy(params):
    return functools.partial(predictor(decoding.greedy), params)


def test_methods_have_the_names_and_arguments_that_t5x_uses():
    def arguments(name):
        return list(inspect.signature(getattr(model, name)).parameters)

    converter = functools.partial(dict)
    model = image_text_model(blind=True, feature_converter_cls=converter)
    assert arguments("get_initial_variables") == ["rng", "input_shapes", "input_types"]
    assert arguments("loss_fn") == ["params", "batch", "dropout_rng"]
    assert arguments("eval_fn") == ["params", "batch"]
    assert arguments("predict_batch") == ["params", "batch", "rng"]
    assert arguments("predict_batch_with_aux") == ["params", "batch", "rng"]
    assert arguments("score_batch") == ["params", "batch", "return_intermediates"]
    assert model.get_initial_variables.__self__ is model
    assert model.FEATURE_CONVERTER_CLS is converter
    assert model.input_vocabulary == model.output_vocabulary == Vocabulary()
    # T5X would replace the module if these said so.
    assert not getattr(model.module, "scan_layers", False)


@pytest.mark.parametrize("types", [None, dict.fromkeys(BATCH, np.int32)])
def test_initial_variables_are_plain_trees_whatever_types_are_announced(types):
    model = model_of(scan_layers=True)
    shapes = {name: array.shape for name, array in BATCH.items()}
    variables = jax.eval_shape(
        lambda key: model.get_initial_variables(key, shapes, types), jax.random.key(0)
    )
    assert type(variables) is type(variables["params"]) is dict
    assert set(variables) == {"params", "params_axes"}
    params = flatten_dict(variables["params"], sep="/")
    axes = flatten_dict(variables["params_axes"], sep="/")
    assert set(axes) == {f"{path}_axes" for path in params}
    for path, leaf in params.items():
        assert len(axes[f"{path}_axes"].names) == leaf.ndim
    tops = {"/".join(path.split("/")[:2]) for path in params}
    assert {path for path in tops if path.startswith("encoder/")} == {
        "encoder/tower",
        "encoder/projection",
        "encoder/text",
    }
    assert not any("/map/" in path for path in params), "nothing would train it"


@pytest.mark.slow
def test_scan_and_remat_change_neither_loss_nor_gradients_nor_scores(params, plain):
    model = model_of(scan_layers=True, remat="dots", **LOSS_OPTIONS)
    scanned = everything(model)(stack_layers(params), BATCH)
    scanned["gradients"] = stacking.unstack_layers(scanned["gradients"])
    # The same sums, which XLA may fuse, and so round, differently.
    assert relative_difference(scanned, plain) <= 1e-5


def test_loss_and_metrics_are_sums_over_tokens_that_count(plain):
    logits = np.float64(plain["logits"])
    targets, weights = BATCH["decoder_target_tokens"], BATCH["decoder_loss_weights"]
    metrics = plain["metrics"]
    assert all(type(m) is clu.metrics.Average for m in metrics.values())
    assert float(plain["loss"]) == float(metrics["loss"].total)
    assert float(metrics["loss"].count) == weights.sum()
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    rest = (logits.sum(-1) - picked) * 0.1 / (VOCAB_SIZE - 1)
    entropy = 0.9 * np.log(0.9) + 0.1 * np.log(0.1 / (VOCAB_SIZE - 1))
    tokens = log_z - 0.9 * picked - rest + entropy + 1e-3 * log_z**2
    assert_within(1e-3, plain["loss"], (tokens * weights).sum())
    assert_within(1e-4, metrics["z_loss"].total, (1e-3 * log_z**2 * weights).sum())
    hits = (logits.argmax(-1) == targets) * weights
    assert float(metrics["accuracy"].total) == hits.sum()
    assert float(metrics["accuracy"].count) == weights.sum()
    assert float(metrics["sequence_accuracy"].count) == len(targets)


def test_a_right_answer_counts_as_a_right_sequence(run, plain):
    best = np.asarray(plain["logits"]).argmax(-1).astype(np.int32)
    right = BATCH | {"decoder_target_tokens": best}
    metrics = run(right)["metrics"]
    assert float(metrics["accuracy"].total) == BATCH["decoder_loss_weights"].sum()
    assert float(metrics["sequence_accuracy"].total) == len(best)
    best[1, 0] = (best[1, 0] + 1) % VOCAB_SIZE
    metrics = run(right)["metrics"]
    assert float(metrics["sequence_accuracy"].total) == len(best) - 1


def test_evaluation_without_dropout_is_the_training_loss_without_a_key(plain):
    loss, metrics = plain["evaluated"]
    assert float(loss) == float(plain["loss"])
    assert relative_difference(metrics, plain["metrics"]) == 0.0


@pytest.mark.slow
def test_dropout_acts_only_with_a_key(params, plain):
    model = image_text_model(
        tower_config(**TWO_BLOCKS),
        text_config(num_decoder_layers=2, dropout_rate=0.5),
        **LOSS_OPTIONS,
    )
    loss = jit(lambda params, key: model.loss_fn(params, BATCH, key)[0])
    assert_within(1e-3, loss(params, None), plain["loss"])
    one, same, other = (loss(params, jax.random.key(i)) for i in (0, 0, 1))
    assert float(one) == float(same) != float(other)
    assert abs(float(one) - float(plain["loss"])) > 1.0


def test_losses_and_gradients_of_microbatches_add_up(run, plain):
    """Each half keeps its place; the other half's weights are zero."""
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        weights = np.zeros_like(BATCH["decoder_loss_weights"])
        weights[rows] = BATCH["decoder_loss_weights"][rows]
        parts.append(run(BATCH | {"decoder_loss_weights": weights}))
    for name in ("loss", "gradients", "metrics"):
        total = jax.tree.map(jnp.add, parts[0][name], parts[1][name])
        assert relative_difference(total, plain[name]) <= 1e-5


def test_padding_rows_change_nothing_that_is_measured(run, plain):
    """The last row as the converter pads a final batch: all zeros."""
    padded = jax.tree.map(np.array, BATCH)
    for array in padded.values():
        array[3] = 0
    weights = BATCH["decoder_loss_weights"].copy()
    weights[3] = 0
    expected = run(BATCH | {"decoder_loss_weights": weights})
    actual = run(padded)
    assert relative_difference(actual["metrics"], expected["metrics"]) <= 1e-6
    assert relative_difference(actual["gradients"], expected["gradients"]) <= 1e-5
    assert float(actual["metrics"]["sequence_accuracy"].count) == 3
    assert float(actual["scores"][3]) == 0.0


def test_a_permuted_batch_gives_permuted_scores(run, plain):
    order = np.array([2, 0, 3, 1])
    permuted = run(jax.tree.map(lambda x: x[order], BATCH))
    assert_within(1e-5, permuted["scores"], plain["scores"][order])
    assert_within(1e-5, permuted["logits"], plain["logits"][order])


def test_scores_are_log_probabilities_of_the_targets(plain):
    logits = np.float64(plain["logits"])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = BATCH["decoder_target_tokens"][..., None]
    picked = np.take_along_axis(log_probs, targets, -1)[..., 0]
    expected = (picked * BATCH["decoder_loss_weights"]).sum(-1)
    assert_within(1e-4, plain["scores"], expected)


def test_pixels_prompt_and_targets_all_reach_the_logits(run, plain):
    for name in ("encoder_input_images", "encoder_input_tokens"):
        changed = np.array(BATCH[name])
        changed[0] = np.where(changed[0] > 0, changed[0] % 60 + 2, 0)
        logits = run(BATCH | {name: changed})["logits"]
        assert np.max(np.abs(logits[0] - plain["logits"][0])) > 1e-3
        assert_within(1e-5, logits[1:], plain["logits"][1:])


def test_padding_of_the_prompt_does_not_change_the_logits(params, plain):
    wider = np.pad(BATCH["encoder_input_tokens"], ((0, 0), (0, 3)))
    model = model_of()
    padded = jit(model.score_batch, static_argnums=2)(
        params, BATCH | {"encoder_input_tokens": wider}, True
    )[1]["logits"]
    assert_within(1e-5, padded, plain["logits"])


def test_greedy_predictions_are_the_argmax_of_the_full_forward(greedy, run):
    tokens, aux = greedy(BATCH)
    assert tokens.dtype == jnp.int32 and tokens.shape == (4, 6)
    # Feeding the prediction back must give the prediction back, and its score.
    tokens = np.asarray(tokens)
    ended = np.cumsum(tokens == multimodal.EOS_ID, axis=1)
    live = (ended - (tokens == multimodal.EOS_ID)) == 0
    shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    forced = run(
        BATCH
        | {
            "decoder_target_tokens": tokens,
            "decoder_input_tokens": shifted,
            "decoder_loss_weights": live.astype(np.int32),
        }
    )
    best = np.asarray(forced["logits"]).argmax(-1)
    np.testing.assert_array_equal(best[live], tokens[live])
    assert np.all(tokens[~live] == 0)
    assert_within(1e-4, aux["scores"], forced["scores"])


def test_one_beam_is_greedy_and_more_beams_are_never_worse(params, greedy):
    tokens, aux = greedy(BATCH)
    one = functools.partial(decoding.beam_search, num_beams=1, alpha=0.0)
    np.testing.assert_array_equal(predictor(one)(params, BATCH)[0], tokens)
    four = functools.partial(decoding.beam_search, num_beams=4, alpha=0.0)
    better = predictor(four)(params, BATCH)[1]["scores"]
    assert better.shape == (4,)
    assert np.mean(better) >= np.mean(aux["scores"])


def test_scanned_parameters_predict_the_same_tokens(params, greedy):
    scanned = predictor(decoding.greedy, scan_layers=True)
    actual = scanned(stack_layers(params), BATCH)
    np.testing.assert_array_equal(actual[0], greedy(BATCH)[0])
    assert_within(1e-4, actual[1]["scores"], greedy(BATCH)[1]["scores"])


def test_decoding_runs_as_long_as_the_model_says(params):
    model = model_of(decode_fn=decoding.greedy, max_decode_length=3)
    shape = jax.eval_shape(model.predict_batch, params, BATCH)
    assert shape.shape == (4, 3)


def test_prediction_needs_a_decode_function(params):
    with pytest.raises(ValueError, match="no decode_fn.*greedy, sample, beam_search"):
        model_of().predict_batch(params, BATCH)


def test_a_blind_model_has_no_tower_and_ignores_the_pixels():
    model = image_text_model(blind=True)
    params = model_params(model)
    assert set(params["encoder"]) == {"text"}
    score = jit(model.score_batch)
    other = BATCH | {"encoder_input_images": images(4, 16, 16, 3, seed=9)}
    assert_within(0.0, score(params, other), score(params, BATCH))


def test_several_images_per_example_stand_one_after_another(params):
    model = model_of()
    score = jit(model.score_batch)
    two = images(4, 2, 16, 16, 3, seed=3)
    straight = score(params, BATCH | {"encoder_input_images": two})
    swapped = score(params, BATCH | {"encoder_input_images": two[:, ::-1].copy()})
    assert np.all(np.isfinite(straight))
    assert np.max(np.abs(straight - swapped)) > 1e-4, "their order matters"


def test_a_vocabulary_larger_than_the_table_is_refused():
    module = model_of().module
    for large, name in (((65, 64), "input"), ((64, 65), "output")):
        with pytest.raises(ValueError, match=f"the {name} vocabulary has 65 tokens"):
            multimodal.ImageTextModel(module, *(Vocabulary(n) for n in large))
