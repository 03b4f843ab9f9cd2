"""The suite: rows run in order, written when done, gone on with; the command."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import rich.console
import tiny_classifier
from shell_commands import no_tasks, run_in_process, use_one_device

from vit22b_transfer import UserError, cli
from vit22b_transfer.experiments import (
    head_training,
    suite,
    suite_findings,
    suite_rows,
)
from vit22b_transfer.experiments import suite_results as results
from vit22b_transfer.experiments.outcomes import Outcome
from vit22b_transfer.experiments.suite_parts import Part
from vit22b_transfer.experiments.suite_results import Finding, Number
from vit22b_transfer.experiments.suite_rows import ROWS, Row
from vit22b_transfer.experiments.surveys import Found, Survey

TOWER = suite.Tower("a tower", "0123", texts=False)
SAID = Number("A", 61.0, 50.0, 70.0, "%", count=80)


def found(name, digest="d0"):
    return Found(name, "/data", {}, {}, digest, {"odd files": 2})


SURVEY = Survey("/data", {"imagenet": found("imagenet")}, {}, [])


def part(name="A", layout="imagenet", recipe="1", **fields):
    return Part(name, (layout,), recipe, lambda result, name: result, **fields)


def table(*numbers):
    return [
        Row(n, f"row {n}", "data", {"A": 89.5}, parts=[part(recipe=str(n))])
        for n in numbers
    ]


class Work:
    """Prepares jobs whose result is `SAID`; `before` is called in each row's run."""

    def __init__(self, before=lambda row: None, protocol=()):
        self.before, self.protocol, self.ran = before, dict(protocol), []

    def __call__(self, job):
        row = int(job.part.recipe)

        def run():
            self.ran.append(row)
            self.before(row)
            return Finding([SAID], notes={"counted": 3}), "/work"

        return suite.Prepared(self.protocol, lambda: f"vit22b probe {row}", run)


def run(rows, work, out, survey=SURVEY, tower=TOWER, **options):
    console = rich.console.Console(quiet=True)
    return suite.run(rows, survey, tower, work, str(out), console, **options)


def lines(out):
    """Those of the file, without what a clock says."""
    text = (Path(out) / results.RESULTS_FILE).read_text()
    return [json.loads(line) | {"seconds": 0} for line in text.splitlines()]


def test_a_line_has_all_that_a_row_rests_on(tmp_path):
    (line,) = run(table(4), Work(protocol={"x": "1"}), tmp_path)
    assert results.read_lines(str(tmp_path)) == [line]
    assert line.status == "done" and line.tower == TOWER.facts()
    assert line.numbers == (dataclasses.replace(SAID, paper=89.5),)
    assert line.protocol == {"A": {"x": "1"}} and line.data == {"imagenet": "d0"}
    assert line.notes == {"counted": "3", "imagenet: odd files": "2"}
    assert line.commands == ("vit22b probe 4",)


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_killed_work_goes_on_and_ends_with_the_same_lines(tmp_path, killed_in):
    rows = [*table(1, 2, 3), Row(4, "none", "")]
    run(rows, Work(), tmp_path / "whole")

    def kill(row):
        if row == killed_in:
            raise KeyboardInterrupt

    killed = Work(kill)
    with pytest.raises(KeyboardInterrupt):
        run(rows, killed, tmp_path / "killed")
    again = Work()
    run(rows, again, tmp_path / "killed")
    assert killed.ran == [*range(1, killed_in + 1)]
    assert again.ran == [*range(killed_in, 4)]
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    run(rows, again, tmp_path / "killed")  # nothing is left to do, or to write
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_another_tower_protocol_or_data_is_run_anew_and_nothing_is_lost(tmp_path):
    work = Work()
    run(table(1), work, tmp_path)
    other = dataclasses.replace(TOWER, fingerprint="4567")
    run(table(1), work, tmp_path, tower=other)
    work.protocol = {"epochs": "20"}
    run(table(1), work, tmp_path)
    moved = dataclasses.replace(SURVEY, found={"imagenet": found("imagenet", "d1")})
    run(table(1), work, tmp_path, survey=moved)
    assert work.ran == [1] * 4
    known = results.read_lines(str(tmp_path))
    assert len({line.key for line in known}) == 4
    run(table(1), work, tmp_path, tower=dataclasses.replace(TOWER, name="renamed"))
    work.protocol = {}
    run(table(1), work, tmp_path)
    run(table(1), work, tmp_path, tower=other)
    assert work.ran == [1] * 4 and len(results.read_lines(str(tmp_path))) == 4
    assert results.newest(known, "4567")[1] == known[1]
    assert results.newest(known)[1] == known[3]


