"""Pages in headless Chromium: it finds nothing to complain of, and nothing is asked."""

import json
import shutil
import subprocess

import prediction_samples
import pytest
from prediction_samples import CAPTIONS

from vit22b_transfer import cli
from vit22b_transfer.experiments.suite_results import Chart, Curve, Line, Number
from vit22b_transfer.reports import html_page, suite_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
OPTIONS += ["--disable-background-networking", "--enable-logging=stderr"]
# Whatever the page may ask for: no host can be looked up.
OPTIONS += ["--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


def opened(page, folder):
    """The page as Chromium reads it, and what it says on the console."""
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *OPTIONS, profile, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, said


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    prediction_samples.register(folder)
    lines = prediction_samples.captions()
    prediction_samples.draw(folder, lines)
    for name, seed in (("a", 1), ("b", 2)):
        lines = prediction_samples.captions(seed=seed)
        lines[0]["prediction"] = "<script>document.title = 'run'</script>"
        prediction_samples.write(folder / f"{name}.jsonl", lines, CAPTIONS)
    entry = {f"{CAPTIONS}/test": {"predictions": "a.jsonl", "metrics": {}}}
    (folder / "metrics.json").write_text(json.dumps(entry))
    log = [json.dumps({"step": n, "train/loss": 1 / n}) for n in range(1, 99)]
    (folder / "metrics.jsonl").write_text("\n".join(log))
    files = [str(folder / f"{name}.jsonl") for name in "ab"]
    for command in (
        ["compare", *files, "--out", str(folder / "compare.html")],
        ["report", str(folder)],
        ["data-check", CAPTIONS, "--size", "32", "--out", str(folder / "data.html")],
    ):
        assert cli.main(command) == 0
    return folder


@pytest.mark.parametrize("name", ["compare", "report", "data"])
def test_a_page_is_read_without_a_complaint(pages, name, tmp_path):
    page = pages / f"{name}.html"
    dom, said = opened(page, tmp_path)
    assert not said
    assert dom.count("<img ") == page.read_text().count("<img ") > 10
    assert "document.title" not in dom or "&lt;script&gt;document.title" in dom
    assert "<title>run</title>" not in dom


def test_the_suites_page_is_read_without_a_complaint(tmp_path):
    name = "<script>document.title = 'run'</script>"
    curve = Curve(name, [[1.0, 40.0], [25.0, 80.0]], [[35.0, 45.0], [75.0, 85.0]])
    line = Line(
        8,
        name,
        status="done",
        key="k",
        tower={"name": name, "fingerprint": "f"},
        numbers=(Number(name, 50.0, 45.0, 55.0, "%"),),
        charts=(Chart(name, "shots", "%", [curve], log_x=True),),
        commands=(name,),
    )
    page = tmp_path / "suite.html"
    results = suite_page.Results(str(tmp_path), {8: line})
    page.write_text(suite_page.html([results]))
    dom, said = opened(page, tmp_path)
    assert not said
    assert "&lt;script&gt;document.title" in dom and "<title>run</title>" not in dom
    assert dom.count("<svg") == page.read_text().count("<svg") > 0


def test_a_page_that_asks_for_something_is_complained_of(tmp_path):
    whole = html_page.page("asks", html_page.tag("p", "text"))
    asking = '<img src="http://stranger.example/a.png"><script>0</script></main>'
    page = tmp_path / "asks.html"
    page.write_text(whole.replace("</main>", asking))
    _, said = opened(page, tmp_path)
    text = " ".join(said)
    assert "stranger.example" in text and "script" in text
    assert "Content Security Policy" in text
