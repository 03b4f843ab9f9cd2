"""Random crops and flips: what they cost, what going on costs, and how they look.

Pictures per second of `load_images` with and without them, on the photographs that
scikit-image ships or on a folder of your own. Then the seconds and the records read
until the first batch of a run that starts at step 0 and one that goes on at a million.
With --sheet FILE.png a contact sheet: a picture a row, first as evaluation sees it,
then as it is drawn in five epochs, last mixed with the row above.
"""

import importlib.util
import itertools
import os
import time

import interleave
import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from PIL import Image

from vit22b_transfer.data import augmentation, image_lengths
from vit22b_transfer.data import preprocessors as pp
from vit22b_transfer.data.converters import ImageTextFeatureConverter
from vit22b_transfer.data.host_batches import Request, host_train_batches
from vit22b_transfer.data.order import HostShard
from vit22b_transfer.data.sources import ImageFolderSource
from vit22b_transfer.models.mixup import mixup
from vit22b_transfer.models.preparation import Preparation

TASK = "benchmark_augmentation"
INCEPTION = augmentation.Augmentation(crop_area=(0.05, 1.0), flip=True)
SETTINGS = {
    "none": None,
    "flips": augmentation.Augmentation(flip=True),
    "inception crops": augmentation.Augmentation(crop_area=(0.05, 1.0)),
    "inception crops, flips": INCEPTION,
}
EPOCHS = 5
LATE = 1_000_000


class CountingSource(ImageFolderSource):
    """Counts the records that it was asked for."""

    asked = 0

    def records(self, split, order):
        def count(number):
            self.asked += 1
            return number

        def counted(number):
            number = tf.numpy_function(count, [number], tf.int64)
            return tf.ensure_shape(number, [])

        return super().records(split, order.map(counted))


def photographs():
    """The folder of scikit-image's own."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install scikit-image, or name a --folder of pictures")
    return os.path.join(os.path.dirname(spec.origin), "data")


def batches(drawn, size, batch_size, start_step=0):
    lengths = {"images": size, "inputs": 64, "targets": 64}
    lengths = image_lengths.prepared(lengths, Preparation(filter="bicubic"))
    lengths = augmentation.train_lengths(TASK, lengths, drawn)
    request = Request(TASK, "train", lengths, ImageTextFeatureConverter, batch_size)
    return host_train_batches(request, 0, start_step, HostShard())


def read(drawn, size, batch_size, count):
    stream = batches(drawn, size, batch_size)
    for _ in itertools.islice(stream, count):
        pass
    stream.close()


def until_first(source, size, start_step):
    """(seconds, records asked for) until the first batch is there, of 8 pictures."""
    source.asked, begin = 0, time.perf_counter()
    stream = batches(INCEPTION, size, 8, start_step)
    next(stream)
    seconds, asked = time.perf_counter() - begin, source.asked
    stream.close()
    return seconds, asked


def write_sheet(path, size, number):
    """One picture a row, one look at it a column."""
    columns = []
    for drawn, epochs in ((None, 1), (INCEPTION, EPOCHS)):
        stream = batches(drawn, size, number)
        for batch in itertools.islice(stream, epochs):
            names = batch.features["encoder_input_tokens"].tolist()
            images = batch.features["encoder_input_images"]
            rows = sorted(range(number), key=names.__getitem__)
            columns.append(images[rows])
        stream.close()
    last = jnp.asarray(columns[-1])
    columns.append(np.asarray(mixup(jax.random.key(0), last, jnp.eye(number))[0]))
    rows = np.stack(columns, axis=1)  # [pictures, looks, size, size, 3]
    rows = rows.transpose(0, 2, 1, 3, 4).reshape(number * size, -1, 3)
    Image.fromarray(rows).save(path)
    print(f"{path}: {number} pictures")


def name_as_prompt(dataset):
    """An example's own name as its question, to tell pictures by."""
    return dataset.map(lambda example: {**example, "question": example["image_id"]})


def main():
    parser = interleave.arguments(__doc__, rounds=5)
    parser.add_argument("--folder", help="of pictures; scikit-image's own if left out")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--batches", type=int, default=8, help="of 16 pictures, a round"
    )
    parser.add_argument("--sheet", help="a .png file to write")
    options = parser.parse_args()

    source = CountingSource({"train": options.folder or photographs()})
    reading = pp.ReadingOptions(on_bad_image="skip")
    vocabulary = seqio.ByteVocabulary()
    seqio.TaskRegistry.add(
        TASK,
        source=source,
        preprocessors=[
            name_as_prompt,
            *pp.image_text_preprocessors("{question}", reading),
        ],
        output_features=pp.image_text_features(vocabulary),
    )
    if options.sheet:
        write_sheet(options.sheet, options.size // 2, source.num_records("train"))
        return

    count = options.batches * 16
    contenders = {
        name: lambda drawn=drawn: read(drawn, options.size, 16, options.batches)
        for name, drawn in SETTINGS.items()
    }
    rounds = interleave.interleave(contenders, options.rounds)
    interleave.print_table(
        ["drawn", "pictures/s", "processor ms a picture"],
        (
            [
                name,
                f"{count / interleave.median(samples, 'wall'):.0f}",
                f"{1000 * interleave.median(samples, 'cpu') / count:.1f}",
            ]
            for name, samples in rounds.items()
        ),
    )
    print()
    until_first(source, options.size, 0)
    found = {step: until_first(source, options.size, step) for step in (0, LATE)}
    interleave.print_table(
        ["first step of the run", "seconds to the first batch", "records read"],
        ([f"{step:,}", f"{s:.2f}", str(asked)] for step, (s, asked) in found.items()),
    )
    interleave.print_conditions(options.rounds)


if __name__ == "__main__":
    main()
