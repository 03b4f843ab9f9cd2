"""Two files of predictions, or two runs: differences, tests, flips, the page."""

import json

import html_checks
import numpy as np
import prediction_samples
import pytest
import scipy.stats
from prediction_samples import CAPTIONS, QUESTIONS

from vit22b_transfer import UserError, cli
from vit22b_transfer.evaluation import intervals, paired_files, run_files, text_metrics
from vit22b_transfer.reports import compare_page
from vit22b_transfer.reports.example_cards import Pictures, card


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    prediction_samples.register(folder)
    prediction_samples.draw(folder, prediction_samples.captions())
    for name, lines, task in (
        ("vqa_a", prediction_samples.answers(seed=1, skill=0.8), QUESTIONS),
        ("vqa_b", prediction_samples.answers(seed=2, skill=0.5), QUESTIONS),
        ("captions_a", prediction_samples.captions(seed=1), CAPTIONS),
        ("captions_b", prediction_samples.captions(seed=2), CAPTIONS),
    ):
        prediction_samples.write(folder / f"{name}.jsonl", lines, task)
    return folder


def paired(folder, name, **options):
    task = CAPTIONS if name == "captions" else QUESTIONS
    one, other = (str(folder / f"{name}_{end}.jsonl") for end in "ab")
    return paired_files.pair(one, other, task, split="test", **options)


@pytest.fixture(scope="module")
def answered(folder):
    return paired(folder, "vqa")


@pytest.fixture(scope="module")
def captioned(folder):
    return paired(folder, "captions")


def change(made, metric):
    return next(c for c in made.changes if c.metric == metric)


def test_a_difference_is_scipys_of_the_same_images(answered):
    found = change(answered, "vqa_accuracy")
    one, other = answered.first, answered.second
    assert found.first == one.metrics["vqa_accuracy"] > found.second
    gaps = one.numbers["vqa_accuracy"].rows - other.numbers["vqa_accuracy"].rows
    sums, counts = intervals.by_image(gaps[:, 0], one.images)
    expected = scipy.stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=intervals.RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    interval = found.difference.interval
    assert (interval.low, interval.high) == pytest.approx(expected.confidence_interval)
    gap, low, high = (100 * x for x in interval[:3])
    assert low > 0
    said = f"A is better by {gap:.1f} vqa_accuracy [{low:.1f}, {high:.1f}]"
    assert paired_files.sentence(found) == said
    # Images that show half a point: those of the normal approximation.
    deviation = interval.standard_error * np.sqrt(30)
    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
    assert found.needed == int(np.ceil((z * deviation / 0.005) ** 2))


def test_mcnemar_is_of_metrics_that_are_right_or_wrong(answered):
    exact = change(answered, "exact_match").exact
    first = [line["prediction"] == line["target"] for line in answered.first.lines]
    second = [line["prediction"] == line["target"] for line in answered.second.lines]
    # An answer of no annotator is right for neither.
    only = [
        sum(a > b for a, b in zip(x, y, strict=True))
        for x, y in ((first, second), (second, first))
    ]
    assert (exact.only_first, exact.only_second) == tuple(only)
    tails = sum(scipy.stats.binom.pmf(k, sum(only), 0.5) for k in range(min(only) + 1))
    assert exact.probability == pytest.approx(min(2 * tails, 1))
    assert change(answered, "vqa_accuracy").exact is None  # one is right in part


def test_the_other_way_round_all_is_turned(folder, answered):
    first, second = (str(folder / f"vqa_{end}.jsonl") for end in "ba")
    turned = paired_files.pair(first, second, QUESTIONS)
    one, other = change(answered, "exact_match"), change(turned, "exact_match")
    assert other.difference.interval.value == -one.difference.interval.value
    assert other.exact.probability == one.exact.probability
    assert [f.gap for f in turned.flips] == [-f.gap for f in answered.flips]
    assert paired_files.sentence(other).startswith("B is better by")


def test_a_file_against_itself_shows_nothing(folder):
    path = str(folder / "captions_a.jsonl")
    same = paired_files.pair(path, path, CAPTIONS)
    assert not same.flips and all(c.needed is None for c in same.changes)
    for found in same.changes:
        assert found.difference is not None
        assert found.difference.interval[:3] == (0, 0, 0), found.metric
    assert "no difference of cider_d is shown" in paired_files.sentence(
        same.changes[-1]
    )


def test_captions_differ_by_what_both_score(captioned):
    assert captioned.main == "cider_d"
    references = [line["references"] for line in captioned.first.lines]
    texts = [
        [line["prediction"] for line in judged.lines]
        for judged in (captioned.first, captioned.second)
    ]
    values = [text_metrics.captioning(references, one) for one in texts]
    for found in captioned.changes:
        gap = values[0][found.metric] - values[1][found.metric]
        assert found.difference is not None
        assert found.difference.interval.value == pytest.approx(gap), found.metric
    scores = [text_metrics.cider_d_scores(references, one).scores for one in texts]
    gaps = np.array(scores[0]) - np.array(scores[1])
    largest = captioned.flips[0]
    place = int(np.argmax(np.abs(gaps)))
    assert largest.gap == gaps[place] and largest.first["index"] == place
    assert len(captioned.flips) == np.count_nonzero(gaps)


def test_the_order_of_lines_does_not_matter(folder, captioned, tmp_path):
    lines = prediction_samples.captions(seed=2)[::-1]
    path = prediction_samples.write(tmp_path / "turned.jsonl", lines)
    turned = paired_files.pair(str(folder / "captions_a.jsonl"), path, CAPTIONS)
    for one, other in zip(turned.changes, captioned.changes, strict=True):
        assert one.difference and other.difference
        assert one.difference.interval == other.difference.interval
        assert one._replace(difference=None) == other._replace(difference=None)


