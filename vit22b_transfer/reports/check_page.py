"""The page of a data check, and its summary on a terminal."""

from collections.abc import Sequence

import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.data import data_check, images, near_duplicates, packed_images
from vit22b_transfer.data.data_check import Checked
from vit22b_transfer.data.records import printable
from vit22b_transfer.host import tables, whole_files
from vit22b_transfer.reports.example_cards import cut, table
from vit22b_transfer.reports.html_page import Markup, page, tag, thumbnail

# Groups of near duplicates that are shown, and images of each.
MOST_GROUPS, _MOST_IN_GROUP = 24, 4


def show(checked: Checked, console: rich.console.Console) -> None:
    """Prints the summary."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    counted = data_check.counts(checked)
    names, columns = _columns(counted)
    none = [n for n in names if all(one.get(n, "0") == "0" for one in counted.values())]
    kept = [place for place, name in enumerate(names) if name not in none]
    columns = {split: [cells[n] for n in kept] for split, cells in columns.items()}
    kept_names = [names[place] for place in kept]
    tables.print_table(console, kept_names, columns, heading=checked.task)
    say(f"none: {', '.join(none)}")
    for part in checked.splits:
        if part.problem:
            say(f"{part.split}: not read: {part.problem}")
        if part.said:
            say(f"{part.split}: left out: {part.said}")
        for path, problem in list(part.unread.items())[:3]:
            say(f"{part.split}: {printable(path)}: {problem}")
    for line in _findings(checked):
        say(line)


def write(checked: Checked, path: str) -> None:
    """Writes the page."""
    with whole_files.replacing(path) as file:
        file.write(html(checked))


def html(checked: Checked) -> str:
    """The page."""
    title = f"Data of {checked.task}"
    parts = [tag("h1", title), table(*_columns(data_check.counts(checked)))]
    parts += [tag("p", line) for line in _findings(checked)]
    for part in checked.splits:
        parts += _split(part)
    parts += _groups("In several splits", checked.leaks)
    others = [group for group in checked.duplicates if group not in checked.leaks]
    parts += _groups("Near duplicates within a split", others)
    parts += _sheet(checked.pipeline)
    return page(title, *parts)


def _columns(counted):
    names = list(dict.fromkeys(name for one in counted.values() for name in one))
    columns = {
        split: [one.get(name, "") for name in names] for split, one in counted.items()
    }
    return names, columns


def _findings(checked: Checked) -> list[str]:
    """What is of all splits together."""
    bits, levels = near_duplicates.NEAR_BITS, near_duplicates.NEAR_LEVELS
    found = [
        f"{len(checked.duplicates)} groups of near duplicates, {len(checked.leaks)} of "
        f"them in several splits (difference hashes within {bits} of 64 bits and "
        f"colours within {levels:g} of 255, or equal files)"
    ]
    if checked.plain:
        found.append(
            f"{checked.plain} images are so plain that their hash is that of many; "
            "near duplicates of these may be missed"
        )
    pipeline = checked.pipeline
    if pipeline.problem:
        found.append(f"the input pipeline stops: {pipeline.problem}")
    else:
        speed = pipeline.examples_per_second
        found.append(f"the input pipeline reads {speed:,.0f} examples a second here")
    return found


def _split(part: data_check.SplitFacts) -> list[Markup]:
    """What is wrong in a split, item by item."""
    lists: list[tuple[str, Sequence[str]]] = [
        ("Not read", [f"{path}: {why}" for path, why in part.unread.items()]),
        ("CMYK: their colours are converted", part.cmyk),
        ("Turned upright by EXIF", part.turned),
    ]
    if part.said:
        lists.insert(0, ("Left out by the source", [part.said]))
    for name, texts in part.texts.items():
        if texts.unknown_characters:
            said = [
                f"{character!r} (U+{ord(character):04X}) in {count} texts"
                for character, count in texts.unknown_characters.items()
            ]
            lists.append((f"{name}: characters that the vocabulary lacks", said))
        for kind, found in texts.samples.items():
            lists.append((f"{name}: {_KINDS[kind]}", [repr(text) for text in found]))
    problem = [tag("p", part.problem, class_="bad")] if part.problem else []
    shown = []
    for title, values in lists:
        if values:
            items = [tag("li", cut(text)) for text in data_check.sampled(values)]
            shown += [tag("h3", title), tag("ul", *items, class_="small")]
    if not (problem or shown):
        return []
    return [tag("h2", f"Split {part.split}"), *problem, *shown]


_KINDS = {
    "empty": "empty texts",
    "past": "texts that are cut",
    "unknown": "texts with unknown pieces",
    "changed": "texts that do not come back from their tokens",
    "control": "texts with control characters",
    "special": "texts with what looks like a token",
}


def _groups(title: str, groups: Sequence[Sequence[tuple[str, str]]]) -> list[Markup]:
    if not groups:
        return []
    shown = groups[:MOST_GROUPS]
    heading = f"{title}: {len(groups)} groups"
    if len(shown) < len(groups):
        heading += f", the first {len(shown)}"
    cards = []
    for number, group in enumerate(shown, 1):
        for split, path in group[:_MOST_IN_GROUP]:
            said = [tag("p", f"group {number}, {split}"), tag("p", cut(path))]
            caption = tag("figcaption", *said, class_="small")
            cards.append(tag("figure", _picture(path), caption))
        if more := len(group) - _MOST_IN_GROUP:
            if more > 0:
                said = tag("figcaption", f"group {number}: {more} more")
                cards.append(tag("figure", said))
    return [tag("h2", heading), tag("div", *cards, class_="cards")]


def _picture(path: str) -> Markup:
    try:
        return thumbnail(images.read_whole(packed_images.read(path)), path)
    except UserError as error:
        return tag("p", str(error), class_="bad small")


def _sheet(pipeline: data_check.Pipeline) -> list[Markup]:
    """The first images as the model gets them."""
    if not pipeline.sheet:
        return []
    cards = [
        tag("figure", thumbnail(pixels, name), tag("figcaption", cut(name)))
        for name, pixels in pipeline.sheet
    ]
    height, width = pipeline.sheet[0][1].shape[:2]
    said = (
        f"The first {len(cards)} images of the split, prepared to {height} × {width} "
        "pixels; what a recipe draws at random is not in it."
    )
    return [
        tag("h2", "What the model sees"),
        tag("p", said, class_="soft small"),
        tag("div", *cards, class_="cards"),
    ]
