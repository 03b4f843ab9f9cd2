"""One tower, several objectives: exactly the models of one, side by side."""

import dataclasses
import functools
import re
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5x_driver
import tiny_classifier
import tiny_mixed
import tiny_models
import tiny_runs
from flax.linen import partitioning as flax_partitioning
from flax.traverse_util import flatten_dict
from tiny_mixed import NAMES
from tiny_models import jit, relative_difference

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading, restoring
from vit22b_transfer.models import contrastive, mixed
from vit22b_transfer.models.instruments import recorded_loss
from vit22b_transfer.models.lora import LoraConfig
from vit22b_transfer.partitioning.rules import LOGICAL_AXES, Partitioning
from vit22b_transfer.planning import advice, devices, jobs, planner
from vit22b_transfer.recipes import t5x_options
from vit22b_transfer.training import eval_loss, optimizers, state, steps

# Models are trained, or towers run, in most of these.
pytestmark = pytest.mark.slow

WEIGHTS = {"captioning": 0.5, "contrastive": 2.0}
# Rows of every kind; four have each objective.
ROWS = [
    ("captioning",),
    ("classification",),
    ("contrastive",),
    ("captioning", "contrastive"),
    (),
    ("classification", "contrastive"),
    ("captioning", "classification"),
    NAMES,
]


def mean_gradients(model, params, batch):
    """(metrics, gradients) of a step, as the compiled step takes them."""
    grads, metrics = jax.grad(model.loss_fn, has_aux=True)(params, batch, None)
    return metrics, steps.mean_gradients(grads, metrics)


def softmax_model():
    """Of pairs by CLIP's loss, and texts that are means: of no tokens a zero vector."""
    made = tiny_mixed.parts(loss="softmax")
    pairs = made["contrastive"]
    text = pairs.module.text
    changes = {"pooling": "mean", "projection_bias": False, "depth": 0}
    text = dataclasses.replace(text, **changes)
    pairs.module = pairs.module.clone(text=text)
    return mixed.MixedModel(**made, weights=WEIGHTS)


MODELS = {
    "sigmoid": functools.partial(tiny_mixed.model, weights=WEIGHTS),
    "softmax": softmax_model,
}


@functools.cache
def measured(name):
    """(model, parameters, its jitted `mean_gradients`)."""
    model = MODELS[name]()
    params = tiny_mixed.params(model)
    return model, params, jit(functools.partial(mean_gradients, model))


@functools.cache
def gradients_of(name, objective):
    """The jitted `mean_gradients` of a part alone."""
    part = measured(name)[0].part(objective)
    return jit(functools.partial(mean_gradients, part))


def alone(name, objective, rows):
    """(metrics, gradients) of a part on those rows that have its objective."""
    has = [objective in row for row in rows]
    batch = tiny_mixed.rows_of(tiny_mixed.batch(rows), has)
    return gradients_of(name, objective)(measured(name)[1], batch)


def value(metrics, name="loss"):
    return float(metrics[name].compute())


@pytest.mark.parametrize("objective", NAMES)
def test_a_batch_of_one_objective_has_the_loss_and_gradients_of_its_model(objective):
    model, params, grad = measured("sigmoid")
    rows = [(objective,), ()] * 4
    metrics, grads = grad(params, tiny_mixed.batch(rows))
    expected, expected_grads = alone("sigmoid", objective, rows)
    weight = model.weights[objective]
    assert value(metrics) == pytest.approx(weight * value(expected), rel=1e-6)
    assert value(metrics, f"loss/{objective}") == pytest.approx(
        value(expected), rel=1e-6
    )
    scaled = jax.tree.map(lambda x: weight * x, expected_grads)
    assert np.any(scaled["encoder"]["tower"]["patch_embedding"]["kernel"])
    # Those of the other heads are zeros, exactly, in both.
    # Two programs: of jax 0.12 one of them sums in another order, 1.3e-6 apart.
    assert relative_difference(grads, scaled) <= 2e-6
    for name, metric in expected.items():
        if name == "pair_share":  # of all rows
            continue
        assert value(metrics, f"{name}/{objective}") == pytest.approx(
            float(metric.compute()), rel=1e-6, abs=1e-6
        )
    counted = {name: value(metrics, f"rows/{name}") for name in NAMES}
    assert counted == dict.fromkeys(NAMES, 0.0) | {objective: 4.0}


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_is_the_weighted_sum_of_its_sub_batches(name):
    model, params, grad = measured(name)
    metrics, grads = grad(params, tiny_mixed.batch(ROWS))
    loss, total = 0.0, jax.tree.map(jnp.zeros_like, params)
    for objective, weight in model.weights.items():
        told, own = alone(name, objective, ROWS)
        loss += weight * value(told)
        total = jax.tree.map(lambda t, x, w=weight: t + w * x, total, own)
        assert value(metrics, f"loss/{objective}") == pytest.approx(
            value(told), rel=1e-6
        )
    assert value(metrics) == pytest.approx(loss, rel=1e-6)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
    assert relative_difference(grads, total) <= 2e-6


