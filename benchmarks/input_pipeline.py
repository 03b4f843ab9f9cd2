"""Image files to batches: ours against tf.data's decoding and resizing, per processor.

Claim: with JPEGs decoded at a scale (runs/scaled_jpegs.gin) a picture like those of
COCO costs 0.65 to 0.75 of the processor time of tf.data's `decode_jpeg` and antialiased
`resize`; whole, it costs 1.0 to 1.2 of it. A small picture costs 0.3 to 0.4 ms, some
five times as much as there: Pillow alone takes longer than all of tf.data.

COCO-like JPEGs (640 x 480, 4:2:0, quality 90) are cut from photographs of scikit-learn
and scikit-image, small ones (32 to 64 pixels a side) too; ours are read as a training
reads them, from the task's source to the host's batches of 64, tf.data's from a list of
files, shuffled. Contenders run interleaved in one process that may use 1 processor, in
another that may use 2. Processor time is of all threads, up to where nothing is read
ahead any more. Prints milliseconds per picture, the ratios, and how far pixels of
JPEGs decoded at a scale are from those of whole ones.

With --feed a B/16 tower of that many layers takes the batches as they come, on the
same processors: how long its loop waits for them, and beside a loop that has its batch.

    python benchmarks/input_pipeline.py [--processors 1 2] [--feed 2]
"""

import functools
import importlib.util
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import interleave
import numpy as np
from PIL import Image

BATCH, SIDE, SMALL_SIDE = 64, 224, 32
FED_STEPS = 3
OURS = {"ours, whole": "whole", "ours, scaled": "scaled"}
ANTIALIASED = "tf.data, antialiased"
PEERS = {
    ANTIALIASED: dict(antialias=True),
    "tf.data, antialiased, INTEGER_FAST": dict(
        antialias=True, dct_method="INTEGER_FAST", fancy_upscaling=False
    ),
    "tf.data, not antialiased": dict(antialias=False),
}


def photographs():
    """Photographs as RGB images, of packages that are never imported."""
    skimage, sklearn = (
        pathlib.Path(importlib.util.find_spec(name).origin).parent
        for name in ("skimage", "sklearn")
    )
    folders = {
        sklearn / "datasets" / "images": ("china.jpg", "flower.jpg"),
        skimage / "data": ("astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png"),
    }
    return [
        Image.open(folder / name).convert("RGB")
        for folder, names in folders.items()
        for name in names
    ]


def write_pictures(folder, count, sizes):
    """Parts of photographs as JPEG files, 80 to 100 % of one side; their mean bytes."""
    draw, sources = np.random.default_rng(0), photographs()
    folder.mkdir(parents=True)
    for number in range(count):
        photograph = sources[number % len(sources)]
        width, height = size = sizes(draw)
        share = draw.uniform(0.8, 1.0)
        share *= min(photograph.width / width, photograph.height / height)
        part = share * width, share * height
        left = draw.uniform(0, photograph.width - part[0])
        top = draw.uniform(0, photograph.height - part[1])
        box = (left, top, left + part[0], top + part[1])
        picture = photograph.resize(size, Image.Resampling.LANCZOS, box)
        picture.save(folder / f"{number:05d}.jpg", quality=90, subsampling="4:2:0")
    return np.mean([path.stat().st_size for path in folder.iterdir()])


def ours(root, side):
    """Name -> request of the pictures below root/train."""
    sys.path.append(str(pathlib.Path(__file__).parents[1]))
    from tasks.classification import register_classification
    from vit22b_transfer.data.host_batches import Request
    from vit22b_transfer.data.image_lengths import PreparedImages
    from vit22b_transfer.data.label_converters import ImageLabelFeatureConverter
    from vit22b_transfer.data.labelled_sources import ClassFolderSource
    from vit22b_transfer.models.preparation import Preparation

    task = f"pictures_{root.name}"
    source = ClassFolderSource({"train": str(root / "train")}, classes=("all", "none"))
    register_classification(task, source)
    converter = functools.partial(ImageLabelFeatureConverter, num_classes=2)
    found = {}
    for name, jpegs in OURS.items():
        images = PreparedImages((side, side), Preparation(jpegs=jpegs))
        lengths = {"images": images, "labels": 1}
        found[name] = Request(task, "train", lengths, converter, BATCH)
    return found


def host_batches(request):
    """Endless host batches of pixels."""
    from vit22b_transfer.data.host_batches import host_train_batches
    from vit22b_transfer.data.order import HostShard

    for batch in host_train_batches(request, 0, 0, HostShard()):
        yield batch.features["encoder_input_images"]


def peers(root, side):
    """Name -> endless batches of tf.data."""
    import tensorflow as tf

    paths = sorted(map(str, (root / "train" / "all").iterdir()))

    def batches(antialias, **decoding):
        def read(path):
            image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3, **decoding)
            image = tf.image.resize(image, (side, side), antialias=antialias)
            return tf.cast(tf.round(image), tf.uint8)

        names = tf.data.Dataset.from_tensor_slices(paths).repeat()
        pixels = names.shuffle(len(paths), seed=0).map(read, tf.data.AUTOTUNE)
        return pixels.batch(BATCH).prefetch(1).as_numpy_iterator()

    return {name: batches(**how) for name, how in PEERS.items()}


def wait_until_quiet():
    """Returns once the threads of this process do nothing any more."""
    before = time.process_time()
    while True:
        time.sleep(0.01)
        now = time.process_time()
        if now - before < 0.001:
            return
        before = now


