"""Files of strangers: what they hold and how they are called leads nowhere else."""

import concurrent.futures
import contextlib
import io
import json
import os

import pytest
from PIL import Image

from vit22b_transfer import UserError
from vit22b_transfer.data import feature_shards, images, sources
from vit22b_transfer.host import memory_limit

# Folders and paths of strangers


@pytest.fixture
def linked(tmp_path):
    """A folder with one image, a subfolder with another, and a secret beside it."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for name in ("a.png", "more/b.png"):
        Image.new("RGB", (8, 8)).save(root / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    return root


@pytest.mark.parametrize(
    "links",
    [
        {"self": "."},
        {"more/up": ".."},
        {"one": "more", "more/two": "../one"},
        {"x": "y", "y": "x"},  # no folder at all
    ],
    ids=["itself", "parent", "each other", "nothing"],
)
def test_each_real_folder_is_listed_once_whatever_links_there_are(linked, links):
    for name, target in links.items():
        (linked / name).symlink_to(target)
    source = sources.ImageFolderSource({"test": linked})
    records = [source.record("test", n) for n in range(source.num_records("test"))]
    assert len({os.path.realpath(record.image_path) for record in records}) == 2
    assert len(records) == 2


def test_an_ordinary_link_to_another_folder_is_followed(linked, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "c.png")
    (linked / "link").symlink_to(tmp_path / "elsewhere")
    source = sources.ImageFolderSource({"test": linked})
    names = [source.record("test", n).image_id for n in range(3)]
    assert names == ["a.png", "link/c.png", "more/b.png"]


OUTSIDE = ["../secret.png", "more/../../secret.png", "{root}/../secret.png", "a.png\0"]


@pytest.mark.parametrize(
    "kind, name",
    [
        (kind, name)
        for kind in ("coco", "jsonl", "csv", "vqa")
        for name in OUTSIDE
        if kind != "csv" or "\0" not in name  # csv files hold no NUL
    ],
)
def test_a_file_name_that_leaves_the_folder_is_refused_and_named(linked, kind, name):
    name = name.format(root=linked)
    files = linked.parent / f"file.{'json' if kind in ('coco', 'vqa') else kind}"
    if kind == "coco":
        content = {
            "images": [{"id": 1, "file_name": name}, {"id": 2, "file_name": "a.png"}],
            "annotations": [
                {"id": n, "image_id": n, "caption": "a cube"} for n in (1, 2)
            ],
        }
        files.write_text(json.dumps(content))
        make = sources.CocoCaptionsSource
    elif kind == "vqa":
        questions = [
            {"question_id": n, "image_id": image, "question": "what?"}
            for n, image in enumerate((name, "a.png"))
        ]
        files.write_text(json.dumps({"questions": questions}))
        make = sources.VqaSource
    else:
        rows = [{"file_name": n, "caption": "a cube"} for n in (name, "a.png")]
        text = "\n".join(map(json.dumps, rows))
        if kind == "csv":
            text = f"file_name,caption\n{name},a cube\na.png,a cube\n"
        files.write_text(text)
        make = sources.CaptionFileSource
    given = sources.CaptionFiles(files, linked)
    if kind == "vqa":
        given = sources.VqaFiles(files, linked, image_file="{image_id}")
    with pytest.raises(UserError, match=r"secret\.png|a\.png"):
        make({"train": given}).num_records("train")
    source = make({"train": given}, on_bad_record="skip")
    paths = [source.record("train", n).image_path for n in range(1)]
    assert source.num_records("train") == 1 and paths == [str(linked / "a.png")]
    outside = make({"train": given}, on_bad_record="skip", paths_outside=True)
    assert outside.num_records("train") == (1 if "\0" in name else 2)


def test_a_name_that_only_looks_as_if_it_left_the_folder_is_read(linked):
    (linked.parent / "c.jsonl").write_text(
        json.dumps({"file_name": "more/../a.png", "caption": "a cube"})
    )
    files = sources.CaptionFiles(linked.parent / "c.jsonl", linked)
    source = sources.CaptionFileSource({"train": files})
    assert source.record("train", 0).image_path == str(linked / "a.png")


# Files of strangers


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
        b"\xc5\xd0\xd3\xc6" + bytes(26) + b"%!PS-Adobe-3.0 EPSF-3.0\n",  # EPS with TIFF
        b"%PDF-1.4\n",
        b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    ],
    ids=["EPS", "binary EPS", "PDF", "JPEG 2000"],
)
def test_no_other_format_is_opened_and_no_program_started(data, tmp_path, monkeypatch):
    mark = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match="not an image in a known format"):
        images.decode(data)
    assert not mark.exists()


def test_large_images_are_decoded_one_after_the_other(monkeypatch):
    """What all readers hold at a time is bounded, not what each of them holds."""
    holding, most = [], []

    class Limit(memory_limit.MemoryLimit):
        @contextlib.contextmanager
        def holding(self, size):
            with super().holding(size):
                holding.append(size)
                most.append(sum(holding))
                yield
                holding.remove(size)

    size = images._BYTES_PER_PIXEL * 500 * 500
    monkeypatch.setattr(images, "_DECODING", Limit(2 * size))
    file = io.BytesIO()
    Image.new("RGB", (500, 500)).save(file, "PNG")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(images.decode, [file.getvalue()] * 24))
    assert len(decoded) == 24 and max(most) <= 2 * size


# Caches of strangers

LAYOUT = {
    "num_examples": 1,
    "examples_per_shard": 1,
    "tokens": {"length": 2, "width": 3, "dtype": "float32", "storage": "exact"},
    "features": {"inputs": ["int32", [None]]},
    "fingerprint": {},
}


def test_a_layout_that_is_whole_is_read(tmp_path):
    (tmp_path / "layout.json").write_text(json.dumps(LAYOUT))
    assert feature_shards.read_layout(str(tmp_path / "layout.json")) == LAYOUT


@pytest.mark.parametrize(
    "change",
    [
        {"num_examples": 0},
        {"num_examples": 10**30},
        {"num_examples": 10**9},  # shards, a name for each
        {"examples_per_shard": True},
        {"tokens": {}},
        {"tokens": LAYOUT["tokens"] | {"width": "3"}},
        {"tokens": LAYOUT["tokens"] | {"dtype": "string"}},
        {"tokens": LAYOUT["tokens"] | {"storage": ["exact"]}},
        {"features": []},
        {"features": {"inputs": ["int33", []]}},
        {"features": {"inputs": ["int32", [-1]]}},
        {"fingerprint": None},
        {"more": 1},
    ],
)
def test_a_damaged_layout_of_cached_features_is_named(tmp_path, change):
    (tmp_path / "layout.json").write_text(json.dumps(LAYOUT | change))
    with pytest.raises(UserError, match=r"layout\.json is damaged.*Delete its folder"):
        feature_shards.read_layout(str(tmp_path / "layout.json"))


@pytest.mark.parametrize(
    "index",
    [[], {"rows": ["a"]}, {"rows": [1], "examples": []}, {"rows": [], "examples": []}],
    ids=str,
)
def test_a_shard_whose_index_is_none_is_named(tmp_path, index):
    path = str(tmp_path / "00000-of-00001.array_record")
    writer = feature_shards.ArrayRecordWriter(path, "group_size:1,uncompressed")
    for record in (b"row", b"example", json.dumps(index).encode()):
        writer.write(record)
    writer.close()
    with pytest.raises(UserError, match=r"00000.*is cut off or damaged .its index"):
        feature_shards.Shard(path)