def test_a_row_that_fails_says_why_and_the_others_go_on(tmp_path):
    def fail(row):
        if row == 1:
            raise UserError("the tower has no eyes.\n  In call to configurable x")
        if row == 2:
            raise ZeroDivisionError("by zero")

    work, written = Work(fail), []
    first, second, third = run(
        table(1, 2, 3), work, tmp_path, written=lambda: written.append(lines(tmp_path))
    )
    # What is known is written behind each row, whatever becomes of those behind it.
    assert [len(some) for some in written] == [1, 2, 3]
    assert first.failed == {"A": first.reason} and not third.failed
    assert first.status == second.status == "failed" and third.status == "done"
    assert first.reason == "A: the tower has no eyes"
    assert second.reason == "A: ZeroDivisionError: by zero"
    work.before = lambda row: None
    again = run(table(1, 2, 3), work, tmp_path)
    assert [line.status for line in again] == ["done"] * 3
    assert work.ran == [1, 2, 3, 1, 2]


def test_a_signal_that_stops_a_training_stops_the_suite(tmp_path):
    def stop(row):
        if row == 2:
            raise head_training.StoppedError("stopped at step 3 of 9")

    work = Work(stop)
    with pytest.raises(head_training.StoppedError, match="at step 3"):
        run(table(1, 2, 3), work, tmp_path)
    assert work.ran == [1, 2]
    work.before = lambda row: None
    assert [line.status for line in run(table(1, 2, 3), work, tmp_path)] == ["done"] * 3
    assert work.ran == [1, 2, 2, 3]


def test_a_recipe_that_is_wrong_fails_its_row_alone(tmp_path):
    def refuse(job):
        if job.part.recipe == "1":
            raise UserError("no such value.")
        return Work()(job)

    first, second = run(table(1, 2), refuse, tmp_path)
    assert (first.status, first.reason) == ("failed", "A: no such value")
    assert second.status == "done"


def test_what_is_not_there_is_said_and_the_rest_is_run(tmp_path):
    sets = {name: found(name) for name in ("few_shot/b", "few_shot/a")}
    survey = Survey("/data", sets, {"imagenet": "classes.txt missing"}, [])
    texts = part("texts", "few_shot/a", texts=True)
    row = Row(8, "few", "x", parts=[part(), part("* 5", "few_shot/*"), texts])
    todo, missing = suite.jobs(row, survey, TOWER)
    assert [job.name for job in todo] == ["b 5", "a 5"]
    assert missing == [
        "imagenet: classes.txt missing",
        "the tower is none of a model of pairs",
    ]
    pairs = dataclasses.replace(TOWER, texts=True)
    assert len(suite.jobs(row, survey, pairs)[0]) == 3
    both = Part("two", ("few_shot/a", "imagenet"), "a.gin", lambda r, n: r)
    assert suite.jobs(Row(1, "x", "y", parts=[both]), survey, TOWER) == (
        [],
        ["imagenet: classes.txt missing"],
    )
    assert suite.jobs(Row(1, "x", "y"), survey, TOWER) == ([], [suite.NOT_BUILT])
    small = Row(1, "x", "y", parts=[part(layout="few_shot/a", least_side=32)])
    assert suite.jobs(small, survey, dataclasses.replace(TOWER, side=31)) == (
        [],
        ["A: needs pictures of 32 pixels, the tower sees 31"],
    )
    assert len(suite.jobs(small, survey, dataclasses.replace(TOWER, side=32))[0]) == 1
    nameless = suite.Job(part(name=""), "", (found("few_shot/a"),))
    assert nameless.told("no eyes") == "few_shot/a: no eyes"
    (line,) = run([Row(6, "x", "y", elsewhere="run that")], Work(), tmp_path)
    assert (line.status, line.reason, line.key) == ("skipped", "run that", "")