def timed(batches, count):
    """A contender: batches of `count` pictures, and as many made ahead as before."""

    def run():
        for _ in range(count // BATCH):
            next(batches)
        wait_until_quiet()

    return run


def compare(kind, requests, root, count, side, rounds):
    """Prints the table of a kind of pictures."""
    batches = {name: host_batches(request) for name, request in requests.items()}
    batches |= peers(root, side)
    contenders = {name: timed(batches[name], count) for name in batches}
    samples = interleave.interleave(contenders, rounds)
    fields = ("cpu", "wall")

    def row(name):
        times = [1e3 * interleave.median(samples[name], x) / count for x in fields]
        ratios = [interleave.ratio(samples, ANTIALIASED, name, x) for x in fields]
        return [name, *(f"{x:.3f}" for x in times), *(f"{x:.2f}" for x in ratios)]

    header = [f"{kind} to {side} x {side}", "processor ms", "wall ms"]
    header += [f"{ANTIALIASED} / it, processor", "wall"]
    interleave.print_table(header, map(row, batches))


def print_differences(root, side):
    """How far pixels of JPEGs decoded at a scale are from those of whole ones."""
    from vit22b_transfer.data import images
    from vit22b_transfer.models.preparation import Preparation

    found = []
    for path in sorted((root / "train" / "all").iterdir()):
        whole, scaled = (
            images.read_image(path, (side, side), Preparation(jpegs=jpegs)).astype(int)
            for jpegs in ("whole", "scaled")
        )
        found.append(abs(whole - scaled))
    found = np.stack(found)
    print(
        f"scaled against whole, {side} x {side}: grey levels differ by "
        f"{found.mean():.2f} on average, by {found.mean((1, 2, 3)).max():.2f} in the "
        f"worst picture; 99.9 % by at most {np.percentile(found, 99.9):.0f}, the worst "
        f"by {found.max()}"
    )


def feed(request, layers, rounds):
    """Prints how long a tower's loop waits for its batches."""
    import jax

    from vit22b_transfer.data import batches
    from vit22b_transfer.models import vit
    from vit22b_transfer.partitioning.rules import Partitioning

    config = vit.vit22b_config("B/16", depth=layers, image_size=(SIDE, SIDE))
    tower = vit.VisionTower(config)
    read = batches.train_batches(
        request.name,
        request.split,
        feature_lengths=request.feature_lengths,
        converter_cls=request.converter_cls,
        batch_size=BATCH,
        seed=0,
        partitioning=Partitioning(data=1, model=1),
    )
    given = next(read)["encoder_input_images"]
    params = jax.jit(tower.init)(jax.random.key(0), given)["params"]
    forward = jax.jit(lambda params, x: tower.apply({"params": params}, x).tokens)
    waits = []

    def fed():
        wait = 0.0
        for _ in range(FED_STEPS):
            started = time.perf_counter()
            images = next(read)["encoder_input_images"]
            wait += time.perf_counter() - started
            forward(params, images).block_until_ready()
        waits.append(wait)

    def bare():
        for _ in range(FED_STEPS):
            forward(params, given).block_until_ready()

    samples = interleave.interleave({"bare": bare, "fed": fed}, rounds)
    shares = [
        wait / sample.wall
        for wait, sample in zip(waits[1:], samples["fed"], strict=True)
    ]
    rates = [
        FED_STEPS * BATCH / interleave.median(samples[name], "wall") for name in samples
    ]
    print(
        f"B/16 of {layers} layers, batches of {BATCH}: {rates[0]:.1f} pictures a "
        f"second of a batch that is there, {rates[1]:.1f} read (scaled), "
        f"{interleave.ratio(samples, 'bare', 'fed', 'wall'):.3f} of that rate; "
        f"{statistics.median(shares):.2%} of the time is waiting for a batch. Tower "
        "and readers share the processors: what reading takes, the tower loses."
    )
    read.close()


def main():
    parser = interleave.arguments(__doc__, rounds=7)
    parser.add_argument("--processors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pictures", type=int, default=192, help="of a run")
    parser.add_argument("--feed", type=int, metavar="LAYERS", help="feed such a tower")
    args = parser.parse_args()
    if len(args.processors) > 1:
        rest = sys.argv[1:]
        for number in args.processors:
            command = [sys.executable, __file__, *rest, "--processors", str(number)]
            subprocess.run(command, check=True)
        return
    # Before TensorFlow, which counts them when it is imported.
    allowed = sorted(os.sched_getaffinity(0))[: args.processors[0]]
    os.sched_setaffinity(0, allowed)
    from vit22b_transfer.data import decoded_images, streams

    streams.keep_tensorflow_off_accelerators()
    print(f"\n{len(allowed)} processors")
    with (
        tempfile.TemporaryDirectory() as work,
        decoded_images.SMALL_SETS.keeping_none(),
    ):
        coco, small = pathlib.Path(work, "coco"), pathlib.Path(work, "small")
        kilobytes = 1e-3 * write_pictures(
            coco / "train" / "all", args.pictures, lambda draw: (640, 480)
        )
        print(f"COCO-like pictures have {kilobytes:.0f} kB on average")
        write_pictures(
            small / "train" / "all",
            BATCH * 16,
            lambda draw: tuple(map(int, draw.integers(32, 65, 2))),
        )
        requests = ours(coco, SIDE)
        compare("COCO-like", requests, coco, args.pictures, SIDE, args.rounds)
        print_differences(coco, SIDE)
        few = ours(small, SMALL_SIDE)
        compare("small", few, small, BATCH * 16, SMALL_SIDE, args.rounds)
        if args.feed:
            feed(requests["ours, scaled"], args.feed, min(3, args.rounds))
    interleave.print_conditions(args.rounds)


if __name__ == "__main__":
    main()
