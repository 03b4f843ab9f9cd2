"""What probes cost: many learning rates against one, and large splits in little memory.

Goal: trying twelve rates takes at most twice the time of learning the one that is
judged. It holds as long as a step waits for its features more than for its matrices,
which are twelve times as wide: with few classes, or on an accelerator. Rates are tried
with products of bfloat16, which is shown beside float32: a CPU with AMX has several
times as many of these a second. Claims: k-NN and ridge regression take the same memory
beside the features, however many images there are, and do their products at 60 % of
the rate of a large matmul of their dtype or more.

    python benchmarks/probes.py
    python benchmarks/probes.py --images 1_000_000 --width 1024 --classes 1000

Features are random. "Beside" is the peak of the process less what it held before, of a
process that has compiled already; the features themselves lie on disk, as float32. The
rate is of the products alone, by the process's own processor time: other work on the
machine does not count. That of ridge regression may be above a matmul's, as the product
of a matrix with itself takes half the work.
"""

import os
import resource
import tempfile
import threading
import time

import interleave
import jax
import numpy as np

from vit22b_transfer.experiments import few_shot, linear, nearest_neighbours
from vit22b_transfer.experiments.labelled import Labelled


def on_disk(folder, images, width, classes, name):
    """Random features in a file that is mapped, and labels."""
    rng = np.random.default_rng(len(name))
    features = np.lib.format.open_memmap(
        os.path.join(folder, f"{name}.npy"), "w+", np.float32, (images, width)
    )
    labels = rng.integers(0, classes, images)
    centres = rng.normal(size=(classes, width)).astype(np.float32)
    for start in range(0, images, 8192):
        part = labels[start : start + 8192]
        noise = rng.standard_normal((len(part), width), np.float32)
        features[start : start + 8192] = centres[part] + 4 * noise
    features.flush()
    return Labelled(features, labels, classes, name)


def sweep(data, rates, rounds, epochs, batch_size):
    """Processor seconds of one rate, and what all take: in float32, and as tried."""

    def learn(some, **dtype):
        sgd = linear.Sgd(some, 0.9, 0.0, epochs, batch_size)
        return lambda: linear.learn(data, sgd, **dtype)

    names = {
        "one": learn(rates[:1]),
        "whole": learn(rates),
        "tried": learn(rates, dtype=linear.TRIED_IN),
    }
    samples = interleave.interleave(names, rounds)
    return (
        interleave.median(samples["one"], "cpu"),
        interleave.ratio(samples, "whole", "one", "cpu"),
        interleave.ratio(samples, "tried", "one", "cpu"),
    )


def matmul_rate(dtype, side=2048, rounds=3):
    """Products of a large matmul per second of processor time, at best."""
    factors = np.random.default_rng(0).standard_normal((2, side, side)).astype(dtype)
    multiply = np.matmul  # as ridge regression does
    if dtype == np.float32:
        multiply, factors = jax.jit(jax.numpy.matmul), jax.numpy.asarray(factors)
    first, second = factors
    jax.block_until_ready(multiply(first, second))
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        jax.block_until_ready(multiply(first, second))
        seconds.append(time.process_time() - began)
    return side**3 / min(seconds)


def anonymous_bytes():
    """Memory of this process that is no mapped file."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


class PeakMemory:
    """Context whose `gained` is the most that anonymous memory grew."""

    def __enter__(self):
        self._first = self._most = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self):
        while not self._done.wait(0.02):
            self._most = max(self._most, anonymous_bytes())

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()
        self.gained = self._most - self._first


def measured(run):
    """Seconds, of them those of a processor, and bytes of a call."""
    with PeakMemory() as memory:
        began, busy = time.perf_counter(), time.process_time()
        run()
        busy = time.process_time() - busy
        seconds = time.perf_counter() - began
    return seconds, busy, memory.gained


def main(arguments=None):
    parser = interleave.arguments(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--sweep-images", type=int, default=20_000)
    parser.add_argument("--sweep-classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rates", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=1024)
    args = parser.parse_args(arguments)
    print(f"on {jax.devices()[0].device_kind}", flush=True)
    rates = tuple(float(rate) for rate in np.geomspace(1e-5, 1e-1, args.rates))
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for classes in args.sweep_classes:
            data = on_disk(folder, args.sweep_images, args.width, classes, "sweep")
            found = sweep(data, rates, args.rounds, 1, args.batch_size)
            shape = f"{args.sweep_images} x {args.width}, {classes} classes"
            rows.append([shape, *(f"{value:.2f}" for value in found)])
        names = ["one epoch of SGD", "1 rate, s", f"{args.rates} rates, times"]
        names += ["as they are tried, times"]
        interleave.print_table(names, rows)
        train = on_disk(folder, args.images, args.width, args.classes, "train")
        test = on_disk(folder, args.queries, args.width, args.classes, "test")
        small = Labelled(
            train.features[:10_000], train.labels[:10_000], args.classes, "small"
        )
        nearest_neighbours.nearest(small, test, 200)  # compiles
        size = train.features.nbytes
        rows = []
        cell = args.images * args.width
        for name, run, products, dtype in (
            (
                "k-NN, 200",
                lambda: nearest_neighbours.nearest(train, test, 200),
                cell * args.queries,
                np.float32,
            ),
            (
                "ridge on all images",
                lambda: few_shot.fit_ridge(train, 1024.0),
                cell * (args.width + args.classes),
                np.float64,
            ),
        ):
            seconds, busy, gained = measured(run)
            row = [name, f"{seconds:.1f}", f"{gained / 1e6:.0f}"]
            row += [f"{size / 1e6:.0f}", f"{gained / size:.3f}"]
            rows.append([*row, f"{100 * products / busy / matmul_rate(dtype):.0f}"])
        shape = f"{args.images} x {args.width}, {args.queries} queries"
        names = [shape, "s", "beside, MB", "features, MB", "ratio"]
        interleave.print_table([*names, "% of a matmul's rate"], rows)
    interleave.print_conditions(args.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"the largest that the process was, files included: {peak / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
