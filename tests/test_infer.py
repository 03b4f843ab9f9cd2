"""Prediction files: order, resuming, refusing, several hosts; and whole inferences."""

import collections
import concurrent.futures
import contextlib
import copy
import functools
import io
import json
import os
import pathlib
import shutil
import threading
import time

import full_disks
import jax
import numpy as np
import pytest
import rich.console
import seqio
import tiny_captions
from tiny_captions import BAD_IMAGE, BATCH_SIZE, LENGTHS, NUM_IMAGES, ONE_DEVICE

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import fingerprints
from vit22b_transfer.host import progress as progress_module
from vit22b_transfer.host.progress import Progress
from vit22b_transfer.inference import decoding, infer
from vit22b_transfer.inference.prediction_files import (
    PredictionFiles,
    Recovered,
    read_lines,
)
from vit22b_transfer.partitioning.rules import Partitioning

TASK = "tiny_infer"


# ----- The files alone ------------------------------------------------------------


def line(index, prediction="a cat"):
    return {"index": index, "prediction": prediction, "score": -0.5}


def files(folder, *, host=0, num_hosts=1, **fingerprint):
    path = str(folder / "out.jsonl")
    return PredictionFiles(
        path, {"step": 1} | fingerprint, host=host, num_hosts=num_hosts
    )


def write(output, *blocks):
    with output.writer() as writer:
        for block in blocks:
            writer.write([line(i) for i in block])


def indices(path):
    return [found["index"] for found in read_lines(path)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_complete_file_stands_alone_with_its_record(tmp_path):
    output = files(tmp_path)
    assert not output.is_complete()
    assert output.recover(4) == Recovered()
    write(output, range(4), range(4, 6))
    summary = output.merge()
    assert names(tmp_path) == ["out.jsonl", "out.jsonl.run.json"]
    assert indices(output.path) == list(range(6))
    assert summary == {"num_examples": 6, "num_bad_images": 0, "num_empty": 0}
    assert files(tmp_path).is_complete()
    assert files(tmp_path).summary() == summary


def test_a_cut_last_line_is_dropped_and_counted(tmp_path):
    output = files(tmp_path)
    output.recover(2)
    write(output, range(4), range(4, 6))
    part = tmp_path / "out.jsonl.host-00000-of-00001"
    part.write_bytes(part.read_bytes()[:-10])
    again = files(tmp_path)
    assert not again.is_complete()
    assert again.recover(2) == Recovered(num_lines=4, num_dropped=2)
    assert again.begun(1) == [0, 1, 2, 3]
    write(again, range(4, 6))
    again.merge()
    assert indices(again.path) == list(range(6))


@pytest.mark.parametrize("rest", [b'{"index": 4}', b"\0\0\0\n", b'{"ind', b"[1]\n"])
def test_nothing_is_believed_without_its_end_of_line_and_index(tmp_path, rest):
    output = files(tmp_path)
    output.recover(2)
    write(output, range(4))
    with open(tmp_path / "out.jsonl.host-00000-of-00001", "ab") as file:
        file.write(rest)
    assert files(tmp_path).recover(2) == Recovered(num_lines=4, num_dropped=1)


def test_only_whole_batches_are_kept(tmp_path):
    output = files(tmp_path)
    output.recover(4)
    write(output, range(4), range(4, 7))
    assert files(tmp_path).recover(4) == Recovered(num_lines=4, num_dropped=3)


def test_hosts_write_their_rows_and_the_merge_puts_them_in_order(tmp_path):
    hosts = [files(tmp_path, host=host, num_hosts=2) for host in range(2)]
    assert not any(host.is_complete() for host in hosts)
    hosts[0].recover(4)
    # Batches of four of which each host has two rows; the last batch has three rows.
    write(hosts[1], [2, 3], [6])
    write(hosts[0], [0, 1], [4, 5])
    hosts[0].merge()
    assert indices(hosts[0].path) == list(range(7))
    assert all(host.is_complete() for host in hosts)


def test_a_stopped_run_goes_on_with_another_number_of_hosts(tmp_path):
    hosts = [files(tmp_path, host=host, num_hosts=2) for host in range(2)]
    hosts[0].recover(4)
    write(hosts[0], [0, 1], [4, 5], [8, 9])  # one batch ahead of the other host
    write(hosts[1], [2, 3], [6, 7])
    alone = files(tmp_path)
    assert alone.recover(4) == Recovered(num_lines=8, num_dropped=2)
    write(alone, [8, 9, 10])
    alone.merge()
    assert indices(alone.path) == list(range(11))


def test_a_stop_between_gathering_and_removing_loses_and_doubles_nothing(tmp_path):
    output = files(tmp_path)
    output.recover(2)
    write(output, range(4))
    part = tmp_path / "out.jsonl.host-00000-of-00001"
    shutil.copy(part, tmp_path / "out.jsonl.begun")
    assert files(tmp_path).recover(2) == Recovered(num_lines=4)
    write(output, range(4, 6))
    # Killed after the merged file was put in place, before that was recorded.
    shutil.copy(tmp_path / "out.jsonl.begun", output.path)
    again = files(tmp_path)
    assert not again.is_complete()
    assert again.recover(2) == Recovered(num_lines=6)
    write(again)
    again.merge()
    assert indices(again.path) == list(range(6))


def test_a_missing_host_or_example_is_an_error_not_a_short_file(tmp_path):
    hosts = [files(tmp_path, host=host, num_hosts=2) for host in range(2)]
    hosts[0].recover(4)
    write(hosts[0], [0, 1], [4, 5])
    with pytest.raises(ValueError, match="host-00001-of-00002 is missing"):
        hosts[0].merge()
    write(hosts[1], [6, 7])
    with pytest.raises(ValueError, match="example 2 is in none of"):
        hosts[0].merge()
    assert not os.path.exists(hosts[0].path)


def test_what_another_run_began_or_finished_is_not_overwritten(tmp_path):
    output = files(tmp_path, decoding={"method": "greedy"})
    output.recover(2)
    write(output, range(2))
    other = files(tmp_path, decoding={"method": "beam_search"}, step=2)
    for finish in (lambda: None, output.merge):
        finish()
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match="step was 1 and is 2") as error:
            other.is_complete()
        assert "'greedy'} and is {'method': 'beam_search'}" in str(error.value)
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_file_of_unknown_origin_is_not_overwritten(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="Nothing is overwritten"):
        files(tmp_path).is_complete()


