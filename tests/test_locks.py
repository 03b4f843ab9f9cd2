"""One writes at a time: who is refused, what is said, and what a killed one leaves."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import Data, run

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.host import locks, whole_files

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys, time
from vit22b_transfer.host import locks
with locks.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_held_place_is_refused_with_who_holds_it_until_it_is_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with pytest.raises(UserError) as error, locks.held(str(tmp_path)):
                pass
            message = str(error.value)
            assert message.startswith(f"{tmp_path} is in use: process {holder.pid} on ")
            assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", message)
            assert socket.gethostname() in message and "\n" not in message
        finally:
            holder.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == [".lock"]
    with locks.held(str(tmp_path)):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            locks.held(str(tmp_path)).__enter__()
    assert os.listdir(tmp_path) == []


def test_who_waited_for_a_lock_that_was_removed_takes_a_new_one(tmp_path, monkeypatch):
    path, real = str(tmp_path / "out.jsonl"), fcntl.flock
    first = locks.held(path)
    first.__enter__()

    def flock(file, how):
        # The holder ends between the opening of its file and the locking of it.
        monkeypatch.setattr(fcntl, "flock", real)
        first.__exit__(None, None, None)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.held(path):
        assert os.path.exists(f"{path}.lock")
        with pytest.raises(UserError, match="in use"), locks.held(path):
            pass


def test_a_file_system_without_locks_is_said_and_gone_on_with(
    tmp_path, monkeypatch, capsys
):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.held(str(tmp_path)):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no locks (No locks available): make sure that no other run" in line


def test_a_lock_that_another_host_left_is_said(tmp_path, capsys):
    left = {"host": "node-7", "pid": 41, "since": "2026-01-01 00:00:00+00:00"}
    (tmp_path / ".lock").write_text(json.dumps(left))
    with locks.held(str(tmp_path)):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert "process 41 on node-7" in line and "do not reach from host to host" in line


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 100,
        b"[1]",
        b'{"host": "\\u001b[2J", "pid": 1, "since": "x"}',
        b'{"host": "a", "pid": "\\n", "since": "x"}',
        b'{"host": "a", "pid": true, "since": []}',
        b"[" * 4000,
    ],
)
def test_what_a_strange_lock_file_says_is_not_repeated(content, tmp_path, capsys):
    (tmp_path / ".lock").write_bytes(content)
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process has been writing there"):
            locks.held(str(tmp_path)).__enter__()
    with locks.held(str(tmp_path)):
        pass
    assert capsys.readouterr().err == ""


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be opened"):
        locks.held(str(tmp_path)).__enter__()
    assert (tmp_path / "precious").read_text() == "kept"


# --- Runs ---


def test_a_second_start_is_refused_and_touches_nothing_of_the_first(tmp_path):
    left = tmp_path / "checkpoint_9.orbax-checkpoint-tmp-1"
    refused = []

    def start_again():
        left.mkdir()  # as if the first were writing it
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(UserError) as error:
            run(tmp_path, keep=1)
        refused.append(str(error.value))
        assert sorted(os.listdir(tmp_path)) == before
        left.rmdir()

    run(tmp_path, data=Data(events={7: start_again}))
    assert refused[0].startswith(f"{tmp_path} is in use: process {os.getpid()} on ")
    assert "\n" not in refused[0]
    assert ".lock" not in os.listdir(tmp_path)


def test_what_killed_runs_left_is_swept_by_the_next_one(tmp_path):
    run(tmp_path, total_steps=5, eval_data=None)
    for name in (
        "checkpoint_3.orbax-checkpoint-tmp-123",
        "checkpoint_2.orbax-checkpoint-tmp",
        "checkpoint_1.being-deleted",
    ):
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / ".metrics.jsonl.abcd1234.unfinished").write_text("{")
    kept = [".notes.jsonl.abcd1234.unfinished", "checkpoint_1.mine", "my.being-deleted"]
    for name in kept:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="beyond total_steps"):
        run(tmp_path, total_steps=2)  # a start that fails removes nothing
    assert len([n for n in os.listdir(tmp_path) if n.startswith("checkpoint_")]) == 5
    run(tmp_path, total_steps=6, eval_data=None)
    there = {name for name in os.listdir(tmp_path) if "tfevents" not in name}
    assert there == {"checkpoint_6", "metrics.jsonl", *kept}


def test_a_checkpoint_whose_removal_is_cut_short_is_none(tmp_path, monkeypatch):
    run(tmp_path, total_steps=5, eval_data=None)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(whole_files.shutil, "rmtree", killed)
        run(tmp_path, eval_data=None)
    assert reading.complete_steps(str(tmp_path)) == [10]
    assert "checkpoint_5.being-deleted" in os.listdir(tmp_path)
    run(tmp_path, eval_data=None)
    assert "checkpoint_5.being-deleted" not in os.listdir(tmp_path)


def test_only_the_link_to_a_checkpoint_elsewhere_is_removed(tmp_path):
    run(tmp_path / "here", total_steps=5, eval_data=None)
    os.rename(tmp_path / "here" / "checkpoint_5", tmp_path / "elsewhere")
    (tmp_path / "here" / "checkpoint_5").symlink_to(tmp_path / "elsewhere")
    run(tmp_path / "here", total_steps=6, eval_data=None)
    assert reading.complete_steps(str(tmp_path / "here")) == [6]
    assert reading.is_complete(str(tmp_path / "elsewhere"))
    assert tiny_runs.saved_params(tmp_path / "elsewhere")
