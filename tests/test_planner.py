"""Plans: counts are exact, bytes are the compiler's, and what does not fit is told."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from tiny_gemma import prefix_lm_model, prefix_lm_module
from tiny_models import (
    IMAGE_SIZE,
    TWO_BLOCKS,
    TWO_LAYERS,
    image_text_model,
    text_config,
    tower_config,
)

from vit22b_transfer import cli
from vit22b_transfer.models import lora
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.planning import advice, devices, jobs, planner, report
from vit22b_transfer.planning.memory import Layout
from vit22b_transfer.training import optimizers

BATCH, PROMPT, TARGETS = 8, 4, 6
SIZES = dict(width=32, num_heads=8, mlp_dim=64)
SCANNED = dict(scan_layers=True, remat="block")
H100 = devices.device("h100")


def abstract_batch(size=BATCH):
    tokens = jax.ShapeDtypeStruct((size, TARGETS), jnp.int32)
    return {
        "encoder_input_images": jax.ShapeDtypeStruct((size, *IMAGE_SIZE, 3), jnp.uint8),
        "encoder_input_tokens": jax.ShapeDtypeStruct((size, PROMPT), jnp.int32),
        "decoder_target_tokens": tokens,
        "decoder_input_tokens": tokens,
        "decoder_loss_weights": tokens,
    }


MODELS = {
    "plain": dict(),
    "scanned": dict(tower=SCANNED | dict(fused_projections=True), text=SCANNED),
    "frozen": dict(tower=SCANNED, text=SCANNED, frozen=("encoder/tower/.*",)),
    "lora": dict(
        tower=SCANNED,
        text=SCANNED,
        lora=lora.LoraConfig(4, 8.0, (".*attention/(query|value)/kernel",)),
    ),
}


def model_of(name, optimizer=optimizers.adamw):
    options = dict(MODELS[name])
    tower = tower_config(**(TWO_BLOCKS | SIZES | options.pop("tower", {})))
    text = text_config(head_dim=4, **(TWO_LAYERS | SIZES | options.pop("text", {})))
    optimizer = optimizer(1e-3)
    return image_text_model(tower, text, optimizer_def=optimizer, **options)


@functools.cache
def job_of(name):
    return jobs.Job(model_of(name), abstract_batch(), Partitioning())


@functools.cache
def run_of(name):
    return job_of(name).run()


def planned_on(devices):
    """A mesh that divides everything: one of the devices is used."""
    return planner.planned(Partitioning(), devices, data=1, model=1)


def plan_of(name, devices=1, device=H100, **mesh):
    return planner.Plan(
        run_of(name), planner.planned(Partitioning(), devices, **mesh), device
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name):
    leaves = jax.tree.leaves(job_of(name).variables()["params"])
    counts = run_of(name).count()
    assert sum(c for c, _ in counts.values()) == sum(leaf.size for leaf in leaves)
    trained = {part for part, (_, trained) in counts.items() if trained}
    assert ("tower" in trained) == (name != "frozen")
    assert ("logits" in trained) == (name != "lora")


def tower_forward_flops():
    """Operations of the tower's products, added up by hand."""
    width, mlp, depth, tokens = 32, 64, 2, 4
    layer = 2 * (4 * width**2 + 2 * width * mlp) + 4 * tokens * width
    return BATCH * tokens * (depth * layer + 2 * 3 * 8**2 * width)


@pytest.mark.parametrize("name", MODELS)
def test_the_towers_flops_are_counted_by_layer_and_phase(name):
    flops = plan_of(name).flops
    expected = tower_forward_flops()
    if name != "lora":
        assert flops["tower", "forward"] == expected
    backward = flops.get(("tower", "backward"), 0)
    if name in ("plain", "scanned"):
        # Twice the forward pass, less the gradient of the pixels.
        pixels = 2 * BATCH * 4 * 3 * 8**2 * 32
        assert backward == 2 * expected - pixels
    assert (backward == 0) == (name == "frozen")
    assert (("tower", "recomputed") in flops) == (name in ("scanned", "lora"))


def test_scanned_layers_count_as_often_as_they_run():
    plain, scanned = plan_of("plain").flops, plan_of("scanned").flops
    for part in ("tower", "projection", "text encoder", "decoder", "logits"):
        for phase in ("forward", "backward"):
            assert plain[part, phase] == scanned[part, phase]


# One layer of each kind: compilation takes the time of this file.
TOWER = tower_config(**SIZES, depth=1)
TEXT = text_config(**SIZES, head_dim=4, num_encoder_layers=0, num_decoder_layers=1)


