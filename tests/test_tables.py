"""What is shown: tables whose names stay whole at 80 columns, the demo's picture."""

import io

import numpy as np
import pytest
import rich.console
from PIL import Image

from vit22b_transfer import cli
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.demo import demo, picture
from vit22b_transfer.evaluation import evaluate
from vit22b_transfer.host import tables
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.planning import bench

WIDTH = 80


@pytest.fixture
def screen(monkeypatch):
    """What is printed on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    written = io.StringIO()
    return written, rich.console.Console(file=written)


def check(text, *names):
    """All names are whole, and no line is longer than the screen."""
    assert not [line for line in text.splitlines() if len(line) > WIDTH]
    for name in names:
        assert name in text, name
    assert "…" not in text


def test_scores_of_several_tasks_become_several_tables(screen):
    written, console = screen
    metrics = {
        "vqa_accuracy/question_type=what color is the": 0.5,
        "vqa_accuracy_count/question_type=what color is the": 21523,
        "cider_d": 1.0,
    }
    titles = [f"{task} test" for task, _, _ in demo.HEADLINES]
    columns = {title: evaluate.Scores(metrics, 9, 0, 0) for title in titles}
    evaluate.print_scores(columns, console=console)
    tasks = [title.removesuffix(" test") for title in titles]
    row = "vqa_accuracy/question_type=what color is the"
    check(written.getvalue(), *tasks, row, "0.5000 of 21523", "empty predictions")
    assert written.getvalue().count(row) > 1


def test_the_demos_table(screen):
    written, console = screen
    row = dict.fromkeys(("model", "blind", "majority", "references"), 0.5)
    results = {"results": {task: row for task, _, _ in demo.HEADLINES}}
    demo._print_table(console, results)
    titles = [title for _, _, title in demo.HEADLINES]
    check(written.getvalue(), *titles, "majority", "references", "Drawn scenes")


def test_the_table_of_bench(screen):
    written, console = screen
    results = [
        bench.Measured(bench.MATMUL, 1.0, 10**15),
        bench.Measured("tower forward and backward", 12.345, 10**15, 10**6, "images"),
        bench.Measured("greedy decoding", 0.001, 10**12, 10**5, "tokens"),
    ]
    bench.print_results(results, Partitioning(data=1, model=1), console)
    names = [result.name for result in results]
    check(written.getvalue(), *names, "81,004.5 images", "TFLOP/s")


def test_what_fits_nowhere_is_folded_and_no_markup_is_heeded(screen):
    written, console = screen
    heading, long = "[red]" + "h" * 90, "n" * 100
    tables.print_table(console, ["[b]x", long], {heading: ["1", "2"], "y": ["3", ""]})
    text = written.getvalue()
    lines = text.splitlines()
    assert heading in lines  # as a line of its own, that the terminal breaks
    assert max(len(line) for line in lines if line != heading) == WIDTH
    assert "[b]x" in text and text.count("n") == 2 * len(long)


def test_tasks_and_weights(tmp_path, monkeypatch, capsys):
    import tasks.coco
    import tasks.scenes  # noqa: F401

    described = list(registered.describe())
    check("\n".join(described), "scenes_captioning_compositional", "targets (int32")
    deep = "/".join(["encoder", *(f"a_long_name_of_a_layer_{n}" for n in range(3))])
    arrays = {f"{deep}/kernel": np.zeros((2, 3), np.float32), "b": np.zeros(4)}
    np.savez(tmp_path / "one.npz", **arrays)
    np.savez(tmp_path / "two.npz", **{name: x + 1 for name, x in arrays.items()})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "one.npz", "--stats"]) == 0
    assert cli.main(["inspect", "one.npz", "two.npz"]) == 0
    shown = capsys.readouterr().out
    wide = [line for line in shown.splitlines() if len(line) > WIDTH]
    assert wide == [f"  {deep}/kernel"]  # the name itself


def lines_of(*sheets):
    return [picture.Line(text) for text in sheets]


def test_the_picture_shows_gaps_between_words_and_marks_without_colour(tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "1.jpg")

    def grey(*lines):
        path = str(tmp_path / "out.png")
        picture.draw([(tmp_path / "1.jpg", lines)], path)
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))[44:64]  # the first line of text

    joined, apart = (grey(picture.Line(text)) for text in ("iiii", "ii ii"))
    ends = [np.flatnonzero((rows < 200).any(axis=0))[-1] for rows in (joined, apart)]
    assert ends[1] - ends[0] >= 5
    marks = [grey(picture.Line("x", mark)) < 140 for mark in ("right", "wrong")]
    assert (marks[0][:, 184:200] != marks[1][:, 184:200]).any()
    # One long word stays in its panel, and a hostile text is drawn as escapes.
    panels = [(tmp_path / "1.jpg", lines_of("w" * 10_000, "\x1b[2J", "\n", ""))] * 2
    picture.draw(panels, str(tmp_path / "two.png"))
    with Image.open(tmp_path / "two.png") as image:
        columns = np.asarray(image.convert("L"))[50:-20]
    assert (columns[:, 640:660] > 250).all()


@pytest.mark.parametrize(
    "prediction, mark",
    [("red", "right"), ("blue", "partly right"), ("dog", "wrong"), ("", "wrong")],
)
def test_an_answer_is_marked_by_its_accuracy_and_shown_beside_the_annotators(
    prediction, mark
):
    given = ["red"] * 6 + ["blue"] + ["pink"] * 2 + ["green"]
    question, said, truth = picture.answer_lines("what color?", prediction, given)
    assert (question.text, said.text, said.mark) == ("what color?", prediction, mark)
    assert truth.text == "annotators: red (6), pink (2), blue (1) and 1 more"


def test_a_caption_is_right_or_in_other_words():
    references = ["a red circle", "a circle"]
    right, shown = picture.caption_lines("a circle ", references)
    assert right.mark == "right" and shown.text == "reference 1 of 2: a red circle"
    assert picture.caption_lines("a blue one", references)[0].mark == "in other words"
