"""Heads of pixels and of videos against transformers, and what they are made of.

Random weights, float32; batch normalisation has random statistics.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import (
    assert_within,
    classic_tower_config,
    images,
    jit,
    random_params,
    tower_config,
)
from torch_peers import import_peer, torch, without_gradients

from vit22b_transfer import UserError
from vit22b_transfer.models import convolutions, dense, dense_heads, freezing
from vit22b_transfer.partitioning.rules import Partitioning

upernet = import_peer("transformers.models.upernet.modeling_upernet")
dpt = import_peer("transformers.models.dpt.modeling_dpt")
transformers = import_peer("transformers")

TOLERANCE = 1e-4
rng = np.random.default_rng(0)


def randomised(module):
    """The torch module in evaluation, no weight or statistic left as it began."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if "var" in name:
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point():
            scale = 0.7 / np.sqrt(tensor[0].numel()) if tensor.ndim > 1 else 0.3
            tensor.normal_(1.0 if "norm.weight" in name else 0.0, scale)
    return module.eval()


def put(tree, path, module):
    """Writes a torch layer's numbers to where ours has them."""
    if isinstance(module, torch.nn.BatchNorm2d):
        of = {"scale": "weight", "bias": "bias", "mean": "running_mean"}
        for ours, theirs in (of | {"variance": "running_var"}).items():
            tree[f"{path}/{ours}/embedding"] = getattr(module, theirs).numpy()
    elif isinstance(module, torch.nn.ConvTranspose2d):
        # [in, out, down, across] -> [in, (down, across, out)]
        kernel = module.weight.numpy().transpose(0, 2, 3, 1)
        tree[f"{path}/dense/kernel"] = kernel.reshape(len(kernel), -1)
        tree[f"{path}/bias/embedding"] = module.bias.numpy()
    else:
        # [out, in, down, across] -> [(down, across, in), out]
        kernel = module.weight.numpy().transpose(2, 3, 1, 0)
        tree[f"{path}/dense/kernel"] = kernel.reshape(-1, kernel.shape[-1])
        if module.bias is not None:
            tree[f"{path}/dense/bias"] = module.bias.numpy()


def put_module(tree, path, module):
    put(tree, f"{path}/conv", module.conv)
    put(tree, f"{path}/norm", module.batch_norm)


def applied(network, tree, *arguments, **options):
    """What our network says with the numbers that were put; all must be given."""
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), *arguments, **options)
    )
    expected = flatten_dict(shapes["params"], sep="/")
    assert {n: v.shape for n, v in expected.items()} == {
        n: v.shape for n, v in tree.items()
    }
    params = unflatten_dict(tree, sep="/")
    return jit(lambda p: network.apply({"params": p}, *arguments, **options))(params)


def last(tensor):
    return jnp.asarray(tensor.permute(0, 2, 3, 1).numpy())