def test_what_stands_in_rows_of_another_objective_counts_for_nothing():
    """To the bit: a text in a row that is no pair, a label in one that has none."""
    _, params, grad = measured("sigmoid")
    batch = tiny_mixed.batch(ROWS)
    other = {name: array.copy() for name, array in batch.items()}
    for objective, name in (
        ("captioning", "decoder_target_tokens"),
        ("captioning", "encoder_input_tokens"),
        ("classification", "labels"),
        ("contrastive", contrastive.TEXTS),
    ):
        lacks = [objective not in row for row in ROWS]
        other[name][lacks] = 3
    tiny_runs.assert_same_bits(grad(params, other), grad(params, batch))


def test_nothing_to_learn_is_a_loss_of_zero_and_no_gradient():
    _, params, grad = measured("softmax")
    metrics, grads = grad(params, tiny_mixed.batch([()] * 8))
    assert value(metrics) == 0.0
    assert not any(np.any(x) for x in jax.tree.leaves(grads))


def test_a_mixed_model_has_the_parameters_of_its_parts_and_no_others():
    model, batch = tiny_mixed.model(), tiny_mixed.batch(ROWS)
    shapes = {name: array.shape for name, array in batch.items()}

    def variables(model):
        init = functools.partial(model.get_initial_variables, input_shapes=shapes)
        return flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")

    parts = [variables(model.part(name)) for name in NAMES]
    together = functools.reduce(lambda a, b: a | b, parts)
    whole = variables(model)
    assert whole == together and len(whole) < sum(map(len, parts))


def test_a_batch_split_over_devices_has_the_loss_of_one():
    model, params, grad = measured("sigmoid")
    batch = tiny_mixed.batch(ROWS)
    layout = Partitioning(data=4, model=1)
    with layout.activate():
        arrays = tiny_runs.on_device(batch, layout)
        metrics, _ = jit(lambda p, b: model.loss_fn(p, b, None)[::-1])(params, arrays)
    assert value(metrics) == pytest.approx(value(grad(params, batch)[0]), rel=1e-5)


# --- Evaluation ---


def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches():
    model, params, _ = measured("sigmoid")
    evaluate = jit(model.eval_fn)
    batch = tiny_mixed.batch([("captioning",), ("classification",)] * 4)
    whole = jax.device_get(evaluate(params, batch)[1])
    # Uneven parts, so that a mean of their means is another number.
    first = {n: a.copy() for n, a in batch.items()}
    second = {n: a.copy() for n, a in batch.items()}
    for name in ("decoder_loss_weights", "label_weights"):
        first[name][3:] = 0
        second[name][:3] = 0
    told = [jax.device_get(evaluate(params, part)[1]) for part in (first, second)]
    merged = t5x_driver.merged(*told)
    counted = eval_loss.counted(merged)
    assert not {name for name in counted if name.endswith("contrastive")}
    assert counted.keys() == eval_loss.counted(whole).keys()
    for name, metric in counted.items():
        assert float(metric.compute()) == pytest.approx(value(whole, name), rel=1e-5)
    expected = 0.5 * value(whole, "loss/captioning") + value(
        whole, "loss/classification"
    )
    assert value(whole) == pytest.approx(expected, rel=1e-6)


def test_predictions_are_those_of_the_first_part():
    from vit22b_transfer.inference import decoding

    model = tiny_mixed.model(decode_fn=decoding.greedy)
    part, params = model.part("captioning"), tiny_mixed.params(model)
    batch = tiny_mixed.batch(ROWS)
    tokens, aux = jit(model.predict_batch_with_aux)(params, batch)
    expected, _ = jit(part.predict_batch_with_aux)(params, batch)
    np.testing.assert_array_equal(tokens, expected)
    assert aux["scores"].shape == (8,)
    with pytest.raises(UserError, match="no part for 'pairs'; it has captioning, cl"):
        model.part("pairs")


# --- Runs ---


def run_model():
    schedule = optimizers.cosine(3e-3, total_steps=100, warmup_steps=2)
    objectives = ("classification", "contrastive")
    return tiny_mixed.model(optimizers.adamw(schedule), objectives=objectives)


