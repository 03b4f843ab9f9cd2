"""What image files hold beside their pixels, and files without what is broken of it.

A PNG is a row of chunks, a JPEG one of segments. Pillow refuses a picture for a wrong
checksum of its print size, or for a profile that is larger than it likes.
"""

import dataclasses
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
# Pillow refuses larger texts and profiles, and all texts beyond 64 MiB.
_MOST_BYTES = 1 << 20
# Keywords of texts that may say how a picture is to be turned.
_TURNING = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_SHORTEST_ADOBE = 12  # with what says how colours are stored


@dataclasses.dataclass(frozen=True)
class Repaired:
    """A file without what is not needed for its pixels and may be broken.

    left_out: what that was, "" if there was nothing: what is seen to be broken, such as
      `PNG chunk pHYs`, else all. broken: all that is seen to be broken, in what was
      kept, too.
    """

    data: bytes
    left_out: str = ""
    broken: str = ""


def without_broken(data: bytes) -> Repaired:
    """The file repaired.

    What decides about pixels stays as it is: so do transparency, and the orientation
    where it is not broken itself.
    """
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(_JPEG):
        return _jpeg(data)
    return Repaired(data)


def _png(data):
    kept, left_out, broken, place = [_PNG], {}, {}, len(_PNG)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        chunk = data[place:end]
        kind, body, checksum = chunk[4:8], chunk[8:-4], chunk[-4:]
        name = kind.decode("ascii", "backslashreplace")
        whole = end <= len(data) and zlib.crc32(kind + body) == int.from_bytes(checksum)
        whole = whole and _is_small(kind, body)
        if not whole:
            broken[name] = None
        turns = kind == b"eXIf" or body.partition(b"\0")[0] in _TURNING
        if not kind[:1].islower() or kind == b"tRNS" or (whole and turns):
            kept.append(chunk)
        else:
            left_out[name] = None
        place = end
    if kept[-1][4:8] != b"IEND":
        kept.append(data[place:])
    without = [name for name in broken if name in left_out] or list(left_out)
    return Repaired(b"".join(kept), *map(_chunks, (without, broken)))


def _chunks(names):
    return f"PNG chunk {','.join(names)}" if names else ""


def _is_small(kind, body):
    """Whether a text or profile is unpacked, and no larger than Pillow reads it."""
    _, _, rest = body.partition(b"\0")
    if kind in (b"zTXt", b"iCCP"):
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] != b"\0":
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return kind != b"tEXt" or len(body) <= _MOST_BYTES
    try:
        unpacked = zlib.decompressobj().decompress(packed, _MOST_BYTES)
    except zlib.error:
        return False
    return len(unpacked) < _MOST_BYTES


def _jpeg(data):
    kept, left_out, place = [_JPEG], {}, len(_JPEG)
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        marker = data[place + 1]
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xDA or end == place + 2:  # the pixels begin
            break
        segment = data[place:end]
        adobe = marker == 0xEE and end - place >= 4 + _SHORTEST_ADOBE
        # EXIF (1) is not read before it is asked for.
        if marker in range(0xE0, 0xF0) and marker != 0xE1 and not adobe:
            left_out[f"APP{marker - 0xE0}"] = None
        else:
            kept.append(segment)
        place = end
    names = ",".join(left_out)
    content = b"".join([*kept, data[place:]])
    return Repaired(content, f"JPEG segment {names}" if names else "")
