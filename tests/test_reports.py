"""Pages of results: valid, self-contained, nothing of a stranger is markup."""

import dataclasses
import html.parser
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.experiments.suite_results import (
    Chart,
    Curve,
    Line,
    Number,
    Picture,
)
from vit22b_transfer.experiments.suite_rows import ROWS
from vit22b_transfer.host import whole_files
from vit22b_transfer.reports import (
    beside,
    html_page,
    suite_page,
    suite_table,
    svg_charts,
)

HOSTILE = "</td><script>alert('x')</script>\"&\x00\x1b[31m\udcff <img src=//e.com/x>"
VOID = {"meta", "img", "br", "hr"}


class Balanced(html.parser.HTMLParser):
    """Reads a page; every element is closed where it must be. tags: all of them."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], []
        self.ids = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len({*(name for name, _ in attributes)}) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        raise AssertionError(f"<{tag}/>")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def line(row, tower="t", numbers=(), **fields):
    status = "done" if numbers else "skipped"
    facts = {"name": tower, "fingerprint": tower}
    whole = {"status": status, "key": "k", "tower": facts, "numbers": numbers}
    return Line(row, fields.pop("name", "a row"), **{**whole, **fields})


def number(name, value, **fields):
    return Number(name, value, value - 5, value + 5, "%", **fields)


def results(*lines, folder="/nowhere"):
    return suite_page.Results(str(folder), {one.row: one for one in lines})


CURVE = Curve("c", [[1.0, 40.0], [25.0, 80.0]])
CHART = Chart("few", "shots", "%", [CURVE], log_x=True)


def check(page):
    """A page that is well formed, and asks for nothing from anywhere."""
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    found = Balanced(page)
    assert len({*found.ids}) == len(found.ids)
    for tag, attributes in found.tags:
        assert tag not in ("script", "link", "iframe", "object", "form", "base")
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#row-"))
        assert not [name for name in attributes if name.startswith("on")]
        if value := attributes.get("href"):
            assert value[1:] in found.ids
    assert not re.search(
        r"url\(|@import|https?://(?!www\.w3\.org)", page.split("<body>")[0]
    )
    return found


def test_nothing_of_a_stranger_is_markup():
    numbers = (number(HOSTILE, 50.0),)
    curve = Curve(HOSTILE, [[0.0, 1.0]], [[0.5, 1.5]])
    charts = (
        Chart(HOSTILE, HOSTILE, HOSTILE, [curve, curve]),
        Chart(HOSTILE, HOSTILE, HOSTILE, [curve], bars=True, ticks=[HOSTILE]),
    )
    hostile = line(
        8,
        tower=HOSTILE,
        numbers=numbers,
        charts=charts,
        reason=HOSTILE,
        protocol={HOSTILE: {HOSTILE: HOSTILE}},
        commands=(HOSTILE,),
        data={HOSTILE: HOSTILE},
        notes={HOSTILE: HOSTILE},
        pictures=(Picture(HOSTILE, HOSTILE.replace("/", "")),),
    )
    for towers in ([results(hostile)], [results(hostile), results(hostile)]):
        page = suite_page.html(towers)
        page.encode()
        found = check(page)
        shown = "".join(found.text)
        assert "alert('x')" in shown and "\x00" not in page and "\x1b" not in page
        assert shown.count("<script>") > 8 and "<script" not in page


def test_text_and_attributes_are_escaped_and_urls_stay_in_the_page():
    made = html_page.tag("p", "a<b", html_page.tag("b", "&"), None, title='"><x')
    assert made == '<p title="&quot;&gt;&lt;x">a&lt;b<b>&amp;</b></p>'
    for url in ("https://e.com", "//e.com", "javascript:x", "data:text/html,x", "/x"):
        with pytest.raises(ValueError, match="leads out of the page"):
            html_page.tag("a", "x", href=url)
    assert html_page.text("\udcff\x07") == "\\udcff\ufffd"


def test_the_table_is_in_the_paper_s_order_with_its_numbers(tmp_path):
    ours = number("ImageNet", 61.0, paper=89.5)
    lines = [
        line(24, status="failed", reason="no eyes"),
        line(9, numbers=(ours,)),
        line(1, numbers=(number("ImageNet", 71.25), number("more", 3.0))),
        line(6, reason="run that"),
    ]
    entries = beside.entries([{one.row: one for one in lines}])
    assert [(entry.row.number, entry.name) for entry in entries] == [
        (1, "ImageNet"),
        (1, "more"),
        (6, ""),
        (9, "ImageNet"),
        (9, "ImageNet-v2"),
        (9, "ObjectNet"),
        (9, "ImageNet-A"),
        (9, "ImageNet-R"),
        (24, "accuracy difference"),
        (24, "observed consistency"),
        (24, "error consistency"),
    ]
    assert [beside.paper(entry) for entry in entries[:4]] == ["89.5", "", "", "85.9"]
    (unsure,) = beside.entries([{4: line(4)}])
    assert beside.paper(unsure) == "74.3 ?"
    console = rich.console.Console(
        width=80, record=True, quiet=False, file=open(tmp_path / "shown", "w")
    )
    suite_table.show([lines], console=console)
    shown = console.export_text()
    rows = re.findall(r"(\d+) .*?│ +(\S+)(?: %)? │ +(\S* ?t?o? ?\S*) │ +(\S*) │", shown)
    assert rows[0] == ("1", "71.2", "66.2 to 76.2", "89.5")
    assert "row 24 failed: no eyes" in shown and "row 6 not run: run that" in shown
    assert max(map(len, shown.splitlines())) <= 80
    page = suite_page.html([results(*lines)])
    found = check(page)
    assert found.ids == ["row-1", "row-6", "row-9", "row-24"]
    assert page.index("71.2 %") < page.index("61.0 %") < page.index("0.783")
    assert "Failed: no eyes" in page


def test_every_row_fits_into_the_table():
    numbers = {
        row.number: [number(name, 1.0) for name in row.paper] or [number("x", 1.0)]
        for row in ROWS
    }
    for row, name in (
        (16, "KITTI, delta < 1.25^2"),
        (22, "Attractive, not Male, chance"),
        (26, "noise, Mahalanobis AUROC"),
    ):
        few = dataclasses.replace(number(name, 1.0), count=9)
        numbers[row] = [few, few, dataclasses.replace(few, name=f"{name}!")]
    lines = [line(row, numbers=tuple(some)) for row, some in numbers.items()]
    console = rich.console.Console(width=80, record=True, file=open("/dev/null", "w"))
    suite_table.show([lines], console=console)
    shown = console.export_text()
    assert shown.count("ViT-22B") == 1  # one table, not several
    assert "    KITTI, delta < 1.25^2!" in shown and "*: of fewer than 30" in shown


def test_a_part_that_failed_stands_beside_the_others():
    failed = {"pets": "pets: no eyes", "ImageNet": "ImageNet: no ears"}
    eight = line(8, numbers=(number("birds, 1 shots", 20.0),), status="failed")
    five = line(5, numbers=(), status="failed")
    lines = [
        dataclasses.replace(eight, failed=failed, reason="; ".join(failed.values())),
        # Of row 5 one part failed; the other has no data.
        dataclasses.replace(five, failed={"ImageNet-R": "no"}, reason="no"),
    ]
    console = rich.console.Console(width=80, record=True, file=open("/dev/null", "w"))
    suite_table.show([lines], console=console)
    shown = re.findall(r"│ +(?:\d  )?(.*?) +│ +(\S+)(?: %)? │", console.export_text())
    assert shown == [
        ("same head, ImageNet-R", "failed"),
        ("ImageNet-A", "-"),
        ("few-shot, birds, 1 shots", "20.0"),
        ("pets", "failed"),
        ("ImageNet", "failed"),
    ]
    page = suite_page.html([results(*lines)])
    assert page.count(">failed</td>") == 3 and page.count(">-</td>") == 1


def test_towers_stand_beside_each_other_in_one_chart():
    towers = [
        results(line(8, tower, (number("A, 1 shots", value),), charts=(CHART,)))
        for tower, value in (("random", 20.0), ("trained", 90.0))
    ]
    page = suite_page.html(towers)
    found = check(page)
    assert "1: random" in page and "2: trained" in page
    assert [tag for tag, _ in found.tags].count("polyline") == 2
    assert page.count("<figcaption>few") == 1
    labels = [a["aria-label"] for tag, a in found.tags if "aria-label" in a]
    assert "20, 95 % interval 15 to 25" in labels
    shown = [
        attributes["cx"]
        for tag, attributes in found.tags
        if tag == "circle" and attributes.get("r") == "3.5"
    ]
    assert [*map(float, shown)] == pytest.approx(
        [4 + 112 * 0.2, 4 + 112 * 0.9], abs=0.06
    )


def test_points_of_a_chart_stand_where_their_numbers_say():
    curve = Curve("c", [[1.0, 0.0], [10.0, 50.0], [100.0, 100.0]], [[0.0, 1.0]] * 3)
    drawn = svg_charts.chart(Chart("t", "x", "y", [curve], log_x=True))
    (points,) = re.findall(r'points="([^"]*)"', drawn)
    (x0, y0), (x1, y1), (x2, y2) = [
        tuple(map(float, point.split(","))) for point in points.split()
    ]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y2
    assert drawn.count('class="s0 span"') == 3
    bars = Curve("c", [[0.0, 25.0], [1.0, 50.0]])
    drawn = svg_charts.chart(Chart("t", "", "%", [bars], bars=True, ticks=["a", "b"]))
    one, two = map(float, re.findall(r'<rect [^>]*width="([^"]*)"', drawn))
    assert two == pytest.approx(2 * one, abs=0.2) and ">a<" in drawn
    for curves in ([], [Curve("c", [])], [Curve("c", [[1.0, 1.0]])]):
        Balanced(svg_charts.chart(Chart("t", "x", "y", curves)))


def test_a_number_without_an_interval_is_shown_without_one():
    bare = Number("evenness", 0.5, None, None)
    page = suite_page.html([results(line(30, numbers=(bare,)))])
    assert "0.5, without an interval" in page and "none" in page
    check(page)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "small.png")
    noise = rng.integers(0, 256, (1200, 900, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "large.jpg")
    return tmp_path


def test_pictures_are_in_the_page_and_no_larger_than_shown(pictures):
    small = html_page.picture(
        str(pictures / "small.png"), "a <b>", within=str(pictures)
    )
    assert 'src="data:image/png;base64,' in small and "a &lt;b&gt;" in small
    large = html_page.picture(str(pictures / "large.jpg"), "b", within=str(pictures))
    assert 'src="data:image/jpeg;base64,' in large and len(large) < 1 << 20


def test_a_picture_that_is_none_or_lies_elsewhere_is_said(pictures, tmp_path):
    inside = pictures / "work"
    inside.mkdir()
    (inside / "out.png").symlink_to(pictures / "small.png")
    (inside / "text.png").write_text("<svg onload=alert(1)>")
    shutil.copy(pictures / "large.jpg", inside / "cut.jpg")
    (inside / "cut.jpg").write_bytes((inside / "cut.jpg").read_bytes()[:300])
    shown = line(
        30,
        numbers=(number("x", 1.0),),
        pictures=tuple(
            Picture(file, file) for file in ("out.png", "text.png", "cut.jpg", "no.png")
        ),
    )
    page = suite_page.html([results(shown, folder=inside)])
    check(page)
    assert page.count('class="bad small"') == 4 and "<img" not in page
    assert "lies outside" in page and "onload" not in page


def test_too_large_a_picture_is_not_decoded(pictures, monkeypatch):
    monkeypatch.setattr(html_page, "MOST_PIXELS", 20)
    with pytest.raises(UserError, match="more than 20 pixels"):
        html_page.picture(str(pictures / "small.png"), "a", within=str(pictures))
    monkeypatch.setattr(html_page, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="at most 10 bytes"):
        html_page.picture(str(pictures / "small.png"), "a", within=str(pictures))


def test_the_page_is_written_whole(tmp_path, monkeypatch):
    path = suite_page.write(str(tmp_path), [results(line(1))])
    first = open(path).read()
    monkeypatch.setattr(suite_page, "html", lambda towers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        suite_page.write(str(tmp_path), [])
    assert open(path).read() == first and whole_files.DELETED not in path
    assert [p.name for p in tmp_path.iterdir()] == ["suite.html"]
    assert dataclasses.is_dataclass(suite_page.Results)