def test_a_complete_file_that_was_edited_is_not_reused(tmp_path):
    output = files(tmp_path)
    output.recover(2)
    write(output, range(2))
    output.merge()
    with open(output.path, "a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="was changed or removed"):
        files(tmp_path).is_complete()


def test_two_processes_cannot_write_one_file(tmp_path):
    output = files(tmp_path)
    with output.lock():
        output.recover(2)
        with output.writer() as writer:
            writer.write([line(0)])
            with pytest.raises(ValueError, match="out.jsonl is in use: process"):
                files(tmp_path).lock().__enter__()
            writer.write([line(1)])
        assert output.merge()["num_examples"] == 2
    assert names(tmp_path) == ["out.jsonl", "out.jsonl.run.json"]


def test_of_many_that_start_at_once_one_writes_and_all_others_get_a_line(tmp_path):
    """Whoever comes late finds the file complete, and takes it as it is."""

    def infer_once(folder, together):
        output = files(folder)
        together.wait()
        with output.lock():
            if output.is_complete():
                return "reused"
            output.recover(2)
            with output.writer() as writer:
                for index in range(len(output.begun(1)), 6):
                    writer.write([line(index)])
                    time.sleep(0)
            output.merge()
        return "made"

    outcomes = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for number in range(30):
            folder, together = tmp_path / str(number), threading.Barrier(4)
            folder.mkdir()
            runs = [pool.submit(infer_once, folder, together) for _ in range(4)]
            for made in runs:
                try:
                    outcomes[made.result()] += 1
                except UserError as error:
                    assert "out.jsonl is in use" in str(error)
                    assert "\n" not in str(error)
                    outcomes["refused"] += 1
            assert names(folder) == ["out.jsonl", "out.jsonl.run.json"]
            assert indices(str(folder / "out.jsonl")) == list(range(6))
    assert outcomes["made"] == 30 and outcomes["refused"] > 30


def test_lines_for_a_file_that_was_removed_are_an_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError), files(folder).writer() as writer:
        writer.write([line(0)])
        shutil.rmtree(folder)
        writer.write([line(1)])


