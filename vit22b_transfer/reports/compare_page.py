"""The page of a comparison: the differences, and the examples that flipped."""

from collections.abc import Sequence

from vit22b_transfer.evaluation import paired_files
from vit22b_transfer.evaluation.paired_files import Flip, Paired
from vit22b_transfer.host import whole_files
from vit22b_transfer.reports import svg_charts
from vit22b_transfer.reports.example_cards import Pictures, card, table
from vit22b_transfer.reports.html_page import Markup, page, tag

# Of each kind of flipped examples.
MOST_FLIPS = 12


def write(paired: Paired, changed: Sequence[str] | None, path: str) -> None:
    """Writes the page. changed: lines by which the recipes differ; None: no recipes."""
    with whole_files.replacing(path) as file:
        file.write(html(paired, changed))


def html(paired: Paired, changed: Sequence[str] | None) -> str:
    """The page."""
    change = paired_files.main_change(paired)
    title = f"Two models on {paired.first.task} {paired.first.split}".rstrip()
    pictures = Pictures(paired.first.task, paired.first.split)
    names, columns = paired_files.rows(paired)
    parts = [
        tag("h1", title),
        tag("p", tag("b", paired_files.sentence(change))),
        tag("p", f"A: {paired.first.path}", class_="small"),
        tag("p", f"B: {paired.second.path}", class_="small"),
        table([f"{name} × 100" for name in names], columns),
        _drawn(paired),
        tag("p", _method(paired), class_="soft small"),
    ]
    if said := paired_files.left_out(paired):
        parts.append(tag("p", said, class_="bad"))
    if pictures.problem:
        parts.append(tag("p", f"No pictures: {pictures.problem}", class_="soft"))
    for name, sign in (("A", 1), ("B", -1)):
        flips = [flip for flip in paired.flips if sign * flip.gap > 0]
        parts.append(_flipped(name, flips, paired.main, pictures))
    if changed is not None:
        parts.append(tag("h2", "What the recipes differ in"))
        parts.append(
            tag("pre", "\n".join(changed)) if changed else tag("p", "in nothing")
        )
    return page(title, *parts)


def _drawn(paired: Paired) -> Markup:
    """Each difference with its interval on one scale, 0 as a tick."""
    found = [
        (change.metric, change.difference.interval)
        for change in paired.changes
        if change.difference is not None
    ]
    ends = [end for _, one in found for end in (one.low, one.high)]
    least, most = min([0.0, *ends]), max([0.0, *ends])
    rows = []
    for metric, one in found:
        drawn = svg_charts.interval(
            one.value,
            one.low,
            one.high,
            0.0,
            least=least,
            most=most,
            reference="no difference",
        )
        rows.append(tag("tr", tag("th", metric, scope="row"), tag("td", drawn)))
    caption = tag("caption", "A - B with 95 % intervals; the tick is no difference")
    return tag("table", caption, tag("tbody", *rows))


def _method(paired: Paired) -> str:
    return (
        f"{len(paired.first.lines)} examples, resampled by image with all their "
        "questions, the same for both (BCa, 95 %); CIDEr with the document frequencies "
        "of all references. McNemar: exact binomial test of metrics that are right or "
        "wrong. The last column: images that would show a difference of "
        f"{paired_files.EFFECT:g} points at 5 % with 80 % power."
    )


def _flipped(
    name: str, flips: Sequence[Flip], metric: str, pictures: Pictures
) -> Markup:
    shown = flips[:MOST_FLIPS]
    heading = f"Where {name} is better: {len(flips)} examples"
    if len(flips) > len(shown):
        heading += f", the {len(shown)} that differ most"
    cards = [
        card(
            pictures,
            flip.first,
            [("A", flip.first["prediction"]), ("B", flip.second["prediction"])],
            [f"{metric} × 100: A - B = {100 * flip.gap:.1f}"],
        )
        for flip in shown
    ]
    return tag("section", tag("h2", heading), tag("div", *cards, class_="cards"))
