"""Pieces of a self-contained HTML page: elements that escape, pictures, the frame.

A page has no script and asks for nothing: its style is in it, its pictures are data.
Whatever text comes in is escaped by `tag`, so that no name of a class or a file is
markup; only what `tag` made is taken as it is.
"""

import base64
import html
import io
import os
import stat

import numpy as np
from jaxtyping import UInt8

from vit22b_transfer import UserError

# Of an image file, of the side of what is shown, and of the pixels that are decoded.
MOST_BYTES, MOST_SIDE, MOST_PIXELS = 32 << 20, 960, 64_000_000
THUMBNAIL = 256
_VOID = {"meta", "img", "br", "hr"}
# Characters that HTML does not allow, but for those that end lines.
_CONTROL = {code: "\ufffd" for code in [*range(32), *range(127, 160)]}
for _code in (9, 10):
    del _CONTROL[_code]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0;
  --paper: #ffffff; --box: #f6f8fa; --bad: #b42318; --s0: #0b62c4; --s1: #b54708;
  --s2: #157f3d; --s3: #7a3fc4; --s4: #a3185f; --s5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa7b4;
  --line: #3a434d; --paper: #0d1117; --box: #161b22; --bad: #ff8b7e; --s0: #6cb2ff;
  --s1: #ffa657; --s2: #62d284; --s3: #c297ff; --s4: #ff8fc4; --s5: #56d4dd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 2rem 0 0.5rem;
  border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1rem 0 0.5rem; }
a { color: var(--s0); }
.soft { color: var(--soft); } .bad { color: var(--bad); }
.small { font-size: 0.875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem;
  overflow-wrap: normal; }
th, td { text-align: left; padding: 0.3rem 0.5rem; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
code, pre { font: 0.85rem/1.4 ui-monospace, monospace; background: var(--box); }
pre { padding: 0.5rem; overflow-x: auto; white-space: pre-wrap; }
details { margin: 0.5rem 0; } summary { cursor: pointer; color: var(--soft); }
figure { margin: 0.75rem 0; } figcaption { font-size: 0.875rem; color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
.figures figure { flex: 1 1 18rem; max-width: 32rem; min-width: 0; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.cards figure { margin: 0; border: 1px solid var(--line); padding: 0.5rem;
  background: var(--box); min-width: 0; }
.cards p { margin: 0.25rem 0; } .said { color: var(--ink); font-size: 1rem; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); }
svg { max-width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .grid { stroke: var(--line); }
svg .paper { stroke: var(--ink); stroke-dasharray: 3 2; }
svg .s0 { stroke: var(--s0); } svg .f0 { fill: var(--s0); }
svg .s1 { stroke: var(--s1); } svg .f1 { fill: var(--s1); }
svg .s2 { stroke: var(--s2); } svg .f2 { fill: var(--s2); }
svg .s3 { stroke: var(--s3); } svg .f3 { fill: var(--s3); }
svg .s4 { stroke: var(--s4); } svg .f4 { fill: var(--s4); }
svg .s5 { stroke: var(--s5); } svg .f5 { fill: var(--s5); }
svg .line { fill: none; stroke-width: 2; }
svg .span { stroke-width: 1.5; opacity: 0.6; }
@media (max-width: 40rem) { .wide { display: none; } body { padding: 0.75rem; }
  th, td { padding: 0.3rem 0.25rem; } }
@media print { details > * { display: block; } }
"""


class Markup(str):
    """HTML that `tag` made: its text is escaped already."""


def text(value: object) -> Markup:
    """A value as text of a page: nothing in it is markup.

    Characters that HTML does not allow become U+FFFD, halves of characters \\udcff.
    """
    whole = str(value).encode("utf-8", "backslashreplace").decode()
    return Markup(html.escape(whole.translate(_CONTROL), quote=True))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. children: `Markup`, or anything else, which is escaped.

    attributes: `class_` is class, `aria_label` is aria-label; one that is None is left
    out. No attribute takes a URL but `src` and `href`, and these only data or a place
    in the page.

    Raises:
      ValueError: for a URL that leads out of the page.
    """
    shown = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if key in ("src", "href") and not str(value).startswith(("data:image/", "#")):
            raise ValueError(f"{key} leads out of the page")
        if value is not None:
            shown += f' {key}="{text(value)}"'
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{joined(*children)}</{name}>")


def joined(*children: object) -> Markup:
    """One behind the other; None is left out."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else text(child)
            for child in children
            if child is not None
        )
    )


def page(title: str, *children: object) -> str:
    """A whole HTML5 page with its style in it."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        Markup(f"<style>{_STYLE}</style>"),
    )
    whole = tag("html", head, tag("body", tag("main", *children)), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def picture(path: str, title: str, *, within: str) -> Markup:
    """A figure of an image file, made smaller where it is large.

    within: a folder; a file that lies outside, by links too, is not read.

    Raises:
      UserError: if it cannot be shown.
    """
    uri = _data_uri(path, within)
    image = tag("img", src=uri, alt=title)
    return tag("figure", image, tag("figcaption", title))


def thumbnail(pixels: UInt8[np.ndarray, "height width 3"], title: str) -> Markup:
    """An image of pixels, at most `THUMBNAIL` wide and high, as a JPEG in the page."""
    from PIL import Image

    shown = Image.fromarray(pixels)
    shown.thumbnail((THUMBNAIL, THUMBNAIL))
    packed = io.BytesIO()
    shown.save(packed, "JPEG", quality=82)
    content = base64.b64encode(packed.getvalue()).decode()
    return tag("img", src=f"data:image/jpeg;base64,{content}", alt=title)


def _data_uri(path: str, within: str) -> str:
    from PIL import Image

    try:
        real, folder = os.path.realpath(path), os.path.realpath(within)
        if os.path.commonpath([real, folder]) != folder:
            raise UserError(f"picture {path!r} lies outside of {within}.")
        status = os.stat(real)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise UserError(
                f"picture {path!r} is no plain file of at most {MOST_BYTES} bytes."
            )
        with Image.open(real, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"picture {path!r} has more than {MOST_PIXELS} pixels.")
            shown = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"picture {path!r} cannot be shown: {error}.") from error
    shown.thumbnail((MOST_SIDE, MOST_SIDE))
    packed = io.BytesIO()
    shown.save(packed, "PNG", optimize=True)
    kind = "png"
    if packed.tell() > 1 << 17:
        packed, kind = io.BytesIO(), "jpeg"
        shown.save(packed, "JPEG", quality=88)
    content = base64.b64encode(packed.getvalue()).decode()
    return f"data:image/{kind};base64,{content}"
