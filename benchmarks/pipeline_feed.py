"""A whole inference against the bare loop of its decoder.

Claim: reading and decoding of image files, tokenising, and the writing of lines cost
so little beside the model that an inference has 90 % of the bare loop's rate or more.

Drawn photographs of 480 x 360 as JPEG files; `infer.predict_split` of them, and as many
calls of its compiled function on a batch that is there. Prints examples per second of
processor time and of the clock, and the median ratios of rounds that run both.

    python benchmarks/pipeline_feed.py [--vit S/16] [--image_size 224] [--images 128]
"""

import argparse
import os
import pathlib
import tempfile

import interleave
import jax
import numpy as np
import seqio
from PIL import Image, ImageFilter

from vit22b_transfer.data import batches, given_images, image_lengths
from vit22b_transfer.inference import infer, restored
from vit22b_transfer.models import encoder_decoder, multimodal, t5, vit
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.planning import bench

BATCH = 16


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vit", default="S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ["VIT22B_VOCABULARY"] = "bytes"
    with tempfile.TemporaryDirectory(prefix="pipeline_feed_") as folder:
        work = pathlib.Path(folder)
        _draw(work / "images", args.images)
        samples = interleave.interleave(_contenders(work, args), args.rounds)
    for field in ("cpu", "wall"):
        for name in samples:
            rate = args.images / interleave.median(samples[name], field)
            print(f"{name}: {rate:.1f} examples per second of {field} time")
        share = interleave.ratio(samples, "bare loop", "inference", field)
        print(f"inference / bare loop, {field} time: {share:.3f}")


def _draw(folder, count):
    """Photographs as far as a JPEG decoder can tell: blurred noise with edges."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        small = draw.integers(0, 256, (24, 32, 3), np.uint8)
        image = Image.fromarray(small).resize((480, 360), Image.Resampling.BICUBIC)
        noise = Image.fromarray(draw.integers(0, 256, (360, 480, 3), np.uint8))
        image = Image.blend(image, noise.filter(ImageFilter.GaussianBlur(1)), 0.2)
        image.save(folder / f"{number:05d}.jpg", quality=90)


def _contenders(work, args):
    size = (args.image_size, args.image_size)
    text = t5.T5Config(
        vocab_size=384,
        width=256,
        num_encoder_layers=2,
        num_decoder_layers=4,
        num_heads=4,
        head_dim=64,
        mlp_dim=1024,
        tied_logits=True,
    )
    tower = vit.vit22b_config(args.vit, image_size=size)
    vocabulary = seqio.ByteVocabulary()

    from vit22b_transfer.data.converters import ImageTextFeatureConverter

    # Every answer has all steps.
    model = bench.endless(
        multimodal.ImageTextModel(
            encoder_decoder.ImageTextModule(tower, text),
            vocabulary,
            vocabulary,
            feature_converter_cls=ImageTextFeatureConverter,
        )
    )
    lengths = {"images": size, "inputs": 16, "targets": args.steps}
    task = given_images.task(images=(str(work / "images"),), prompts=("caption en",))
    data = infer.SplitToRead(task, given_images.SPLIT, lengths, BATCH)
    mesh = Partitioning(data=1)
    with batches.eval_batches(
        task,
        given_images.SPLIT,
        feature_lengths=lengths,
        converter_cls=image_lengths.converter_of(model),
        batch_size=BATCH,
        partitioning=mesh,
    ) as rows:
        batch = jax.device_put(dict(next(rows).features))
    shapes = {name: value.shape for name, value in batch.items()}
    params = jax.jit(lambda key: model.get_initial_variables(key, shapes)["params"])(
        jax.random.key(0)
    )
    ready = restored.RestoredModel(model, mesh, str(work / "checkpoint_0"), params)
    runs = iter(range(1000))

    def inference():
        output = str(work / f"{next(runs)}.jsonl")
        result = infer.predict_split(ready, data, output=output)
        assert result.num_examples == args.images and not result.num_bad_images

    def bare_loop():
        ahead = []
        with mesh.activate():
            for number in range(-(-args.images // BATCH)):
                ahead.append(
                    ready.predict(params, batch, np.uint32(0), np.uint32(number))
                )
                if len(ahead) > 2:
                    jax.device_get(ahead.pop(0))
        jax.device_get(ahead)

    return {"bare loop": bare_loop, "inference": inference}


if __name__ == "__main__":
    main()