def test_rows_are_chosen_by_number_in_the_paper_s_order():
    assert [row.number for row in ROWS] == [*range(1, 34)]
    chosen = suite_rows.numbered("14,1,8,11-13,12")
    assert [row.number for row in chosen] == [1, 8, 11, 12, 13, 14]
    assert suite_rows.numbered(None) == ROWS
    for wrong in ("", "0", "34", "5-3", "a", "1-2-3", "1,", "²", "9999"):
        with pytest.raises(UserError, match="--rows"):
            suite_rows.numbered(wrong)


def test_parts_of_rows_name_what_there_is():
    for row in ROWS:
        assert not (row.parts and row.elsewhere)
        for one in row.parts:
            assert callable(one.root()), row.number


def test_shots_are_numbers_and_a_curve():
    scores = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    outcomes = [
        Outcome({"shots": shots, "features": ["pooled"]}, results_of(some), {"odd": 1})
        for shots, some in zip((1, 5), scores, strict=True)
    ]
    found = suite_findings.few_shot(outcomes, "pets")
    assert [number.name for number in found.numbers] == [
        "pets, 1 shots",
        "pets, 5 shots",
    ]
    assert [number.value for number in found.numbers] == [25.0, 75.0]
    assert all(n.low < n.value < n.high and n.count == 4 for n in found.numbers)
    (chart,) = found.charts
    assert chart.curves[0].points == [[1.0, 25.0], [5.0, 75.0]] and chart.log_x
    assert found.notes == {"odd, 1 shots": 1, "odd, 5 shots": 1}


def test_numbers_of_measures_say_of_how_many_examples_they_are():
    def told(metric, count, **settings):
        facts = {"value": 0.25, "interval": [0.125, 0.5], "notes": {"odd": 1}}
        return {"metric": metric, "count": count, "settings": settings, **facts}

    some = [
        told("ece", 8, subgroup="Male"),
        told("ece_by_chance", 8, subgroup="Male"),
        told("accuracy", 7, subgroup="Male"),
        told("accuracy_gap", 15),
    ]
    of_ece = suite_findings.subgroups(some, "Smiling", "ece")
    of_accuracy = suite_findings.subgroups(some, "Smiling", "accuracy")
    measured = suite_findings.measured(some, "A", {"accuracy_gap": "gap"})
    numbers = [*of_ece.numbers, *of_accuracy.numbers, *measured.numbers]
    assert [(n.name, n.count) for n in numbers] == [
        ("Smiling, Male", 8),
        ("Smiling, Male, chance", 8),
        ("Smiling, Male", 7),
        ("Smiling, gap", 15),
        ("A, gap", 15),
    ]
    assert numbers[0] == Number("Smiling, Male", 25.0, 12.5, 50.0, "%", count=8)
    (bars,) = of_ece.charts
    assert bars.ticks == ["Male"]


def results_of(scores):
    import numpy as np

    return np.array(scores)


# --- What is read back ---

GOOD = suite.Line(
    1, "x", "done", "k", {"name": "t", "fingerprint": "f"}, numbers=[SAID]
)


