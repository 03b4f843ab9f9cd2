"""Damage to files: of their bytes, and of what they say in the format that they have.

A file that is read in one of the known forms (JSON, lines of JSON, CSV, the header of
safetensors, msgpack, members of a zip, the header of an array of NumPy) is most of the
time damaged in there and written again whole, with lengths and checksums that are
right: random bytes alone would never get behind the first check of a parser.
"""

import ast
import copy
import csv
import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import msgpack
from hostile_files import places

NESTED = 3_000


class Raw(str):
    """A text that stands in JSON as it is."""


def _nested(open_, close):
    return Raw(open_ * NESTED + "1" + close * NESTED)


# What stands in place of a value. Of each type, and what hurts parsers of it.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, -(2**31), 2**31, 2**53 + 1, 2**63, 2**64, 3e8),
    *(10**30, -(10**30), 10**308, 300_000_000, 65_536, 0.5, 1.5, 2.0, -0.5, 1e-300),
    *(1e308, Raw("1e999"), Raw("NaN"), Raw("-Infinity"), Raw("1" * 5000)),
    *(
        "",
        "x",
        "1",
        "16",
        "float32",
        "\0",
        "\n",
        "\ud83d",
        "\u2028",
        "%s{0}{i}",
        "a" * 5000,
    ),
    *(
        "../../x",
        "/",
        "/etc/passwd",
        ".",
        "@f()",
        "[(",
        "\\1",
        "<f4",
        "|O",
        "none",
        "None",
    ),
    *(
        [],
        [1],
        [1, 2],
        [-1, 4],
        [1.5, 2],
        ["a"],
        [None],
        [[1]],
        [0, 0, 0],
        list(range(99)),
    ),
    *(
        {},
        {"a": 1},
        {"x": {"y": [1]}},
        {"height": 16, "width": "16"},
        {"shortest_edge": 0},
    ),
    *({"": {}}, _nested("[", "]"), _nested('{"a":', "}"), [2**31, 2**31], [2**62, 4]),
)


# --- Values ---


def mutated_value(value: Any, rng: Random) -> Any:
    """The value with one place replaced, removed, renamed, doubled or swapped."""
    value = copy.deepcopy(value)
    path = rng.choice(list(places(value)))
    if not path:
        return rng.choice(VALUES)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    last, how = path[-1], rng.random()
    if how < 0.6:
        parent[last] = rng.choice(VALUES)
    elif how < 0.7:
        del parent[last]
    elif how < 0.8 and isinstance(parent, dict):
        name = rng.choice(
            [f"{last}x", "", "\ud83d", f"{last}\0", "a" * 3000, "..", "__class__"]
        )
        parent[name] = parent.pop(last)
    elif how < 0.9 and isinstance(parent, list):
        parent[last:last] = [copy.deepcopy(parent[last])] * rng.choice([1, 2, 50])
    else:
        parent[last] = _nearby(parent[last], value, rng)
    return value


def _nearby(old: Any, whole: Any, rng: Random) -> Any:
    """A value that is nearly right: another number, its text, another place's value."""
    if (
        isinstance(old, int | float)
        and not isinstance(old, bool)
        and rng.random() < 0.7
    ):
        numbers = (
            old + 1,
            old - 1,
            -old,
            old * 2,
            float(old),
            str(old),
            [old],
            old * 1000,
        )
        return rng.choice(numbers)
    other = whole
    for key in rng.choice(list(places(whole))):
        other = other[key]
    return copy.deepcopy(other)


def json_text(value: Any) -> bytes:
    """JSON of a value that may hold `Raw`, NaN and lone surrogates."""
    raw: dict[str, str] = {}

    def marked(part):
        if isinstance(part, Raw):
            mark = f"raw-{len(raw)}-"
            raw[f'"{mark}"'] = str(part)
            return mark
        if isinstance(part, dict):
            return {str(key): marked(child) for key, child in part.items()}
        if isinstance(part, list | tuple):
            return [marked(child) for child in part]
        if isinstance(part, bytes):
            return part.decode("latin-1")
        return part

    text = json.dumps(marked(value))
    for mark, content in raw.items():
        text = text.replace(mark, content)
    return text.encode()


