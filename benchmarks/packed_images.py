"""Images in their own shapes before a frozen tower: packed rows against padded ones.

Claim: packed rows of images that are not enlarged give more images a second than one
image to a row, padded to the most patches (as NaFlex in transformers does); the less
room an image leaves, the less there is to gain. Of images that are all enlarged to the
budget, SigLIP 2's rule, padding is a few percent, and packing gains nothing.

The sizes are those of 354 photographs of COCO 2017. Pixels are random: only sizes
matter. Peers: our tower on padded rows, and Hugging Face's Siglip2VisionModel (sdpa) on
the same, with its mask. Parameters of all are float32, B/16's width.

    python benchmarks/packed_images.py [--depth 1] [--rounds 5] [--no_peer]
"""

import interleave
import jax
import numpy as np

from vit22b_transfer.data.image_packing import RowFormat, size_within
from vit22b_transfer.models import vit

PATCH = 16
# Width, height, how many photographs.
SIZES = """
640 480 77, 640 427 45, 480 640 31, 640 426 18, 500 375 14, 640 428 12, 427 640 9,
375 500 8, 640 424 8, 500 333 7, 640 425 7, 426 640 4, 478 640 4, 428 640 3, 500 374 3,
640 433 3, 333 500 2, 358 640 2, 425 640 2, 500 334 2, 640 383 2, 640 399 2, 640 429 2,
640 449 2, 640 457 2, 640 464 2, 640 478 2, 640 484 2, 213 140 1, 320 240 1, 351 500 1,
352 230 1, 359 640 1, 376 500 1, 383 640 1, 389 500 1, 400 302 1, 414 640 1, 424 640 1,
448 336 1, 449 640 1, 450 600 1, 457 640 1, 460 640 1, 461 500 1, 469 469 1, 470 640 1,
474 640 1, 479 640 1, 500 332 1, 500 346 1, 500 357 1, 500 370 1, 500 377 1, 500 400 1,
500 406 1, 500 423 1, 500 486 1, 500 500 1, 600 593 1, 612 612 1, 614 461 1, 621 640 1,
634 640 1, 640 304 1, 640 313 1, 640 320 1, 640 342 1, 640 358 1, 640 359 1, 640 360 1,
640 361 1, 640 368 1, 640 382 1, 640 388 1, 640 393 1, 640 400 1, 640 406 1, 640 408 1,
640 409 1, 640 414 1, 640 418 1, 640 420 1, 640 421 1, 640 422 1, 640 423 1, 640 444 1,
640 461 1, 640 462 1, 640 463 1, 640 474 1, 640 476 1, 640 479 1, 640 482 1, 640 483 1,
640 489 1, 640 498 1, 640 500 1, 640 506 1, 640 511 1, 640 512 1, 640 522 1, 640 559 1,
640 579 1, 640 640 1
"""
# Most patches of an image, whether small ones are enlarged to it, tokens of a packed
# row, rows.
CASES = (
    (256, True, 512, 12),
    (1024, True, 2048, 3),
    (1024, False, 4096, 2),
    (2048, False, 4096, 3),
)


def shapes():
    """(height, width) of every photograph, in a random order, always the same."""
    found = []
    for entry in SIZES.split(","):
        width, height, count = map(int, entry.split())
        found += [(height, width)] * count
    return [found[n] for n in np.random.default_rng(0).permutation(len(found))]


def empty_shares(sizes, budget, tokens, rows=8):
    """Shares of tokens that are empty: padded, and in full batches of packed rows."""
    counts = [height * width // PATCH**2 for height, width in sizes]
    form = RowFormat(tokens, tokens, 1)
    batch, full = form.batch(rows), []
    for count in counts:
        picture = np.zeros((1, count, 3), np.uint8)
        if not batch.add(picture):
            full.append(np.mean(batch.arrays.segments == 0))
            batch = form.batch(rows)
            batch.add(picture)
    return 1 - sum(counts) / (len(counts) * budget), float(np.mean(full))


def tower_config(depth):
    """SigLIP 2's B/16 NaFlex tower, of fewer layers."""
    return vit.classic_config(
        "B/16",
        depth=depth,
        image_size=(256, 256),
        position_resampling="bilinear_antialiased",
    )


def peer(pictures, budget, depth):
    """Hugging Face's tower on the pictures, padded; a function that runs it."""
    import torch
    from torch_peers import transformers

    config = transformers.Siglip2VisionConfig(num_hidden_layers=depth)
    model = transformers.Siglip2VisionModel(config).eval()
    patches = np.zeros((len(pictures), budget, 3 * PATCH**2), np.float32)
    mask = np.zeros((len(pictures), budget), np.int32)
    grids = np.array([x.shape[:2] for x in pictures]) // PATCH
    for row, count in enumerate(grids.prod(axis=1)):
        patches[row, :count], mask[row, :count] = 0.1, 1
    inputs = {
        "pixel_values": torch.from_numpy(patches),
        "pixel_attention_mask": torch.from_numpy(mask),
        "spatial_shapes": torch.from_numpy(grids),
    }

    def run():
        with torch.inference_mode():
            model(**inputs)

    return run


def rows(case, depth, rounds, with_peer):
    """A row of the table: a case measured."""
    budget, enlarge, tokens, count = case
    sizes = [size_within(x, budget, PATCH, enlarge=enlarge) for x in shapes()]
    shares = empty_shares(sizes, budget, tokens)
    images = 8 * tokens // budget
    packed = RowFormat(tokens, images, PATCH).batch(count)
    rng, pictures = np.random.default_rng(0), []
    for size in sizes:
        picture = rng.integers(0, 256, (*size, 3), np.uint8)
        if not packed.add(picture):
            break
        pictures.append(picture)
    padded = RowFormat(budget, 1, PATCH).batch(len(pictures))
    for picture in pictures:
        padded.add(picture)
    tower = tower_config(depth).build()
    params = jax.jit(tower.init)(jax.random.key(0), padded.arrays)["params"]

    @jax.jit
    def forward(params, x):
        return tower.apply({"params": params}, x).pooled

    contenders = {
        "packed": lambda: forward(params, packed.arrays).block_until_ready(),
        "padded": lambda: forward(params, padded.arrays).block_until_ready(),
    }
    if with_peer:
        contenders["peer"] = peer(pictures, budget, depth)
    samples = interleave.interleave(contenders, rounds)
    per_second = [
        f"{len(pictures) / interleave.median(samples[name], 'wall'):.2f}"
        if name in samples
        else "-"
        for name in ("packed", "padded", "peer")
    ]
    ratios = [
        f"{interleave.ratio(samples, slow, 'packed', 'wall'):.2f}"
        if slow in samples
        else "-"
        for slow in ("padded", "peer")
    ]
    name = f"{budget}, {'enlarged' if enlarge else 'own size'}, rows of {tokens}"
    empty = [f"{100 * share:.1f} %" for share in shares]
    return [name, *empty, str(len(pictures)), *per_second, *ratios]


def main():
    parser = interleave.arguments(__doc__, rounds=5)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--no_peer", action="store_true")
    args = parser.parse_args()
    print(f"layers of B/16: {args.depth}; float32, images/s by the clock")
    header = ["most patches", "empty, padded", "empty, packed", "images", "packed"]
    header += ["padded", "transformers", "packed / padded", "packed / transformers"]
    peers = not args.no_peer
    table = (rows(case, args.depth, args.rounds, peers) for case in CASES)
    interleave.print_table(header, table)
    interleave.print_conditions(args.rounds)


if __name__ == "__main__":
    main()
