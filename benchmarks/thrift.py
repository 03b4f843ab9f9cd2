"""What each level of thrift costs: the same work, one table.

A B/16 tower and a decoder of T5-small's sizes behind it, trained on one batch: all of
it; with a frozen tower in float32, bfloat16 or int8; low-rank updates alone; and from
cached features, without the tower. Memory is XLA's own account of the step: arguments,
results and temporaries. The size of a checkpoint is that of its arrays.

Bars: a frozen step at most 0.40 of the full one, one on cached features 0.20, with the
loss of the live ones; LoRA's optimizer state at most 2 % of the full one; the tower in
int8 at most 0.55 of the bytes in bfloat16.

    python benchmarks/thrift.py [--tower-layers 12] [--text-layers 8] [--batch 16]
"""

import dataclasses
import types

import frozen_step
import interleave
import jax
import jax.numpy as jnp
import numpy as np
import workload

from vit22b_transfer.models import encoder_decoder, lora, multimodal, t5, vit
from vit22b_transfer.training import optimizers
from vit22b_transfer.training.state import to_checkpoint_tree

SIDE, VOCABULARY, TEXT = 224, 32128, 16
FROZEN = ("encoder/tower/.*",)
# As gin_configs/models/lora.gin has it.
LORA = lora.LoraConfig(16, 32.0, (".*attention/(query|value)/kernel",))
FULL, IN_FLOAT, IN_BFLOAT16 = "full", "frozen", "frozen bfloat16"
IN_INT8, UPDATES, CACHED = "frozen int8", "LoRA", "cached features"
VARIANTS = {
    FULL: dict(),
    IN_FLOAT: dict(frozen=FROZEN),
    IN_BFLOAT16: dict(frozen=FROZEN),
    IN_INT8: dict(frozen=FROZEN, int8_tower=True),
    UPDATES: dict(lora=LORA),
    CACHED: dict(),
}


def build_model(name, options, optimizer):
    """The model of a variant; activations are in one dtype, whatever is stored."""
    dtype = jnp.dtype(options.dtype)
    stored = jnp.bfloat16 if name in (IN_BFLOAT16, IN_INT8) else jnp.float32
    tower = vit.vit22b_config(
        "B/16",
        depth=options.tower_layers,
        image_size=(SIDE, SIDE),
        dtype=dtype,
        param_dtype=stored,
    )
    text = t5.T5Config(
        vocab_size=VOCABULARY,
        width=512,
        num_encoder_layers=0,
        num_decoder_layers=options.text_layers,
        num_heads=6,
        head_dim=64,
        mlp_dim=1024,
        dtype=dtype,
    )
    vocabulary = types.SimpleNamespace(vocab_size=VOCABULARY)
    module = encoder_decoder.ImageTextModule(tower, text)
    return multimodal.ImageTextModel(
        module, vocabulary, vocabulary, optimizer, **VARIANTS[name]
    )


def build_batch(size):
    """Random images, prompts and targets."""
    random = np.random.default_rng(0)
    tokens = random.integers(2, VOCABULARY, (size, 2 * TEXT)).astype(np.int32)
    targets = tokens[:, :TEXT]
    images = random.integers(0, 256, (size, SIDE, SIDE, 3), dtype=np.uint8)
    batch = {
        "encoder_input_images": images,
        "encoder_input_tokens": tokens[:, TEXT:],
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": np.ones((size, TEXT), np.int32),
    }
    return jax.tree.map(jnp.asarray, batch)


def with_features(model, params, batch):
    """The batch with what the tower makes of its images in their place."""
    config = dataclasses.replace(model.module.tower, pooling="none")
    tower = vit.VisionTower(config)
    images = batch["encoder_input_images"]
    tokens = jax.jit(lambda p, x: tower.apply({"params": p}, x).tokens)
    rest = {k: v for k, v in batch.items() if k != "encoder_input_images"}
    return rest | {multimodal.FEATURES: tokens(params["encoder"]["tower"], images)}


def build(options):
    """Compiled steps, bytes of towers, and first losses, by variant."""
    optimizer = optimizers.adamw(1e-3, clip_norm=1.0)
    batch, runs, towers, losses = build_batch(options.batch), {}, {}, {}
    for name in VARIANTS:
        model = build_model(name, options, optimizer)
        params, inputs = workload.initial_params(model, batch), batch
        towers[name] = num_bytes(params["encoder"]["tower"])
        if name == CACHED:
            inputs = with_features(model, params, batch)
            del params["encoder"]["tower"]
        frozen = optimizers.freeze(optimizer, params, model.frozen)
        runs[name] = frozen_step.Step(model, frozen, params, inputs)
        if name in (IN_FLOAT, CACHED):
            loss, metrics = jax.jit(model.eval_fn)(params, inputs)
            losses[name] = float(loss / metrics["loss"].count)
    return runs, towers, losses


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def peak_bytes(step):
    account = step.compiled.memory_analysis()
    return (
        account.argument_size_in_bytes
        + account.output_size_in_bytes
        - account.alias_size_in_bytes
        + account.temp_size_in_bytes
    )


def main():
    parser = interleave.arguments(__doc__, rounds=5)
    parser.add_argument("--tower-layers", type=int, default=12)
    parser.add_argument("--text-layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()

    runs, towers, losses = build(options)
    samples = interleave.interleave(runs, options.rounds)
    header = ["run", "wall ms", "cpu ms", "/ full", "peak MB", "tower MB"]
    header += ["optimizer MB", "checkpoint MB"]

    def row(name):
        step = runs[name]
        tower = 0 if name == CACHED else towers[name]
        sizes = (
            peak_bytes(step),
            tower,
            num_bytes(step.state.opt_state),
            num_bytes(to_checkpoint_tree(step.state)),
        )
        times = (interleave.median(samples[name], f) * 1e3 for f in ("wall", "cpu"))
        ratio = interleave.ratio(samples, name, FULL, "cpu")
        cells = [*(f"{time:.0f}" for time in times), f"{ratio:.2f}"]
        return [name, *cells, *(f"{size / 1e6:.1f}" for size in sizes)]

    interleave.print_table(header, (row(name) for name in runs))
    for field in ("wall", "cpu"):
        for name, bar in ((IN_FLOAT, 0.40), (CACHED, 0.20)):
            ratio = interleave.ratio(samples, name, FULL, field)
            print(f"{name} / {FULL}, {field} time: {ratio:.3f} (bar {bar})")
    states = {name: num_bytes(runs[name].state.opt_state) for name in (UPDATES, FULL)}
    share = states[UPDATES] / states[FULL]
    print(f"{UPDATES} / {FULL}, optimizer state: {share:.4f} (bar 0.02)")
    print(
        f"tower in int8 / bfloat16, bytes: {towers[IN_INT8] / towers[IN_BFLOAT16]:.3f} "
        "(bar 0.55)"
    )
    difference = abs(losses[CACHED] - losses[IN_FLOAT])
    print(
        f"{CACHED} against {IN_FLOAT}, loss: {difference:.1e} of {losses[CACHED]:.3f}"
    )
    interleave.print_conditions(options.rounds)


if __name__ == "__main__":
    main()
