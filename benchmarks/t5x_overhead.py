"""T5X against our runtime: importing, the overhead of a step, inference over a split.

Claim: per step, `fine_tune` adds to the bare compiled step at most a third of what
T5X's train loop adds, on the same model, optimizer and host batches.

Needs T5X, airio and jestimator (requirements-t5x.txt). Both loops take NumPy batches
through their own way to the device, and log once per block of steps; the bare step runs
on batches that lie there. Inference goes from the task to JSON lines, compiled before.

    python benchmarks/t5x_overhead.py [--block 100] [--rounds 9]
"""

import concurrent.futures
import functools
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import types

import interleave
import jax
import numpy as np
import tensorflow as tf
from held_up_loop import HeldUp
from t5x import infer as t5x_infer
from t5x import partitioning as t5x_partitioning
from t5x import trainer as t5x_trainer
from t5x import utils as t5x_utils

from vit22b_transfer import t5x_adapter
from vit22b_transfer.data import converters, placement, vocabularies
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.prefetch import Prefetched
from vit22b_transfer.demo import scenes
from vit22b_transfer.inference import decoding, infer
from vit22b_transfer.models import encoder_decoder, multimodal, t5, vit
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, steps, train
from vit22b_transfer.training.state import (
    abstract_state,
    abstract_variables,
    fresh_state,
    init_params,
    shardings_of,
)

OURS, THEIRS, BARE = "ours", "T5X", "bare step"
SIDE, BATCH = 32, 8
LENGTHS = {"images": (SIDE, SIDE), "inputs": 48, "targets": 8}
TASK = "scenes_vqa"
ONE_DEVICE = Partitioning(data=1, model=1)
IMPORTS = {
    "import t5x.train": "import t5x.train",
    "import ours, without data": "import vit22b_transfer.training.train",
    "import ours, with SeqIO": "import vit22b_transfer.training.train\n"
    "import vit22b_transfer.data.batches",
}


def build_model():
    """A model whose step takes a few milliseconds, so that overheads show."""
    vocabulary = vocabularies.load()
    sizes = dict(width=32, num_heads=2, mlp_dim=64)
    tower = vit.ViTConfig(
        depth=1, patch_size=16, image_size=(SIDE, SIDE), pooling="none", **sizes
    )
    text = t5.T5Config(
        vocab_size=vocabulary.vocab_size,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=16,
        **sizes,
    )
    return multimodal.ImageTextModel(
        encoder_decoder.ImageTextModule(tower, text),
        vocabulary,
        vocabulary,
        optimizers.adamw(1e-4),
        decode_fn=decoding.greedy,
        feature_converter_cls=converters.ImageTextFeatureConverter,
    )


def host_batches(count=4):
    random = np.random.default_rng(0)
    for _ in range(count):
        targets = random.integers(2, 256, (BATCH, LENGTHS["targets"]), np.int32)
        yield {
            "encoder_input_images": random.integers(
                0, 256, (BATCH, SIDE, SIDE, 3), np.uint8
            ),
            "encoder_input_tokens": random.integers(
                2, 256, (BATCH, LENGTHS["inputs"]), np.int32
            ),
            "decoder_target_tokens": targets,
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_loss_weights": np.ones_like(targets),
        }


class OurBatches:
    """The host batches in turn, put on the device ahead of the loop as its data are."""

    # What the loop reports at its end of the data it was given: nothing.
    counters = types.SimpleNamespace(counts=dict)

    def __init__(self, partitioning):
        place = placement.Placement.on(partitioning, BATCH)
        drawn = itertools.cycle(list(host_batches()))
        self._items = Prefetched(place(batch) for batch in drawn)

    def __next__(self):
        return next(self._items)

    def close(self):
        self._items.close()


