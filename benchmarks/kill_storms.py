"""Kills at random moments: what a command leaves, and what it ends with.

Claim: train, infer, import and cache-features, killed outright at any moment and
started again until they end, end with what an uninterrupted run ends with, bit for bit
on the same number of devices; on another number it differs by rounding. Of four
processes of which one is killed or stopped, the others end within 60 seconds and say
why.

A tiny model on drawn scenes. Every start is a fork of a process that has imported
everything and used nothing yet, so that kills hit the work and not the start. Prints a
row of a table for each storm.

    python benchmarks/kill_storms.py [--command train] [--kills 20] [--devices 1]
    python benchmarks/kill_storms.py --processes [--signal STOP] [--seed 3]
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time

import storm_contents
import storm_processes
from storm_processes import child, do, flags

STEPS = 12
# Of the drawn scenes; each evaluation and each inference is several batches.
SIZES = {"train": 24, "validation": 24, "test": 40}
# Seconds in which the others have to end when one of four processes does no more.
LIMIT = 60


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = ["train", "infer", "import", "cache-features"]
    parser.add_argument("--command", choices=commands, help="default: all of them")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--devices", type=int, choices=[1, 4], default=1)
    parser.add_argument("--seed", type=int, default=0, help="also: who is hit")
    parser.add_argument("--processes", action="store_true", help="four, one killed")
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_storms_") as folder:
        work = pathlib.Path(folder)
        storm_processes.prepare(work, options.devices, SIZES)
        do(work / "source.txt", lambda: _write_source(work / "source"))
        if options.processes:
            print(_stop_one_of_four(work, options.signal, options.seed % 4))
            return
        chosen = [options.command] if options.command else commands
        print(
            "| command | devices | kills | runs | uninterrupted, s | equal to the bit "
            "| largest difference to another number of devices |"
        )
        print("|---|---|---|---|---|---|---|")
        for command in chosen:
            print(_storm(work, command, options), flush=True)


# --- Commands ---


def _run(work, output, arguments, *, kill_after=None):
    """Whether a command ended by itself; it has to end well."""

    def command():
        from vit22b_transfer import cli

        if code := cli.main(arguments):
            sys.exit(code)

    pid = child(output, command)
    end = None if kill_after is None else time.monotonic() + kill_after
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        if end is not None and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.002)
    assert status == 0, output.read_text()
    return True


def _write_source(folder):
    """A drawn T5 in the format of Hugging Face, and an adapter of it."""
    import numpy as np
    import safetensors.numpy

    from vit22b_transfer.weights import mapping
    from vit22b_transfer.weights.families import t5

    config = dict(model_type="t5", vocab_size=320, d_model=64, d_kv=8, d_ff=128)
    config |= dict(num_heads=4, num_layers=4, feed_forward_proj="gated-gelu")
    config |= dict(tie_word_embeddings=False)
    model = t5.HUGGING_FACE.read(config, {})
    shapes = t5.HUGGING_FACE.shapes(model.tower, model.text)
    plan = mapping.steps(model.rows, (), shapes)
    draw = np.random.default_rng(0).standard_normal
    tensors = {
        name: draw(shape).astype(np.float32)
        for name, shape in mapping.expected_shapes(plan, shapes).items()
    }
    module = "base_model.model.encoder.block.1.layer.0.SelfAttention.q.lora_"
    updates = {f"{module}A.weight": draw((2, 64)), f"{module}B.weight": draw((32, 2))}
    settings = dict(peft_type="LORA", r=2, lora_alpha=4, bias="none")
    for name, content, values in (
        ("model", config, tensors),
        ("adapter_model", settings, updates),
    ):
        to = folder / name
        to.mkdir(parents=True)
        kind = "config" if name == "model" else "adapter_config"
        (to / f"{kind}.json").write_text(json.dumps(content))
        values = {n: np.asarray(x, np.float32) for n, x in values.items()}
        safetensors.numpy.save_file(values, to / f"{name}.safetensors")


# --- Storms ---


def _arguments(work, command, out, devices):
    """A command that writes into `out`."""
    if command == "import":
        source = work / "source"
        names = [str(source / "model"), str(source / "adapter_model")]
        return ["import", *names, "--out", str(out)]
    mesh = "data_parallel" if devices == 1 else "activations_2d_fsdp"
    files = [str(work / "recipe.gin"), f"gin_configs/meshes/{mesh}.gin"]
    values = {"MODEL_DIR": str(out), "TRAIN_STEPS": STEPS}
    checkpoint = str(work / "whole" / "train" / f"checkpoint_{STEPS}")
    if command == "infer":
        values |= {"CHECKPOINT": checkpoint, "OUTPUT": str(out), "BATCH_SIZE": 4}
    if command == "cache-features":
        files.append("gin_configs/runs/cached_features.gin")
        values |= {"CACHE_DIR": str(out), "TOWER_CHECKPOINT": checkpoint}
        values |= {"BATCH_SIZE": 4}
    return [
        command,
        *(f"--gin_file={file}" for file in files),
        *(f"--gin.{name}={value!r}" for name, value in values.items()),
    ]


def _storm(work, command, options):
    """The row of one command: runs until it was killed often enough."""
    devices, draw = options.devices, random.Random(options.seed)
    whole = work / "whole"
    first = [] if command == "import" else ["train"]  # gives the checkpoint
    for name in dict.fromkeys([*first, command]):
        for _ in range(2):  # the second one compiles nothing any more
            shutil.rmtree(whole / name, ignore_errors=True)
            began = time.monotonic()
            _run(
                work,
                work / f"{name}.txt",
                _arguments(work, name, whole / name, devices),
            )
            seconds = time.monotonic() - began
    expected = _content(work, command, whole / command)
    kills = runs = 0
    while kills < options.kills:
        # In the place of the first one: some files hold their own path.
        shutil.rmtree(whole / command)
        while kills < options.kills:
            kill_after = draw.uniform(0, seconds)
            arguments = _arguments(work, command, whole / command, devices)
            if _run(work, work / "storm.txt", arguments, kill_after=kill_after):
                break
            kills += 1
            # Its rename comes last: killed between that and its end, it is done.
            if command == "import" and (whole / command / "checkpoint_0").exists():
                break
        else:
            _run(work, work / "storm.txt", arguments)
        runs += 1
        found = _content(work, command, whole / command)
        differing = [
            name
            for name in expected["exact"] | found["exact"]
            if expected["exact"].get(name) != found["exact"].get(name)
        ]
        assert not differing, f"{command}: {differing[:5]} differ after {kills} kills"
    other = _other_devices(work, command, devices, expected)
    return (
        f"| {command} | {devices} | {kills} | {runs} | {seconds:.1f} | "
        f"{len(expected['exact'])} files and arrays | {other} |"
    )


def _other_devices(work, command, devices, expected):
    """How far a run on the other number of devices is off, in a word or number."""
    if command == "import":
        return "no devices"
    count = 5 - devices
    before = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = flags(count)
    try:
        # The inference and the features are those of the same checkpoint.
        out = work / f"other_{command}"
        _run(work, work / "other.txt", _arguments(work, command, out, count))
        found = _content(work, command, out)
    finally:
        os.environ["XLA_FLAGS"] = before
    largest = 0.0
    for name, numbers in expected["numbers"].items():
        for x, y in zip(numbers, found["numbers"][name], strict=True):
            largest = max(largest, abs(x - y) / max(abs(x), abs(y), 1e-3))
    return f"{largest:.1e} ({count} devices)"


def _content(work, command, out):
    """What a command left; read in a child, which may start threads."""
    file = work / "content.json"

    def write():
        file.write_text(json.dumps(storm_contents.read(command, out)))

    do(work / "content.txt", write)
    return json.loads(file.read_text())


# --- One of four processes ---


def _stop_one_of_four(work, name, victim):
    """The row of a run of four processes of which this one is killed or stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = _arguments(work, "train", work / "four", 4)
    arguments.insert(1, "--distributed")
    arguments.append("--gin.TRAIN_STEPS=1000000")
    children = {}
    for number in range(4):

        def command(number=number):
            from vit22b_transfer import cli

            os.environ |= {
                "XLA_FLAGS": flags(1),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "4",
                "JAX_PROCESS_ID": str(number),
            }
            if code := cli.main(arguments):
                sys.exit(code)

        children[child(work / f"four_{number}.txt", command)] = number
    victim = sorted(children)[victim]
    try:
        while not (work / "four" / "checkpoint_6").exists():
            assert os.waitpid(-1, os.WNOHANG)[0] == 0, _why(work, 0)
            time.sleep(0.1)
        os.kill(victim, getattr(signal, f"SIG{name}"))
        began, left, said = time.monotonic(), set(children) - {victim}, {}
        while left:
            ended, _ = os.waitpid(-1, os.WNOHANG)
            if ended in left:
                left.remove(ended)
                number = children[ended]
                said[number] = (time.monotonic() - began, _why(work, number))
            time.sleep(0.1)
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for number, (seconds, line) in sorted(said.items()):
        print(f"process {number} ended after {seconds:.1f} s: {line}")
    slowest = max(seconds for seconds, _ in said.values())
    assert slowest <= LIMIT and all(line for _, line in said.values()), said
    return f"| SIG{name} to process {children[victim]} of 4 | {slowest:.1f} s |"


def _why(work, number):
    """What the output of a process says of its end."""
    lines = (work / f"four_{number}.txt").read_text().splitlines()
    said = ("Terminating process", "unhealthy", "vit22b: error", "has failed")
    return " ".join(line[:300] for line in lines if any(word in line for word in said))


if __name__ == "__main__":
    main()
