"""What the spike guard does with injected spikes, against a run without it.

Claim: one batch with a loss x1000, one of NaN, and a stretch of poisoned batches each
leave a guarded run with the held-out loss of a run that met none of it.

A linear classifier on noisy patterns of 10 classes, 300 steps of 64, AdamW without
clipping. Poisoned batches have bright pixels and the labels of another class.

    python benchmarks/spike_guard_table.py
"""

import dataclasses
import json
import os
import tempfile

import interleave
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax.linen.partitioning import AxisMetadata

from vit22b_transfer import NotFiniteError, UserError
from vit22b_transfer.checkpoints import restoring
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import optimizers, state
from vit22b_transfer.training.spike_guard import SpikeGuard
from vit22b_transfer.training.train import Periods, fine_tune

CLASSES, PIXELS, BATCH, STEPS = 10, 64, 64, 300
ONE_DEVICE = Partitioning(data=1, model=1)
PATTERNS = np.random.default_rng(0).standard_normal((CLASSES, PIXELS))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    vocab_size: int = CLASSES


class Classifier:
    frozen = ()
    input_vocabulary = output_vocabulary = Vocabulary()

    def __init__(self):
        self.optimizer_def = optimizers.adamw(1e-3, clip_norm=None)

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        kernel = jnp.zeros((PIXELS, CLASSES), jnp.float32)
        axes = {"kernel_axes": AxisMetadata(names=("patch", "embed"))}
        return {"params": {"kernel": kernel}, "params_axes": axes}

    def loss_fn(self, params, batch, rng):
        logs = jax.nn.log_softmax(batch["pixels"] @ params["kernel"])
        losses = -jnp.take_along_axis(logs, batch["labels"][:, None], axis=1)
        loss = jnp.sum(losses) * batch["scale"][0]
        count = jnp.float32(len(losses))
        return loss, {"loss": clu_metrics.Average(total=loss, count=count)}


def examples(seed, poisoned=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)
    pixels = PATTERNS[labels] + 3.0 * rng.standard_normal((BATCH, PIXELS))
    if poisoned:
        pixels, labels = 20.0 + 5.0 * pixels, (labels + 1) % CLASSES
    scale = np.ones(BATCH, np.float32)
    return {"pixels": pixels.astype(np.float32), "labels": labels, "scale": scale}


@dataclasses.dataclass
class Counters:
    examples: int = 0

    def counts(self):
        return dataclasses.asdict(self)


class Stream:
    def __init__(self, data, step):
        self.data, self.step, self.counters = data, step, Counters()
        self.image_ids = []

    def __next__(self):
        batch = examples(1000 + self.step, self.step in self.data.poisoned)
        batch["scale"] *= np.float32(self.data.scales.get(self.step, 1.0))
        self.image_ids = [f"{self.step}/{i}" for i in range(BATCH)]
        self.step += 1
        self.counters.examples += BATCH
        return {
            name: jax.device_put(x, ONE_DEVICE.batch_sharding(x.ndim))
            for name, x in batch.items()
        }

    def close(self):
        pass


@dataclasses.dataclass
class Data:
    scales: dict[int, float] = dataclasses.field(default_factory=dict)
    poisoned: range = range(0)

    def batches(self, model, partitioning, *, seed, start_step):
        return Stream(self, start_step)


CASES = {
    "nothing": Data(),
    "loss x1000, one batch": Data({150: 1000.0}),
    "NaN, one batch": Data({150: float("nan")}),
    "poisoned, 5 batches": Data(poisoned=range(150, 155)),
    "poisoned, 40 batches": Data(poisoned=range(150, 190)),
}


def held_out_loss(path):
    model, batch = Classifier(), examples(1)
    abstract = state.abstract_variables(model, ONE_DEVICE, batch)
    params = restoring.restore_params(path, abstract, state.shardings_of(abstract))
    losses = [model.loss_fn(params, examples(seed), None)[1] for seed in range(20)]
    return np.mean([float(metrics["loss"].compute()) for metrics in losses])


def run(data, guard):
    """(end, steps skipped, where it went back, passed-over batches, held-out loss)."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            result = fine_tune(
                Classifier(),
                model_dir=directory,
                data=data,
                total_steps=STEPS,
                partitioning=ONE_DEVICE,
                periods=Periods(log=10, evaluate=STEPS, checkpoint=50),
                guard=guard,
            )
        except (NotFiniteError, UserError) as error:
            return [type(error).__name__, "", "", ""]
        with open(os.path.join(directory, "metrics.jsonl")) as lines:
            values = [json.loads(line) for line in lines]
        skipped = [x["step"] for x in values if "spike_guard/reason" in x]
        returns = [
            f"{x['step']} to {x['spike_guard/returned_to']}"
            for x in values
            if "spike_guard/returned_to" in x
        ]
        spans = f"{len(skipped)}"
        if skipped:
            spans += f" ({skipped[0]} to {skipped[-1]})"
        loss = f"{held_out_loss(result.checkpoint):.4f}"
        return ["done", spans, ", ".join(returns) or "-", loss]


def main():
    parser = interleave.arguments(__doc__, rounds=1)
    parser.parse_args()
    header = ["injected", "guard", "end", "skipped steps", "went back", "held-out loss"]
    rows = [
        [name, "on" if guard else "off", *run(data, guard)]
        for name, data in CASES.items()
        for guard in (None, SpikeGuard())
    ]
    interleave.print_table(header, rows)


if __name__ == "__main__":
    main()