def plain(value: Any) -> Any:
    """The value for msgpack: `Raw` is a string, integers have 64 bits."""
    if isinstance(value, dict):
        return {plain(key): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return float(min(max(value, -(10**300)), 10**300))
    if isinstance(value, str):
        return (
            str(value)[:2000]
            .encode("utf-8", "surrogatepass")
            .decode("utf-8", "replace")
        )
    return value


# --- Bytes ---


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """The bytes with bits flipped, pieces cut out, doubled, moved or made alike."""
    if not data:
        return rng.choice([b"\0", b"[", b"\xff" * 9])
    out = bytearray(data)
    at, to = sorted((rng.randrange(len(out)), rng.randrange(len(out) + 1)))
    # Most pieces are short: a header is damaged, and not all of the file.
    to = min(to, at + rng.choice([1, 2, 8, 64, 10**9]))
    how = rng.randrange(8)
    if how == 0:
        for _ in range(rng.choice([1, 1, 2, 8])):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del out[at:]
    elif how == 2:
        del out[at:to]
    elif how == 3:
        out[at:at] = out[at:to] * rng.choice([1, 2, 30])
    elif how == 4:
        out[at:to] = bytes([rng.choice([0, 0xFF, 0x20, 0x80, 0x22])]) * (to - at)
    elif how == 5:
        out[at : at + 1] = rng.choice(
            [b"\0", b"\n", b'"', b"[" * 2000, b"9" * 5000, b"\xed\xa0\xbd"]
        )
    elif how == 6:
        piece, start = bytes(out[at:to]), rng.randrange(len(out))
        out[start : start + len(piece)] = piece
    else:
        out[at : at + 4] = struct.pack(
            rng.choice("<>") + "I", rng.choice([0, 1, 2**31, 2**32 - 1])
        )
    return bytes(out)


# --- Forms: what a file says, and the file that says something else ---

Form = Callable[[bytes, Random], bytes | None]


def _in_json(data: bytes, rng: Random) -> bytes | None:
    if data[:1] not in b'{["' or not data:
        return None
    return json_text(mutated_value(json.loads(data), rng))


def _in_lines(data: bytes, rng: Random) -> bytes | None:
    lines = data.split(b"\n")
    if len(lines) < 2 or data[:1] not in b'{["':
        return None
    at = rng.randrange(len(lines))
    if rng.random() < 0.2:  # a line is lost, there twice, or of zeros
        lines[at : at + 1] = rng.choice([[], [lines[at]] * 2, [b"\0" * len(lines[at])]])
    elif lines[at]:
        lines[at] = json_text(mutated_value(json.loads(lines[at]), rng))
    return b"\n".join(lines)


def _in_csv(data: bytes, rng: Random) -> bytes | None:
    text = data.decode()
    if not text.isprintable() and "\n" not in text or "," not in text:
        return None
    rows = list(csv.reader(io.StringIO(text)))
    row = rng.choice(rows)
    if not row:
        return None
    at, values = (
        rng.randrange(len(row)),
        (*VALUES, "a" * 200_000, '"', 'x"y', ",", "\r"),
    )
    row[at : at + 1] = rng.choice([[], [row[at]] * 2, [str(rng.choice(values))]])
    out = io.StringIO()
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    csv.writer(out, quoting=quoting).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def _in_safetensors(data: bytes, rng: Random) -> bytes | None:
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    if not 2 <= length <= len(data) - 8 or header[:1] != b"{":
        return None
    if rng.random() < 0.2:
        header = mutated_bytes(header, rng)
    else:
        header = json_text(mutated_value(json.loads(header), rng))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _in_msgpack(data: bytes, rng: Random) -> bytes | None:
    if not 0x80 <= data[0] <= 0x8F and data[0] not in (0xDE, 0xDF):  # a map
        return None
    tree = msgpack.unpackb(
        data, ext_hook=msgpack.ExtType, raw=False, strict_map_key=False
    )
    return msgpack.packb(plain_msgpack(mutated_value(tree, rng)))


def plain_msgpack(value: Any) -> Any:
    """`plain`, with the arrays of flax, which are extensions, left as they are."""
    if isinstance(value, dict):
        return {plain(key): plain_msgpack(child) for key, child in value.items()}
    if isinstance(value, list):
        return [plain_msgpack(child) for child in value]
    return value if isinstance(value, msgpack.ExtType) else plain(value)


def _in_zip(data: bytes, rng: Random) -> bytes | None:
    if data[:2] != b"PK":
        return None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [
            (x.filename, x.compress_type, archive.read(x)) for x in archive.infolist()
        ]
    at = rng.randrange(len(members))
    name, kind, content = members[at]
    how = rng.random()
    if how < 0.8:
        members[at] = name, kind, mutated(content, rng)
    elif how < 0.9:
        members[at] = f"{mutated_value([name], rng)}", kind, content
    else:
        kinds = (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
            zipfile.ZIP_BZIP2,
            zipfile.ZIP_LZMA,
        )
        members[at] = name, rng.choice(kinds), content
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, kind, content in members:
            name = name.encode("utf-8", "replace").decode()[:1000]
            archive.writestr(name, content, kind)
    written = out.getvalue()
    # Sizes and kinds that the directory says of a member, with all else right.
    return mutated_bytes(written, rng) if rng.random() < 0.1 else written


def _in_npy(data: bytes, rng: Random) -> bytes | None:
    if data[:6] != b"\x93NUMPY":
        return None
    (length,) = struct.unpack("<H", data[8:10])
    header = data[10 : 10 + length]
    if rng.random() < 0.3:
        header = mutated_bytes(header, rng)
    else:
        said = ast.literal_eval(header.decode().strip())
        said["shape"] = list(said["shape"])
        changed = mutated_value(said, rng)
        if isinstance(changed, dict) and isinstance(changed.get("shape"), list):
            changed["shape"] = tuple(changed["shape"])
        header = repr(changed).encode("utf-8", "replace")[:65_000] + b"\n"
    return data[:8] + struct.pack("<H", len(header)) + header + data[10 + length :]


FORMS: tuple[Form, ...] = (
    _in_npy,
    _in_zip,
    _in_json,
    _in_lines,
    _in_safetensors,
    _in_msgpack,
    _in_csv,
)


def mutated(data: bytes, rng: Random) -> bytes:
    """The content of a file, damaged in one to three ways; nearly always it differs."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = _mutated_once(data, rng)
    return data


def _mutated_once(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    for form in FORMS:
        # After an earlier mutation it may be in none of the forms any more.
        try:
            changed = form(data, rng)
        except Exception:
            continue
        if changed is not None:
            return changed
    return mutated_bytes(data, rng)


def mutated_files(files: dict[str, bytes], rng: Random) -> dict[str, bytes | None]:
    """What changes in a folder: new contents of one or two files, None if one is gone.

    files: relative path -> content.
    """
    names = sorted(files)
    # Small files say what the large ones are: they are damaged as often.
    name = rng.choice(names)
    how = rng.random()
    if how < 0.03:
        return {name: None}
    if how < 0.05:
        return {name: b""}
    if how < 0.07:
        return {name: bytes(len(files[name]))}
    if how < 0.10:
        return {name: files[rng.choice(names)]}
    changes: dict[str, bytes | None] = {name: mutated(files[name], rng)}
    if how > 0.9:
        other = rng.choice(names)
        changes[other] = mutated(files[other], rng)
    return changes
