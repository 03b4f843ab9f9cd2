"""The page of a run: curves, metrics with intervals, slices, examples, recipe."""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import evaluate, run_files, scored_files
from vit22b_transfer.evaluation.scored_files import Judged, Report
from vit22b_transfer.experiments.suite_results import Chart, Curve
from vit22b_transfer.host import json_files, whole_files
from vit22b_transfer.inference.prediction_files import read_lines
from vit22b_transfer.reports import svg_charts
from vit22b_transfer.reports.example_cards import Pictures, card, cut, table
from vit22b_transfer.reports.html_page import Markup, page, tag
from vit22b_transfer.training import curves

PAGE_FILE = "report.html"
# Of the best, the worst and others; of charts; of a recipe and a record, in bytes.
MOST_EXAMPLES = 8
_MOST_CHARTS = 30
_MAX_RECIPE, _MAX_METRICS = 1 << 20, 16 << 20
# Of an image's error messages that are told; of numbers that are shown as such.
_MOST_ERRORS, _LARGEST = 10, 1e30
_LOSSES = re.compile(r"(^train/|^eval/.*/)loss$")
_LEFT_OUT = re.compile(r"^instruments/")


def write(folder: str, register: Callable[[str], None], path: str | None = None) -> str:
    """Writes the page of a run's folder; its path, by default in the folder.

    register: makes a task of that name known, or raises a UserError, which is said.

    Raises:
      UserError: if the folder holds neither a log nor an evaluation.
    """
    path = path or os.path.join(folder, PAGE_FILE)
    content = html(folder, register)
    with whole_files.replacing(path) as file:
        file.write(content)
    return path


def html(folder: str, register: Callable[[str], None]) -> str:
    """The page; as `write`."""
    logged = curves.read(folder)
    metrics = os.path.join(folder, evaluate.METRICS_FILE)
    has_scores = os.path.isfile(metrics)
    if not logged.points and not has_scores:
        raise UserError(
            f"{folder} has neither {curves.METRICS_FILE} of a training nor "
            f"{evaluate.METRICS_FILE} of `vit22b eval`: name the MODEL_DIR of a run."
        )
    title = f"Run {os.path.basename(os.path.abspath(folder))}"
    parts: list[Markup] = [tag("h1", title), *_training(logged)]
    if has_scores:
        scores = json_files.read_object(metrics, limit=_MAX_METRICS)
        files = run_files.entries(folder)
        for entry, said in scores.items():
            parts.append(_section(entry, said, files.get(entry), register))
    else:
        parts.append(
            tag("p", f"No evaluation yet: `vit22b eval {folder}`.", class_="soft")
        )
    parts += _setup(folder)
    return page(title, *parts)


def _training(logged: curves.Curves) -> list[Markup]:
    """Charts of what was logged: the losses in one, each other number in its own."""
    if not logged.points:
        return []
    names = [name for name in logged.points if not _LEFT_OUT.match(name)]
    losses = [name for name in names if _LOSSES.search(name)]
    others = [name for name in names if name not in losses]
    groups = [("loss", losses), *((name, [name]) for name in others)]
    groups = [(title, group) for title, group in groups if group]
    charts = []
    for title, group in groups[:_MOST_CHARTS]:
        lines = [Curve(name, logged.points[name]) for name in group]
        charts.append(svg_charts.chart(Chart(title, "step", "", lines)))
    last = max(points[-1][0] for points in logged.points.values())
    notes = [f"{last:,.0f} steps are logged"]
    if len(groups) > len(charts):
        notes.append(f"{len(groups) - len(charts)} more numbers are not drawn")
    if hidden := len(logged.points) - len(names):
        notes.append(f"{hidden} of instruments: instruments.png")
    if logged.damaged:
        notes.append(f"{logged.damaged} lines of the log could not be read")
    return [
        tag("h2", "Training"),
        tag("p", "; ".join(notes), class_="soft small"),
        tag("div", *charts, class_="figures"),
    ]


def _section(
    entry: str, said: Any, path: str | None, register: Callable[[str], None]
) -> Markup:
    """An evaluation: from its predictions if these are there, else what it said."""
    heading = tag("h2", entry)
    try:
        if path is None:
            raise UserError("its file of predictions is not in the folder")
        task, split = scored_files.of_record(path)
        task, split = task or entry.partition("/")[0], split or entry.split("/")[-1]
        register(task)
        made = scored_files.report(scored_files.judge(path, task, split))
    except UserError as error:
        values = _metrics(said)
        problem = f"No intervals, slices or examples: {error}"
        column = {"value": [_shown(value) for value in values.values()]}
        return tag(
            "section",
            heading,
            tag("p", problem, class_="bad"),
            table([cut(name) for name in values], column),
        )
    return tag(
        "section",
        heading,
        *_scores(made, said),
        *_slices(made),
        *_examples(made.judged),
        *_skipped(path, made.judged),
    )


def _scores(made: Report, said: Any) -> list[Markup]:
    judged = made.judged
    sliced = {name for name in judged.metrics if made.slices and "=" in name}
    names = [name for name in judged.metrics if name not in sliced]
    columns = {
        "value": [_shown(judged.metrics[name]) for name in names],
        "95 % interval": [
            scored_files.told(made.intervals.get(name)) for name in names
        ],
        "clustered error": [
            f"{made.clustered[name]:.4f}" if name in made.clustered else ""
            for name in names
        ],
    }
    of_model = _metrics(said)
    extra = [n for n in of_model if n not in judged.metrics]
    columns["value"] += [_shown(of_model[name]) for name in extra]
    for name in ("95 % interval", "clustered error"):
        columns[name] += [""] * len(extra)
    note = (
        f"{len(judged.lines)} examples of {len(np.unique(judged.images))} images. "
        "Intervals: bootstrap over images (BCa); CIDEr with the document frequencies "
        "of all references."
    )
    return [
        table([*names, *map(cut, extra)], columns),
        tag("p", note, class_="soft small"),
    ]


