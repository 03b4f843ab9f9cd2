"""Pixels from image files: any mode and orientation becomes uint8 RGB of one size.

How they are resized is a `models.preparation.Preparation`; the default squashes the
aspect ratio to the size asked for, as PaliGemma does. Nothing is ever padded.
"""

import contextlib
import io
import logging
import os
import stat

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from vit22b_transfer import UserError
from vit22b_transfer.data import image_extras, image_warnings
from vit22b_transfer.data.image_packing import size_within
from vit22b_transfer.data.records import Tally, printable
from vit22b_transfer.host import memory_limit
from vit22b_transfer.models.preparation import FILTERS, OWN, Preparation

# 256 MiB of RGB pixels, and what Pillow itself begins to warn about.
MAX_PIXELS = 2**28 // 3
# Suffix -> Pillow's name. No other format is opened, whatever a file is called: some
# plugins of Pillow start other programs (EPS: Ghostscript).
IMAGE_FORMATS = {
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
_FORMATS = sorted(set(IMAGE_FORMATS.values()))
# A pixel is held several times while its image is decoded, turned and flattened: in up
# to four channels each.
_BYTES_PER_PIXEL = 12
# Of all images that are decoded at a time; a larger one is decoded alone.
_DECODING = memory_limit.MemoryLimit(2**30)
RESIZE_METHODS = {name: Image.Resampling[name.upper()] for name in FILTERS}
USUAL = Preparation()
# Of a long strip, only the part that is kept is resized: the whole would be huge.
_WHOLE_PIXELS = 2**24

_WHITE = (255, 255, 255, 255)
_ORIENTATION = 0x0112  # EXIF's tag
# How an image is turned that has this orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What was wrong beside the pixels of images so far, and of how many that was told.
_NOTED = Tally()
_TOLD: dict[str, int] = {}
_SHOWN_WARNING = 200


def read_image(
    source: bytes | str | os.PathLike,
    size: tuple[int, int],
    how: Preparation = USUAL,
    *,
    name: str = "an image",
) -> UInt8[np.ndarray, "height width 3"]:
    """The image in a file or in encoded bytes, made into one of (height, width).

    It is `prepare` of `read_whole`, made without an array of the whole image; but for
    JPEGs that `how` has decoded at a scale, which differ a little.

    Raises:
      UserError: as `read_whole`.
    """
    return _read(source, size, how, name)[0]


def read_with_region(
    source: bytes | str | os.PathLike,
    size: tuple[int, int],
    how: Preparation = USUAL,
    *,
    name: str = "an image",
) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[float, float, float, float]]:
    """`read_image`, and the `kept_region` of the whole image."""
    pixels, shape = _read(source, size, how, name)
    return pixels, kept_region(shape, size, how)


def _read(source, size, how, name):
    """`read_image`, and (height, width) of the whole image."""

    def made(data):
        # Of the whole image, whatever part of it is decoded.
        shape = None

        def least(of_image):
            nonlocal shape
            shape = of_image
            return _resized_size(shape, size, how)[0]

        scaled = how.jpegs == "scaled"
        image = _opened(data, MAX_PIXELS, name, least if scaled else None)
        shape = shape or (image.height, image.width)
        return _resized(image, shape, size, how), shape

    return _of_source(source, name, made)


