"""Videos: the transformer over frames against ViViT, folders of clips, a whole run."""

import json
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tiny_models
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_dense import save_grey as save
from tiny_dense import write_clips
from tiny_runs import ONE_DEVICE
from torch_peers import import_peer, torch, without_gradients

from vit22b_transfer import UserError
from vit22b_transfer.data import images, video_folders
from vit22b_transfer.experiments import features, head_training, labelled, video
from vit22b_transfer.models import video_head
from vit22b_transfer.training import optimizers

transformers = import_peer("transformers")
HEAD = video_head.TemporalHead(depth=1, head_dim=8, mlp_ratio=2)


@pytest.mark.slow
@without_gradients
def test_the_transformer_over_frames_is_vivits():
    width, frames = 16, 6
    config = transformers.VivitConfig(
        image_size=4,
        num_frames=frames,
        tubelet_size=[1, 4, 4],
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_act="gelu_pytorch_tanh",
        num_labels=5,
    )
    torch.manual_seed(0)
    peer = transformers.VivitForVideoClassification(config).eval()
    for name, tensor in peer.state_dict().items():
        scale = 0.7 / np.sqrt(tensor[0].numel()) if "weight" in name else 0.3
        is_norm = "layernorm" in name and name.endswith("weight")
        tensor.normal_(1.0 if is_norm else 0.0, 0.3 if is_norm else scale)
    pixels = torch.randn(2, frames, 3, 4, 4)
    vectors = peer.vivit.embeddings.patch_embeddings(pixels).numpy()  # one a frame
    state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    tree = {
        "cls/embedding": state["vivit.embeddings.cls_token"],
        "positions/embedding": state["vivit.embeddings.position_embeddings"][0],
    }

    def dense(ours, theirs):
        tree[f"{ours}/kernel"] = state[f"{theirs}.weight"].T
        tree[f"{ours}/bias"] = state[f"{theirs}.bias"]

    def norm(ours, theirs):
        tree[f"{ours}/scale"] = state[f"{theirs}.weight"]
        tree[f"{ours}/bias"] = state[f"{theirs}.bias"]

    for number in range(2):
        ours, theirs = f"blocks_{number}", f"vivit.layers.{number}"
        parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
        for name, part in parts.items():
            dense(f"{ours}/attention/{name}", f"{theirs}.attention.{part}")
        dense(f"{ours}/mlp/wi", f"{theirs}.mlp.fc1")
        dense(f"{ours}/mlp/wo", f"{theirs}.mlp.fc2")
        norm(f"{ours}/norm", f"{theirs}.layernorm_before")
        norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after")
    norm("norm", "vivit.layernorm")
    dense("head", "classifier")
    model = video_head.VideoModel(
        video_head.TemporalHead(depth=2, head_dim=8, mlp_ratio=2),
        width=width,
        frames=frames,
        num_classes=5,
    )
    shapes = model.get_initial_variables(jax.random.key(0), {"frames": vectors.shape})
    expected = {n: x.shape for n, x in flatten_dict(shapes["params"], sep="/").items()}
    assert expected == {name: array.shape for name, array in tree.items()}
    params = unflatten_dict({n: jnp.asarray(x) for n, x in tree.items()}, sep="/")
    found = tiny_models.jit(model.predict)(params, vectors)
    logits = peer(pixels).logits.numpy()
    assert logits.std() > 0.1
    tiny_models.assert_within(1e-4, found, logits, "ViViT")
    labels = np.array([4, 0], np.int32)
    loss, metrics = model.loss_fn(params, {"frames": vectors, "labels": labels}, None)
    peer_loss = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels).long(), reduction="sum"
    )
    assert float(loss) == pytest.approx(float(peer_loss), rel=1e-4)
    assert float(metrics["loss"].count) == 2


@pytest.mark.parametrize(
    "head, message",
    [
        (video_head.TemporalHead(head_dim=5), "head_dim=5 do not .* such as 4"),
        (video_head.TemporalHead(depth=0), "each must be positive"),
    ],
)
def test_a_transformer_that_fits_no_vector_is_refused(head, message):
    with pytest.raises(UserError, match=message):
        head.config(16)


# --- Folders ---