def drawn(step):
    rows = [("classification",), ("contrastive",), ("contrastive",)]
    rng = np.random.default_rng(step)
    return tiny_mixed.batch([rows[i] for i in rng.integers(0, 3, 16)], seed=step)


def train(folder, total_steps, **arguments):
    periods = tiny_runs.Periods(log=1, checkpoint=2)
    data = tiny_runs.Data(batch=drawn)
    options = dict(eval_data=None, periods=periods, keep=None)
    return tiny_runs.run(
        folder, run_model(), data=data, total_steps=total_steps, **options, **arguments
    )


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "run"
    train(folder, 4)
    return folder


def test_two_steps_and_two_more_are_four_to_the_bit(four_steps, tmp_path):
    shutil.copytree(four_steps / "checkpoint_2", tmp_path / "run" / "checkpoint_2")
    train(tmp_path / "run", 4)
    ours, expected = (
        tiny_runs.arrays_of(folder / "checkpoint_4")
        for folder in (tmp_path / "run", four_steps)
    )
    tiny_runs.assert_same_bits(ours, expected)
    named = {name for line in tiny_runs.logged(four_steps) for name in line}
    assert {
        f"train/{m}/{n}"
        for m in ("loss", "rows")
        for n in ("classification", "contrastive")
    } <= named


def test_a_mixed_run_starts_runs_of_one_objective_and_the_other_way(four_steps):
    path = str(four_steps / "checkpoint_4")
    saved = tiny_runs.arrays_of(path)
    whole = run_model()

    def start(model, rules=()):
        abstract = state.abstract_variables(model, tiny_runs.ONE_DEVICE, drawn(0))
        return restoring.restore_initial(path, abstract, rules, model=model)

    for name, unused in (("classification", "text"), ("contrastive", "head")):
        restored = start(whole.part(name))
        assert not restored.kept
        assert any(path.startswith(f"{unused}/") for path in restored.unused)
        for path_of, array in reading.flatten(restored.params).items():
            np.testing.assert_array_equal(array, saved[f"target/{path_of}"])
    three = tiny_mixed.model()
    fresh = [(f"{scope}/.*", None) for scope in ("token_embedder", "decoder")]
    fresh += [("encoder/(projection|text)/.*", None)]
    restored = start(three, fresh)
    assert restored.loaded.keys() == {
        name.removeprefix("target/") for name in saved if name.startswith("target/")
    }


def test_microbatches_are_refused():
    model = run_model()
    with pytest.raises(UserError, match="MixedModel compares all .* or is a mean"):
        steps.make_update(
            model, model.optimizer_def, tiny_runs.ONE_DEVICE, num_microbatches=2
        )


def test_instruments_tell_of_the_tower_and_of_every_head():
    model, params, _ = measured("sigmoid")
    _, metrics = jax.eval_shape(
        lambda p: recorded_loss(model)(p, tiny_mixed.batch(ROWS), None), params
    )
    told = {name.split("/layers")[0] for name in metrics if "instr" in name}
    assert {
        f"instruments/{x}" for x in ("encoder/tower", "text/tower", "decoder")
    } <= told
    assert "instruments/encoder/text" in " ".join(told)


def test_the_planner_counts_the_tower_once_and_advises_what_can_be_done():
    optimizer = optimizers.adamw(optimizers.cosine(1e-3, total_steps=9))
    model = tiny_mixed.model(optimizer)
    alone = model.part("classification")
    alone.optimizer_def = optimizer

    def forward(model):
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype)
            for name, array in tiny_mixed.batch(ROWS).items()
        }
        job = jobs.Job(model, batch, Partitioning(data=1, model=1))
        layout = planner.planned(job.partitioning, 1, data=1, model=1)
        return job, planner.Plan(job.run(), layout, devices.device("h100")).flops

    job, flops = forward(model)
    assert flops["tower", "forward"] == forward(alone)[1]["tower", "forward"]
    assert flops["decoder", "forward"] and flops["head", "forward"]
    lines, knobs = zip(*advice._job_knobs(job), strict=True)
    named = " ".join(line for some in lines for line in some)
    assert "remat = 'block'" in named and "frozen_tower.gin" in named
    assert "microbatches" not in named and "lora" not in named
    remat = next(knob.model for knob in knobs if knob.model.module != model.module)
    assert remat.module.tower.remat == remat.module.contrastive.tower.remat == "block"


# --- What fits together ---


def lora_captioner():
    made = tiny_mixed.parts()
    made["captioning"].lora = LoraConfig(2, 4.0, (".*kernel",))
    return made


def projecting():
    made = tiny_mixed.parts()
    pairs = made["contrastive"]
    pairs.module = pairs.module.clone(image_projection=True)
    return made