def _metrics(said: Any) -> Mapping[str, Any]:
    """The metrics of an entry of `metrics.json`; none if it is none of ours."""
    values = said.get("metrics") if isinstance(said, dict) else None
    return values if isinstance(values, dict) else {}


def _slices(made: Report) -> list[Markup]:
    """Bars of the main metric by the values of each field, and the numbers folded."""
    if not made.slices:
        return []
    main = scored_files.main_metric(made.judged.numbers)
    parts: list[Markup] = []
    for field in dict.fromkeys(part.field for part in made.slices):
        slices = [part for part in made.slices if part.field == field]
        points, spans = [], []
        for place, part in enumerate(slices):
            value, found = part.metrics[main]
            value = 0.0 if np.isnan(value) else value
            points.append((float(place), value))
            spans.append((found.low, found.high) if found else (value, value))
        names = [part.value for part in slices]
        bars = [Curve(main, points, spans)]
        drawn = Chart(f"{main} by {field}", "", main, bars, bars=True, ticks=names)
        columns = {"examples": [f"{part.count:,}" for part in slices]}
        for name in made.judged.numbers:
            columns[name] = [
                f"{part.metrics[name][0]:.4f} "
                f"{scored_files.told(part.metrics[name][1])}".rstrip()
                for part in slices
            ]
        parts.append(svg_charts.chart(drawn))
        summary = tag("summary", f"Numbers by {field}")
        parts.append(tag("details", summary, table(names, columns), class_="small"))
    return parts


def _examples(judged: Judged) -> list[Markup]:
    """The best, the worst and some of the others, by the main metric; none twice."""
    try:
        main = scored_files.main_metric(judged.numbers)
    except UserError as error:
        return [tag("p", str(error), class_="soft")]
    scores = judged.numbers[main].rows[:, 0]
    places = np.random.default_rng(0).permutation(np.flatnonzero(~np.isnan(scores)))
    ranked = places[np.argsort(-scores[places], kind="stable")]
    each = min(MOST_EXAMPLES, -(-len(ranked) // 3))
    best, rest = ranked[:each], ranked[each:]
    worst = rest[::-1][:each]
    others = [place for place in places if place in set(rest[:-each])][:each]
    pictures = Pictures(judged.task, judged.split)
    parts: list[Markup] = []
    if pictures.problem:
        parts.append(tag("p", f"No pictures: {pictures.problem}", class_="soft"))
    for title, chosen in (("Best", best), ("Worst", worst), ("Of the others", others)):
        cards = [
            card(
                pictures,
                judged.lines[place],
                [("", _said(judged.lines[place]))],
                [f"{main} {scores[place]:.3f}"],
            )
            for place in chosen
        ]
        if cards:
            parts.append(tag("h3", f"{title}, by {main}"))
            parts.append(tag("div", *cards, class_="cards"))
    return parts


def _said(line: Mapping[str, Any]) -> object:
    return line.get("class_name", line["prediction"])


def _skipped(path: str, judged: Judged) -> list[Markup]:
    """What is not in the scores, and why."""
    reasons = [
        f"image {cut(line.get('image_id', line['index']))}: {cut(line['error'])}"
        for line in read_lines(path)
        if "error" in line
    ]
    said = [
        f"{judged.num_bad_images} images could not be read, and are in no score; "
        f"{judged.num_empty} predictions are empty, and scored as such."
    ]
    from vit22b_transfer.data import tasks

    try:
        if judged.split and (left_out := tasks.skipped_text(judged.task, judged.split)):
            said.append(f"Left out of the split by its source: {left_out}.")
    except UserError:
        pass  # its files are not here: said above, where the pictures are missing
    items = [tag("li", reason) for reason in reasons[:_MOST_ERRORS]]
    if len(reasons) > len(items):
        items.append(tag("li", f"and {len(reasons) - len(items)} more"))
    listed = tag("ul", *items) if items else None
    parts = [tag("p", text) for text in said]
    return [tag("div", tag("h3", "What was skipped"), *parts, listed, class_="small")]


def _setup(folder: str) -> list[Markup]:
    """What the run is made of: its checkpoints and its recipe."""
    names = os.listdir(folder)
    steps = sorted(
        int(name.removeprefix("checkpoint_"))
        for name in names
        if re.fullmatch(r"checkpoint_\d{1,15}", name)
    )
    parts = [tag("h2", "Data and recipe")]
    if steps:
        listed = ", ".join(f"{step:,}" for step in steps)
        parts.append(tag("p", f"Checkpoints of the steps {listed}."))
    for file in ("recipe.gin", "vocabulary.json"):
        path = os.path.join(folder, file)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as opened:
                text = opened.read(_MAX_RECIPE)
            whole = tag("pre", text)
            parts.append(tag("details", tag("summary", file), whole, class_="small"))
    for name in sorted(names):
        if name.endswith(".jsonl.run.json"):
            said = json_files.read_object(
                os.path.join(folder, name), limit=_MAX_METRICS
            )
            text = json.dumps(said.get("fingerprint"), indent=2)
            summary = tag("summary", f"What made {name.removesuffix('.run.json')}")
            parts.append(tag("details", summary, tag("pre", text), class_="small"))
    return parts


def _shown(value: object) -> str:
    if isinstance(value, int | float) and abs(value) < _LARGEST:
        return f"{value:.4f}"
    return cut(value)