@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"[]", b"{}", b'{"summary": 1}'])
def test_a_damaged_record_is_named_and_nothing_is_touched(content, tmp_path):
    (tmp_path / "out.jsonl.run.json").write_bytes(content)
    output = files(tmp_path)
    with output.lock(), pytest.raises(UserError, match="run.json.* remove .*out.jsonl"):
        output.is_complete()
    assert names(tmp_path) == ["out.jsonl.run.json"]


def test_empty_predictions_and_unread_images_are_counted_apart(tmp_path):
    output = files(tmp_path)
    output.recover(2)
    bad = {"index": 1, "error": "truncated"}
    with output.writer() as writer:
        writer.write([line(0, " "), bad, line(2)])
    assert output.merge() == {"num_examples": 3, "num_bad_images": 1, "num_empty": 1}


def test_reading_names_a_line_that_is_no_prediction(tmp_path):
    lines = [json.dumps(line(0)), json.dumps(line(2))]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 2: a prediction with index 1"):
        list(read_lines(str(tmp_path / "p.jsonl")))


# ----- Fingerprints and progress --------------------------------------------------


def test_decode_settings_are_seen_through_any_binding():
    bound = functools.partial(decoding.beam_search, num_beams=3)

    def wrapped_as_gin_does(*args, **kwargs):
        return bound(*args, **kwargs, alpha=0.5)

    expected = {"method": "beam_search", "num_beams": 3, "alpha": 0.5}
    assert infer.decode_settings(wrapped_as_gin_does) == expected
    assert infer.decode_settings(decoding.greedy) == {"method": "greedy"}
    nucleus = functools.partial(decoding.sample, top_k=50, top_p=0.9)
    assert infer.decode_settings(nucleus)["top_p"] == 0.9


def test_parameter_digests_see_every_change_and_no_mesh():
    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(8, 4)).astype(np.float32),
        "b": rng.normal(size=4).astype(np.float32).astype(jax.numpy.bfloat16),
    }
    digest = fingerprints.parameters_digest(params)
    mesh = Partitioning(data=4, model=2)
    sharded = jax.device_put(params, mesh.batch_sharding(1))
    assert fingerprints.parameters_digest(sharded) == digest
    a = params["a"]
    for changed in (-a, a[::-1], a.T, a.reshape(4, 8), np.nextafter(a, 1)):
        other = fingerprints.parameters_digest({**params, "a": changed.copy()})
        assert other != digest
    renamed = {"c": params["a"], "b": params["b"]}
    assert fingerprints.parameters_digest(renamed) != digest


def test_progress_is_a_bar_on_terminals_and_silent_lines_elsewhere():
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=100)
    with Progress(terminal, "vqa test", total=10, done=4) as progress:
        progress.show(8)
        assert progress.report() == "8/10 examples"
        progress.show(12)
    assert "10/10 examples" in screen.getvalue() and "ETA 0:" in screen.getvalue()
    screen = io.StringIO()
    with Progress(rich.console.Console(file=screen), "x", total=None) as progress:
        progress.show(3)
        assert progress.report() == "3 examples"
    assert "\x1b" not in screen.getvalue()


def test_progress_in_lines_ends_at_the_full_number(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    with Progress(rich.console.Console(file=screen), "x", total=19) as progress:
        progress.show(8)
        monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 1e9)
        progress.show(16)
        progress.show(24)
    first, last = screen.getvalue().splitlines()
    assert first.startswith("x: 8/19 examples")
    assert last.startswith("x: 19/19 examples")


def test_one_progress_stands_below_another_while_it_lasts():
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=100)
    with Progress(terminal, "training", total=10) as outer:
        with Progress(terminal, "generating", total=3, beside=outer) as inner:
            inner.show(3)
            outer._bar.refresh()
            terminal.print("a line")
        outer.show(10)
        assert [task.description for task in outer._bar.tasks] == ["training"]
    assert "3/3 examples" in screen.getvalue()
    assert "10/10 examples" in screen.getvalue()