@pytest.mark.slow
@without_gradients
def test_upernet_is_that_of_transformers():
    config = transformers.UperNetConfig(
        hidden_size=6, num_labels=5, pool_scales=[1, 2, 3], backbone_config=None
    )
    peer = randomised(upernet.UperNetHead(config, [4, 4, 4, 4]))
    levels = [torch.randn(2, 4, 20 // n, 12 // n) for n in (1, 2, 4)]
    levels.append(torch.randn(2, 4, 3, 2))
    tree = {}
    for number, block in enumerate(peer.psp_modules.blocks):
        put_module(tree, f"pooled_{number}", block.layers[1])
    put_module(tree, "bottleneck", peer.bottleneck)
    put_module(tree, "fusion", peer.fpn_bottleneck)
    for number in range(3):
        put_module(tree, f"laterals_{number}", peer.lateral_convs[number])
        put_module(tree, f"smoothing_{number}", peer.fpn_convs[number])
    put(tree, "classifier", peer.classifier)
    network = dense_heads.UperNet(("tokens",) * 4, 6, (1, 2, 3)).build(4, 5)
    maps = [last(level) for level in levels]
    found = applied(network, tree, maps, train=False, method="of_levels")
    assert float(jnp.std(found)) > 0.05
    assert_within(TOLERANCE, found, last(peer(levels)), "UperNet")
    # Of a tower's maps, which have one size, the pyramid is made bilinearly.
    grid = jnp.asarray(rng.normal(size=(2, 4, 6, 4)).astype(np.float32))
    sizes = (16, 24), (8, 12), (4, 6), (2, 3)
    levels = [convolutions.resized(grid, size) for size in sizes]
    whole = applied(network, tree, [grid] * 4, train=False)
    same = applied(network, tree, levels, train=False, method="of_levels")
    assert_within(1e-6, whole, same, "a pyramid of one map")


@without_gradients
def test_dpt_is_that_of_transformers():
    channels = (4, 6, 8, 10)
    config = transformers.DPTConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=8,
        readout_type="ignore",
        neck_hidden_sizes=list(channels),
        fusion_hidden_size=6,
        backbone_out_indices=[0, 1, 2, 3],
        reassemble_factors=[4, 2, 1, 0.5],
    )
    neck = randomised(dpt.DPTNeck(config))
    head = randomised(dpt.DPTDepthEstimationHead(config))
    head.head[4].bias.fill_(0.2)  # else ReLU leaves little of it
    tokens = [torch.randn(2, 1 + 3 * 5, 8) for _ in range(4)]
    tree = {}
    for number, layer in enumerate(neck.reassemble_stage.layers):
        put(tree, f"projections_{number}", layer.projection)
        if number != 2:
            put(tree, f"resizing_{number}", layer.resize)
        put(tree, f"levels_{number}", neck.convs[number])
        fusion = neck.fusion_stage.layers[number]
        put(tree, f"fusions_{number}/project", fusion.projection)
        parts = {"whole": fusion.residual_layer2}
        if number:  # at the top there is nothing above, whatever torch holds
            parts["lower"] = fusion.residual_layer1
        for name, part in parts.items():
            put(tree, f"fusions_{number}/{name}/first", part.convolution1)
            put(tree, f"fusions_{number}/{name}/second", part.convolution2)
    for ours, theirs in ((1, 0), (2, 2), (3, 4)):
        put(tree, f"head_{ours}", head.head[theirs])
    network = dense_heads.Dpt(("tokens",) * 4, channels, 6).build(8, 1)
    maps = [jnp.asarray(t[:, 1:].reshape(2, 3, 5, 8).numpy()) for t in tokens]
    found = applied(network, tree, maps, train=False)
    expected = head(neck(tokens, 3, 5))
    task = dense.Depth(1e-6, 10.0, None)
    assert float(expected.std()) > 0.01 and float((expected > 0).float().mean()) > 0.5
    assert_within(TOLERANCE, task.predicted(found)[..., 0], expected.numpy(), "DPT")


@without_gradients
def test_resizing_and_pooling_are_those_of_torch():
    x = torch.randn(2, 3, 7, 5)
    interpolate = torch.nn.functional.interpolate
    for size in ((14, 11), (3, 2), (7, 9)):
        expected = interpolate(x, size=size, mode="bilinear", align_corners=False)
        assert_within(1e-5, convolutions.resized(last(x), size), last(expected))
    expected = interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    assert_within(1e-5, convolutions.doubled(last(x)), last(expected))
    for size in (1, 2, 3, 6):
        expected = torch.nn.functional.adaptive_avg_pool2d(x, size)
        assert_within(1e-5, convolutions.pooled(last(x), size), last(expected))


@without_gradients
def test_batches_are_normalised_by_themselves_and_later_by_many():
    batches = torch.randn(3, 4, 5, 3, 2) * 3 + 1
    norm = convolutions.BatchNorm(5)
    params = random_params(norm, last(batches[0]), train=False)
    peer = torch.nn.BatchNorm2d(5, momentum=None).train()
    for name, ours in (("weight", "scale"), ("bias", "bias")):
        getattr(peer, name).copy_(torch.tensor(np.array(params[ours]["embedding"])))
    told, squares = None, []
    for batch in batches:
        found, state = norm.apply(
            {"params": params}, last(batch), train=True, mutable=["batch_statistics"]
        )
        assert_within(1e-5, found, last(peer(batch)))
        part = state["batch_statistics"]
        told = part if told is None else jax.tree.map(jnp.add, told, part)
        squares.append(batch)
    tree = convolutions.with_statistics({"norm": params}, {"norm": told}, 3)["norm"]
    every = last(torch.cat(list(batches)))
    mean, variance = every.mean((0, 1, 2)), every.var((0, 1, 2))
    assert_within(1e-5, tree["mean"]["embedding"], mean)
    assert_within(1e-5, tree["variance"]["embedding"], variance)
    np.testing.assert_array_equal(
        tree["scale"]["embedding"], params["scale"]["embedding"]
    )


def test_a_batch_is_normalised_over_all_devices():
    norm = convolutions.BatchNorm(3)
    x = jnp.asarray(rng.normal(size=(8, 2, 2, 3)).astype(np.float32))
    params = random_params(norm, x, train=False)
    sharded = jax.device_put(x, Partitioning().batch_sharding(4))
    one, many = (norm.apply({"params": params}, x, train=True) for x in (x, sharded))
    assert len(many.sharding.device_set) == 8
    assert_within(1e-5, many, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parallel", "classic"])
def test_a_head_reads_the_patches_of_the_blocks_that_it_names(name):
    make = tower_config if name == "parallel" else classic_tower_config
    tower = make(depth=2, class_token=True, num_registers=1, pooling="none")
    head = dense_heads.LinearHead(("block_0", "tokens"))
    model = dense.DenseModel(tower, head, dense.Segmentation(3))
    pixels = images(1, 16, 24, 3)
    params = random_params(model.module, pixels)
    variance = params["head"]["norm"]["variance"]
    variance["embedding"] = 0.5 + jnp.abs(variance["embedding"])
    found = jit(model.predict)(params, pixels)
    output = tower.build().apply(
        {"params": params["encoder"]["tower"]},
        jnp.asarray(pixels),
        intermediates=("block_0",),
    )
    block, tokens = output.intermediates["block_0"], output.tokens
    assert block.shape[1] == 8 and tokens.shape[1] == 6
    x = np.concatenate([block[:, 2:], tokens], axis=-1)  # class token, register
    head_params = jax.tree.map(np.asarray, params["head"])
    norm, classifier = head_params["norm"], head_params["classifier"]["dense"]
    x = (x - norm["mean"]["embedding"]) / np.sqrt(norm["variance"]["embedding"] + 1e-5)
    x = x * norm["scale"]["embedding"] + norm["bias"]["embedding"]
    logits = x @ classifier["kernel"] + classifier["bias"]
    grid = jnp.asarray(logits.reshape(1, 2, 3, 3))
    expected = convolutions.resized(grid, (16, 24))
    assert_within(1e-4, found, expected)


def test_pyramids_take_four_blocks_evenly_where_none_are_named():
    twelve = tower_config(depth=12)
    expected = ("block_2", "block_5", "block_8", "block_11")
    assert dense_heads.of_tower(dense_heads.UperNet(), twelve).features == expected
    assert dense_heads.of_tower(dense_heads.Dpt(), twelve).features == expected
    with pytest.raises(UserError, match="the tower has 2 blocks, too few for 4"):
        dense_heads.of_tower(dense_heads.Dpt(), tower_config(depth=2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dense_heads.LinearHead("tokens"), "takes a tuple of one name or more"),
        (lambda: dense_heads.LinearHead(()), "one name or more"),
        (lambda: dense_heads.LinearHead(dropout=1.0), "dropout=1.0"),
        (lambda: dense_heads.UperNet(("tokens",)), "a tuple of 4 names"),
        (lambda: dense_heads.UperNet(channels=0), "channels=0 must be positive"),
        (lambda: dense_heads.Dpt(channels=(1, 2)), "one number for each of its 4"),
        (lambda: dense.Depth(2.0, 1.0, None), "from 2.0 to 1.0 metres"),
        (lambda: dense.Depth(1.0, 2.0, 1), "bins=1 must be at least 2"),
        (
            lambda: dense_heads.of_tower(
                dense_heads.LinearHead(("block_1",)), tower_config(depth=1)
            ),
            "no feature 'block_1'; nearest: block_0",
        ),
    ],
)
def test_what_is_no_head_is_said(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --- Losses ---


@without_gradients
def test_the_loss_of_classes_is_that_of_torch_and_skips_what_has_none():
    maps = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    labels = rng.integers(-1, 5, (2, 3, 4)).astype(np.int32)
    task = dense.Segmentation(5)
    loss, count = task.loss(jnp.asarray(maps), {"labels": labels})
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(maps).permute(0, 3, 1, 2),
        torch.tensor(labels).long(),
        ignore_index=-1,
        reduction="sum",
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(count) == np.sum(labels >= 0)
    none = {"labels": np.full_like(labels, -1)}
    assert [float(x) for x in task.loss(jnp.asarray(maps), none)] == [0, 1]


def test_the_loss_of_depths_is_sigloss_and_at_first_its_second_part():
    metres = rng.uniform(1.0, 9.0, (2, 3, 4)).astype(np.float32)
    metres[0, 0], metres[1, 2, 3] = 0.0, 20.0  # unknown, and beyond the most
    maps = rng.uniform(0.5, 8.0, (2, 3, 4, 1)).astype(np.float32)
    task = dense.Depth(0.5, 10.0, None)
    valid = (metres > 0.5) & (metres < 10.0)
    gap = np.log(maps[..., 0] + 0.5 + 1e-3)[valid] - np.log(metres + 1e-3)[valid]
    for warm_up in (0.0, 1.0):
        batch = {"labels": metres, "warm_up": np.full(2, warm_up, np.float32)}
        loss, count = task.loss(jnp.asarray(maps), batch)
        inside = (1 - warm_up) * gap.var(ddof=1) + 0.15 * gap.mean() ** 2
        assert float(loss) == pytest.approx(np.sqrt(inside), rel=1e-4)
        assert float(count) == 1
    nothing = {"labels": np.zeros((2, 3, 4), np.float32), "warm_up": np.zeros(2)}
    nothing["warm_up"] = nothing["warm_up"].astype(np.float32)
    slopes = jax.grad(lambda maps: task.loss(maps, nothing)[0])(jnp.asarray(maps))
    assert float(task.loss(jnp.asarray(maps), nothing)[0]) == 0
    assert not np.any(slopes)


def test_bins_weigh_depths_from_the_least_to_the_most():
    task = dense.Depth(1.0, 5.0, 5)
    maps = jnp.asarray([[[[-9.0, -9.0, -9.0, -9.0, 99.6]]]])
    # weights .1 .1 .1 .1 99.7 of 1 2 3 4 5 metres
    assert float(task.predicted(maps)[0, 0, 0, 0]) == pytest.approx(499.5 / 100.1)
    even = task.predicted(jnp.zeros((1, 1, 1, 5)))
    assert float(even[0, 0, 0, 0]) == pytest.approx(3.0)


def test_the_tower_is_frozen_unless_it_is_asked_for():
    head, task = dense_heads.LinearHead(), dense.Segmentation(3)
    frozen = dense.DenseModel(tower_config(), head, task)
    trained = dense.DenseModel(tower_config(), head, task, train_trunk=True)
    assert frozen.frozen == (freezing.TOWER,) and trained.frozen == ()