def bare_step(model, placed, block):
    """The compiled update alone, on batches that lie on the device."""
    rng = jax.device_put(jax.random.key(0), ONE_DEVICE.replicated)
    params = abstract_variables(model, ONE_DEVICE, placed[0])
    abstract = abstract_state(params, model.optimizer_def, ONE_DEVICE)
    update = steps.make_update(model, model.optimizer_def, ONE_DEVICE)
    with ONE_DEVICE.activate():
        step = (
            jax.jit(
                update,
                donate_argnums=0,
                out_shardings=(shardings_of(abstract), ONE_DEVICE.replicated),
            )
            .lower(abstract, placed[0], rng)
            .compile()
        )
    fresh = init_params(model, rng, placed[0], params, ONE_DEVICE)
    held = [fresh_state(fresh, model.optimizer_def, abstract)]

    def run():
        for i in range(block):
            held[0], metrics = step(held[0], placed[i % len(placed)], rng)
        jax.block_until_ready(metrics)

    return run


def t5x_partitioner():
    return t5x_partitioning.PjitPartitioner(num_partitions=1)


def t5x_state(model, partitioner):
    shapes = {name: x.shape for name, x in next(host_batches()).items()}
    return t5x_utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes=shapes,
        partitioner=partitioner,
    )


def t5x_loop(model, block, directory):
    """Blocks of T5X's own train loop."""
    model, partitioner = t5x_adapter.for_t5x(model), t5x_partitioner()
    initializer = t5x_state(model, partitioner)
    drawn = list(host_batches())
    dataset = tf.data.Dataset.from_tensor_slices(
        {name: np.stack([b[name] for b in drawn]) for name in drawn[0]}
    ).repeat()
    iterator = t5x_utils.prepare_train_iter(
        dataset,
        checkpoint_cfg=t5x_utils.CheckpointConfig(),
        partitioner=partitioner,
        data_layout=partitioner.get_data_layout(BATCH),
    )
    trainer = t5x_adapter.mean_gradient_trainer(
        model,
        initializer.from_scratch(jax.random.PRNGKey(0)),
        partitioner,
        [],
        directory,
        initializer.train_state_axes,
        jax.random.PRNGKey(1),
        trainer_cls=functools.partial(
            t5x_trainer.Trainer, learning_rate_fn=None, num_microbatches=None
        ),
    )
    trainer.compile_train(next(iterator))
    return lambda: trainer.train(iterator, block).result()


def measure_steps(options, directory):
    streams = []
    # Out of the mesh and the rules that our loop has set in its thread.
    thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)

    def elsewhere(function, *arguments):
        return thread.submit(function, *arguments).result()

    def stream(model, partitioning, **place):
        def make_others(kept):
            theirs = elsewhere(t5x_loop, model, options.block, f"{directory}/t5x")
            return {
                BARE: bare_step(model, kept, options.block),
                THEIRS: lambda: elsewhere(theirs),
            }

        inner = OurBatches(partitioning)
        streams.append(HeldUp(inner, options.block, OURS, make_others))
        return streams[-1]

    train.fine_tune(
        build_model(),
        model_dir=f"{directory}/model",
        data=types.SimpleNamespace(batches=stream),
        total_steps=options.block * (options.rounds + 1) + 1,
        partitioning=ONE_DEVICE,
        periods=train.Periods(log=options.block, checkpoint=10**6),
    )
    samples = streams[0].samples

    def over_bare(name, field):
        """Milliseconds a step takes beyond the bare one: the median over the rounds."""
        pairs = zip(samples[name], samples[BARE], strict=True)
        return statistics.median(
            (getattr(a, field) - getattr(b, field)) / options.block * 1e3
            for a, b in pairs
        )

    rows = [
        [
            name,
            f"{interleave.median(samples[name], 'wall') / options.block * 1e3:.3f}",
            f"{interleave.median(samples[name], 'cpu') / options.block * 1e3:.3f}",
            f"{over_bare(name, 'wall'):.3f}",
            f"{over_bare(name, 'cpu'):.3f}",
        ]
        for name in (BARE, OURS, THEIRS)
    ]
    header = ["per step", "wall ms", "cpu ms", "over bare: wall", "cpu"]
    interleave.print_table(header, rows)
    shares = (over_bare(OURS, f) / over_bare(THEIRS, f) for f in ("wall", "cpu"))
    wall, cpu = shares
    print(f"our overhead is {wall:.2f} (cpu {cpu:.2f}) of T5X's; bar: 0.33\n")


