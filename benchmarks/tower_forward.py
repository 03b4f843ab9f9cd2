"""Forward pass of the image tower at B/16 width, 256 tokens, against its peers.

Claim: at least 1.3x the torch towers in float32 and level with them in bfloat16, at
least level with big_vision's ViT in both, at least 85 % of the matrix multiplication
rate of the same run in float32 and 60 % in bfloat16 (with sums in float32, a CPU's
fast form).

Peers: Hugging Face SigLIP (sdpa), timm's ViT with QK-norm, timm's ParallelScalingBlock
(the ViT-22B block); big_vision's ViT if its repository is on PYTHONPATH.
Parameters of all are stored in the type they compute in. Ours starts from uint8
pixels, the peers from normalised ones.

    python benchmarks/tower_forward.py [--dtype bfloat16] [--depth 12] [--rounds 9]
"""

import functools

import interleave
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_peers
from torch_peers import timm_vit

from vit22b_transfer.models import vit

WIDTH, MLP_DIM, PATCH, SIDE = 768, 3072, 16, 256
GEMM = 2048
OURS = {
    "ours, ViT-22B block": dict(form="22b", fused=False),
    "ours, ViT-22B block, fused": dict(form="22b", fused=True),
    "ours, classic block": dict(form="classic", fused=False),
}
BEST = "ours, ViT-22B block"


def tower_flop(depth: int, batch: int) -> float:
    """Operations of the matrix multiplications of one forward pass, attention's too."""
    tokens = (SIDE // PATCH) ** 2
    per_token = 4 * WIDTH**2 + 2 * WIDTH * MLP_DIM + 2 * tokens * WIDTH
    return 2.0 * batch * tokens * (depth * per_token + 3 * PATCH**2 * WIDTH)


def our_tower(pixels, dtype, depth, *, form, fused):
    make = vit.vit22b_config if form == "22b" else vit.classic_config
    config = make(
        "B/16",
        depth=depth,
        image_size=(SIDE, SIDE),
        pooling="none",
        fused_projections=fused,
        dtype=dtype,
        param_dtype=dtype,
    )
    tower = vit.VisionTower(config)
    images = jnp.asarray(pixels)
    params = jax.jit(tower.init)(jax.random.key(0), images)["params"]
    forward = jax.jit(lambda params, x: tower.apply({"params": params}, x).tokens)
    return lambda: forward(params, images).block_until_ready()


def big_vision_tower(normalised, dtype, depth):
    from big_vision.models import vit as big_vision_vit

    model = big_vision_vit._Model(
        num_classes=None,
        depth=depth,
        pool_type="none",
        dtype_mm=jnp.dtype(dtype).name,
    )
    images = jnp.asarray(normalised)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    # `encoded` alone: with no classes the model's own output is that as well
    forward = jax.jit(lambda params, x: model.apply({"params": params}, x)[0])
    return lambda: forward(params, images).block_until_ready()


def torch_tower(model, normalised, dtype):
    dtype = getattr(torch, jnp.dtype(dtype).name)
    model = model.to(dtype)
    images = torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy()).to(dtype)

    def run():
        with torch.inference_mode():
            model(images)

    return run


def gemm(dtype):
    x = jnp.ones((GEMM, GEMM), dtype)
    multiply = jax.jit(
        functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    )
    return lambda: multiply(x, x).block_until_ready()


def contenders(dtype, depth, batch):
    pixels = np.random.default_rng(0).integers(
        0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8
    )
    normalised = pixels.astype(np.float32) / 127.5 - 1.0
    runs = {
        name: our_tower(pixels, dtype, depth, **form) for name, form in OURS.items()
    }
    peers = {
        "Hugging Face SigLIP": torch_peers.siglip(SIDE, depth),
        "timm ViT, QK-norm": torch_peers.timm_b16(SIDE, depth, timm_vit.Block),
        "timm ParallelScalingBlock": torch_peers.timm_b16(
            SIDE, depth, timm_vit.ParallelScalingBlock
        ),
    }
    for name, model in peers.items():
        runs[name] = torch_tower(model, normalised, dtype)
    try:
        runs["big_vision ViT"] = big_vision_tower(normalised, dtype, depth)
    except ImportError as error:
        print(f"big_vision left out ({error}); put its repository on PYTHONPATH")
    return runs


def measure(dtype, depth, batch, rounds):
    runs = contenders(dtype, depth, batch)
    samples = interleave.interleave(runs | {"matmul": gemm(dtype)}, rounds)
    per_gemm = tower_flop(depth, batch) / (2.0 * GEMM**3)
    rows = []
    for name in runs:
        share = functools.partial(interleave.ratio, samples, "matmul", name)
        ours = functools.partial(interleave.ratio, samples, name, BEST)
        rows.append(
            [
                name,
                f"{interleave.median(samples[name], 'wall') * 1e3:.0f}",
                f"{interleave.median(samples[name], 'cpu') * 1e3:.0f}",
                f"{100 * per_gemm * share('wall'):.0f} %",
                f"{100 * per_gemm * share('cpu'):.0f} %",
                f"{ours('wall'):.2f}",
                f"{ours('cpu'):.2f}",
            ]
        )
    rate = 2e-9 * GEMM**3 / interleave.median(samples["matmul"], "wall")
    print(
        f"\n{jnp.dtype(dtype).name}: {depth} layers, batch {batch}; {GEMM}^3 matmul "
        f"{rate:.0f} GFLOP/s"
    )
    interleave.print_table(
        [
            "tower",
            "wall ms",
            "cpu ms",
            "of matmul rate",
            "(cpu)",
            f"x {BEST}",
            "(cpu)",
        ],
        rows,
    )


def main():
    parser = interleave.arguments(__doc__, rounds=5)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    for dtype in [options.dtype] if options.dtype else ["float32", "bfloat16"]:
        measure(jnp.dtype(dtype), options.depth, options.batch, options.rounds)
    interleave.print_conditions(options.rounds)


if __name__ == "__main__":
    main()
