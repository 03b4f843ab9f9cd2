"""A served model: its answers are those of the commands, and its clients stay apart."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import html_checks
import numpy as np
import photographs
import PIL.Image
import pytest
import served
import tiny_imports
from prometheus_client.parser import text_string_to_metric_families
from shell_commands import no_tasks, use_one_device

from vit22b_transfer import NotFiniteError, UserError, cli
from vit22b_transfer.commands import serving
from vit22b_transfer.data import images
from vit22b_transfer.inference import word_attention
from vit22b_transfer.models.preparation import Preparation
from vit22b_transfer.serving import app, limits, predictor

NAMES = ["grey.png", "odd.png", "square.png", "tall.png", "wide.jpg"]
IMPORTED = ["--vocabulary", "bytes", "--batch_size", "2"]
QUESTION = "What is there?"


# ----- The answers are those of `vit22b caption` and `answer` ----------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "photos").mkdir()
    for name, path in photographs.write(folder / "photos").items():
        if name not in NAMES:
            os.remove(path)
    use_one_device(folder)
    with contextlib.redirect_stdout(sys.stderr):
        tiny_imports.paligemma(folder)
    return folder


@pytest.fixture(scope="module")
def model(home):
    """The predictor that `vit22b serve imported` loads."""
    with contextlib.chdir(home), no_tasks():
        return serving.load(cli.parsed(["serve", "imported", *IMPORTED]))


@pytest.fixture(scope="module")
def expected(home):
    """(caption, answer) of each image, as the commands write them."""
    with contextlib.chdir(home), no_tasks():
        common = ["photos", "--model", "imported", *IMPORTED, "--out"]
        assert cli.main(["caption", *common, "captions.jsonl"]) == 0
        asked = ["--question", QUESTION]
        assert cli.main(["answer", *common, "answers.jsonl", *asked]) == 0
    files = [home / "captions.jsonl", home / "answers.jsonl"]
    pairs = zip(*(path.read_text().splitlines() for path in files), strict=True)
    return [tuple(told(json.loads(line)) for line in pair) for pair in pairs]


def told(line):
    return {name: line[name] for name in ("prompt", "prediction", "score")}


def content(home, name):
    return (home / "photos" / name).read_bytes()


@pytest.mark.slow
def test_served_answers_equal_those_of_the_commands_in_any_batch(home, model, expected):
    photos = [content(home, name) for name in NAMES]
    asked = [
        model.prepare(image, model.prompt_of(question))
        for image in photos
        for question in (None, QUESTION)
    ]
    lines = [line for pair in expected for line in pair]
    assert len({line["score"] for line in lines}) == 10
    # In pairs, as the commands had them; then each in other company: equal bytes.
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    for sequence in (order, order[::-1], [3, 8, 1, 9]):
        for first in range(0, len(sequence), 2):
            pair = sequence[first : first + 2]
            assert model.predict([asked[n] for n in pair]) == [lines[n] for n in pair]
    # Alone: another program, which adds up in another order.
    (alone,) = model.predict(asked[:1])
    assert alone["prediction"] == lines[0]["prediction"]
    assert alone["score"] == pytest.approx(lines[0]["score"], rel=1e-5)


def test_the_page_of_a_model_answers_with_attention_of_each_word(home, model, expected):
    photo = content(home, NAMES[2])
    with served.serving(app.App(model, queue=8, local=True)) as port:
        status, _, said = served.caption(port, photo, attention="true")
        attention = said.pop("attention")
        assert status == 200 and said["prediction"] == expected[2][0]["prediction"]
        encoded = base64.b64encode(photo).decode()
        body = json.dumps({"image": encoded, "question": QUESTION})
        kind = {"Content-Type": "application/json"}
        status, _, said = served.ask(port, "/v1/answer", body, kind)
        assert status == 200 and said["prediction"] == expected[2][1]["prediction"]
        assert "attention" not in said
        _, _, health = served.ask(port, "/health")
    assert (attention["rows"], attention["columns"]) == (2, 2)
    words = [word["word"] for word in attention["words"]]
    assert words and set(words) <= set(expected[2][0]["prediction"].split())
    weights = [word["weights"] for word in attention["words"]]
    assert {len(of) for of in weights} == {4} and max(map(sum, weights)) > 0.001
    assert all(min(of) >= 0 and sum(of) <= 1.001 for of in weights)
    assert health["status"] == "ready" and health["attention"]
    assert health["answer_prompt"] == "answer en {question}"


def test_what_is_asked_is_checked_and_never_cut(home, model):
    photo = content(home, NAMES[0])
    for question, problem in (
        (" ", "blank"),
        ("\ud800", "no Unicode text"),
    ):
        with pytest.raises(UserError, match=problem):
            model.prompt_of(question)
    for long in ("x" * 64, "x" * 100_000):
        with pytest.raises(UserError, match="more than the 64 tokens"):
            model.prepare(photo, long)
    assert model.prepare(photo, "x" * 63).tokens[-1] == 1


def test_jpegs_are_decoded_as_the_model_learned_from_them(model, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (90, 300, 3), np.uint8)
    packed = io.BytesIO()
    PIL.Image.fromarray(noise).save(packed, "JPEG", quality=95)
    whole = model.prepare(packed.getvalue(), "caption en")
    scaled = Preparation(jpegs="scaled")
    monkeypatch.setattr(model, "_how", scaled)
    found = model.prepare(packed.getvalue(), "caption en")
    expected = images.read_image(packed.getvalue(), found.pixels.shape[:2], scaled)
    np.testing.assert_array_equal(found.pixels, expected)
    assert np.any(found.pixels != whole.pixels) and found.region == whole.region


def test_batch_sizes_are_few_and_divide_among_the_devices():
    assert predictor.batch_sizes(16, 1) == (1, 4, 16)
    assert predictor.batch_sizes(20, 1) == (1, 4, 16, 20)
    assert predictor.batch_sizes(16, 8) == (8, 16)
    with pytest.raises(UserError, match="batch_size is 0"):
        predictor.batch_sizes(0, 1)


def test_the_region_is_what_is_kept_of_the_image():
    # Rows of their own colour: what is kept is told by the first and the last.
    pixels = np.broadcast_to(
        np.arange(200, dtype=np.uint8)[:, None, None], (200, 80, 3)
    )
    how = Preparation(fit="shorter_side", resized=48, cropped=40, kept=40)
    left, top, width, height = images.kept_region((200, 80), (40, 40), how)
    kept = images.prepare(np.ascontiguousarray(pixels), (40, 40), how)
    assert kept[0, 0, 0] == pytest.approx(200 * top, abs=3)
    assert kept[-1, 0, 0] == pytest.approx(200 * (top + height), abs=3)
    assert left + width / 2 == pytest.approx(0.5) and width == pytest.approx(40 / 48)
    assert images.kept_region((200, 80), (40, 40)) == (0, 0, 1, 1)


class Pieces:
    """A vocabulary of pieces, in which `_` begins a word."""

    names = dict(enumerate("_a _do g ! _ <ctrl>".split()))

    def decode(self, ids):
        text = "".join(self.names[n].replace("<ctrl>", "") for n in ids)
        return text.replace("_", " ").strip()


def test_tokens_are_told_by_the_words_that_they_are_part_of():
    found = word_attention.words_of(Pieces(), [0, 1, 2, 3, 5, 4])
    assert found == [("a", [0]), ("dog!", [1, 2, 3, 4, 5])]
    assert word_attention.words_of(Pieces(), [5, 4]) == []


# ----- Clients: a predictor that computes nothing, or waits until it may ------------


class Stub(predictor.Predictor):
    """Answers with the size of the image, when `go` is set."""

    def __init__(self, checkpoint="."):
        self.sizes, self.grid = (1, 4), None
        self.caption_prompt, self.answer_prompt = "caption en", "answer {question}"
        self.restored = type("Restored", (), {"checkpoint": checkpoint})()
        self.go, self.batches, self.error = threading.Event(), [], None
        self.go.set()

    def prepare(self, image, prompt, *, attention=False):
        pixels = images.read_whole(image)
        tokens = np.zeros(1, np.int32)
        return predictor.Asked(pixels, tokens, prompt, (0.0, 0.0, 1.0, 1.0), attention)

    def predict(self, asked):
        self.go.wait(30)
        self.batches.append(len(asked))
        if self.error:
            raise self.error
        return [
            {"prompt": one.prompt, "prediction": str(one.pixels.shape), "score": 0.0}
            if one.pixels.shape[0] != 13
            else NotFiniteError("the model's score of this is not finite")
            for one in asked
        ]


def png(height=5, width=7):
    packed = io.BytesIO()
    PIL.Image.new("RGB", (width, height), "red").save(packed, "PNG")
    return packed.getvalue()


BOUNDS = limits.Limits(body=50_000, bodies=120_000, seconds=1.0, connections=40)


@pytest.fixture(scope="module")
def stub():
    return Stub()


@pytest.fixture(scope="module")
def served_app(stub):
    return app.App(stub, queue=6, local=True, bounds=BOUNDS)


@pytest.fixture(scope="module")
def port(served_app):
    with served.serving(served_app, BOUNDS) as port:
        yield port


def metrics(port):
    _, _, text = served.ask(port, "/metrics")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@contextlib.contextmanager
def held(stub, served_app, port):
    """Context in which the device works on one request; its answer comes behind."""
    stub.batches = []
    stub.go.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as client:
        first = client.submit(served.caption, port, png(3))
        try:
            served.wait_for(lambda: served_app.queue.computing == 1)
            yield
        finally:
            stub.go.set()
        assert first.result()[0] == 200


def test_requests_that_come_together_share_a_batch_and_the_queue_is_bounded(
    stub, served_app, port
):
    before = metrics(port)
    with concurrent.futures.ThreadPoolExecutor(6) as clients:
        with held(stub, served_app, port):
            jobs = [clients.submit(served.caption, port, png(n)) for n in range(20, 26)]
            served.wait_for(lambda: len(served_app.queue) == 6)
            status, headers, said = served.caption(port, png())
            assert status == 503 and int(headers["Retry-After"]) >= 1
            assert "too many requests wait" in said["error"]
            assert metrics(port)["vit22b_queue_length",] == 6
        answers = [job.result() for job in jobs]
    assert [status for status, _, _ in answers] == [200] * 6
    shapes = [f"({n}, 7, 3)" for n in range(20, 26)]
    assert [said["prediction"] for _, _, said in answers] == shapes
    assert stub.batches == [1, 4, 2]
    after = metrics(port)
    assert after["vit22b_batch_size_sum",] - before["vit22b_batch_size_sum",] == 7
    assert after["vit22b_batch_size_count",] - before["vit22b_batch_size_count",] == 3
    ended = [n for key, n in after.items() if key[0] == "vit22b_requests_total"]
    assert after["vit22b_requests_total", "caption", "503"] == 1
    assert after["vit22b_request_seconds_count", "caption"] == sum(ended) == 8


def test_a_client_that_goes_leaves_the_queue(stub, served_app, port):
    request = served.request("/v1/caption", *served.form(image=png()))
    with held(stub, served_app, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(request)
            served.wait_for(lambda: len(served_app.queue) == 1)
        served.wait_for(lambda: len(served_app.queue) == 0)
    assert stub.batches == [1]
    gone = "vit22b_requests_total", "caption", "gone"
    served.wait_for(lambda: metrics(port).get(gone) == 1)


def refused(port, status, words, *, path="/v1/caption", fields=None, **headers):
    kind, body = served.form(**(fields or {"image": png()}))
    found, _, said = served.ask(port, path, body, kind | headers)
    assert found == status and words in said["error"], said
    assert list(said) == ["error"] and "\n" not in said["error"]


@pytest.mark.parametrize(
    "fields, status, words",
    [
        (dict(imag=b"x"), 400, "no field imag of captions; did you mean image?"),
        (dict(image=png(), question="?"), 400, "no field question of captions"),
        (dict(image=png(), attention="yes"), 400, "attention is true or false"),
        (dict(image="/etc/passwd"), 400, "is to be a file"),
        (dict(image=b"no image"), 400, "not an image in a known format"),
        (dict(image=png()[:-30]), 400, "truncated"),
        (dict(image=b""), 400, "empty"),
        (dict(attention="true"), 400, "there is no image"),
        (dict(attention="x" * 70_000), 413, "send a smaller image"),
        (dict(image=b"x" * 50_000), 413, "more than 0 MiB; send a smaller image"),
        (dict(image=png(13)), 503, "score of this is not finite"),
        (dict([(f"x{n}", "") for n in range(20)]), 400, "more than 8 parts"),
    ],
)
def test_a_form_that_is_wrong_is_refused_in_one_sentence(port, fields, status, words):
    refused(port, status, words, fields=fields)


@pytest.mark.parametrize(
    "kind, body, status, words",
    [
        ("application/json", '{"image": "x', 400, "malformed JSON"),
        ("application/json", "[]", 400, "no object"),
        ("application/json", "[" * 40_000, 400, "nested too deeply"),
        ("application/json", '{"image": "%%%%", "question": "?"}', 400, "no base64"),
        ("application/json", '{"image": 1, "question": "?"}', 400, "to be a text"),
        ("application/json", '{"image": "", "image": ""}', 400, "twice"),
        ("application/json", '{"image": "", "questoin": ""}', 400, "mean question?"),
        ("multipart/form-data", "x", 415, "send multipart/form-data"),
        ("multipart/form-data; boundary=x", "--x\r\nno", 400, "malformed"),
        ("image/png", "x", 415, "the body is image/png"),
        ("", "x", 415, "of no type"),
    ],
)
def test_a_body_that_is_wrong_is_refused_in_one_sentence(
    port, kind, body, status, words
):
    found, _, said = served.ask(port, "/v1/answer", body, {"Content-Type": kind})
    assert found == status and words in said["error"], said


def test_other_places_and_methods_are_refused(port):
    assert served.ask(port, "/v1/captions")[0] == 404
    assert served.ask(port, "/page.js/../../etc/passwd")[0] == 404
    assert served.ask(port, "/v1/caption")[0] == 405
    refused(port, 400, "behind a '?'", path="/v1/caption?image=/etc/passwd")


def test_only_this_machines_own_page_may_ask(port):
    for host in ("stranger.example", "127.0.0.1.stranger.example:80", "localhost:1:2"):
        refused(port, 421, "call it http://127.0.0.1:PORT", Host=host)
        assert served.ask(port, "/health", headers={"Host": host})[0] == 421
    for host in ("localhost:8000", "LOCALHOST", "[::1]:8000", "127.0.0.2:8000"):
        assert served.ask(port, "/health", headers={"Host": host})[0] == 200
    refused(port, 403, "only this server's own page", Origin="http://stranger.example")
    refused(port, 403, "only this server's own page", Origin="null")
    crossing = {"Sec-Fetch-Site": "cross-site"}
    refused(port, 403, "only this server's own page", **crossing)
    kind, body = served.form(image=png())
    own = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
    assert served.ask(port, "/v1/caption", body, kind | own)[0] == 200


def test_a_server_for_the_network_is_called_by_any_name(stub):
    with served.serving(app.App(stub, queue=2, local=False)) as port:
        named = {"Host": "vision.example"}
        assert served.ask(port, "/health", headers=named)[0] == 200
        refused(port, 403, "own page", Host="a.example", Origin="http://b.example")
    assert limits.is_loopback("127.0.0.2") and limits.is_loopback("::1")
    assert not limits.is_loopback("0.0.0.0") and not limits.is_loopback("name.example")


def test_slow_clients_are_given_up_and_hold_nothing(served_app, port):
    headers, body = served.form(image=png())
    whole = served.request("/v1/caption", headers, body)
    cuts = {"no byte": 0, "half the headers": 40, "half the body": len(whole) - 9}
    with concurrent.futures.ThreadPoolExecutor(3) as clients:
        jobs = [clients.submit(served.raw, port, whole[:cut]) for cut in cuts.values()]
        for job in jobs:
            assert job.result().startswith(b"HTTP/1.1 408 ")
    assert served_app._bodies.held == 0
    # A connection that is kept has as long for its next headers, and no longer.
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(whole)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(whole[:40])
        assert client.recv(65536).startswith(b"HTTP/1.1 408 ")
    # So has one that was answered before its body was there, and sends on and on.
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        endless = {"Content-Length": 10**9}
        client.sendall(served.request("/v1/nowhere", headers, b"x", **endless))
        assert client.recv(65536).startswith(b"HTTP/1.1 404 ")
        with pytest.raises(OSError):
            for _ in range(100):
                client.sendall(b"x")
                time.sleep(0.1)


def test_large_bodies_are_bounded_while_they_come_and_all_together(served_app, port):
    headers, body = served.form(image=b"x" * 200_000)
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    sent = served.request(
        "/v1/caption", headers, b"", **{"Transfer-Encoding": "chunked"}
    )
    sent = sent.replace(b"Content-Length: 0\r\n", b"") + chunk + b"0\r\n\r\n"
    assert served.raw(port, sent).startswith(b"HTTP/1.1 413 ")
    half = served.request("/v1/caption", headers, body[:40_000])
    half = half.replace(b"Length: 40000", b"Length: 45000")
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        jobs = [clients.submit(served.raw, port, half) for _ in range(4)]
        found = sorted(job.result()[9:12] for job in jobs)
    assert found == [b"408", b"408", b"408", b"503"]
    assert served_app._bodies.held == 0


def test_a_failing_model_is_told_and_the_server_goes_on(stub, port, caplog):
    stub.error = OSError("the disk is gone")
    refused(port, 503, "could not be run")
    status, _, said = served.ask(port, "/health")
    assert status == 503 and "OSError" in said["status"] and "disk" not in str(said)
    stub.error = None
    assert served.caption(port, png())[0] == 200
    assert served.ask(port, "/health")[0] == 200
    assert "the disk is gone" in caplog.text


def test_a_model_directory_that_vanishes_leaves_the_answers(tmp_path):
    folder = tmp_path / "checkpoint_7"
    folder.mkdir()
    with served.serving(app.App(Stub(str(folder)), queue=2, local=True)) as port:
        assert served.ask(port, "/health")[2]["model"] == "loaded"
        folder.rmdir()
        assert served.caption(port, png())[0] == 200
        status, _, said = served.ask(port, "/health")
        assert status == 200 and "its folder is gone" in said["model"]


def test_the_page_asks_no_other_server_and_is_kept_to_itself(port):
    status, headers, page = served.ask(port, "/")
    assert status == 200 and headers["Content-Security-Policy"].startswith(
        "default-src 'none'; script-src 'self'"
    )
    assert headers["X-Content-Type-Options"] == "nosniff"
    reader = html_checks.read(page)
    assert set(reader.links) == {"/page.css", "/page.js", "data:,"}
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        _, headers, text = served.ask(port, f"/{name}")
        assert headers["Content-Type"].startswith(kind)
        assert "://" not in text and "innerHTML" not in text
    ids = set(re.findall(r'at\("(\w+)"\)', text))
    assert ids <= set(reader.ids)


# ----- The command -----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--port", "99999"], "cannot listen at 127.0.0.1 port 99999"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host"),
        (["--host", "a..b"], "cannot listen at a..b"),
        (["--queue", "0"], "at least one request has to wait"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--prompt", "answer {}"], "no other braces"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_served(
    home, arguments, message, capfd, monkeypatch
):
    monkeypatch.chdir(home)
    with no_tasks():
        code = cli.main(["serve", "imported", "--vocabulary", "bytes", *arguments])
    assert code == 1 and message in capfd.readouterr().err


def test_a_missing_package_is_told_with_what_installs_it(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "anything"]) == 1
    said = capfd.readouterr().err
    assert "needs uvicorn" in said and "pip install 'vit22b_transfer[serve]'" in said


@pytest.mark.slow
def test_the_command_warns_of_the_network_and_ends_by_a_signal_with_all_answers(home):
    command = [sys.executable, "-m", "vit22b_transfer.cli", "serve", "imported"]
    options = ["--vocabulary", "bytes", "--port", "0", "--host", "0.0.0.0"]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [*command, *options, "--batch_size", "1"],
            cwd=home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving at "):
                break
        port = int(re.search(r":(\d+)/", lines[-1])[1])
        assert sum("compiling" in line for line in lines) == 2
        photo = content(home, NAMES[0])
        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            jobs = [clients.submit(served.caption, port, photo) for _ in range(8)]
            served.wait_for(jobs[0].done)
            process.send_signal(number)
            assert [job.result()[0] for job in jobs] == [200] * 8
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "stopped" in out
        assert "without a password" in err and "Traceback" not in err
