"""Tiny towers, text models and batches, random parameters, and how to compare trees."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit22b_transfer.models import encoder_decoder, multimodal, t5, vit

VOCAB_SIZE = 64
# For what concerns more than one layer: scanned ones, their names, rates by depth.
TWO_BLOCKS = dict(depth=2)
TWO_LAYERS = dict(num_encoder_layers=2, num_decoder_layers=2)
IMAGE_SIZE = (16, 16)


def _quick_compilation():
    """Compiler options of plain code, of those that the installed XLA knows."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
    }
    known = {}
    for name, value in options.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            compiled = jax.jit(lambda x: -x, compiler_options={name: value})
            compiled.lower(1.0).compile()
            known[name] = value
    return known


# Most of the time of tests is compilation; so it takes a third.
jit = functools.partial(jax.jit, compiler_options=_quick_compilation())


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """All that a model asks of a vocabulary."""

    vocab_size: int = VOCAB_SIZE


def tower_config(**overrides):
    """A ViT-22B-form tower: 1 block, 4 tokens; overrides are ViTConfig fields."""
    sizes = dict(width=32, depth=1, mlp_dim=64, num_heads=4, patch_size=8)
    return vit.ViTConfig(**(sizes | dict(image_size=IMAGE_SIZE) | overrides))


def classic_tower_config(**overrides):
    """The same sizes in the sequential form with biases everywhere."""
    classic = dict(
        parallel=False,
        qk_norm=False,
        qkv_bias=True,
        norm_centering=True,
        norm_bias=True,
    )
    return tower_config(**(classic | overrides))


def text_config(**overrides):
    """A T5 of 1 + 1 layers; its joined_kv is not its width; fields as in T5Config."""
    sizes = dict(
        vocab_size=VOCAB_SIZE,
        width=24,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        head_dim=8,
        mlp_dim=48,
    )
    return t5.T5Config(**(sizes | overrides))


def image_text_model(tower=None, text=None, *, blind=False, **arguments):
    """An `ImageTextModel` without optimizer; arguments are the constructor's."""
    module = encoder_decoder.ImageTextModule(
        None if blind else tower or tower_config(), text or text_config()
    )
    return multimodal.ImageTextModel(module, Vocabulary(), Vocabulary(), **arguments)


def images(*shape, seed=0):
    """Random uint8 pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def batch(size=4, inputs=5, targets=6, seed=0):
    """A batch as the feature converter makes it: prompts and targets of all lengths."""
    rng = np.random.default_rng(seed)

    def tokens(length, lengths):
        drawn = rng.integers(2, VOCAB_SIZE, (size, length), np.int32)
        return np.where(np.arange(length)[None] < lengths[:, None], drawn, 0)

    prompts = tokens(inputs, inputs - np.arange(size) % inputs)
    lengths = targets - np.arange(size) % (targets - 1)
    answers = tokens(targets, lengths)
    answers[np.arange(size), lengths - 1] = multimodal.EOS_ID
    return {
        "encoder_input_images": images(size, *IMAGE_SIZE, 3, seed=seed),
        "encoder_input_tokens": prompts.astype(np.int32),
        "decoder_target_tokens": answers.astype(np.int32),
        "decoder_input_tokens": np.pad(answers, ((0, 0), (1, 0)))[:, :-1].astype(
            np.int32
        ),
        "decoder_loss_weights": (answers > 0).astype(np.int32),
    }


def random_params(module, *inputs, seed=0, **options):
    """Parameters with nothing left at zero or one: biases and scales are random too.

    Options are those of the module's `__call__` or `method`.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda *x: module.init(jax.random.key(0), *x, **options), *inputs
    )["params"]

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape)
        if path[-1] == "kernel":
            value *= 0.7 / np.sqrt(leaf.shape[-2])
        elif path[-1] == "scale":
            value = 1.0 + 0.3 * value
        else:
            value *= 0.3
        return jnp.asarray(value, leaf.dtype)

    return unflatten_dict(
        {path: draw(path, leaf) for path, leaf in flatten_dict(shapes).items()}
    )


def model_params(model, seed=0):
    """Random parameters of an `ImageTextModel`."""
    example = batch(1)
    return random_params(
        model.module,
        example["encoder_input_images"],
        example["encoder_input_tokens"],
        example["decoder_input_tokens"],
        seed=seed,
    )


def stack_layers(params):
    """Parameters of unrolled layers as those of scanned ones."""
    out = {}
    names = [name for name in params if name.startswith("layers_")]
    for name, child in params.items():
        if name not in names:
            out[name] = stack_layers(child) if isinstance(child, dict) else child
    if names:
        layers = [params[f"layers_{i}"] for i in range(len(names))]
        out["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return out


def assert_within(tolerance, actual, expected, label=""):
    """Equal shapes, and no absolute difference above the tolerance, which is printed.

    `pytest -rP` shows what was printed.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference = float(np.max(np.abs(np.float64(actual) - np.float64(expected))))
    print(f"{label or 'difference'}: {difference:.1e} (at most {tolerance:.0e})")
    assert difference <= tolerance


def relative_difference(actual, expected):
    """Largest difference of two trees, each array on the scale of its largest value.

    A softmax cancels the gradients of key biases, so they are zero but for rounding;
    they are measured on the largest scale of the tree.
    """
    scales = [np.max(np.abs(np.float64(b))) for b in jax.tree.leaves(expected)]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = 0.0
    for path, a, b, scale in zip(
        paths, jax.tree.leaves(actual), jax.tree.leaves(expected), scales, strict=True
    ):
        assert a.shape == b.shape and a.dtype == b.dtype
        if "key" in str(path[-2:-1]) and "bias" in str(path[-1:]):
            scale = max(scales)
        difference = np.max(np.abs(np.float64(a) - np.float64(b)))
        largest = max(largest, float(difference / max(scale, 1e-30)))
    print(f"difference: {largest:.1e} of the scale")
    return largest


@contextlib.contextmanager
def without_type_checks():
    """Lets wrong values through to the package's own errors, as it is outside tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
