"""Rings of devices compute what one matmul computes, and move what the paper says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import NamedSharding, PartitionSpec

from vit22b_transfer.models import vit
from vit22b_transfer.partitioning import parallel_linear
from vit22b_transfer.partitioning.parallel_linear import Ring
from vit22b_transfer.partitioning.rules import Partitioning

MESHES = [(4, 2), (2, 4), (1, 8)]
FORMS = ["row", "column"]
BATCH, LENGTH, INPUTS, OUTPUTS = 4, 6, 32, 48
COLLECTIVES = re.compile(
    r"= (.*?) (collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter)"
    r"(?:-start)?\("
)
# (sizes, dtype) of what is sent, before compilation.
SENT = re.compile(r"stablehlo.collective_permute.* -> tensor<(\S+)x(f32|bf16)>")
BYTES = {"f32": 4, "bf16": 2}


def collectives(program):
    """{name: [(dtype, shape), ...]} of what each device sends in a compiled program."""
    found = {}
    for result, name in COLLECTIVES.findall(program.as_text()):
        dtype, sizes = re.findall(r"(\w+)\[([\d,]*)\]", result)[0]
        shape = tuple(int(size) for size in sizes.split(",") if size)
        found.setdefault(name, []).append((dtype, shape))
    return found


def bytes_sent(sent):
    return sum(math.prod(shape) * BYTES[dtype] for dtype, shape in sent)


@functools.cache
def operands(dtype="float32"):
    """x, kernel, and a gradient of the result."""
    rng = np.random.default_rng(0)
    shapes = (BATCH, LENGTH, INPUTS), (INPUTS, OUTPUTS), (BATCH, LENGTH, OUTPUTS)
    scales = 1.0, INPUTS**-0.5, OUTPUTS**-0.5
    return tuple(
        (rng.standard_normal(shape) * scale).astype(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )


def laid_out(partitioning, form, arrays):
    """x, kernel and gradient as the ring has them."""
    activation = PartitionSpec("data", None, "model")
    weights = PartitionSpec(*((None, "model") if form == "row" else ("model", None)))
    specs = activation, weights, activation
    return tuple(
        jax.device_put(array, NamedSharding(partitioning.mesh, spec))
        for array, spec in zip(arrays, specs, strict=True)
    )


@functools.cache
def compiled(mesh, form):
    """(forward, gradients) of a ring's product."""
    partitioning = Partitioning(*mesh)
    ring = Ring(partitioning.mesh)
    project = functools.partial(parallel_linear.linear, ring=ring, form=form)

    def gradients(x, kernel, grad):
        return jax.vjp(project, x, kernel)[1](grad)

    arrays = laid_out(partitioning, form, operands())
    forward = tiny_models.jit(project).lower(*arrays[:2]).compile()
    return forward, tiny_models.jit(gradients).lower(*arrays).compile()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ring_forms_equal_the_plain_product_and_its_gradients(mesh, form):
    forward, backward = compiled(mesh, form)
    arrays = laid_out(Partitioning(*mesh), form, operands())
    x, kernel, grad = (np.float64(array) for array in operands())
    expected = x @ kernel, grad @ kernel.T, np.einsum("bli,blo->io", x, grad)
    results = forward(*arrays[:2]), *backward(*arrays)
    for name, result, value in zip("yxw", results, expected, strict=True):
        tiny_models.assert_within(1e-5, result, value, f"{form} {mesh} {name}")
    # The next layer finds its input split, as the gradients of parameters are.
    for result, like in zip(results, (arrays[2], *arrays[:2]), strict=True):
        assert result.sharding.is_equivalent_to(like.sharding, like.ndim)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_ring_moves_the_bytes_of_the_formula_and_gathers_nothing(mesh, form):
    forward, backward = compiled(mesh, form)
    data, k = mesh
    sent = collectives(forward)
    assert list(sent) == ["collective-permute"]
    # Dehghani et al. 2023, section 3: floats per token and device.
    floats = (k - 1) * (INPUTS if form == "row" else OUTPUTS) // k
    tokens = BATCH // data * LENGTH
    moved = bytes_sent(sent["collective-permute"])
    assert moved == 4 * floats * tokens
    assert moved == parallel_linear.bytes_moved(
        form, tokens, INPUTS, OUTPUTS, k, jnp.float32
    )
    # Half of it goes each way.
    assert len(sent["collective-permute"]) == 2 * (k - 1)

    # Back: the gradients of what moved move, and in the row form the inputs once more.
    sent = collectives(backward)
    passes = 2 if form == "row" else 1
    assert bytes_sent(sent["collective-permute"]) == passes * moved
    # The gradient of the kernel is summed over the batch.
    assert set(sent) <= {"collective-permute", "all-reduce"}