def t5x_inference(model, params, directory):
    """From the task to JSON lines by the parts that T5X's infer is made of."""
    model, partitioner = t5x_adapter.for_t5x(model), t5x_partitioner()
    initializer = t5x_state(model, partitioner)
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    state = state.replace_params(type(state.params)(params))
    infer_fn = t5x_utils.get_infer_fn(
        model.predict_batch, BATCH, initializer.train_state_axes, partitioner
    )
    task = t5x_infer.seqio.get_mixture_or_task(TASK)
    converter = model.FEATURE_CONVERTER_CLS(pack=False)

    def run():
        examples = task.get_dataset(LENGTHS, "test", shuffle=False)
        features = converter(examples, LENGTHS)
        results = infer_fn(
            features.enumerate(), train_state=state, rng=jax.random.PRNGKey(0)
        )
        t5x_infer.write_inferences_to_file(
            f"{directory}/t5x.jsonl",
            t5x_infer._extract_tokens_and_aux_values(results),
            examples,
            "predict",
            task.output_features["targets"].vocabulary,
        )

    return run


def our_inference(model, params, directory):
    restored = infer.RestoredModel(model, ONE_DEVICE, "fresh", params)
    data = infer.SplitToRead(TASK, "test", LENGTHS, BATCH)
    output = pathlib.Path(directory) / "ours.jsonl"

    def run():
        for path in output.parent.glob("ours.jsonl*"):
            path.unlink()
        infer.predict_split(restored, data, output=str(output))

    return run


def measure_inference(options, directory):
    model, batch = build_model(), next(host_batches())
    abstract = abstract_variables(model, ONE_DEVICE, batch)
    params = init_params(model, jax.random.key(0), batch, abstract, ONE_DEVICE)
    runs = {
        OURS: our_inference(model, params, directory),
        THEIRS: t5x_inference(model, params, directory),
    }
    samples = interleave.interleave(runs, options.rounds)
    count = registered.num_examples(TASK, "test")
    rows = [
        [
            f"{name}, {count} examples",
            f"{interleave.median(samples[name], 'wall'):.2f}",
            f"{interleave.median(samples[name], 'cpu'):.2f}",
            f"{interleave.ratio(samples, name, THEIRS, 'wall'):.2f}",
            f"{interleave.ratio(samples, name, THEIRS, 'cpu'):.2f}",
        ]
        for name in runs
    ]
    interleave.print_table(["inference", "wall s", "cpu s", "x T5X", "(cpu)"], rows)
    print()


def measure_imports(rounds):
    def run(code):
        command = [sys.executable, "-c", code]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    runs = {name: run(code) for name, code in IMPORTS.items()}
    samples = interleave.interleave(runs, rounds)
    first = next(iter(IMPORTS))
    rows = [
        [
            name,
            f"{interleave.median(samples[name], 'wall'):.1f}",
            f"{interleave.median(samples[name], 'cpu'):.1f}",
            f"{interleave.ratio(samples, name, first, 'wall'):.2f}",
        ]
        for name in IMPORTS
    ]
    interleave.print_table(["start", "wall s", "cpu s", "x T5X"], rows)


def main():
    parser = interleave.arguments(__doc__, rounds=9)
    parser.add_argument("--block", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["VIT22B_DATA_DIR"] = f"{directory}/scenes"
        sizes = {split: 16 for split in scenes.SPLITS} | {"test": 100}
        scenes.write_scenes(f"{directory}/scenes", sizes=sizes)
        import tasks.scenes  # noqa: F401

        measure_inference(options, directory)
        measure_steps(options, directory)
    measure_imports(min(options.rounds, 5))
    interleave.print_conditions(options.rounds)


if __name__ == "__main__":
    main()
