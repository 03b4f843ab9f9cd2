"""Questions about one image: encoded once against once for each question.

    python benchmarks/shared_images.py --questions 5

A tower-heavy model of random parameters decodes a batch of questions about images, each
image asked about several times, as in VQAv2. Prints examples per second of both, and
their ratio; predictions are compared.
"""

import argparse
import time
import types

import jax
import numpy as np

from vit22b_transfer.data import batches
from vit22b_transfer.inference import decoding, predicting, shared_images
from vit22b_transfer.models import encoder_decoder, multimodal, t5, vit
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.planning import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=5, help="per image")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--vit", default="S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--length", type=int, default=8, help="of the answers")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    size = (args.image_size, args.image_size)
    text = t5.T5Config(
        vocab_size=512,
        width=128,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        head_dim=32,
        mlp_dim=256,
        tied_logits=True,
    )
    tower = vit.vit22b_config(args.vit, image_size=size)
    vocabulary = bench.Vocabulary(512)
    model = multimodal.ImageTextModel(
        encoder_decoder.ImageTextModule(tower, text),
        vocabulary,
        vocabulary,
        decode_fn=decoding.greedy,
    )
    rng = np.random.default_rng(0)
    count = -(-args.rows // args.questions)
    images = rng.integers(0, 256, (count, *size, 3), np.uint8)
    images = np.repeat(images, args.questions, axis=0)[: args.rows]
    zeros = np.zeros((args.rows, args.length), np.int32)
    features = {
        "encoder_input_images": images,
        "encoder_input_tokens": rng.integers(2, 500, (args.rows, 12), np.int32),
        "decoder_input_tokens": zeros,
        "decoder_target_tokens": zeros,
        "decoder_loss_weights": zeros,
    }
    batch = types.SimpleNamespace(
        features=features, repeated=batches.repeated_images(features)
    )
    shapes = {name: value.shape for name, value in features.items()}
    params = jax.jit(lambda key: model.get_initial_variables(key, shapes)["params"])(
        jax.random.key(0)
    )
    mesh = Partitioning(data=1)
    shared = shared_images.SharedImages(model, mesh)
    predict = predicting.make_predict(model, mesh)
    ways = {
        "each question": lambda: predict(params, features, np.uint32(0), np.uint32(0)),
        "each image once": lambda: shared(params, batch, np.uint32(0), np.uint32(0)),
    }
    rates, tokens = {}, {}
    for name, way in ways.items():
        tokens[name] = np.asarray(jax.block_until_ready(way())[0])
        seconds = []
        for _ in range(args.rounds):
            began = time.perf_counter()
            jax.block_until_ready(way())
            seconds.append(time.perf_counter() - began)
        rates[name] = args.rows / min(seconds)
        print(f"{name}: {rates[name]:.2f} examples per second")
    first, second = tokens.values()
    print(f"equal predictions: {(first == second).all(axis=1).mean():.1%}")
    print(f"ratio: {rates['each image once'] / rates['each question']:.2f}")


if __name__ == "__main__":
    main()