@pytest.mark.parametrize(
    "change, message",
    [
        ("not json", "line 2.*malformed JSON"),
        ("[1]", "line 2: .* is no object"),
        ({"row": "1"}, "row: .* is no count"),
        ({"row": True}, "row: .* is no count"),
        ({"status": "good"}, "status: .* none of done, skipped, failed"),
        ({"key": None}, "key: "),
        ({"tower": []}, "tower: .* no object"),
        ({"seconds": float("nan")}, "seconds: .* not finite"),
        ({"seconds": 10**400}, "seconds: .* not finite"),
        ({"numbers": [{"name": "a"}]}, "numbers: value is missing"),
        ({"numbers": [{"name": "a", "value": "7"}]}, "value: .* no number"),
        ({"pictures": [{"title": "a", "file": "../b.png"}]}, "leaves the folder"),
        ({"pictures": [{"title": "a", "file": "/etc/b.png"}]}, "leaves the folder"),
        ({"charts": [{"title": "a", "x": "", "y": "", "curves": [{}]}]}, "name is mis"),
        ({"name": "x" * 200_000}, "no text of a usual length"),
        ({"reason": ["x"]}, "reason: .* no text"),
    ],
)
def test_a_file_of_somebody_else_is_refused_with_the_line(tmp_path, change, message):
    text = change if isinstance(change, str) else json.dumps(GOOD.as_json() | change)
    path = tmp_path / results.RESULTS_FILE
    path.write_text(json.dumps(GOOD.as_json()) + "\n" + text + "\n")
    with pytest.raises(UserError, match=message):
        results.read_lines(str(tmp_path))


def test_lines_are_read_as_they_were_written(tmp_path):
    curve = results.Curve("c", ((1.0, 2.0),), ((1.5, 2.5),))
    chart = results.Chart("t", "x", "y", (curve,), bars=True, ticks=("a",))
    picture = results.Picture("p", "rows/01/a.png")
    whole = dataclasses.replace(
        GOOD,
        numbers=(SAID, dataclasses.replace(SAID, low=None, high=None)),
        charts=(chart,),
        pictures=(picture,),
    )
    (tmp_path / results.RESULTS_FILE).write_text(json.dumps(whole.as_json()) + "\n")
    assert results.read_lines(str(tmp_path)) == [
        dataclasses.replace(whole, commands=())
    ]
    assert results.read_lines(str(tmp_path / "nothing")) == []


# --- The command ---

GIN = """from __gin__ import dynamic_registration
from vit22b_transfer.models import vit
IMAGE_SIZE = (16, 16)
TOWER = @vit.ViTConfig()
vit.ViTConfig:
  width = 32
  depth = 1
  mlp_dim = 64
  num_heads = 4
  patch_size = 8
  image_size = %IMAGE_SIZE
  pooling = 'gap'
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn pictures in layouts, one picture broken, and the size of a tower."""
    root = tmp_path_factory.mktemp("suite")
    tiny_classifier.draw_folders(root / "data", train=4, validation=3)
    pets = root / "data" / "few_shot" / "pets"
    tiny_classifier.draw_folders(pets, train=3, validation=2)
    broken = root / "data" / "train" / "rising" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (root / "tower.gin").write_text(GIN)
    use_one_device(root)
    return root


def command(folder, *arguments):
    with no_tasks():
        os.chdir(folder)
        return cli.main(["suite", *arguments])


@pytest.mark.slow
def test_the_command_runs_what_the_folder_allows_and_goes_on(folder, capsys):
    words = ["--tower=random", "--data=data", "--gin_file=tower.gin"]
    words += ["--gin.FewShot.shots=(1, 2)", "--gin.Sgd.epochs=2"]
    assert command(folder, *words, "--out=out", "--rows=6-9") == 0
    shown = capsys.readouterr().out
    assert "imagenet: 16 images of train, 12 images of validation" in shown
    assert "few_shot/pets: 12 images of train, 8 images of validation" in shown
    assert shown.count("the tower was run on") == 4
    assert "row 9 not run: the tower is none of a model of pairs\n" in shown
    assert '--gin.FewShot.shots="(1, 2)"' in shown
    known = {line.row: line for line in results.read_lines(str(folder / "out"))}
    assert [known[row].status for row in (6, 7, 8, 9)] == [
        "skipped",
        "skipped",
        "done",
        "skipped",
    ]
    assert [number.name for number in known[8].numbers] == [
        "ImageNet, 1 shots",
        "ImageNet, 2 shots",
        "pets, 1 shots",
        "pets, 2 shots",
    ]
    assert known[8].protocol["pets"]["few_shot.FewShot.shots"] == "(1, 2)"
    assert {*known[8].data} == {"imagenet", "few_shot/pets"}
    told = json.dumps(known[8].as_json()["protocol"])
    assert str(folder) not in told  # what decides a row has no place in it

    (folder / "out" / "suite.html").unlink()
    assert command(folder, *words, "--out=out", "--rows=1,8,27") == 0
    again = capsys.readouterr().out
    assert "done before" in again and "the tower was run on" not in again
    page = (folder / "out" / "suite.html").read_text()
    assert 'id="row-1"' in page and 'id="row-8"' in page and "<polyline" in page
    run_printed_commands(folder, capsys)


