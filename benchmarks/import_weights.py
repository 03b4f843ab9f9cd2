"""Memory and rate of `vit22b import` on a large sharded checkpoint.

Claim: a sharded safetensors checkpoint of three billion parameters is imported in at
most its largest tensor + 1.5 GiB of resident memory, at 80 % or more of the rate at
which the same files are copied on the same disk.

The checkpoint has T5's names and shapes (by default T5-XL's, 2.8 billion parameters in
bfloat16) and drawn values. Each round copies the files and imports them, in a process
each, in turn; files are dropped from the page cache before, and synced to disk within
the time.

    python benchmarks/import_weights.py [--folder DIR] [--depth 24] [--rounds 3]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from vit22b_transfer.weights import mapping
from vit22b_transfer.weights.families import t5
from vit22b_transfer.weights.files import tensor_files, tensor_writing

COPY = """
import os, sys
source, to = sys.argv[1:]
os.makedirs(to)
buffer = bytearray(16 << 20)
for name in os.listdir(source):
    with open(os.path.join(source, name), "rb", buffering=0) as old:
        with open(os.path.join(to, name), "wb", buffering=0) as new:
            while count := old.readinto(buffer):
                new.write(memoryview(buffer)[:count])
            os.fsync(new.fileno())
"""
IMPORT = """
import sys
from vit22b_transfer import cli
sys.exit(cli.main(["import", sys.argv[1], "--out", sys.argv[2]]))
"""
# Runs a process, and prints its peak memory in KiB and its processor time.
WATCH = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=sys.stderr)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_maxrss, usage.ru_utime + usage.ru_stime)
"""


def write_source(folder, options):
    """A drawn T5 of the published XL sizes, `depth` layers on each side."""
    config = dict(
        model_type="t5",
        vocab_size=32128,
        d_model=options.width,
        d_kv=64,
        d_ff=5 * options.width // 2,
        num_heads=options.width // 64,
        num_layers=options.depth,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = t5.HUGGING_FACE.read(config, {})
    shapes = t5.HUGGING_FACE.shapes(model.tower, model.text)
    plan = mapping.steps(model.rows, (), shapes)
    drawn = np.random.default_rng(0).standard_normal(2**24, np.float32)
    drawn = drawn.astype(ml_dtypes.bfloat16)

    def make(shape):
        return lambda: np.resize(drawn, shape)

    tensors = [
        tensor_writing.LazyTensor(name, shape, drawn.dtype, make(shape))
        for name, shape in mapping.expected_shapes(plan, shapes).items()
    ]
    os.makedirs(folder)
    tensor_writing.write_safetensors(
        folder, tensors, max_shard_bytes=2 * 10**9, done=lambda _: None
    )
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)


def forget(folder):
    """Drops the files of a folder from the page cache."""
    os.sync()
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(code, source, to):
    """Seconds of wall and of processor time, and peak resident memory in bytes."""
    forget(source)
    start = time.perf_counter()
    command = [sys.executable, "-c", WATCH, "-c", code, source, to]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(to)
    peak, processor = done.stdout.split()
    return seconds, float(processor), int(peak) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", help="on the disk to measure (default: a new one)")
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = os.path.join(folder, "source")
        write_source(source, options)
        tensors = tensor_files.open_tensors(source)
        total = sum(tensor.nbytes for tensor in tensors.values())
        largest = max(tensor.nbytes for tensor in tensors.values())
        print(f"{total / 2:.3g} parameters, {total / 2**30:.2f} GiB in bfloat16")
        rates = {"copy": [], "import": []}
        peaks = []
        for i in range(options.rounds):
            for name, code in (("copy", COPY), ("import", IMPORT)):
                to = os.path.join(folder, name)
                seconds, processor, peak = timed(code, source, to)
                rates[name].append(total / seconds / 1e6)
                print(
                    f"round {i}: {name} {rates[name][-1]:.0f} MB/s, "
                    f"{seconds:.1f} s, {processor:.1f} s of a processor",
                    flush=True,
                )
            peaks.append(peak)
    ratio = statistics.median(rates["import"]) / statistics.median(rates["copy"])
    above = (max(peaks) - largest) / 2**30
    print(f"rate of import / rate of copy (medians): {ratio:.2f}")
    print(
        f"peak memory {max(peaks) / 2**30:.2f} GiB: "
        f"largest tensor ({largest / 2**30:.2f} GiB) + {above:.2f} GiB"
    )


if __name__ == "__main__":
    main()
