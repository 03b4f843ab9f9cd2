"""One file from many jobs: each example once and in order, however they end."""

import contextlib
import functools
import json
import os
import pathlib

import pytest
import tiny_captions
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_captions import BATCH_SIZE, LENGTHS, NUM_IMAGES, ONE_DEVICE

from vit22b_transfer import UserError, cli
from vit22b_transfer.inference import decoding, infer
from vit22b_transfer.inference.prediction_files import PredictionFiles, read_lines
from vit22b_transfer.inference.prediction_shards import ShardFiles, merge_file
from vit22b_transfer.partitioning.rules import Partitioning

TOTAL, BLOCK = 11, 2


def line(index):
    return {"index": index, "prediction": f"text {index}", "score": -0.5}


def files(folder, **options):
    facts = {"num_examples": TOTAL}
    return PredictionFiles(str(folder / "out.jsonl"), facts, **options)


def block(number):
    return [line(i) for i in range(number * BLOCK, min(TOTAL, (number + 1) * BLOCK))]


def run_shard(folder, index, count, *, batches, cut):
    """A shard that is killed after some batches, in the middle of the next."""
    shards = ShardFiles(files(folder))
    if files(folder).is_complete():
        return
    with shards.entered(index, count) as writer, contextlib.ExitStack() as stack:
        mine = [n for n in shards.missing(BLOCK, TOTAL) if n % count == index]
        out = stack.enter_context(writer()) if mine else None
        for number in mine[:batches]:
            out.write(block(number))
        if mine[batches:]:
            whole = json.dumps(line(mine[batches] * BLOCK)).encode() + b"\n"
            out._file.write(whole[:cut])
            return
    shards.merge(TOTAL)


