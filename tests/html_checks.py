"""Whether a page is well formed and asks for nothing outside of it."""

import html.parser

VOID = {"meta", "img", "br", "hr", "link", "input"}
# What a paragraph may hold.
PHRASING = {"a", "b", "code", "img", "svg", "span", "br"}


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.problems, self.ids, self.links = [], [], [], []
        self.texts, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.problems.append(f"an attribute of {tag} is there twice")
        if any(name.startswith("on") for name in names):
            self.problems.append(f"{tag} has a handler")
        if self.open and self.open[-1] == "p" and tag not in PHRASING:
            self.problems.append(f"{tag} in a paragraph")
        if tag == "img" and "alt" not in names:
            self.problems.append("an image without alt")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href"):
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.texts.append(data)


def read(page):
    """The reader of a page, which is found well formed."""
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert not reader.problems and not reader.open, (reader.problems, reader.open)
    assert len(set(reader.ids)) == len(reader.ids)
    return reader


def checked(page):
    """The texts and tags of a page, which is found well formed and self-contained."""
    reader = read(page)
    places = {f"#{name}" for name in reader.ids}
    for link in reader.links:
        assert link.startswith("data:image/") or link in places, link[:80]
    assert not {"script", "iframe", "link", "object", "form"} & {*reader.tags}
    assert "url(" not in page and "@import" not in page
    assert "default-src &#x27;none&#x27;" in page
    return " ".join(" ".join(reader.texts).split()), reader.tags