def test_other_examples_are_an_error_or_are_counted(folder, tmp_path):
    whole = str(folder / "vqa_a.jsonl")
    lines = prediction_samples.answers(seed=2)
    part = prediction_samples.write(tmp_path / "part.jsonl", lines[:40])
    with pytest.raises(UserError, match=f"{len(lines) - 40} are in the first alone, 0"):
        paired_files.pair(whole, part, QUESTIONS)
    made = paired_files.pair(whole, part, QUESTIONS, common=True)
    assert (made.only_first, made.only_second) == (len(lines) - 40, 0)
    assert len(made.first.lines) == len(made.second.lines) == 40
    for line in lines[:3]:
        line["error"] = "is cut off"
    unread = prediction_samples.write(tmp_path / "unread.jsonl", lines)
    made = paired_files.pair(whole, unread, QUESTIONS)
    assert made.unread == 3 and "3 not read" in paired_files.left_out(made)
    lines[9]["references"] = ["elsewhere"] * 10
    other = prediction_samples.write(tmp_path / "other.jsonl", lines)
    with pytest.raises(UserError, match="have other references"):
        paired_files.pair(whole, other, QUESTIONS)
    nothing = prediction_samples.write(
        tmp_path / "nothing.jsonl", prediction_samples.captions()
    )
    with pytest.raises(UserError, match="no example in common"):
        paired_files.pair(whole, nothing, QUESTIONS)


# ----- Runs and the page ----------------------------------------------------------


@pytest.fixture(scope="module")
def runs(folder):
    """Two folders of runs whose evaluations lay elsewhere when they were made."""
    for end, rate in (("a", 0.1), ("b", 0.2)):
        run = folder / f"run_{end}"
        run.mkdir()
        found = {}
        for name, task in (("captions", CAPTIONS), ("vqa", QUESTIONS)):
            for suffix in ("", ".run.json"):
                text = (folder / f"{name}_{end}.jsonl{suffix}").read_bytes()
                (run / f"{name}.jsonl{suffix}").write_bytes(text)
            found[f"{task}/test"] = {"predictions": f"/etc/../moved/{name}.jsonl"}
        found["gone/test"] = {"predictions": "/etc/passwd"}
        (run / "metrics.json").write_text(json.dumps(found))
        (run / "recipe.gin").write_text(f"# of {end}\nSTEPS = 5\nRATE = {rate}\n")
    return [str(folder / f"run_{end}") for end in "ab"]


def test_runs_are_compared_with_their_recipes(runs, folder, capsys):
    assert set(run_files.entries(runs[0])) == {f"{CAPTIONS}/test", f"{QUESTIONS}/test"}
    assert cli.main(["compare", *runs]) == 1
    assert "2 evaluations" in capsys.readouterr().err
    out = folder / "runs.html"
    entry = ["--entry", f"{CAPTIONS}/test"]
    assert cli.main(["compare", *runs, *entry, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "-RATE = 0.1\n+RATE = 0.2" in shown and "STEPS" not in shown
    text, tags = html_checks.checked(out.read_text())
    assert "-RATE = 0.1 +RATE = 0.2" in text
    cards = [len(part) for part in _split(compare_page, runs, folder)]
    assert tags.count("img") == sum(cards)


def _split(module, runs, folder):
    """The flips that a page shows, of each side."""
    made = paired(folder, "captions")
    for sign in (1, -1):
        yield [f for f in made.flips if sign * f.gap > 0][: module.MOST_FLIPS]


def test_what_strangers_wrote_is_text_on_the_page(folder, tmp_path):
    lines = prediction_samples.captions(seed=2)
    evil = "<script>alert(1)</script><img src=http://x.example/a onerror=b> \x00\x1b"
    for line in lines:
        line |= {"prediction": evil, "prompt": evil}
    path = prediction_samples.write(tmp_path / "evil.jsonl", lines, CAPTIONS, "<b>")
    made = paired_files.pair(path, path, CAPTIONS, split="test")
    flip = paired_files.Flip(made.first.lines[0], made.second.lines[0], 1.0)
    made = made._replace(flips=[flip])
    text, tags = html_checks.checked(compare_page.html(made, [evil]))
    assert text.count("<script>alert(1)</script>") == 4 and tags.count("img") == 1


def test_pictures_that_are_not_there_are_said(folder):
    made = paired(folder, "vqa")
    text, tags = html_checks.checked(compare_page.html(made, None))
    assert "No pictures:" in text and "questions.json" in text and "img" not in tags


def test_the_image_of_another_example_is_not_shown(folder):
    made = paired(folder, "captions")
    line = made.first.lines[3]
    pictures = Pictures(CAPTIONS, "test")
    assert "<img" in card(pictures, line, [])
    assert "the split has another image there" in card(
        pictures, line | {"image_id": "777"}, []
    )
    outside = card(pictures, line | {"index": 99}, [])
    assert "its place is not in the split" in outside and "<img" not in outside


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vqa_a.jsonl", "no.jsonl"], "no.jsonl cannot be read"),
        (["vqa_a.jsonl", "vqa_b.jsonl", "--entry", "x"], "these are files"),
        (["vqa_a.jsonl", "."], "first `vit22b eval .`"),
        (["run_a", "run_b", "--entry", "x/test"], "no evaluation 'x/test'"),
    ],
)
def test_what_cannot_be_compared_is_said(
    arguments, message, runs, folder, capsys, monkeypatch
):
    monkeypatch.chdir(folder)
    assert cli.main(["compare", *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
