"""Images that are given: files, folders, lists and archives become the same records."""

import base64
import io
import json
import os
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vit22b_transfer import UserError
from vit22b_transfer.data import given_images, packed_images, preprocessors
from vit22b_transfer.data.given_images import SPLIT, GivenImagesSource
from vit22b_transfer.data.images import read_image

SIZE = (8, 8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four images and one that is cut off, in a folder and one below it."""
    folder = tmp_path_factory.mktemp("given") / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "more/c.jpg", "more/d.png", "cut.png"):
        pixels = rng.integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    cut = folder / "cut.png"
    cut.write_bytes(cut.read_bytes()[:50])
    (folder / "notes.txt").write_text("no image")
    return folder


def records(*images, **options):
    source = GivenImagesSource([str(image) for image in images], **options)
    count = source.num_records(SPLIT)
    return [source.record(SPLIT, index) for index in range(count)]


def read(*images, **options):
    """(id, question, pixels or error) of all, as a task reads them."""
    source = GivenImagesSource([str(image) for image in images], **options)
    examples = source.get_dataset(SPLIT, shuffle=False)
    options = preprocessors.ReadingOptions(on_bad_image="skip")
    loaded = preprocessors.load_images(
        examples, {"images": 8}, options=options, tally=preprocessors.Tally()
    )
    for example in loaded.as_numpy_iterator():
        error = example["image_error"].decode()
        text = (example[name].decode() for name in ("image_id", "question"))
        yield *text, error or example["images"]


def listed(folder, name, *lines):
    path = folder / name
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def same(pixels, path):
    np.testing.assert_array_equal(pixels, read_image(str(path), SIZE))


def test_files_folders_and_patterns_keep_their_order_and_names(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    found = records("photos/b.png", "photos", "photos/more/*")
    names = [record.image_id for record in found]
    below = ["photos/a.png", "photos/b.png", "photos/cut.png"]
    more = ["photos/more/c.jpg", "photos/more/d.png"]
    # Each image once, where it comes first.
    assert names == ["photos/b.png", "photos/a.png", "photos/cut.png", *more]
    assert sorted(names) == sorted(below + more)
    asked = records("photos/b.png", "photos/b.png", asked=True, question="What?")
    assert [record.question for record in asked] == ["What?"] * 2


def test_an_image_that_cannot_be_read_keeps_its_place(photos):
    (_, _, first), (_, _, error), *_ = read(photos / "a.png", photos / "cut.png")
    same(first, photos / "a.png")
    assert "truncated" in error


def test_lists_name_images_beside_them(photos):
    rows = [{"image": "a.png", "image_id": 7}, {"image": "missing.png"}]
    rows += [{"image": "../photos/b.png"}, {"image": "/etc/passwd"}]
    first, missing, outside, absolute = read(listed(photos, "list.jsonl", *rows))
    assert first[0] == "7"
    same(first[2], photos / "a.png")
    assert missing[2] == "missing.png: missing image file"
    assert "leaves the image folder" in outside[2]
    assert "leaves the image folder" in absolute[2]
    (found,) = records(
        listed(photos, "one.jsonl", {"path": str(photos / "b.png")}),
        paths_outside=True,
    )
    assert found.image_path == str(photos / "b.png")
    (photos / "list.csv").write_text('file_name,question\na.png,"What, then?"\n')
    (asked,) = records(photos / "list.csv", asked=True)
    assert (asked.question, asked.image_id) == ("What, then?", "a.png")


def test_files_of_coco_and_vqa_are_lists(photos, tmp_path):
    coco = {"images": [{"id": 3, "file_name": "more/d.png"}], "annotations": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (found,) = records(tmp_path / "coco.json", folder=photos)
    assert (found.image_id, found.image_path) == ("3", str(photos / "more/d.png"))
    asked = [
        {"question_id": n, "image_id": name, "question": f"{n}?"}
        for n, name in enumerate(["a", "a", "b"])
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"questions": asked}))
    options = dict(folder=photos, image_file="{image_id}.png")
    found = records(path, asked=True, **options)
    assert [(r.question_id, r.question) for r in found] == [
        ("0", "0?"),
        ("1", "1?"),
        ("2", "2?"),
    ]
    # For captions each image is there once, and is asked nothing.
    found = records(path, **options)
    assert [(r.image_id, r.question) for r in found] == [("a", ""), ("b", "")]
    # Ids that are no numbers do not fit VQAv2's own names of files.
    found = records(path, asked=True, folder=photos)
    assert all("does not fit image_file" in r.image_problem for r in found)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_archives_give_the_bytes_of_their_members_in_any_order(photos, tmp_path):
    a, b = (photos / "a.png").read_bytes(), (photos / "b.png").read_bytes()
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        add(archive, "one/0001.png", a)
        add(archive, "one/0001.txt", b"How many? \n")
        add(archive, "one/0002.txt", b"And here?")
        add(archive, "one/0002.png", b[:40])
        add(archive, "../0003.png", b)
        archive.addfile(tarfile.TarInfo("link.png"))  # empty
    found = list(read(tmp_path / "set.tar", photos / "b.png", asked=True, question="?"))
    assert [x[0] for x in found][:3] == ["one/0001.png", "one/0002.png", "../0003.png"]
    same(found[0][2], photos / "a.png")
    assert isinstance(found[1][2], str)
    same(found[2][2], photos / "b.png")
    assert "empty" in found[3][2]
    same(found[4][2], photos / "b.png")
    asked = records(tmp_path / "set.tar")
    assert not any(record.question for record in asked)
    source = GivenImagesSource([str(tmp_path / "set.tar")], asked=True, question="Q")
    assert source.record(SPLIT, 1).question == "Q"
    places = [record.image_path for record in asked]
    assert [packed_images.read(place) for place in reversed(places[:3])] == [
        b,
        b[:40],
        a,
    ]
    # None is written anywhere, wherever its name leads.
    assert sorted(os.listdir(tmp_path)) == ["set.tar"]
    with tarfile.open(tmp_path / "own.tar", "w") as archive:
        add(archive, "1.png", a)
        add(archive, "1.txt", b"How many? \n")
    (one,) = records(tmp_path / "own.tar", asked=True)
    assert one.question == "How many?"


def test_parquet_holds_bytes_or_structs_in_any_row_group(photos, tmp_path):
    a, b = (photos / "a.png").read_bytes(), (photos / "b.png").read_bytes()
    structs = [{"bytes": x, "path": None} for x in (a, b, a)]
    table = {"image": structs, "question": ["1?", "2?", "3?"]}
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=2)
    found = list(read(path, asked=True))
    assert [x[:2] for x in found] == [
        ("rows.parquet:0", "1?"),
        ("rows.parquet:1", "2?"),
        ("rows.parquet:2", "3?"),
    ]
    for (_, _, pixels), name in zip(found, ("a.png", "b.png", "a.png"), strict=True):
        same(pixels, photos / name)
    names = ["a.png", "../photos/a.png", None]
    for name in ("a.png",):
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    pyarrow.parquet.write_table(pyarrow.table({"image": names}), tmp_path / "n.parquet")
    first, outside, nothing = read(tmp_path / "n.parquet")
    same(first[2], photos / "a.png")
    assert "leaves the folder" in outside[2] and "has no image" in nothing[2]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="has no column image; it has text"):
        records(tmp_path / "t.parquet")


def request(custom_id, text, url):
    parts = [{"type": "text", "text": text}]
    if url:
        parts.append({"type": "image_url", "image_url": {"url": url}})
    body = {"model": "any", "messages": [{"role": "user", "content": parts}]}
    return {"custom_id": custom_id, "method": "POST", "body": body}


def test_requests_of_openais_batches_are_asked(photos):
    encoded = base64.b64encode((photos / "b.png").read_bytes()).decode()
    path = listed(
        photos,
        "requests.jsonl",
        request("x", "Was ist das – hier?", f"data:image/png;base64,{encoded}"),
        request("y", "And?", "file://a.png"),
        request("z", "And?", "https://example.org/a.png"),
        request("w", "And?", ""),
        request("v", "And?", "data:image/png;base64,!!!"),
    )
    data, file, network, none, broken = read(path, asked=True)
    assert data[:2] == ("x", "Was ist das – hier?")
    same(data[2], photos / "b.png")
    same(file[2], photos / "a.png")
    assert "only data:, file:" in network[2]
    assert "0 images in the request" in none[2]
    assert "no base64" in broken[2]


@pytest.mark.parametrize(
    "content, message",
    [
        ("nothing", "does not exist; name a file"),
        ("no*thing", "nothing matches"),
        ("notes.txt", "neither a folder nor a file that is read"),
        ("broken.tar", "no readable tar file"),
        ("broken.parquet", "no readable parquet file"),
        ("other.jsonl", "line 1: no image is named"),
    ],
)
def test_what_is_no_image_is_said_at_once(photos, tmp_path, content, message):
    path = photos / content if content == "notes.txt" else tmp_path / content
    if content.startswith("broken"):
        path.write_bytes(b"not an archive" * 100)
    if content == "other.jsonl":
        path.write_text('{"picture": "a.png"}\n')
    with pytest.raises(UserError, match=message):
        records(path)


def test_nobody_is_asked_nothing(photos):
    with pytest.raises(UserError, match="has no question; give one for all"):
        records(photos / "a.png", asked=True)
    with pytest.raises(UserError, match="but asked is False"):
        records(photos / "a.png", question="What?")
    with pytest.raises(UserError, match="none of the prompts 'caption en' has the"):
        given_images.task(
            [str(photos / "a.png")], ["caption en"], asked=True, question="What?"
        )


def test_the_digest_is_of_images_questions_and_order(photos):
    def digest(*names, **options):
        return GivenImagesSource([str(photos / n) for n in names], **options).digest()

    one = digest("a.png", "b.png")
    assert one == digest("a.png", "b.png")
    others = {
        digest("b.png", "a.png"),
        digest("a.png"),
        digest("a.png", "b.png", asked=True, question="?"),
    }
    assert len(others | {one}) == 4
