"""What `vit22b train` says before it starts, and what it refuses."""

import dataclasses

import pytest
import tiny_captions

from vit22b_transfer import UserError
from vit22b_transfer.planning import ahead, devices, jobs, planner
from vit22b_transfer.training import inputs, optimizers


@pytest.fixture(scope="module")
def arguments():
    """Of `train.fine_tune`: a model of two layers each, not scanned."""
    model = tiny_captions.model(num_encoder_layers=2)
    model.optimizer_def = optimizers.adamw(1e-3)
    data = inputs.TrainData("any", "train", tiny_captions.LENGTHS, 8)
    mesh = tiny_captions.ONE_DEVICE
    mesh = dataclasses.replace(mesh, data=-1)
    return {"model": model, "data": data, "partitioning": mesh, "total_steps": 100}


def of_memory(monkeypatch, memory, name="h100"):
    device = dataclasses.replace(devices.device(name), memory=memory)
    monkeypatch.setattr(devices, "here", lambda: device)


@pytest.mark.slow
def test_the_quick_plan_is_a_bound_of_the_plan(arguments):
    job = jobs.Job.from_arguments(arguments)
    quick = ahead._scanned(job)
    assert (
        quick.model.module.tower.scan_layers and not job.model.module.tower.scan_layers
    )
    mesh, device = planner.planned(job.partitioning, 8), devices.device("h100")
    exact, bound = (planner.Plan(j.run(), mesh, device) for j in (job, quick))
    for name in ("weights", "optimizer", "batch"):
        assert bound.memory[name] == exact.memory[name]
    assert exact.total <= bound.total < 3 * exact.total


def test_what_fits_is_told_in_a_line(arguments, monkeypatch):
    of_memory(monkeypatch, 80e9)
    (line,) = ahead.check(arguments)
    assert line.startswith("plan: at most 0.0")
    assert "of 74.5 GiB on each of 8 h100; a step takes" in line
    assert "all 100 take" in line


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_helps(arguments, monkeypatch):
    of_memory(monkeypatch, 1e5)
    with pytest.raises(UserError, match="does not fit: it takes") as error:
        list(ahead.check(arguments))
    assert "frozen_tower.gin" in str(error.value) and "--force" in str(error.value)
    first, last = ahead.check(arguments, force=True)
    assert "at most" not in first and "is forced to start" in last


def test_what_cannot_be_planned_is_left_to_the_training(arguments, monkeypatch):
    of_memory(monkeypatch, 80e9)
    odd = arguments | {"data": dataclasses.replace(arguments["data"], batch_size=9)}
    (line,) = ahead.check(odd)
    assert line.startswith("no plan: a batch of 9 examples does not divide")
    monkeypatch.setattr(devices, "here", lambda: None)
    (line,) = ahead.check(arguments)
    assert line == "no plan: nothing is known of a cpu"


def test_devices_are_known_by_the_names_that_jax_gives_them(monkeypatch):
    def named(kind, **stats):
        class Local:
            platform, device_kind = "gpu", kind

            @staticmethod
            def memory_stats():
                return stats

        monkeypatch.setattr(devices.jax, "local_devices", lambda: [Local()])
        return devices.here()

    assert named("NVIDIA H100 80GB HBM3").name == "h100"
    assert named("NVIDIA H200", bytes_limit=5) == dataclasses.replace(
        devices.device("h200"), memory=5.0
    )
    for kind, name in (
        ("TPU v4", "tpu-v4"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5p", "tpu-v5p"),
        ("TPU v6 lite", "tpu-v6e"),
    ):
        assert named(kind).name == name
    assert named("Unheard of") is None
    other = named("Unheard of", bytes_limit=7)
    assert (other.name, other.memory, other.flops) == ("Unheard of", 7.0, 0.0)
    monkeypatch.undo()
    assert devices.here().memory * 8 == devices.device("cpu").memory
