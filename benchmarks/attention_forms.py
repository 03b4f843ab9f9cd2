"""Attention on a GPU: cuDNN's flash attention against the einsum form, by shape.

Claim: where `auto` takes cuDNN's, results and gradients are those of the einsum form in
float32 to within bfloat16's rounding, and forward and backward are faster.

A row for each shape of a model: milliseconds of both forms, forward alone and with
gradients of queries, keys and values, and the largest difference from float32, as a
fraction of the largest value (of the einsum form in bfloat16 beside it).

    python benchmarks/attention_forms.py [--rounds 9] [--batch 64] [--depth 12]
"""

import concurrent.futures
import functools
from typing import Any

import interleave
import jax
import jax.numpy as jnp

from vit22b_transfer.models import attention

CONTENDERS = ("auto", "einsum")
# queries, keys, query heads, key heads, head size, mask, bias
SHAPES = {
    "short, 64 tokens": (64, 64, 12, 12, 64, None, False),
    "short, 96 tokens": (96, 96, 12, 12, 64, None, False),
    "short, 128 tokens": (128, 128, 12, 12, 64, None, False),
    "short, 128 tokens, causal, bias": (128, 128, 12, 12, 64, "causal", True),
    "short, 64 queries, masked": (64, 272, 12, 12, 64, "padding", False),
    "masked, heads of 256": (288, 288, 8, 8, 256, "prefix", False),
    "masked, heads of 128": (288, 288, 8, 8, 128, "prefix", False),
    "B/16, 196 tokens": (196, 196, 12, 12, 64, None, False),
    "B/16, 256 tokens": (256, 256, 12, 12, 64, None, False),
    "So400m/14": (256, 256, 16, 16, 72, None, False),
    "So400m/14 at 448": (1024, 1024, 16, 16, 72, None, False),
    "g/14": (256, 256, 16, 16, 88, None, False),
    "22B/14": (256, 256, 48, 48, 128, None, False),
    "22B/14 and a class token": (257, 257, 48, 48, 128, None, False),
    "MAP pooling": (1, 256, 12, 12, 64, None, False),
    "CLIP's text tower, causal": (64, 64, 8, 8, 64, "causal", False),
    "T5-base's decoder": (64, 64, 12, 12, 64, "causal", True),
    "T5-base's cross-attention": (64, 272, 12, 12, 64, "padding", False),
    "Gemma 2B, prefix-LM": (288, 288, 8, 1, 256, "prefix", False),
    "grouped queries": (256, 256, 16, 8, 128, None, False),
}


def main() -> None:
    """Prints the table."""
    parser = interleave.arguments(__doc__, rounds=9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--depth", type=int, default=12, help="calls in a program")
    parser.add_argument("--only", default="", help="shapes whose name has this text")
    args = parser.parse_args()
    shapes = {name: shape for name, shape in SHAPES.items() if args.only in name}
    header = ["shape", "auto takes", "forward ms", "both ways ms"]
    header += ["einsum forward", "einsum both ways", "error", "einsum's error"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = [pool.submit(build, shape, args) for shape in shapes.values()]
        concurrent.futures.wait(made)
    rows = (row(name, future, args) for name, future in zip(shapes, made, strict=True))
    interleave.print_table(header, rows)
    interleave.print_conditions(args.rounds)


def build(shape, args):
    """(why `auto` is no cuDNN, compiled programs by name, arrays) of a shape."""
    queries, keys, heads, kv_heads, size, mask, biased = shape
    makers = jax.random.split(jax.random.key(0), 4)
    query, key, value = (
        jax.random.normal(maker, (args.batch, length, count, size), jnp.bfloat16)
        for maker, length, count in zip(
            makers, (queries, keys, keys), (heads, kv_heads, kv_heads), strict=False
        )
    )
    extra: dict[str, Any] = {"mask": mask_of(mask, args.batch, queries, keys)}
    if biased:
        bias = jax.random.normal(makers[3], (1, heads, queries, keys), jnp.bfloat16)
        extra["bias"] = bias
    why_not = attention.cudnn_refuses(query, key, **extra)
    arrays = query, key, value
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    programs = {"exact": compiled("einsum", 1, extra, "all", wide)}
    for form in CONTENDERS:
        programs[f"{form} once"] = compiled(form, 1, extra, "all", arrays)
        for part in ("forward", "both ways"):
            name = f"{form} {part}"
            programs[name] = compiled(form, args.depth, extra, part, arrays)
    return why_not, programs, arrays, wide


def row(name, made, args) -> list[str]:
    """The cells of one shape; one that fails says so."""
    try:
        why_not, programs, arrays, wide = made.result()
        exact = programs["exact"](*wide)
        errors = [
            f"{difference(programs[f'{form} once'](*arrays), exact):.1e}"
            for form in CONTENDERS
        ]
        contenders = {
            f"{form} {part}": programs[f"{form} {part}"]
            for form in CONTENDERS
            for part in ("forward", "both ways")
        }
        runs = {
            contender: functools.partial(_run, program, arrays)
            for contender, program in contenders.items()
        }
        samples = interleave.interleave(runs, args.rounds)
    except Exception as error:
        return [name, f"failed: {str(error)[:200]!r}", *[""] * 6]
    milliseconds = [
        f"{interleave.median(samples[contender], 'wall') * 1e3 / args.depth:.3f}"
        for contender in contenders
    ]
    return [name, "einsum" if why_not else "cudnn", *milliseconds, *errors]


def _run(program, arrays):
    jax.block_until_ready(program(*arrays))


def mask_of(kind, batch, queries, keys):
    """None, or bool [batch or 1, 1, queries or 1, keys]."""
    if kind is None:
        return None
    causal = jnp.tril(jnp.ones((queries, keys), bool))
    if kind == "causal":
        return causal[None, None]
    lengths = jnp.arange(batch) % 16 + keys - 16
    valid = jnp.arange(keys)[None] < lengths[:, None]
    if kind == "padding":
        return valid[:, None, None]
    prefix = jnp.arange(keys) < keys - 32
    return (causal | prefix[None])[None, None] & valid[:, None, None]


def compiled(form, depth, extra, part, arrays):
    """`depth` calls one after the other, and the gradients of the sum of squares."""

    def loss(query, key, value):
        x = query
        for _ in range(depth):
            x = attention.attend(
                x, key, value, scale=x.shape[-1] ** -0.5, form=form, **extra
            )
        return jnp.sum(jnp.square(x.astype(jnp.float32))), x

    def run(*arrays):
        if part == "forward":
            return loss(*arrays)[1]
        gradients, x = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return (x, *gradients) if part == "all" else gradients

    return jax.jit(run).lower(*arrays).compile()


def difference(ours, exact) -> float:
    """The largest difference of all arrays, each as a fraction of its largest value."""
    return max(
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(ours, exact, strict=True)
    )


if __name__ == "__main__":
    main()