@pytest.fixture
def root(tmp_path):
    write_clips(tmp_path / "clips", "training", 2, first=7)
    write_clips(tmp_path / "clips", "validation", 1)
    return tmp_path / "clips"


def records(root, *, stride=2, least=3, split="training", **fields):
    folder = video_folders.VideoFolder(root, **fields)
    source = seqio.TaskRegistry.get(folder.task(stride=stride, least=least)).source
    count = source.num_records(split)
    return [source.record(split, n) for n in range(count)], source


def test_every_second_frame_of_each_clip_is_read_in_order(root):
    found, _ = records(root)
    names = [record.image_id for record in found]
    assert names[:3] == [f"darker/clip_0/frame_{n:05}.png" for n in (7, 9, 11)]
    assert len(names) == 12 and names == sorted(names)
    assert [record.labels for record in found[::3]] == [(0,), (0,), (1,), (1,)]


def test_numbers_are_in_order_where_names_are_not(root):
    where = root / "training" / "darker" / "clip_0"
    for n in range(8, 13):
        os.rename(where / f"frame_{n:05}.png", where / f"{n}.png")
    names = [record.image_id for record in records(root, stride=1, least=6)[0][:6]]
    assert [os.path.basename(name) for name in names] == ["frame_00007.png"] + [
        f"{n}.png" for n in range(8, 13)
    ]


def spoil(root):
    """Clips that are bad, each in its own way."""
    where = root / "training" / "lighter"
    for clip in ("gap", "twice", "short", "noname"):
        for n in range(6):
            save(where / clip / f"{n}.png", 100)
    os.remove(where / "gap" / "3.png")
    save(where / "twice" / "frame_0004.png", 9)
    os.remove(where / "short" / "5.png")
    os.remove(where / "short" / "4.png")
    save(where / "noname" / "still.png", 9)
    (where / "empty").mkdir()
    save(where / "beside.png", 9)
    save(root / "training" / "unknown" / "clip" / "1.png", 9)
    save(root / "elsewhere.png", 9)
    (where / "clip_0" / "frame_00013.png").symlink_to(root / "elsewhere.png")
    return {
        "frames missing": 1,
        "frame number that stands twice": 1,
        "clip with too few frames": 1,
        "frame without a number": 1,
        "clip without a frame": 1,
        "frame in no folder of a clip": 1,
        "unknown class": 1,
        "file that lies outside of its folder": 1,
    }


def test_bad_clips_are_an_error_or_counted(root):
    expected = spoil(root)
    with pytest.raises(UserError, match=r"--gin\.VideoFolder\.on_bad_record="):
        records(root)
    found, source = records(root, on_bad_record="skip")
    assert len(found) == 12 and source.report() == {"training": expected}


@pytest.mark.parametrize(
    "clip, message",
    [
        ("gap", "none from 2 to 4"),
        ("twice", "stands twice: .*4.png, frame_0004.png"),
        ("short", "short: 4; 3 frames, 2 apart, need 5"),
    ],
)
def test_a_bad_clip_is_named(root, tmp_path, clip, message):
    spoil(root)
    only = tmp_path / "only" / "training" / "lighter"
    only.mkdir(parents=True)
    os.rename(root / "training" / "lighter" / clip, only / clip)
    os.rename(root / "classes.txt", tmp_path / "only" / "classes.txt")
    with pytest.raises(UserError, match=message):
        records(tmp_path / "only")


def test_folders_that_are_not_there_and_no_frames_are_said(root):
    with pytest.raises(UserError, match="frames=3 and stride=0 must be positive"):
        records(root, stride=0)
    with pytest.raises(UserError, match="none is not a directory"):
        records(root, test="none", split="none")


def test_a_clip_without_one_of_its_frames_is_left_out(root):
    folder = video_folders.VideoFolder(root, on_bad_record="skip")
    task = folder.task(stride=2, least=3)
    rows = np.array([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11])  # not 4, of the second clip
    vectors = np.arange(11.0)[:, None]
    labels = np.repeat([0, 1], [5, 6])
    clips = video_folders.Clips.of_frames(task, "training", rows, vectors, labels)
    assert clips.left_out == 1
    np.testing.assert_array_equal(clips.labels, [0, 1, 1])
    np.testing.assert_array_equal(clips.vectors[1][:, 0], [5, 6, 7])
    with pytest.raises(UserError, match="no clip all of whose frames"):
        video_folders.Clips.of_frames(
            task, "training", rows[:2], vectors[:2], labels[:2]
        )