def read_whole(
    source: bytes | str | os.PathLike, *, name: str = "an image"
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The image in a file or in encoded bytes, of the size that it has.

    name: what the log calls encoded bytes.

    Raises:
      UserError: it cannot be read or has more than `MAX_PIXELS` pixels; the message
        says why but not which image it is, unless a path was given.
    """
    return _of_source(source, name, lambda data: decode(data, name=name))


def _of_source(source, name, made):
    if isinstance(source, bytes):
        return made(source)
    name = printable(os.fspath(source))
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise UserError(f"{name} is not a file")
        with open(source, "rb") as file:
            data = file.read()
    except OSError as e:
        raise UserError(f"{name}: {e.strerror or e}") from e
    try:
        return made(data)
    except ValueError as e:
        raise UserError(f"{name}: {e}") from e


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, name: str = "an image"
) -> UInt8[np.ndarray, "height width 3"]:
    """RGB pixels of an encoded image, upright as its EXIF orientation says.

    Transparent parts lie on white, 16-bit grey is scaled to 8 bits, of an animation the
    first frame is taken. What a file says beside its pixels (profiles, texts, sizes) is
    left out where it is broken, and an orientation that cannot be read is upright: the
    first of each kind is logged with the image's `name`, all are counted.
    """
    return np.asarray(_opened(data, max_pixels, name))


def _opened(data, max_pixels, name, least=None):
    """Pillow's image of what `decode` says.

    least: of the (height, width) of an upright JPEG, those that are needed of it.
    """
    if not data:
        raise UserError("the file is empty (0 bytes)")
    try:
        return _decoded(data, max_pixels, name, least)
    except UserError:
        raise
    except Exception as e:
        if isinstance(e, Image.DecompressionBombError):
            raise _TooLarge(_size_in_header(data), max_pixels) from e
        # Pillow's plugins raise many types (OSError, SyntaxError, struct.error, ...).
        repaired = image_extras.without_broken(data)
        broken = f" (broken: {repaired.broken})" if repaired.broken else ""
        if not repaired.left_out:
            raise _refusal(e, broken) from e
        try:
            image = _decoded(repaired.data, max_pixels, name, least)
        except Exception as again:
            raise _refusal(again, broken) from again
        kind, _, _ = repaired.left_out.rpartition(" ")
        _note(name, kind, f"a broken {repaired.left_out}, which is left out")
        return image


def _decoded(data, max_pixels, name, least):
    with image_warnings.heard() as heard:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _TooLarge(image.size, max_pixels)
            with _DECODING.holding(_BYTES_PER_PIXEL * width * height):
                orientation = None
                if image.format == "JPEG":
                    orientation = _orientation(image, name)
                    if least is not None:
                        _draft(image, orientation, least)
                image.load()  # which also turns a TIFF
                orientation = orientation or _orientation(image, name)
                turned = _UPRIGHT.get(orientation)
                upright = image if turned is None else image.transpose(turned)
                rgb = _to_rgb(upright)
    for text in dict.fromkeys(heard):
        text = printable(" ".join(text.split()))[:_SHOWN_WARNING]
        if "EXIF" in text or "Metadata" in text:
            _note(name, "EXIF", f"broken EXIF data ({text})")
        else:
            _note(name, "other warnings of Pillow", f"a fault ({text})")
    return rgb


def _draft(image, orientation, least):
    """Has a JPEG decoded at 1/2, 1/4 or 1/8 where that is as large as needed."""
    across = orientation >= 5
    height, width = least(image.size if across else image.size[::-1])
    image.draft(None, (height, width) if across else (width, height))


def _orientation(image, name):
    """EXIF's orientation, 1 (upright) if there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception as e:
        what = f"broken EXIF data ({printable(str(e))}) and is taken to be upright"
        _note(name, "EXIF", what)
        return 1
    return orientation if isinstance(orientation, int) else 1


def _note(name, kind, what):
    if _NOTED.add(kind, name):
        logging.getLogger(__name__).warning(
            "%s has %s; its pixels are whole (later ones are only counted)", name, what
        )


def tell_noted() -> None:
    """Logs in how many images something beside the pixels is broken, by kind.

    Of a kind with one image nothing is said, which the log has named; nor if there are
    no more than when it was last told.
    """
    counts = _NOTED.counts()
    more = [kind for kind, n in counts.items() if n > _TOLD.get(kind, 1)]
    _TOLD.update(counts)
    for kind in more:
        logging.getLogger(__name__).warning(
            "%d images so far have something broken beside their pixels, which are "
            "whole: %s",
            counts[kind],
            kind,
        )


def _size_in_header(data):
    """(width, height) of an image that Pillow refuses to open; None if not known."""
    for name in _FORMATS:
        make, accepts = Image.OPEN[name]
        if accepts is None or accepts(data[:16]) is True:
            with contextlib.suppress(Exception), make(io.BytesIO(data), "") as image:
                return image.size
    return None


def _refusal(error, broken):
    """Why an image cannot be read, in words of ours."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, UnidentifiedImageError):
        return UserError(
            f"not an image in a known format ({', '.join(_FORMATS)}), or its header is "
            f"corrupt{broken}"
        )
    return UserError(f"corrupt or truncated image: {printable(str(error))}{broken}")


class _TooLarge(UserError):
    def __init__(self, size, max_pixels):
        pixels = f"{size[0]}x{size[1]} = {size[0] * size[1]:,}" if size else "its"
        super().__init__(
            f"the image is too large to decode: {pixels} pixels are more than the "
            f"limit of {max_pixels:,}; scale it down"
        )


def _to_rgb(image):
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_grey_to_8_bits(image)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(
            Image.new("RGBA", image.size, _WHITE), image
        ).convert("RGB")
    # Of one that is RGB, `convert` makes a copy.
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_to_8_bits(image):
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"pixels of mode {image.mode} from {values.min()} to {values.max()} have "
            "no known range; convert the image to 8 or 16 bits"
        )
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def prepare(
    image: UInt8[np.ndarray, "rows columns 3"],
    size: tuple[int, int],
    how: Preparation = USUAL,
) -> UInt8[np.ndarray, "height width 3"]:
    """The image at `size` = (height, width), antialiased when it becomes smaller.

    Its pixels are Pillow's. Those of torchvision on bytes differ by a grey level in
    some places and by 2 in very few: both round between rows and columns, Pillow in the
    order that is cheaper.
    """
    return _resized(Image.fromarray(image), image.shape[:2], size, how)


def _resized(image, shape, size, how):
    """An image at `size` that had `shape` = (height, width) before it was decoded."""
    size = final_size(shape, size, how)
    if (image.height, image.width) == size and how.resized == how.kept:
        return np.asarray(image)
    columns, rows = image.size
    whole, (top, left) = _resized_size(shape, size, how)
    filter_ = RESIZE_METHODS[how.filter]
    if whole[0] * whole[1] <= _WHOLE_PIXELS:
        resized = np.asarray(image.resize((whole[1], whole[0]), filter_))
        return resized[top : top + size[0], left : left + size[1]]
    down, across = rows / whole[0], columns / whole[1]
    part = (
        left * across,
        top * down,
        min((left + size[1]) * across, columns),
        min((top + size[0]) * down, rows),
    )
    return np.asarray(image.resize((size[1], size[0]), filter_, box=part))


def final_size(
    image: tuple[int, ...], size: tuple[int, int], how: Preparation = USUAL
) -> tuple[int, int]:
    """(height, width) of what `prepare` makes of an image of that shape.

    It is `size`, unless images keep their shapes: then no more patches than in it.
    """
    if how.fit not in OWN:
        return size
    budget = (size[0] // how.patch) * (size[1] // how.patch)
    enlarge = how.fit == "own_shape"
    return size_within(image[:2], budget, how.patch, enlarge=enlarge)


def kept_region(
    image: tuple[int, int], size: tuple[int, int], how: Preparation = USUAL
) -> tuple[float, float, float, float]:
    """Left, top, width and height, in [0, 1], of what `prepare` keeps of an image."""
    size = final_size(image, size, how)
    whole, (top, left) = _resized_size(image, size, how)
    rows, columns = whole
    return left / columns, top / rows, size[1] / columns, size[0] / rows


def _resized_size(
    image: tuple[int, ...], size: tuple[int, int], how: Preparation
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the whole image resized; (top, left) of what is kept of it."""
    if how.fit in OWN:
        return final_size(image, size, how), (0, 0)
    along = max(size) if how.fit == "shorter_side" else None
    height, width = (how.resized * (along or side) // how.kept for side in size)
    if how.fit == "shorter_side":
        short, long = min(image), max(image)
        longer = int(height * long / short)
        height, width = (height, longer) if image[0] <= image[1] else (longer, height)
    cropped = [how.cropped * side // how.kept for side in size]
    halve = round if how.halves == "even" else int
    top, left = halve((height - cropped[0]) / 2), halve((width - cropped[1]) / 2)
    return (height, width), (top, left)