def other_tower():
    other = tiny_mixed.tower(mlp_dim=128)
    return tiny_mixed.parts() | {"classification": tiny_classifier.classifier(other)}


def mixing():
    made = tiny_mixed.parts()
    made["classification"].mixup = 0.2
    return made


def other_vocabulary():
    other = tiny_mixed.parts(tiny_models.Vocabulary(40))
    return tiny_mixed.parts() | {"contrastive": other["contrastive"]}


@pytest.mark.parametrize(
    "parts, arguments, message",
    [
        (lambda: {}, {}, "needs two objectives .* but got none"),
        (
            lambda: {"captioning": tiny_mixed.parts()["captioning"]},
            {},
            "but got captioning. For one objective take its own model",
        ),
        (lora_captioner, {}, "lora is set for captioning, but in a mixed model low"),
        (mixing, {}, "mixup is set for classification, but .* its mixed images"),
        (projecting, {}, "image_projection=True has its layer where that of caption"),
        (other_tower, {}, "tower of classification is another than that of captioni"),
        (other_vocabulary, {}, "one vocabulary, but captioning and contrastive"),
        (
            lambda: tiny_mixed.parts(image_tower=tiny_mixed.tower(pooling="cls")),
            {},
            "class token for pooling='cls' alone",
        ),
        (tiny_mixed.parts, {"weights": {"pairs": 1.0}}, "weights names 'pairs', but"),
        (tiny_mixed.parts, {"weights": {"captioning": -1.0}}, "captioning is -1.0"),
        (tiny_mixed.parts, {"weights": dict.fromkeys(NAMES, 0.0)}, "all weights are 0"),
    ],
)
def test_what_does_not_go_together_is_refused(parts, arguments, message):
    with pytest.raises(UserError, match=message):
        mixed.MixedModel(**parts(), **arguments)


def test_what_a_part_freezes_is_frozen():
    made = tiny_mixed.parts()
    made["captioning"].frozen = ("encoder/tower/.*",)
    model = mixed.MixedModel(**made, frozen=("decoder/.*",))
    assert model.frozen == ("encoder/tower/.*", "decoder/.*")
    params, batch = tiny_mixed.params(model), tiny_mixed.batch(ROWS)
    gradient = jit(jax.grad(lambda p: model.loss_fn(p, batch, None)[0]))
    still = {
        name for name, x in reading.flatten(gradient(params)).items() if not np.any(x)
    }
    frozen = ("encoder/tower/", "decoder/")
    assert still == {n for n in reading.flatten(params) if n.startswith(frozen)}


# --- T5X's contract, without T5X ---


def test_variables_and_metrics_are_as_t5x_takes_them():
    model, params, _ = measured("sigmoid")
    batch = tiny_mixed.batch(ROWS)
    shapes = {name: array.shape for name, array in batch.items()}
    others, made, axes = jax.eval_shape(
        functools.partial(t5x_driver.initialize, model, shapes), jax.random.PRNGKey(0)
    )
    assert not others
    leaves = flatten_dict(made, sep="/")
    names = flatten_dict(axes, sep="/")
    assert names.keys() == {f"{path}_axes" for path in leaves}
    for path, leaf in leaves.items():
        assert type(leaf) is jax.ShapeDtypeStruct
        metadata = names[f"{path}_axes"]
        assert isinstance(metadata, flax_partitioning.AxisMetadata)
        assert len(metadata.names) == leaf.ndim and set(metadata.names) <= set(
            LOGICAL_AXES
        )
    frozen = flax.core.freeze(params)
    both = jax.eval_shape(
        lambda p, b: t5x_driver.accumulate(model, p, b, None, 1), frozen, batch
    )
    assert jax.tree.structure(both[0]) == jax.tree.structure(frozen)
    assert type(both[1]) is dict and {"loss", "loss/captioning"} <= both[1].keys()
    loss, metrics = jax.eval_shape(model.eval_fn, frozen, batch)
    assert loss.shape == () and type(metrics) is dict
    told = jax.device_get(jit(model.eval_fn)(frozen, batch)[1])
    assert np.isfinite(told["loss"].compute_value().value)
    assert model.input_vocabulary == model.output_vocabulary


@pytest.mark.parametrize("job", t5x_options.JOBS)
def test_t5x_is_refused_by_name(job):
    selector = f"{mixed.MixedModel.__module__}.MixedModel"
    found = t5x_options.meaning(job, selector, "captioning")
    assert found is not None and found.kind == "refused"
    assert re.search("each task has its own part. Use `vit22b`", found.words)
    assert t5x_options.meaning(job, selector, "weights") is None