def run_whole(folder, hosts, *, batches, cut):
    """A run of several hosts, all killed at once, each in the middle of a line."""
    parts = [files(folder, host=host, num_hosts=hosts) for host in range(hosts)]
    with parts[0].lock():
        if parts[0].is_complete():
            return
        ShardFiles(parts[0]).check_none_writes()
        parts[0].recover(BLOCK)
        begun = parts[0].begun(BLOCK)
        todo = [n for n in range(-(-TOTAL // BLOCK)) if n not in begun]
        each = BLOCK // hosts
        for host, part in enumerate(parts):
            with part.writer() as out:
                for number in todo[:batches]:
                    out.write(block(number)[host * each : (host + 1) * each])
                if todo[batches:]:
                    out._file.write(b'{"index": 1, "pred'[:cut])
        if not todo[batches:]:
            parts[0].merge()


session = st.tuples(
    st.sampled_from(["shard", "whole"]),
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(0, 60),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(session, max_size=6), st.integers(1, 3))
def test_whatever_is_killed_when_all_examples_are_there_once_and_in_order(
    tmp_path_factory, sessions, last
):
    folder = tmp_path_factory.mktemp("killed")
    for kind, index, count, batches, cut in sessions:
        if kind == "shard":
            run_shard(folder, index % count, count, batches=batches, cut=cut)
        else:
            run_whole(folder, min(count, BLOCK), batches=batches, cut=cut)
    for index in range(last):
        run_shard(folder, index, last, batches=99, cut=0)
    path = folder / "out.jsonl"
    expected = "".join(json.dumps(line(i)) + "\n" for i in range(TOTAL))
    assert path.read_text() == expected
    assert sorted(os.listdir(folder)) == ["out.jsonl", "out.jsonl.run.json"]
    record = json.loads((folder / "out.jsonl.run.json").read_text())
    assert record["summary"]["num_examples"] == TOTAL


def test_a_started_batch_is_never_made_again_by_another_number_of_shards(tmp_path):
    run_shard(tmp_path, 0, 2, batches=2, cut=0)  # batches 0 and 2
    shards = ShardFiles(files(tmp_path))
    assert shards.missing(BLOCK, TOTAL) == [1, 3, 4, 5]
    # 1, and of 4 the first of its two lines.
    run_shard(tmp_path, 1, 3, batches=1, cut=999)
    assert shards.missing(BLOCK, TOTAL) == [3, 4, 5]
    whole = files(tmp_path)
    assert whole.recover(BLOCK).num_lines == 6
    assert whole.begun(BLOCK) == [0, 1, 2]


def test_a_shard_and_the_whole_keep_each_other_out(tmp_path, monkeypatch):
    from vit22b_transfer.inference import prediction_shards

    monkeypatch.setattr(prediction_shards, "_WAITS", (0.001,))
    shards = ShardFiles(files(tmp_path))
    with shards.entered(0, 2):
        with shards.entered(1, 2):
            pass
        with pytest.raises(UserError, match="shard-00000-of-00002 is in use"):
            shards.entered(0, 2).__enter__()
        with files(tmp_path).lock(), pytest.raises(UserError, match="is in use"):
            shards.check_none_writes()
    with files(tmp_path).lock(), pytest.raises(UserError, match="out.jsonl is in use"):
        shards.entered(0, 2).__enter__()


def test_what_was_killed_in_merging_is_gone_after_the_next_start(tmp_path):
    (tmp_path / ".out.jsonl.abcdefgh.unfinished").write_text("{")
    for index in range(2):
        run_shard(tmp_path, index, 2, batches=9, cut=0)
    names = ["out.jsonl", "out.jsonl.run.json"]
    assert sorted(os.listdir(tmp_path)) == names
    # Killed when all was in place but the parts were not removed yet.
    (tmp_path / "out.jsonl.shard-00000-of-00002.000").write_text("")
    (tmp_path / ".out.jsonl.run.json.abcdefgh.unfinished").write_text("{")
    assert ShardFiles(files(tmp_path)).merge(TOTAL)["num_examples"] == TOTAL
    assert sorted(os.listdir(tmp_path)) == names


def test_merging_says_what_is_missing_and_does_it_once(tmp_path, capsys):
    path = str(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="was not begun"):
        merge_file(path)
    run_shard(tmp_path, 0, 2, batches=9, cut=0)
    with pytest.raises(UserError, match="6 of 11 examples of .* are there"):
        merge_file(path)
    shards = ShardFiles(files(tmp_path))
    with shards.entered(1, 2) as writer, writer() as out:  # killed before it merged
        for number in (1, 3, 5):
            out.write(block(number))
    assert cli.main(["merge", path]) == 0
    assert "11 predictions" in capsys.readouterr().out
    assert [found["index"] for found in read_lines(path)] == list(range(TOTAL))
    assert merge_file(path)["num_examples"] == TOTAL


# ----- Whole inferences -----------------------------------------------------------


TASK = "tiny_shards"


@pytest.fixture(scope="module", autouse=True)
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    tiny_captions.write_folder(folder)
    tiny_captions.register(TASK, folder)


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    path = tiny_captions.write_checkpoint(tmp_path_factory.mktemp("run"))
    sample = functools.partial(decoding.sample, temperature=1.5)
    model = tiny_captions.model(sample)
    return infer.restore(model, ONE_DEVICE, path, LENGTHS, BATCH_SIZE)


DATA = infer.SplitToRead(TASK, "test", LENGTHS, BATCH_SIZE)


@pytest.mark.slow
def test_shards_end_with_the_bytes_of_one_run(restored, tmp_path, capsys):
    whole = infer.predict_split(restored, DATA, output=str(tmp_path / "whole.jsonl"))
    expected = pathlib.Path(whole.path).read_bytes()
    output = str(tmp_path / "sharded.jsonl")
    # The last batch, which is not full, first; then one of no batch; then the rest.
    assert infer.predict_shard(restored, DATA, (2, 3), output=output) is None
    assert infer.predict_shard(restored, DATA, (3, 4), output=output) is None
    assert "2 of 10 examples" in capsys.readouterr().out
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{output}.shard-00000-of-00002.000")
    last = infer.predict_shard(
        restored, DATA, (0, 1), output=output, recipe="vit22b infer"
    )
    assert last is not None and last.num_examples == NUM_IMAGES
    assert pathlib.Path(output).read_bytes() == expected
    record = json.loads(pathlib.Path(f"{output}.run.json").read_text())
    assert record["made_with"]["versions"].keys() >= {"jax", "vit22b_transfer"}
    assert record["summary"]["num_bad_images"] == 1
    again = infer.predict_shard(restored, DATA, (1, 3), output=output)
    assert again is not None and again.reused


@pytest.mark.slow
def test_a_whole_run_goes_on_from_what_shards_left(restored, tmp_path):
    output = str(tmp_path / "out.jsonl")
    assert infer.predict_shard(restored, DATA, (1, 3), output=output) is None
    result = infer.predict_split(restored, DATA, output=output)
    assert result.num_resumed == BATCH_SIZE
    whole = infer.predict_split(restored, DATA, output=str(tmp_path / "whole.jsonl"))
    assert pathlib.Path(output).read_bytes() == pathlib.Path(whole.path).read_bytes()


@pytest.mark.slow
def test_what_is_drawn_depends_on_the_example_not_on_its_batch(restored, tmp_path):
    sizes = []
    for size in (BATCH_SIZE, 8):
        data = infer.SplitToRead(TASK, "test", LENGTHS, size)
        output = str(tmp_path / f"{size}.jsonl")
        infer.predict_split(restored, data, output=output, seed=3)
        sizes.append([x.get("prediction") for x in read_lines(output)])
    assert sizes[0] == sizes[1]
    assert len(set(sizes[0])) > 5


def test_shards_that_cannot_be_are_refused(tmp_path):
    arguments = dict(
        partitioning=Partitioning(data=1),
        checkpoint=str(tmp_path),
        task=TASK,
        split="test",
        feature_lengths=LENGTHS,
        batch_size=BATCH_SIZE,
        output=str(tmp_path),
    )
    with pytest.raises(UserError, match="shard 3/3: the first number is from 0"):
        infer.infer_split(tiny_captions.model(), shard=(3, 3), **arguments)
    assert cli.main(["infer", "--shard", "one", "--gin_file=x.gin"]) == 1