@pytest.mark.slow
def test_argument_bytes_are_those_of_the_compiled_step():
    """Full and LoRA runs, and 22 B parameters: benchmarks/plan_22b.py."""
    frozen = ("encoder/tower/.*",)
    optimizer = optimizers.adafactor(1e-3)
    model = image_text_model(TOWER, TEXT, optimizer_def=optimizer, frozen=frozen)
    partitioning = Partitioning(4, 2, 2, 2)
    job = jobs.Job(model, abstract_batch(), partitioning)
    plan = planner.Plan(job.run(), planner.planned(partitioning, 8), H100)
    memory = jobs.compile_step(job, partitioning).memory_analysis()
    assert memory is not None
    assert plan.arguments == pytest.approx(memory.argument_size_in_bytes, rel=0.01)


def test_cached_features_leave_the_tower_out():
    tower = dataclasses.replace(TOWER, dtype=jnp.bfloat16)
    batch = jobs.with_features(abstract_batch(), tower)
    assert "encoder_input_images" not in batch
    model = image_text_model(TOWER, TEXT, optimizer_def=optimizers.adamw(1e-3))
    run = jobs.Job(model, batch, Partitioning()).run()
    whole = jobs.Job(model, abstract_batch(), Partitioning()).run()
    counts, others = run.count(), whole.count()
    del others["tower"]
    assert counts == others
    cpu = planner.Plan(run, planned_on(1), devices.device("cpu"))
    texts = 4 * BATCH * (PROMPT + 3 * TARGETS)
    assert cpu.memory["batch"] == 2 * BATCH * 4 * TOWER.width + texts


def test_a_batch_is_split_into_microbatches_with_the_same_work():
    job = dataclasses.replace(job_of("scanned"), num_microbatches=2)
    whole, split = (
        plan_of("scanned"),
        planner.Plan(job.run(), planner.planned(Partitioning(), 1), H100),
    )
    assert split.flops == whole.flops
    assert split.memory["gradients"] > whole.memory["gradients"]


def test_data_parallel_gradients_are_summed_once():
    """2 (k-1)/k of the trained parameters in float32, and no more than a few sums."""
    plan = plan_of("plain", 8)
    sent = planner.sent_by_part(plan)
    assert {(kind, axis) for _, kind, axis in sent} == {("all-reduce", "data")}
    parameters = sum(count for count, _ in plan.run.count().values())
    assert sum(sent.values()) == pytest.approx(2 * 7 / 8 * 4 * parameters, rel=0.05)


def test_fsdp_gathers_parameters_and_scatters_their_gradients():
    plan = plan_of("scanned", 8, parameter_partitioning_dims=2)
    tower = {(t.kind, t.phase): 0 for t in plan.transfers if t.part == "tower"}
    for t in plan.transfers:
        if t.part == "tower":
            tower[t.kind, t.phase] += t.total
    # Seven eighths of every kernel come from elsewhere, or go there.
    projections, outputs = 4 * 2 * (3 * 32**2 + 32 * 64), 4 * 2 * (32**2 + 64 * 32)
    patches = 4 * 3 * 8**2 * 32
    once = (projections + outputs + patches) * 7 // 8
    assert tower["all-gather", "forward"] == once
    assert tower["reduce-scatter", "backward"] == once
    # What a kernel multiplied is needed again where its block is computed again.
    assert tower["all-gather", "recomputed"] == projections * 7 // 8
    assert tower["all-gather", "backward"] == (projections + outputs) * 7 // 8


def test_two_dimensional_activations_move_what_the_paper_says():
    """In-projection: (k-1) n/k per token; out-projection: (k-1) m/k (section 3)."""
    plan = plan_of("scanned", 8, data=1, model=8, activation_partitioning_dims=2)
    forward = [t for t in plan.transfers if (t.part, t.phase) == ("tower", "forward")]
    tokens, width, layers = BATCH * 4, 32, 2
    moved = 4 * tokens * width * 7 // 8
    large = [t for t in forward if t.times == layers and t.bytes > 2000]
    assert {(t.kind, t.bytes) for t in large} == {
        ("all-gather", moved),
        ("reduce-scatter", moved),
    }


def test_a_vocabulary_that_does_not_divide_is_told_with_its_parameter():
    with pytest.raises(ValueError, match="does not divide by the mesh axis 'model'"):
        plan_of("plain", 3, model=3)


def test_a_batch_that_does_not_divide_is_told_with_the_line_that_helps():
    with pytest.raises(ValueError, match="Set BATCH_SIZE = 9"):
        plan_of("plain", 3)


def test_a_device_that_is_too_small_is_told():
    small = dataclasses.replace(H100, memory=1e5)
    assert plan_of("plain").fits
    assert not plan_of("plain", device=small).fits