def run_printed_commands(folder, capsys):
    """What a row prints runs it alone, and gives the same."""
    known = {line.row: line for line in results.read_lines(str(folder / "out"))}
    commands = [known[row].commands[-1] for row in (1, 8, 27)]
    for text in commands:
        names = re.findall(r"--gin\.([^=]+)=", text)
        assert len({*names}) == len(names) and "'-'" not in text
    files = [
        folder / "out" / "work" / f"{kind}s.jsonl" for kind in ("probe", "measure")
    ]
    before = [path.read_text().splitlines() for path in files]
    run_in_process("\n".join(commands), folder)
    assert "the tower was run on" not in capsys.readouterr().out
    for path, lines in zip(files, before, strict=True):
        added = path.read_text().splitlines()[len(lines) :]
        assert len(added) > 2 and {*added} <= {*lines}


@pytest.mark.slow
def test_rows_fail_by_themselves_and_values_for_no_row_are_wrong(folder, capsys):
    words = ["--tower=random", "--data=data", "--gin_file=tower.gin"]
    words += ["--rows=8", "--out=other"]
    assert command(folder, *words, "--gin.FewShot.penalty=-1.0") == 1
    shown = capsys.readouterr()
    assert "1 of 1 rows failed: 8" in shown.err
    assert "row 8 failed: ImageNet: penalty=-1.0 must be positive" in shown.out
    assert command(folder, *words, "--gin.FewShot.penlaty=1.0") == 2
    assert "has no parameter 'penlaty'. Did you mean penalty" in capsys.readouterr().err
    assert command(folder, *words, "--gin.ZeroShot.templates=('{}',)") == 2
    assert "names no 'ZeroShot'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_or_a_gin_file_of_a_tower_gives_the_same_lines(folder, capsys):
    words = ["--data=data", "--rows=8", "--gin.FewShot.shots=(1, 2)"]
    (step,) = (folder / "out" / "random_tower").rglob("checkpoint_0")
    (folder / "imported").mkdir(exist_ok=True)
    gin = f"{GIN}INITIAL_CHECKPOINT = '{step}'\n"
    (folder / "imported" / "model.gin").write_text(gin)
    for number, tower in enumerate(("imported", "imported/model.gin", str(step))):
        files = ["--gin_file=tower.gin"] if tower == str(step) else []
        out = f"tower_{number}"
        given = [f"--tower={tower}", f"--out={out}", *words, *files]
        given.append(f"--gin.FEATURES_DIR='{folder / 'out' / 'work'}'")
        assert command(folder, *given) == 0
    assert "the tower was run" not in capsys.readouterr().out
    first = {line.row: line for line in results.read_lines(str(folder / "out"))}[8]
    for number in range(3):
        (line,) = results.read_lines(str(folder / f"tower_{number}"))
        assert (line.key, line.numbers) == (first.key, first.numbers)
    compared = ["--compare", "out", "tower_0", "--out=compared"]
    assert command(folder, *compared) == 0
    page = (folder / "compared" / "suite.html").read_text()
    assert "1: random" in page and "2: imported" in page


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tower=random"], "--tower, --data and --out are required"),
        (["--compare", "a", "--data=data"], "--compare takes folders"),
    ],
)
def test_wrong_usage_is_said(folder, capsys, arguments, message):
    with pytest.raises(SystemExit):
        command(folder, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tower=nowhere", "--data=data", "--out=x"], "nowhere"),
        (["--tower=random", "--data=nodata", "--out=x"], "nodata is not a directory"),
        (["--compare", "data"], "data has no suite.jsonl"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(folder, capsys, arguments, message):
    assert command(folder, *arguments) == 1
    assert message in capsys.readouterr().err
