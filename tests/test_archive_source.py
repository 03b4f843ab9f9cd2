"""Images and captions inside of archives, as a task's source."""

import concurrent.futures
import gzip
import io
import json
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from shell_commands import run_in_process

from vit22b_transfer import UserError, cli
from vit22b_transfer.data import images, packed_images, packed_texts
from vit22b_transfer.data.archive_source import ArchiveSource
from vit22b_transfer.data.records import MissingFilesError

CAPTIONS = [["a red one", "red"], ["a green one"], ["blue", "the blue one"]]


def picture(number):
    buffer = io.BytesIO()
    image = np.full((6, 8, 3), 40 * number + 20, np.uint8)
    image[..., number] = 250
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(number) for number in range(3)]


def example(number, said):
    def of(values):
        values = [value.encode() for value in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    numbers = tf.train.Int64List(value=[number])
    features = {name: of(values) for name, values in said.items()}
    features["image_id"] = tf.train.Feature(int64_list=numbers)
    image = tf.train.BytesList(value=[PICTURES[number]])
    features["image/encoded"] = tf.train.Feature(bytes_list=image)
    return tf.train.Example(features=tf.train.Features(feature=features))


def write_tar(path, said):
    with tarfile.open(path, "w") as archive:
        for number, values in enumerate(said):
            content = json.dumps({**values, "image_id": number}).encode()
            for name, data in (("png", PICTURES[number]), ("json", content)):
                member = tarfile.TarInfo(f"shard/{number:04d}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_parquet(path, said):
    rows = [
        {"image": {"bytes": PICTURES[n], "path": None}, "image_id": n, **values}
        for n, values in enumerate(said)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_tfrecord(path, said):
    with tf.io.TFRecordWriter(str(path)) as file:
        for number, values in enumerate(said):
            file.write(example(number, values).SerializeToString())


def write_array_record(path, said):
    writer = ArrayRecordWriter(str(path), "group_size:2")
    for number, values in enumerate(said):
        writer.write(example(number, values).SerializeToString())
    writer.close()


WRITERS = {
    "pairs.tar": write_tar,
    "pairs.parquet": write_parquet,
    "pairs.tfrecord-00000-of-00001": write_tfrecord,
    "pairs.array_record": write_array_record,
}


def read(source, split, order=None):
    order = range(source.num_records(split)) if order is None else order
    numbers = tf.data.Dataset.from_tensor_slices(np.array(order, np.int64))
    return list(source.records(split, numbers).as_numpy_iterator())


@pytest.mark.parametrize("name", WRITERS)
def test_every_archive_gives_the_same_captions_and_images_in_any_order(name, tmp_path):
    WRITERS[name](tmp_path / name, [{"caption": texts} for texts in CAPTIONS])
    source = ArchiveSource({"train": tmp_path / name, "test": [tmp_path / name]})
    expected = [(n, text) for n, texts in enumerate(CAPTIONS) for text in texts]
    assert source.num_records("train") == 5 and source.num_records("test") == 3
    for place in (4, 0, 3):
        (found,) = read(source, "train", [place])
        number, text = expected[place]
        assert found["image"] == PICTURES[number]
        assert found["image_id"] == str(number).encode()
        assert found["target"] == text.encode()
        assert found["references"].tolist() == [x.encode() for x in CAPTIONS[number]]
        assert found["image_problem"] == b""
    assert [x["target"] for x in read(source, "test")] == [
        texts[0].encode() for texts in CAPTIONS
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_questions_have_the_answer_that_is_rewarded_most(name, tmp_path):
    answers = [["cat", "dog", "dog"], ["yes"], ["two", "2", "3"]]
    said = [{"question": ["What?"], "answers": texts} for texts in answers]
    if not name.startswith("pairs.tf") and "array" not in name:
        said = [{**values, "question": "What?"} for values in said]
    WRITERS[name](tmp_path / name, said)
    source = ArchiveSource({"train": tmp_path / name})
    records = [source.record("train", n) for n in range(source.num_records("train"))]
    assert [record.question for record in records] == ["What?"] * 3
    assert [record.references for record in records] == [*map(tuple, answers)]
    assert [record.target for record in records] == ["dog", "yes", "two"]


def test_a_text_file_in_a_tar_is_a_caption_and_patterns_are_sorted(tmp_path):
    for number in (1, 0):
        with tarfile.open(tmp_path / f"part-{number}.tar", "w") as archive:
            for name, data in (("k.txt", b" one \n"), ("k.png", PICTURES[number])):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    source = ArchiveSource({"test": str(tmp_path / "part-*.tar")})
    found = read(source, "test")
    assert [x["image"] for x in found] == PICTURES[:2]
    assert {x["target"] for x in found} == {b"one"}


def test_a_bad_entry_is_named_or_counted(tmp_path):
    texts = [{"caption": ["x" * (packed_texts.MOST_BYTES + 1)]}, {"caption": [" "]}]
    path = tmp_path / "pairs.tfrecord"
    write_tfrecord(path, [*texts, {"caption": ["good"]}])
    with pytest.raises(UserError, match=r"0 of .*longer than 65,536 characters"):
        ArchiveSource({"train": path}).num_records("train")
    source = ArchiveSource({"train": path}, on_bad_record="skip")
    assert source.num_records("train") == 1
    assert source.report()["train"] == {
        "entry that cannot be used": 1,
        "image without a text": 1,
    }


def test_malformed_json_is_the_problem_of_its_image_alone(tmp_path):
    with tarfile.open(tmp_path / "pairs.tar", "w") as archive:
        for number, text in enumerate([b'{"caption": ', b'{"caption": "good"}']):
            for name, data in (("png", PICTURES[number]), ("json", text)):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    files = {"train": tmp_path / "pairs.tar"}
    with pytest.raises(UserError, match=r"0.png of .*pairs.tar: .*malformed JSON"):
        ArchiveSource(files).num_records("train")
    source = ArchiveSource(files, on_bad_record="skip")
    assert source.record("train", 0).target == "good"
    assert source.report()["train"] == {"entry that cannot be used": 1}


def test_what_is_no_archive_is_one_clear_error(tmp_path):
    def refused(path, match, error=UserError):
        with pytest.raises(error, match=match):
            ArchiveSource({"train": path}).num_records("train")

    refused(tmp_path / "no-*.tar", "there is no archive", MissingFilesError)
    (tmp_path / "a.zip").write_bytes(b"PK")
    refused(tmp_path / "a.zip", r"no archive that is read: \.tar, \.parquet, \.tfrec")
    whole = tmp_path / "whole.tfrecord"
    write_tfrecord(whole, [{"caption": ["a"]}])
    content = whole.read_bytes()
    for name, data, match in (
        ("cut", content[:-3], "cut off, or no TFRecord file: a record of"),
        ("short", content + b"\1\2", "damaged, cut off"),
        ("huge", struct.pack("<QI", 2**60, 0) + content, "1,152,921,504,606,846,976"),
        ("packed", gzip.compress(content), "compressed; unpack it first"),
        ("other", content[:12] + b"\xff" * (len(content) - 12), "no tf.train.Example"),
        ("empty", b"", "holds no image"),
    ):
        path = tmp_path / f"{name}.tfrecord"
        path.write_bytes(data)
        refused(path, match)
    with tf.io.TFRecordWriter(str(tmp_path / "text.tfrecord")) as file:
        file.write(tf.train.Example().SerializeToString())
    refused(tmp_path / "text.tfrecord", "record 0 has no image: .* among no features")
    (tmp_path / "a.array_record").write_bytes(b"none")
    refused(tmp_path / "a.array_record", "holds no image")
    write_array_record(tmp_path / "b.array_record", [{"caption": ["a"]}] * 3)
    content = bytearray((tmp_path / "b.array_record").read_bytes())
    for name, data in (
        ("cut", content[:-9]),
        ("changed", content[:120] + b"\xff" * 20 + content[140:]),
    ):
        (tmp_path / f"{name}.array_record").write_bytes(data)
        refused(tmp_path / f"{name}.array_record", "holds no image|no readable")


def test_a_first_record_as_long_as_gzips_mark_reads_is_no_compressed_file(tmp_path):
    path = tmp_path / "pairs.tfrecord"
    long = 0x8B1F
    for length in range(long - 200, long):
        one = example(0, {"caption": ["a"], "other": ["x" * length]})
        if one.ByteSize() == long:
            break
    with tf.io.TFRecordWriter(str(path)) as file:
        file.write(one.SerializeToString())
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    assert ArchiveSource({"train": path}).num_records("train") == 1


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.array_record"])
def test_many_threads_read_one_archive(name, tmp_path):
    path = tmp_path / name
    # So many that a process whose threads all ask Arrow at once often dies.
    rng = np.random.default_rng(0)
    rows = [rng.bytes(10_000) for _ in range(400)]
    if name == "pairs.parquet":
        table = pyarrow.table({"image": rows})
        pyarrow.parquet.write_table(table, path, row_group_size=20)
        places = [f"parquet:{number}::{path}" for number in range(400)]
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[row]))
            features = tf.train.Features(feature={"image": image})
            writer.write(tf.train.Example(features=features).SerializeToString())
        writer.close()
        places = [f"arrayrecord:{number}::{path}" for number in range(400)]
    order = rng.integers(0, 400, 1500)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        found = threads.map(packed_images.read, [places[n] for n in order])
        assert all(image == rows[n] for image, n in zip(found, order, strict=True))


def test_a_damaged_row_group_is_an_error_of_its_images(tmp_path):
    path = tmp_path / "pairs.parquet"
    image = np.random.default_rng(0).bytes(9_000)
    table = pyarrow.table({"image": [image] * 2})
    pyarrow.parquet.write_table(table, path, row_group_size=1, compression="zstd")
    content = bytearray(path.read_bytes())
    content[2_000:3_000] = bytes(1_000)
    content[4:40] = bytes(36)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"pairs.parquet is damaged"):
        packed_images.read(f"parquet:0::{path}")
    assert packed_images.read(f"parquet:1::{path}") == image


def test_an_archive_that_changed_since_is_an_error_of_that_image(tmp_path):
    path = tmp_path / "pairs.tfrecord"
    write_tfrecord(path, [{"caption": ["a"]}, {"caption": ["b"]}])
    source = ArchiveSource({"train": path})
    place = source.record("train", 1).image_path
    assert packed_images.read(place) == PICTURES[1]
    assert images.decode(packed_images.read(place)).shape == (6, 8, 3)
    path.write_bytes(path.read_bytes()[:-90])
    (found,) = read(source, "train", [1])
    assert found["image"] == b"" and b"no tf.train.Example" in found["image_problem"]


def test_data_bench_tells_where_the_time_goes(tmp_path, capsys, monkeypatch):
    said = [{"caption": texts} for texts in CAPTIONS]
    write_parquet(tmp_path / "pairs.parquet", said)
    monkeypatch.setenv("MY_ARCHIVES", str(tmp_path / "*.parquet"))
    monkeypatch.setenv("VIT22B_VOCABULARY", "bytes")
    benched = ["data-bench", "my_archives", "--batch_size", "4", "--size", "16"]
    cli.main([*benched, "--seconds", "0.2"])
    out = " ".join(capsys.readouterr().out.split())
    shares = [int(share) for share in re.findall(r"(\d+)%", out)]
    assert len(shares) == 5 and shares[-1] == 100
    assert 95 <= sum(shares[:-1]) < 500  # tiny pictures: parts are timed apart
    read, speed = re.search(r"(\d+) examples read: ([\d,]+) a second", out).groups()
    assert int(read) % 4 == 0 and int(speed.replace(",", "")) > 0
    assert cli.main([*benched, "--seconds", "0"]) == 1
    assert "it is to be above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_archives_are_learned_from_as_the_docs_say(tmp_path):
    said = [{"caption": texts} for texts in CAPTIONS]
    write_tar(tmp_path / "pairs-train-0.tar", said)
    write_parquet(tmp_path / "pairs-test.parquet", said)
    text = (Path(__file__).parent.parent / "docs/data.md").read_text()
    block = re.search(
        r"<!-- elsewhere: tests/test_archive_source.py -->\n```bash\n(.*?)```",
        text,
        re.DOTALL,
    )
    run_in_process(block[1], tmp_path)
    assert (tmp_path / "my_model" / "checkpoint_20").is_dir()