@pytest.mark.slow
def test_knobs_are_ranked_by_what_they_leave_and_name_their_gin_lines():
    small = dataclasses.replace(H100, memory=1e5)
    plan = plan_of("scanned", 8, device=small)
    found = advice.knobs(job_of("scanned"), plan)
    totals = [knob.plan.total for knob in found]
    assert totals == sorted(totals) and totals[-1] < plan.total
    lines = {line for knob in found for line in knob.lines}
    assert {
        "rules.Partitioning.parameter_partitioning_dims = 2",
        "include 'gin_configs/models/frozen_tower.gin'",
        "include 'gin_configs/models/lora.gin'",
        "include 'gin_configs/runs/optimizer_adafactor.gin'",
    } <= lines
    for knob in found:
        if "models/lora.gin" in knob.lines[0]:
            assert knob.plan.memory["optimizer"] < 0.5 * plan.memory["optimizer"]


@pytest.mark.slow
def test_the_search_finds_the_fastest_mesh_that_fits():
    plan = plan_of("plain", 8)
    found = advice.meshes(plan)
    assert {p.partitioning.mesh.size for p in found} == {8}
    times = [p.time.longest for p in found]
    assert times == sorted(times) and all(p.fits for p in found)
    # Between the largest and the smallest: the largest are put behind.
    limit = (min(p.total for p in found) + max(p.total for p in found)) / 2 / 0.95
    small = dataclasses.replace(H100, memory=limit)
    best = advice.meshes(dataclasses.replace(plan, device=small))
    assert best[0].fits and not best[-1].fits


def test_no_mesh_of_devices_that_divide_nothing():
    with pytest.raises(ValueError, match="no mesh of 7 devices divides"):
        advice.meshes(planner.Plan(run_of("plain"), planned_on(7), H100))


def test_unknown_devices_list_the_nearest():
    with pytest.raises(ValueError, match="nearest: h100"):
        devices.device("h10")


def test_the_decode_cache_is_that_of_every_layer():
    from vit22b_transfer.inference import decoding

    model = image_text_model(
        tower_config(**SIZES, **TWO_BLOCKS),
        text_config(**SIZES, head_dim=4, **TWO_LAYERS),
        decode_fn=decoding.greedy,
    )
    job = jobs.Job(model, abstract_batch(), Partitioning())
    cache = planner.decode_cache(model, job.variables(), job.batch)
    keys_and_values = [v for v in cache if len(v.shape) == 4 and v.itemsize == 4]
    joined, layers, encoded = 32, 2, 4 + PROMPT
    per_example = 2 * layers * joined * (TARGETS + encoded)
    assert sum(math.prod(v.shape) for v in keys_and_values) == BATCH * per_example
    layout = Layout({"data": 2, "model": 4}, Partitioning().rules)
    for value in keys_and_values:
        assert layout.bytes(value) == 4 * math.prod(value.shape) // 8


def test_a_prefix_lm_is_planned_alike():
    model = prefix_lm_model(
        prefix_lm_module("gemma2", scan_layers=True),
        optimizer_def=optimizers.adafactor(1e-3),
    )
    job = jobs.Job(model, abstract_batch(), Partitioning())
    plan = planner.Plan(job.run(), planner.planned(Partitioning(), 1), H100)
    assert plan.flops["decoder", "backward"] == 2 * plan.flops["decoder", "forward"]
    shown = list(report.report(plan))
    assert "DOES NOT" not in "\n".join(shown)
    assert max(map(len, shown)) <= 80


@pytest.mark.slow
def test_the_command_plans_pre_training_by_labels(capsys):
    arguments = ["plan", "--gin_file=gin_configs/recipes/vit22b_pretrain.gin"]
    arguments += ["--gin_file=gin_configs/meshes/activations_2d_fsdp.gin"]
    arguments += ["--gin.VIT='Ti/16'", "--gin.vit22b_config.depth=2"]
    arguments += ["--gin.NUM_CLASSES=1000", "--gin.BATCH_SIZE=64", "--devices=8"]
    assert cli.main([*arguments, "--gin.IMAGE_SIZE=(32, 32)"]) == 0
    out = capsys.readouterr().out
    assert "mesh 4 data x 2 model; batch 64 in 1 microbatches" in out
    parts = r"tower +1,480,192 +1,480,192\nhead +193,000 +193,000\ntotal"
    assert re.search(parts, out)
    assert "fits: " in out and "DOES NOT FIT" not in out


@pytest.mark.slow
def test_the_command_plans_a_recipe_without_its_model_dir_or_data(capsys):
    arguments = ["plan", "--gin_file=gin_configs/recipes/my_captions.gin"]
    arguments += ["--gin.T5Config.scan_layers=True", "--devices=4", "--device=a100"]
    assert cli.main([*arguments, "--gin.vit22b_config.scan_layers=True"]) == 0
    out = capsys.readouterr().out
    assert "a100, 4 devices: mesh 4 data x 1 model; batch 64 in 1 microbatches" in out
    assert "decoding a batch of 64 keeps 0.0" in out
    assert "fits: " in out and "DOES NOT FIT" not in out
    assert cli.main([*arguments, "--gin.Partitioning.model=3"]) == 1