# ----- Whole inferences -----------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    tiny_captions.write_folder(folder)
    return tiny_captions.register(TASK, folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_captions.write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def restored(checkpoint):
    return infer.restore(
        tiny_captions.model(), ONE_DEVICE, checkpoint, LENGTHS, BATCH_SIZE
    )


def changed(restored, **fields):
    """The same with other fields, and what it has compiled."""
    result = copy.copy(restored)
    result.__dict__.update(fields)
    result.__dict__.pop("params_digest", None)
    return result


DATA = infer.SplitToRead(TASK, "test", LENGTHS, BATCH_SIZE)


@pytest.fixture(scope="module")
def complete(restored, tmp_path_factory):
    """An uninterrupted run in a directory."""
    folder = tmp_path_factory.mktemp("complete")
    return infer.predict_split(restored, DATA, output=str(folder))


def all_lines(path):
    return [json.loads(text) for text in pathlib.Path(path).read_text().splitlines()]


def test_a_split_becomes_one_line_per_example_in_order(complete):
    assert os.path.basename(complete.path) == f"{TASK}-test-checkpoint_7.jsonl"
    lines = all_lines(complete.path)
    # Ten images are three batches of four: no line is left of the last batch's filling.
    assert [found["index"] for found in lines] == list(range(NUM_IMAGES))
    assert [found["image_id"] for found in lines] == [
        f"{number}.png" for number in range(NUM_IMAGES)
    ]
    first = lines[0]
    assert first["prompt"] == "caption"
    assert first["references"] == ["näme 0", "a dog"]
    assert first["target"] == "näme 0"
    assert isinstance(first["prediction"], str) and first["score"] < 0
    assert max(len(json.dumps(found)) for found in lines) < 500, "pixels in a line"


def test_an_image_that_cannot_be_read_has_an_error_and_no_prediction(complete):
    lines = all_lines(complete.path)
    bad = lines[BAD_IMAGE]
    assert not bad.keys() & {"prediction", "score"} and bad["error"]
    assert bad["references"]
    assert not any("error" in found for found in lines if found is not bad)
    assert complete.num_bad_images == 1 and complete.num_examples == NUM_IMAGES


def test_predictions_are_those_of_the_model_on_each_example_alone(restored, complete):
    from vit22b_transfer.data import batches

    predictions = []
    predict = jax.jit(restored.model.predict_batch_with_aux)
    for batch in batches.eval_batches(
        TASK,
        "test",
        feature_lengths=LENGTHS,
        converter_cls=restored.model.FEATURE_CONVERTER_CLS,
        batch_size=1,
        partitioning=ONE_DEVICE,
    ):
        tokens, aux = predict(restored.params, batch.features)
        text = restored.model.output_vocabulary.decode(tokens[0].tolist())
        predictions.append((text, float(aux["scores"][0])))
    for found, (text, score) in zip(all_lines(complete.path), predictions, strict=True):
        if "error" not in found:
            assert found["prediction"] == text
            np.testing.assert_allclose(found["score"], score, atol=1e-4)


def test_a_trial_on_the_first_examples_is_never_taken_for_the_whole(
    restored, complete, tmp_path, capsys
):
    def first(count):
        return infer.SplitToRead(TASK, "test", LENGTHS, BATCH_SIZE, max_examples=count)

    trial = infer.predict_split(restored, first(6), output=str(tmp_path))
    assert os.path.basename(trial.path) == f"{TASK}-test-checkpoint_7-first_6.jsonl"
    assert all_lines(trial.path) == all_lines(complete.path)[:6]
    assert trial.num_examples == 6
    record = json.loads(pathlib.Path(f"{trial.path}.run.json").read_text())
    assert record["fingerprint"]["max_examples"] == 6
    assert record["fingerprint"]["num_examples"] == NUM_IMAGES
    said = f"6 predictions in {trial.path}, of the first 6 of 10 examples alone"
    assert said in capsys.readouterr().out
    with pytest.raises(UserError, match="max_examples was 6 and is None"):
        infer.predict_split(restored, DATA, output=trial.path)
    with pytest.raises(UserError, match="max_examples was None and is 6"):
        infer.predict_split(restored, first(6), output=complete.path)
    # A limit that is not reached is none.
    folder = os.path.dirname(complete.path)
    whole = infer.predict_split(restored, first(NUM_IMAGES), output=folder)
    assert whole.reused and whole.path == complete.path


@pytest.mark.parametrize("batches_written,cut", [(0, 1), (1, 0), (2, 7), (3, 0)])
def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(
    restored, complete, tmp_path, batches_written, cut
):
    whole = pathlib.Path(complete.path).read_bytes()
    lines = whole.splitlines(keepends=True)
    begun = b"".join(lines[: batches_written * BATCH_SIZE])
    begun += b"".join(lines[batches_written * BATCH_SIZE :])[:cut]
    path = tmp_path / "out.jsonl"
    record = json.loads(pathlib.Path(f"{complete.path}.run.json").read_text())
    record = {"fingerprint": record["fingerprint"]}
    pathlib.Path(f"{path}.run.json").write_text(json.dumps(record))
    pathlib.Path(f"{path}.host-00000-of-00001").write_bytes(begun)
    result = infer.predict_split(restored, DATA, output=str(path))
    assert path.read_bytes() == whole
    assert result.num_resumed == min(batches_written, 2) * BATCH_SIZE
    assert names(tmp_path) == ["out.jsonl", "out.jsonl.run.json"]


def test_a_full_disk_keeps_the_lines_and_the_same_command_goes_on(
    restored, complete, tmp_path, capfd
):
    whole = pathlib.Path(complete.path).read_bytes()
    lines = whole.splitlines(keepends=True)
    num_kept = BATCH_SIZE + 1
    with full_disks.full_disk() as fill:
        fill(len(b"".join(lines[:num_kept])) + 3)
        kept = f"{num_kept} lines of out.jsonl are kept"
        with full_disks.refused(capfd, str(tmp_path), full_disks.FULL, kept):
            infer.predict_split(restored, DATA, output=str(tmp_path / "out.jsonl"))
    result = infer.predict_split(restored, DATA, output=str(tmp_path / "out.jsonl"))
    assert result.num_resumed == BATCH_SIZE
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_an_interrupted_run_goes_on_where_it_stopped(restored, complete, tmp_path):
    class ByteVocabulary(seqio.ByteVocabulary):
        """Fails in the seventh example's detokenisation."""

        decoded = 0

        def decode(self, ids):
            type(self).decoded += 1
            if type(self).decoded == 7:
                raise KeyboardInterrupt
            return super().decode(ids)

    restored = changed(restored, model=tiny_captions.model(vocabulary=ByteVocabulary()))
    with pytest.raises(KeyboardInterrupt):
        infer.predict_split(restored, DATA, output=str(tmp_path))
    assert not (tmp_path / os.path.basename(complete.path)).exists()
    # The third batch only was lost; examples 4, 5 and 7 are decoded again.
    ByteVocabulary.decoded = 100
    result = infer.predict_split(restored, DATA, output=str(tmp_path))
    assert result.num_resumed == BATCH_SIZE
    ours = pathlib.Path(result.path).read_bytes()
    assert ours == pathlib.Path(complete.path).read_bytes()


def test_a_complete_run_is_reused_and_said_to_be(restored, complete, capsys):
    before = os.stat(complete.path).st_mtime_ns
    again = infer.predict_split(restored, DATA, output=os.path.dirname(complete.path))
    assert again.reused and again.num_examples == NUM_IMAGES
    assert os.stat(complete.path).st_mtime_ns == before
    assert "reusing" in capsys.readouterr().out


def test_another_model_or_setting_is_refused_and_harms_nothing(
    restored, complete, tmp_path_factory
):
    before = pathlib.Path(complete.path).read_bytes()
    folder = tmp_path_factory.mktemp("other")
    # Same step, same name, other values.
    path = tiny_captions.write_checkpoint(folder, seed=1)
    other = infer.restore(restored.model, ONE_DEVICE, path, LENGTHS, BATCH_SIZE)
    with pytest.raises(ValueError, match="parameters was"):
        infer.predict_split(other, DATA, output=complete.path)
    beams = functools.partial(decoding.beam_search, num_beams=2)
    searched = infer.RestoredModel(
        tiny_captions.model(beams), ONE_DEVICE, restored.checkpoint, restored.params
    )
    with pytest.raises(ValueError, match="decoding was {'method': 'greedy'}"):
        infer.predict_split(searched, DATA, output=complete.path)
    longer = infer.SplitToRead(TASK, "test", LENGTHS | {"inputs": 9}, BATCH_SIZE)
    with pytest.raises(ValueError, match="feature_lengths was"):
        infer.predict_split(restored, longer, output=complete.path)
    assert pathlib.Path(complete.path).read_bytes() == before


@pytest.mark.slow
def test_infer_takes_the_latest_checkpoint_and_any_mesh(checkpoint, complete, tmp_path):
    result = infer.infer_split(
        tiny_captions.model(),
        partitioning=Partitioning(data=4, model=2),
        checkpoint=os.path.dirname(checkpoint),
        task=TASK,
        split="test",
        feature_lengths=LENGTHS,
        batch_size=BATCH_SIZE,
        output=str(tmp_path / "sharded.jsonl"),
    )
    assert result.path == str(tmp_path / "sharded.jsonl")
    for ours, theirs in zip(
        all_lines(result.path), all_lines(complete.path), strict=True
    ):
        assert ours.keys() == theirs.keys()
        assert ours.get("prediction") == theirs.get("prediction")
        if "error" not in ours:
            np.testing.assert_allclose(ours["score"], theirs["score"], atol=1e-5)


@pytest.mark.slow
def test_sampled_predictions_are_a_function_of_the_seed(restored, tmp_path):
    model = tiny_captions.model(functools.partial(decoding.sample, temperature=1.5))
    sampled = infer.RestoredModel(
        model, ONE_DEVICE, restored.checkpoint, restored.params
    )
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        output = str(tmp_path / f"{name}.jsonl")
        infer.predict_split(sampled, DATA, output=output, seed=seed)
        texts.append(pathlib.Path(output).read_text())
    assert texts[0] == texts[1] != texts[2]


# ----- Refusals -------------------------------------------------------------------


@contextlib.contextmanager
def refused(message):
    with pytest.raises(ValueError, match=message):
        yield


def test_unknown_tasks_and_splits_are_refused_with_the_names_there_are(
    restored, tmp_path
):
    for data, message in (
        (infer.SplitToRead("tiny_inver", "test", LENGTHS, 4), f"Nearest: {TASK}"),
        (infer.SplitToRead(TASK, "testt", LENGTHS, 4), "it has test, train"),
    ):
        with refused(message):
            infer.predict_split(restored, data, output=str(tmp_path))
    assert names(tmp_path) == []


def test_a_task_in_another_vocabulary_is_refused(restored, tmp_path):
    other = tiny_captions.model(vocabulary=seqio.ByteVocabulary(extra_ids=5))
    with refused("has inputs in the vocabulary"):
        infer.predict_split(
            infer.RestoredModel(other, ONE_DEVICE, "checkpoint_7", restored.params),
            DATA,
            output=str(tmp_path),
        )


def test_an_output_that_cannot_be_written_is_refused(restored, tmp_path):
    (tmp_path / "file").write_text("")
    with refused("cannot be written"):
        infer.predict_split(restored, DATA, output=str(tmp_path / "file" / "out"))


def test_a_batch_that_does_not_divide_by_the_mesh_is_refused(checkpoint, tmp_path):
    with refused("batch_size 4 does not divide by 8"):
        infer.infer_split(
            tiny_captions.model(),
            partitioning=Partitioning(data=8, model=1),
            checkpoint=checkpoint,
            task=TASK,
            split="test",
            feature_lengths=LENGTHS,
            batch_size=BATCH_SIZE,
            output=str(tmp_path),
        )


def test_scores_that_are_not_numbers_name_the_example(restored, tmp_path):
    broken = jax.tree.map(lambda p: p * np.nan, restored.params)
    broken = changed(restored, params=broken)
    with pytest.raises(FloatingPointError, match="example 0 .image '0.png'."):
        infer.predict_split(broken, DATA, output=str(tmp_path))
