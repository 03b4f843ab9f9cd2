"""What probes cost: many learning rates against one, and large splits in little memory.

Goal: a sweep of twelve rates takes at most twice the time of one. It holds as long as a
step waits for its features more than for its matrices, which are twelve times as wide:
with few classes, or on an accelerator. Claim: k-NN and ridge regression take the same
memory beside the features, however many images there are.

    python benchmarks/probes.py
    python benchmarks/probes.py --images 1_000_000 --width 1024 --classes 1000

Features are random. "Beside" is the peak of the process less what it held before, of a
process that has compiled already; the features themselves lie on disk, as float32.
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
    """Seconds of one rate and of all, their ratio, and that of processor time."""

    def learn(some):
        sgd = linear.Sgd(some, 0.9, 0.0, epochs, batch_size)
        return lambda: linear.learn(data, sgd)

    names = {"one": learn(rates[:1]), "all": learn(rates)}
    samples = interleave.interleave(names, rounds)
    return (
        interleave.median(samples["one"], "wall"),
        interleave.median(samples["all"], "wall"),
        interleave.ratio(samples, "all", "one", "wall"),
        interleave.ratio(samples, "all", "one", "cpu"),
    )


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
    """Seconds and bytes of a call."""
    with PeakMemory() as memory:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
    return seconds, memory.gained


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
        names = ["one epoch of SGD", "1 rate, s", f"{args.rates} rates, s"]
        names += ["ratio", "of processor time"]
        interleave.print_table(names, rows)
        train = on_disk(folder, args.images, args.width, args.classes, "train")
        test = on_disk(folder, args.queries, args.width, args.classes, "test")
        small = Labelled(
            train.features[:10_000], train.labels[:10_000], args.classes, "small"
        )
        nearest_neighbours.nearest(small, test, 200)  # compiles
        size = train.features.nbytes
        rows = []
        for name, run in (
            ("k-NN, 200", lambda: nearest_neighbours.nearest(train, test, 200)),
            ("ridge on all images", lambda: few_shot.fit_ridge(train, 1024.0)),
        ):
            seconds, gained = measured(run)
            row = [name, f"{seconds:.1f}", f"{gained / 1e6:.0f}"]
            rows.append([*row, f"{size / 1e6:.0f}", f"{gained / size:.3f}"])
        shape = f"{args.images} x {args.width}, {args.queries} queries"
        interleave.print_table(
            [shape, "s", "beside, MB", "features, MB", "ratio"], rows
        )
    interleave.print_conditions(args.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"the largest that the process was, files included: {peak / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
