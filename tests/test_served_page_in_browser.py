"""The page of `vit22b serve` in headless Chromium, as a user works with it."""

import json
import os

import chromium
import numpy as np
import photographs
import PIL.Image
import pytest
import served
from test_serving import Stub

from vit22b_transfer.serving import app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.PATH is None, reason="Chromium is not installed"),
]
TEXT = "<b>an</b> <script>document.title='run'</script> astronaut & \u202eflag"


class Painter(Stub):
    """Says markup, and looked at the image's upper right for each word."""

    def __init__(self):
        super().__init__()
        self.grid = (4, 4)

    def predict(self, asked):
        weights = [0.0] * 16
        weights[3], weights[2] = 0.5, 0.25
        words = [{"word": word, "weights": weights} for word in TEXT.split()]
        attention = {"rows": 4, "columns": 4, "region": (0.0, 0.0, 1.0, 1.0)}
        return [
            {"prompt": one.prompt, "prediction": TEXT, "score": -1.5}
            | ({"attention": attention | {"words": words}} if one.attention else {})
            for one in asked
        ]


def test_a_user_uploads_captions_asks_looks_and_downloads(tmp_path):
    photo = photographs.write(tmp_path)["square.png"]
    name = tmp_path / "<img src=x onerror=alert(1)>.png"
    os.rename(photo, name)
    with (
        served.serving(app.App(Painter(), queue=4, local=True)) as port,
        chromium.opened(tmp_path) as page,
    ):
        page("Page.navigate", url=f"http://127.0.0.1:{port}/")
        page.wait_for("document.getElementById('state')?.textContent.includes('ready')")
        page.choose_file("#file", name)
        page.wait_for("document.getElementById('shown').naturalWidth === 512")
        page.value("document.getElementById('caption').click()")
        page.wait_for("document.querySelectorAll('.word').length === 5")
        assert page.value("document.querySelector('.text').textContent") == "".join(
            TEXT.split()
        )
        page.value("document.querySelectorAll('.word')[2].click()")
        pixels = page.value(
            "Array.from(document.getElementById('overlay').getContext('2d')"
            ".getImageData(0, 0, 512, 512).data)"
        )
        page.value("document.getElementById('attention').click()")
        question = "document.getElementById('question')"
        page.value(f"{question}.value = 'Who <i>is</i> it?'")
        page.value("document.getElementById('send').click()")
        page.wait_for("document.querySelectorAll('li').length === 2")
        page.screenshot(tmp_path / "page.png")
        page.value("document.getElementById('download').click()")
        served.wait_for((tmp_path / "answers.jsonl").is_file)
        page.choose_file("#file", __file__)
        page.value("document.getElementById('caption').click()")
        page.wait_for("!document.getElementById('problem').hidden")
        problem = page.value("document.getElementById('problem').textContent")
    lines = [
        json.loads(x) for x in (tmp_path / "answers.jsonl").read_text().split("\n") if x
    ]
    assert [line["index"] for line in lines] == [0, 1]
    assert [line.get("question") for line in lines] == [None, "Who <i>is</i> it?"]
    assert lines[1]["prompt"] == "answer Who <i>is</i> it?"
    assert {line["image_id"] for line in lines} == {name.name}
    assert {line["prediction"] for line in lines} == {TEXT}
    assert not any("attention" in line for line in lines)
    # The map lies where it was said: the brightest patch is the upper right.
    overlay = np.array(pixels).reshape(512, 512, 4)
    patches = overlay.reshape(4, 128, 4, 128, 4).mean(axis=(1, 3))
    assert patches[..., 0].argmax() == 3 and patches[0, 2, 0] > patches[3, 0, 0]
    assert "not an image in a known format" in problem
    assert not [x for x in page.complaints if "400 (Bad Request)" not in x]
    own = (f"http://127.0.0.1:{port}/", f"blob:http://127.0.0.1:{port}/", "data:,")
    assert all(url.startswith(own) for url in page.requests), page.requests
    shot = PIL.Image.open(tmp_path / "page.png")
    colours = np.unique(np.asarray(shot.convert("RGB")).reshape(-1, 3), axis=0)
    assert shot.width > 500 and len(colours) > 1000
