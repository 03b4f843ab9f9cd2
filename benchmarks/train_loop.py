"""The training loop on real data against its bare compiled step.

Claim: at steps of 50 ms or more, `fine_tune` takes at most 1.05x the time of the same
compiled step called in a row on batches that lie on the device.

The loop reads drawn scenes (JPEG files, COCO format), decodes, shuffles, converts,
prefetches, and logs once per block of steps; after each of its blocks it is held up
for a block of bare steps. On CPUs both share the processors, so what the data costs is
seen in full; on accelerators it runs beside the step.

    python benchmarks/train_loop.py [--batch 8] [--block 10] [--rounds 9]
"""

import os
import tempfile
import types

import interleave
import jax
from held_up_loop import HeldUp

from vit22b_transfer.data import converters, vocabularies
from vit22b_transfer.demo import scenes
from vit22b_transfer.models import encoder_decoder, multimodal, t5, vit
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import compiling, inputs, optimizers, steps, train
from vit22b_transfer.training.state import (
    abstract_state,
    abstract_variables,
    fresh_state,
    init_params,
)

SIDE, WIDTH, LENGTHS = 64, 256, {"images": (64, 64), "inputs": 64, "targets": 96}
LOOP, BARE = "training loop", "bare step"


def build_model():
    vocabulary = vocabularies.load()
    text = t5.T5Config(
        vocab_size=vocabulary.vocab_size,
        width=WIDTH,
        num_encoder_layers=1,
        num_decoder_layers=2,
        num_heads=4,
        head_dim=64,
        mlp_dim=512,
    )
    tower = vit.ViTConfig(
        width=WIDTH,
        depth=4,
        mlp_dim=1024,
        num_heads=4,
        patch_size=8,
        image_size=(SIDE, SIDE),
    )
    return multimodal.ImageTextModel(
        encoder_decoder.ImageTextModule(tower, text),
        vocabulary,
        vocabulary,
        optimizers.adamw(1e-4),
        feature_converter_cls=converters.ImageTextFeatureConverter,
    )


class BareStep:
    """Blocks of the loop's own compiled step on a few batches that stay in place."""

    def __init__(self, model, partitioning, batches, block):
        self.batches, self.block = batches, block
        rng = jax.device_put(jax.random.key(0), partitioning.replicated)
        params = abstract_variables(model, partitioning, batches[0])
        optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
        abstract = abstract_state(params, optimizer, partitioning)
        fresh = init_params(model, rng, batches[0], params, partitioning)
        self.state = fresh_state(fresh, optimizer, abstract)
        update = steps.make_update(model, optimizer, partitioning)
        example = abstract, batches[0], rng, partitioning
        self.window = compiling.empty_window(update, *example)
        self.step = compiling.compile_train_step(
            steps.make_train_step(update, block), abstract, self.window, *example[1:]
        )
        self.rng = rng

    def __call__(self):
        for i in range(self.block):
            batch = self.batches[i % len(self.batches)]
            self.state, self.window = self.step(
                self.state, self.window, batch, self.rng
            )
        jax.block_until_ready(self.window)


def main():
    parser = interleave.arguments(__doc__, rounds=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block", type=int, default=10)
    options = parser.parse_args()
    partitioning = Partitioning(data=1, model=1)
    streams = []

    def batches(model, partitioning, **place):
        data = inputs.TrainData("scenes_mixture", "train", LENGTHS, options.batch)
        inner = data.batches(model, partitioning, **place)

        def make_others(kept):
            return {BARE: BareStep(model, partitioning, kept, options.block)}

        streams.append(HeldUp(inner, options.block, LOOP, make_others))
        return streams[-1]

    with tempfile.TemporaryDirectory() as directory:
        os.environ["VIT22B_DATA_DIR"] = f"{directory}/scenes"
        sizes = {split: 16 for split in scenes.SPLITS} | {"train": 512}
        scenes.write_scenes(f"{directory}/scenes", sizes=sizes)
        import tasks.scenes  # noqa: F401

        train.fine_tune(
            build_model(),
            model_dir=f"{directory}/model",
            data=types.SimpleNamespace(batches=batches),
            total_steps=options.block * (options.rounds + 1) + 1,
            partitioning=partitioning,
            periods=train.Periods(log=options.block),
        )
    samples = streams[0].samples
    rows = [
        [
            name,
            f"{interleave.median(samples[name], 'wall') / options.block * 1e3:.1f}",
            f"{interleave.median(samples[name], 'cpu') / options.block * 1e3:.1f}",
            f"{interleave.ratio(samples, name, BARE, 'wall'):.3f}",
            f"{interleave.ratio(samples, name, BARE, 'cpu'):.3f}",
        ]
        for name in (LOOP, BARE)
    ]
    header = ["per step", "wall ms", "cpu ms", "x bare", "(cpu)"]
    interleave.print_table(header, rows)
    interleave.print_conditions(options.rounds)


if __name__ == "__main__":
    main()