def test_the_cheaper_form_is_chosen_for_each_layer():
    # ViT-22B: into and out of the fused block of width 6144.
    for dtype in (jnp.float32, jnp.bfloat16):
        assert parallel_linear.choose(6144, 43008, dtype) == "row"
        assert parallel_linear.choose(30720, 6144, dtype) == "column"
    assert parallel_linear.choose(6144, 6144, jnp.float32) == "row"
    # Inputs travel in two bytes, sums in four.
    assert parallel_linear.choose(64, 48, jnp.float32) == "column"
    assert parallel_linear.choose(64, 48, jnp.bfloat16) == "row"

    ring = Ring(Partitioning(2, 4).mesh)
    x, kernel, _ = operands()
    program = tiny_models.jit(lambda x, w: parallel_linear.linear(x, w, ring=ring))
    sent = collectives(program.lower(x, kernel).compile())["collective-permute"]
    assert bytes_sent(sent) == 4 * (BATCH // 2 * LENGTH) * 3 * INPUTS // 4


def test_a_ring_of_bfloat16_sums_in_float32():
    partitioning = Partitioning(2, 4)
    ring = Ring(partitioning.mesh)
    exact = np.float64(operands()[0]) @ np.float64(operands()[1])
    for form in FORMS:
        x, kernel, _ = operands(jnp.bfloat16)
        project = functools.partial(parallel_linear.linear, ring=ring, form=form)
        lowered = tiny_models.jit(project).lower(
            *laid_out(partitioning, form, (x, kernel, x))[:2]
        )
        # Inputs travel as they are. (XLA for CPUs makes them float32 on the way.)
        sent = {dtype for _, dtype in SENT.findall(lowered.as_text())}
        assert sent == {"bf16" if form == "row" else "f32"}
        result = lowered.compile()(*laid_out(partitioning, form, (x, kernel, x))[:2])
        assert result.dtype == jnp.bfloat16
        rounded = np.float64(x) @ np.float64(kernel)
        # One rounding, of the result: half of 2 ** -7 of its size.
        np.testing.assert_allclose(np.float64(result), rounded, rtol=2**-8, atol=1e-6)
        assert np.max(np.abs(rounded - exact)) < 0.05


@pytest.mark.parametrize(
    "shape, form, words",
    [
        ((30, 48), "row", "30 inputs do not divide into 8 equal parts"),
        ((32, 46), "row", "46 outputs do not divide into 4 equal parts"),
        ((30, 48), "column", "30 inputs do not divide into 4 equal parts"),
        ((32, 44), "column", "44 outputs do not divide into 8 equal parts"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(shape, form, words):
    ring = Ring(Partitioning(2, 4).mesh)
    project = functools.partial(parallel_linear.linear, ring=ring, form=form)
    x = np.zeros((4, 6, shape[0]), np.float32)
    with pytest.raises(ValueError, match=words) as error:
        jax.eval_shape(project, x, np.zeros(shape, np.float32))
    assert "'model'" in str(error.value) and "mesh file" in str(error.value)


def test_a_ring_of_one_device_is_the_plain_product():
    x, kernel, _ = operands()
    ring = Ring(Partitioning(8, 1).mesh)
    jaxpr = jax.make_jaxpr(functools.partial(parallel_linear.linear, ring=ring))
    assert "ppermute" not in str(jaxpr(x, kernel))


def test_rings_need_activations_that_are_split_on_embed():
    with pytest.raises(ValueError, match="activation_partitioning_dims=2"):
        Partitioning(4, 2, ring_projections=True)


def test_a_mesh_with_rings_refuses_a_tower_without_fused_projections():
    for config in (tiny_models.tower_config(), tiny_models.classic_tower_config()):
        tower = vit.VisionTower(config)
        with (
            Partitioning(4, 2, 2, ring_projections=True).activate(),
            pytest.raises(ValueError, match="Set fused_projections=True"),
        ):
            jax.eval_shape(tower.init, jax.random.key(0), IMAGES)


# Unrolled, and in the forms of scan and remat that large towers train in.
TOWERS = {
    "unrolled": dict(),
    "scanned": dict(scan_layers=True, **tiny_models.TWO_BLOCKS),
    "scanned, dots": dict(scan_layers=True, **tiny_models.TWO_BLOCKS, remat="dots"),
    "scanned, block": dict(scan_layers=True, **tiny_models.TWO_BLOCKS, remat="block"),
}


IMAGES = tiny_models.images(4, *tiny_models.IMAGE_SIZE, 3)


@functools.cache
def tower_of(name):
    """(tower, its parameters, their logical axes)."""
    sizes = dict(width=32, mlp_dim=64, num_heads=8, fused_projections=True)
    tower = vit.VisionTower(tiny_models.tower_config(**sizes, **TOWERS[name]))
    shapes = jax.eval_shape(tower.init, jax.random.key(0), IMAGES)
    return tower, tiny_models.random_params(tower, IMAGES), shapes["params_axes"]


def step_of(tower):
    """The function (parameters, images) -> (gradients, tokens), jitted."""

    def loss(params, images):
        tokens = tower.apply({"params": params}, images).tokens
        weights = jnp.sin(jnp.arange(tokens.size, dtype=jnp.float32))
        return jnp.sum(tokens * weights.reshape(tokens.shape)), tokens

    return tiny_models.jit(jax.grad(loss, has_aux=True))


@functools.cache
def one_device(name):
    tower, params, _ = tower_of(name)
    return jax.device_get(step_of(tower)(params, IMAGES))


def on_mesh(name, partitioning):
    """(compiled program, parameters and images as placed)."""
    tower, params, axes = tower_of(name)
    placed = (
        jax.device_put(params, partitioning.params_shardings(params, axes)),
        jax.device_put(IMAGES, partitioning.batch_sharding(4)),
    )
    with partitioning.activate():
        return step_of(tower).lower(*placed).compile(), placed


@pytest.mark.parametrize(
    "name, mesh, parameter_dims",
    [
        pytest.param("unrolled", (4, 2), 1, marks=pytest.mark.slow),
        ("scanned, dots", (2, 4), 1),
        pytest.param("scanned", (1, 8), 1, marks=pytest.mark.slow),
        ("scanned, block", (4, 2), 2),
    ],
    ids=str,
)
def test_a_tower_on_rings_equals_the_tower_on_one_device(name, mesh, parameter_dims):
    partitioning = Partitioning(*mesh, 2, parameter_dims, ring_projections=True)
    program, placed = on_mesh(name, partitioning)
    result = jax.device_get(program(*placed))
    assert tiny_models.relative_difference(result, one_device(name)) <= 1e-5
    sent = collectives(program)
    assert len(sent["collective-permute"]) >= 2 * 2 * (mesh[1] - 1)
    # Only parameters are gathered, where they are split over the batch axis as well;
    # the activations of an example are 640 numbers at most.
    gathered = [math.prod(shape) for _, shape in sent.get("all-gather", ())]
    assert min(gathered, default=1024) >= 1024
    assert bool(gathered) == (parameter_dims == 2)


def test_without_rings_activations_are_gathered():
    program, _ = on_mesh("unrolled", Partitioning(4, 2, 2, 1))
    sent = collectives(program)
    assert "all-gather" in sent and "collective-permute" not in sent


def test_vit_22b_on_a_ring_of_eight_moves_what_the_formula_says():
    partitioning = Partitioning(1, 8, 2, 1, ring_projections=True)
    tower = vit.VisionTower(
        vit.vit22b_config(
            "22B/14",
            image_size=(224, 224),
            pooling="none",
            dtype="bfloat16",
            fused_projections=True,
            scan_layers=True,
        )
    )
    images = jax.ShapeDtypeStruct(
        (8, 224, 224, 3), jnp.uint8, sharding=partitioning.batch_sharding(4)
    )
    shapes = jax.eval_shape(tower.init, jax.random.key(0), images)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes["params"],
        partitioning.params_shardings(shapes["params"], shapes["params_axes"]),
    )
    with partitioning.activate():
        forward = tiny_models.jit(
            lambda params, images: tower.apply({"params": params}, images).tokens
        )
        lowered = forward.lower(params, images)
    sent = {"bf16": 0, "f32": 0}
    for sizes, dtype in SENT.findall(lowered.as_text()):
        sent[dtype] += BYTES[dtype] * math.prod(map(int, sizes.split("x")))
    # One block, which the scan repeats: into it by the row form, in bfloat16, and out
    # of it by the column form, whose sums are in float32; (k-1)/k of 6144 either way.
    tokens = 8 * 256
    assert sent == {"bf16": tokens * 5376 * 2, "f32": tokens * 5376 * 4}
    names = set(collectives(lowered.compile()))
    assert names == {"collective-permute", "all-reduce"}
