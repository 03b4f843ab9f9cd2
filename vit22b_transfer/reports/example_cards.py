"""Cards of examples on a page: the image, what was asked and said, what is true."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.reports.html_page import Markup, tag, thumbnail

# Of texts and of references that a card shows.
_LONGEST, _REFERENCES = 400, 3


class Pictures:
    """The images of a split's examples, or why there are none, said once."""

    def __init__(self, task: str, split: str):
        self.problem, self._records = "", []
        if not split:
            self.problem = "no record says which split the predictions are of"
            return
        from vit22b_transfer.data import example_images

        try:
            self._records = example_images.records_of(task, split)
        except UserError as error:
            self.problem = str(error)

    def shown(self, line: Mapping[str, Any]) -> Markup | None:
        """The image of a line as an element; None if pictures have a problem."""
        from vit22b_transfer.data import images, packed_images

        if self.problem:
            return None
        index, known = line["index"], line.get("image_id")
        if not 0 <= index < len(self._records):
            return tag("p", "its place is not in the split", class_="bad small")
        record = self._records[index]
        if known is not None and str(known) != record.image_id:
            return tag("p", "the split has another image there", class_="bad small")
        try:
            data = packed_images.read(record.image_path)
            return thumbnail(images.read_whole(data), record.image_id)
        except UserError as error:
            return tag("p", str(error), class_="bad small")


def card(
    pictures: Pictures,
    line: Mapping[str, Any],
    said: Sequence[tuple[str, object]],
    more: Iterable[str] = (),
) -> Markup:
    """A card. said: label and text of each prediction; more: small lines below."""
    parts = (
        [tag("p", cut(line["prompt"]), class_="small")] if line.get("prompt") else []
    )
    for label, text in said:
        shown = cut(text) if str(text).strip() else "(nothing)"
        name = tag("b", f"{label}: ") if label else None
        parts.append(tag("p", name, shown, class_="said"))
    references = line.get("references") or [line.get("target", "")]
    names = line.get("metadata", {}).get("label_names") or references
    counts: dict[str, int] = {}
    for text in map(str, names if isinstance(names, list) else [names]):
        counts[text] = counts.get(text, 0) + 1
    for text, count in list(counts.items())[:_REFERENCES]:
        times = f" ({count} times)" if count > 1 else ""
        parts.append(tag("p", f"true: {cut(text)}{times}", class_="small"))
    if len(counts) > _REFERENCES:
        rest = f"and {len(counts) - _REFERENCES} other references"
        parts.append(tag("p", rest, class_="small"))
    parts += [tag("p", text, class_="small") for text in more]
    named = f"example {line['index']}, image {cut(line.get('image_id', 'unnamed'))}"
    parts.append(tag("p", named, class_="small"))
    return tag("figure", pictures.shown(line), tag("figcaption", *parts))


def cut(text: object) -> str:
    """A text, cut if it is long; it says so."""
    whole = str(text)
    if len(whole) <= _LONGEST:
        return whole
    return f"{whole[:_LONGEST]}… ({len(whole):,} characters)"


def table(names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Markup:
    """A table with a row for each name and the columns of numbers beside it."""
    head = [tag("th", "", scope="col")]
    head += [tag("th", name, class_="number", scope="col") for name in columns]
    body = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", column[place], class_="number") for column in columns.values()),
        )
        for place, name in enumerate(names)
    ]
    whole = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))
    return tag("div", whole, class_="scroll")