def test_windows_lie_evenly_over_a_clip_and_are_drawn_within_it():
    clips = video_folders.Clips([np.arange(10.0)[:, None]], np.array([1]), 0)
    assert clips.windows(0, 4, 3)[..., 0].tolist() == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],
    ]
    assert len(clips.windows(0, 10, 3)) == 1
    data = video_folders.ClipData(clips, 4, 32)
    starts = set()
    stream = data.batches(None, ONE_DEVICE, seed=0, start_step=0)
    for _ in range(3):
        batch = next(stream)
        assert (batch["labels"] == 1).all() and batch["frames"].dtype == np.float32
        assert (np.diff(batch["frames"][..., 0], axis=1) == 1).all()
        starts.update(batch["frames"][:, 0, 0].tolist())
    stream.close()
    assert starts == {0, 1, 2, 3, 4, 5, 6}


# --- The run ---


class Greys(features.FeatureSource):
    """In place of a tower: a frame's vector is its grey. A broken frame has none."""

    def read(self, task, split, vectors):
        source = seqio.TaskRegistry.get(task).source
        rows, found, labels = [], [], []
        for row in range(source.num_records(split)):
            record = source.record(split, row)
            try:
                grey = images.read_whole(record.image_path).mean() / 128 - 1
            except UserError:
                continue
            rows.append(row)
            found.append(np.tile([[grey, -grey, 1, -1]], 2).astype(np.float32))
            labels.append(record.labels[0])
        notes = {f"{task} {split}: unreadable_images": 1} if split[0] == "v" else {}
        data = labelled.Labelled(np.concatenate(found), np.array(labels), 2)
        return types.SimpleNamespace(
            joined=lambda names: data,
            num_classes=2,
            notes=notes,
            rows=np.array(rows),
        )

    def facts(self):
        return {"checkpoint": "none"}


def test_a_head_that_fits_no_vector_is_said_before_any_frame_is_read(tmp_path):
    tower = types.SimpleNamespace(width=96)
    source = Greys(tower, "", "", ONE_DEVICE, (16, 16), 8)
    training = head_training.HeadTraining(optimizers.adamw(1e-3), 1, 1)
    protocol = video.VideoProtocol(video_head.TemporalHead(), training)
    with pytest.raises(UserError, match="96 numbers.*TemporalHead.head_dim.*as 48"):
        video.run_video(
            protocol,
            source=source,
            data=video_folders.VideoFolder(tmp_path / "nothing"),
            output_dir=str(tmp_path / "out"),
        )


@pytest.mark.slow
def test_a_head_of_frames_tells_what_no_frame_does(tmp_path):
    root = tmp_path / "clips"
    write_clips(root, "training", 8)
    write_clips(root, "validation", 5)
    broken = root / "validation" / "darker" / "clip_0" / "frame_00001.png"
    broken.write_bytes(broken.read_bytes()[:40])
    source = Greys(types.SimpleNamespace(width=8), "", "", ONE_DEVICE, (16, 16), 8)
    optimizer = optimizers.adamw(optimizers.cosine(1e-2, total_steps=100))
    training = head_training.HeadTraining(optimizer, 100, 16)
    protocol = video.VideoProtocol(HEAD, training, frames=3, stride=1, views=2)
    folder = video_folders.VideoFolder(root, on_bad_record="skip")
    out = tmp_path / "out"
    (found,) = video.run_video(
        protocol, source=source, data=folder, output_dir=str(out)
    )
    assert found.metric == "accuracy" and found.value >= 8 / 9
    (line,) = map(json.loads, (out / "probes.jsonl").read_text().splitlines())
    assert line["test"]["images"] == 9 and line["train"]["images"] == 16
    assert line["notes"] == {
        "validation: unreadable_images": 1,
        "validation: clips with an unreadable frame": 1,
    }
    assert line["interval_kind"] == "Wilson, 95 %, over 9 images"
    assert line["protocol"]["frames"] == 3 and line["classes"] == 2
