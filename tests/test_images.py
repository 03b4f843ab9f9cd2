import concurrent.futures
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vit22b_transfer import UserError
from vit22b_transfer.data import images
from vit22b_transfer.data.records import Tally
from vit22b_transfer.models.preparation import Preparation

RED = (200, 30, 40)


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def halves(left=RED, right=(20, 60, 220), mode="RGB", size=(40, 20)):
    """Left and right half in two colors: shows orientation."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def assert_close(pixel, expected, tolerance=6):
    np.testing.assert_allclose(pixel.astype(int), expected, atol=tolerance)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats_decode_to_rgb(file_format):
    options = {"quality": 98} if file_format in ("JPEG", "WEBP") else {}
    pixels = images.decode(encode(halves(), file_format, **options))
    assert pixels.shape == (20, 40, 3)
    assert pixels.dtype == np.uint8
    assert_close(pixels[10, 5], RED, 12)
    assert_close(pixels[10, 35], (20, 60, 220), 12)


def test_grey_images_have_three_equal_channels():
    for mode, value, expected in (("L", 77, 77), ("1", 1, 255)):
        pixels = images.decode(encode(Image.new(mode, (8, 6), value), "PNG"))
        assert pixels.shape == (6, 8, 3)
        assert (pixels == expected).all()


def test_cmyk_jpeg_shows_its_colors():
    cmyk = halves(left=(0, 200, 200, 30), right=(0, 0, 0, 255), mode="CMYK")
    pixels = images.decode(encode(cmyk, "JPEG", quality=98))
    assert_close(pixels[10, 5], (225, 48, 48), 12)
    assert_close(pixels[10, 35], (0, 0, 0), 12)


def test_16_bit_grey_is_scaled_to_8_bits():
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    pixels = images.decode(encode(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 1, 128, 255])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def rgb16_png(value):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">HHH", *value)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )


def test_16_bit_color_is_scaled_to_8_bits():
    pixels = images.decode(rgb16_png((65535, 0, 128 * 257)))
    np.testing.assert_array_equal(pixels[0, 0], [255, 0, 128])


def test_32_bit_and_float_pixels_are_refused_rather_than_clipped():
    values = np.array([[0, 70_000]], np.int32)
    with pytest.raises(ValueError, match="mode I from 0 to 70000 have no known range"):
        images.decode(encode(Image.fromarray(values), "TIFF"))
    with pytest.raises(ValueError, match="mode F"):
        images.decode(encode(Image.fromarray(values.astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_lie_on_white(mode):
    clear, half, opaque = {
        "RGBA": ((0, 0, 0, 0), (0, 0, 0, 128), (0, 0, 0, 255)),
        "LA": ((0, 0), (0, 128), (0, 255)),
    }[mode]
    image = Image.new(mode, (3, 1))
    for column, value in enumerate((clear, half, opaque)):
        image.putpixel((column, 0), value)
    pixels = images.decode(encode(image, "PNG"))
    np.testing.assert_array_equal(pixels[0, 0], 255)
    assert_close(pixels[0, 1], (127, 127, 127), 1)
    np.testing.assert_array_equal(pixels[0, 2], 0)


def test_palette_images_keep_colors_and_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(images.decode(encode(palette, "PNG"))[0, 0], RED)
    clear = encode(palette, "PNG", transparency=1)
    np.testing.assert_array_equal(images.decode(clear)[0, 1], (255, 255, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = halves()
    # What the camera stored: the inverse of what the tag asks to do on display.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = images.decode(encode(stored, "JPEG", quality=98, exif=exif))
    assert pixels.shape == (20, 40, 3)
    assert_close(pixels[10, 5], RED, 12)


# What stands beside the pixels


def png_chunk(kind, body, *, checksum=None):
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def with_chunk(data, *chunks):
    """The PNG with more chunks behind its header."""
    return b"".join([data[:33], *chunks, data[33:]])


def with_segment(data, marker, body):
    """The JPEG with another segment at its beginning."""
    segment = struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    return data[:2] + segment + data[2:]


def packed(size):
    return zlib.compress(bytes(size), 9)


EXIF_6 = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
BROKEN_EXIF = [
    b"garbage!",
    b"",
    b"MM",
    b"MM\0*\xff\xff\xff\xff",
    EXIF_6[:12],
    EXIF_6.replace(b"\0\x03\0\0\0\x01", b"\0\x03\0\0\0\0"),  # no value
    EXIF_6.replace(b"\0\x03\0\0\0\x01\0\x06", b"\0\x02\0\0\0\x01x\0"),  # a text
    EXIF_6.replace(b"\0\x06\0\0", b"\xff\xff\0\0"),  # no such orientation
]


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", BROKEN_EXIF, ids=range(len(BROKEN_EXIF)))
def test_broken_exif_data_leave_an_image_upright(file_format, exif):
    options = {"lossless": True} if file_format == "WEBP" else {}
    plain = images.decode(encode(halves(), file_format, **options))
    data = encode(halves(), file_format, exif=b"Exif\0\0" + exif, **options)
    np.testing.assert_array_equal(images.decode(data), plain)
    turned = encode(halves(), file_format, exif=b"Exif\0\0" + EXIF_6, **options)
    assert images.decode(turned).shape == (40, 20, 3)


def test_broken_exif_data_are_told_once_with_the_image_and_counted(
    caplog, recwarn, monkeypatch
):
    monkeypatch.setattr(images, "_NOTED", Tally())
    monkeypatch.setattr(images, "_TOLD", {})
    exif = b"Exif\0\0" + BROKEN_EXIF[3]
    data = encode(halves(), "JPEG", exif=exif)

    def read(number):
        return images.read_whole(data, name=f"image '{number}'")

    images.read_whole(data, name="image 'first'")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(20)))
    warnings.warn("a user's own", stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["a user's own"]
    (told,) = caplog.messages
    assert told.startswith("image 'first' has broken EXIF data (Corrupt EXIF data. ")
    for _ in range(2):
        images.tell_noted()
    assert caplog.messages[1:] == [
        "21 images so far have something broken beside their pixels, which are whole: "
        "EXIF"
    ]


PROFILE = b"Raw profile type exif\0"
TURN_TEXT = b"\nexif\n%8d\n%s\n" % (len(EXIF_6), EXIF_6.hex().encode())


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", PROFILE + b"\nexif\n 9\nno hex\n"),
        png_chunk(b"zTXt", PROFILE + b"\0" + zlib.compress(b"\nexif\n")),
        png_chunk(b"zTXt", PROFILE + b"\0no zlib"),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no zlib"),
        png_chunk(b"pHYs", bytes(9), checksum=7),
        png_chunk(b"pHYs", b"short"),
        png_chunk(b"cHRM", b"x"),
        png_chunk(b"iCCP", b"name\0\0" + packed(5 << 20)),
        png_chunk(b"iCCP", b"name\0\7" + packed(9)),
        png_chunk(b"zTXt", b"key\0\0" + packed(5 << 20)),
        png_chunk(b"iTXt", b"key\0\1\0\0\0" + packed(5 << 20)),
        png_chunk(b"tEXt", b"key\0" + bytes(2 << 20)) * 33,
        png_chunk(b"tIME", b"", checksum=0) + png_chunk(b"eXIf", b"x", checksum=0),
        png_chunk(b"acTL", b"x"),
    ],
    ids=lambda chunk: f"{chunk[4:8].decode()} {len(chunk)}",
)
def test_a_png_is_read_whatever_stands_beside_its_pixels(chunk):
    plain = encode(halves(), "PNG")
    expected = images.decode(plain)
    np.testing.assert_array_equal(images.decode(with_chunk(plain, chunk)), expected)
    # Behind the pixels, too, and with an orientation that is whole.
    end = plain[:-12] + chunk + plain[-12:]
    np.testing.assert_array_equal(images.decode(end), expected)
    for turn in (
        png_chunk(b"eXIf", EXIF_6),
        png_chunk(b"zTXt", PROFILE + b"\0" + zlib.compress(TURN_TEXT)),
    ):
        turned = images.decode(with_chunk(plain, turn, png_chunk(b"pHYs", b"short")))
        assert turned.shape == (40, 20, 3)


def test_a_png_whose_pixels_are_not_whole_names_the_broken_chunk():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    plain = encode(Image.fromarray(noise), "PNG")
    cut = with_chunk(plain, png_chunk(b"pHYs", bytes(9), checksum=7))[: len(plain) // 2]
    with pytest.raises(ValueError, match=r"truncated .*broken: PNG chunk pHYs,IDAT"):
        images.decode(cut)
    header = bytearray(plain)
    header[29] ^= 1
    with pytest.raises(ValueError, match="broken: PNG chunk IHDR"):
        images.decode(bytes(header))
    transparency = png_chunk(b"tRNS", bytes(6), checksum=7)
    with pytest.raises(ValueError, match="broken: PNG chunk tRNS"):
        images.decode(with_chunk(plain, transparency))


@pytest.mark.parametrize(
    "marker, body",
    [
        (0xE0, b"JFIF\0"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
        (0xEE, b"Adobe"),
    ],
)
def test_a_jpeg_is_read_whatever_stands_beside_its_pixels(marker, body):
    plain = encode(halves(), "JPEG", exif=b"Exif\0\0" + EXIF_6)
    data = with_segment(plain, marker, body)
    np.testing.assert_array_equal(images.decode(data), images.decode(plain))


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("pipe.jpg", "."):
        with pytest.raises(ValueError, match="is not a file"):
            images.read_image(tmp_path / name, (4, 4))


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, (0, 0, 0))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert_close(images.decode(data)[0, 0], RED)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_truncated_jpeg_is_an_error(keep):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), "JPEG")
    with pytest.raises(ValueError, match="truncated"):
        images.decode(data[: int(keep * len(data))])


def test_unreadable_bytes_are_errors():
    with pytest.raises(ValueError, match=r"empty \(0 bytes\)"):
        images.decode(b"")
    with pytest.raises(ValueError, match="not an image in a known format"):
        images.decode(b"<html>404</html>")
    data = encode(halves(), "JPEG")
    with pytest.raises(ValueError, match="not an image|corrupt"):
        images.decode(data[:20])


@given(data=st.data())
def test_damaged_files_give_pixels_or_a_value_error(data):
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = bytearray(encode(halves(size=(12, 8)), file_format, exif=exif))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    try:
        pixels = images.decode(bytes(content), max_pixels=10**6)
    except ValueError:
        return
    assert pixels.ndim == 3


def test_enormous_images_are_refused_before_decoding():
    data = bytearray(encode(Image.new("L", (10, 10)), "PNG"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)  # the header alone lies
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ValueError, match="too large.*60000x60000 = 3,.* limit of 89,4"):
        images.decode(bytes(data))
    small = encode(Image.new("L", (200, 100)), "PNG")
    with pytest.raises(ValueError, match=r"200x100 = 20,000 pixels .* limit of 19,999"):
        images.decode(small, max_pixels=19_999)
    assert images.decode(small, max_pixels=20_000).shape == (100, 200, 3)


def test_files_are_named_in_errors(tmp_path):
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.jpg: the file is empty"):
        images.read_image(empty, (4, 4))
    with pytest.raises(ValueError, match=r"absent\.jpg: No such file"):
        images.read_image(str(tmp_path / "absent.jpg"), (4, 4))


@pytest.mark.parametrize("method", list(images.RESIZE_METHODS))
def test_resizing_squashes_to_exactly_the_size_asked_for(method):
    for size in ((20, 40), (16, 16), (64, 8)):
        pixels = images.read_image(
            encode(halves(), "PNG"), size, Preparation(filter=method)
        )
        assert pixels.shape == (*size, 3)
        assert_close(pixels[size[0] // 2, 0], RED, 2)
        assert_close(pixels[size[0] // 2, -1], (20, 60, 220), 2)


def test_resizing_is_antialiased_and_methods_differ():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    results = {
        method: images.prepare(stripes, (8, 8), Preparation(filter=method))
        for method in images.RESIZE_METHODS
        if method != "nearest"
    }
    assert len({pixels.tobytes() for pixels in results.values()}) > 3
    for pixels in results.values():
        assert_close(pixels[4, 2:6], 127.5, 8)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(16, 24), (9, 50), (80, 80)])
def test_resizing_equals_tensorflows_antialiased_resize(method, size):
    # Mid-range values: Pillow also clips between its two passes.
    noise = np.random.default_rng(0).integers(90, 166, (37, 53, 3), np.uint8)
    expected = tf.image.resize(noise, size, method, antialias=True)
    ours = images.prepare(noise, size, Preparation(filter=method)).astype(float)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1.6)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
@pytest.mark.parametrize("halves", ["down", "even"])
@pytest.mark.parametrize("fit", ["squash", "shorter_side"])
@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (7, 90), (23, 23)], ids=str)
def test_a_part_is_resized_as_if_it_were_cut_from_the_whole(
    fit, shape, halves, whole, monkeypatch
):
    monkeypatch.setattr(images, "_WHOLE_PIXELS", 2**24 if whole else 0)
    # Mid-range values: Pillow also clips between its two passes.
    image = np.random.default_rng(2).integers(90, 166, (*shape, 3), np.uint8)
    how = Preparation(
        filter="bicubic", fit=fit, resized=26, cropped=23, kept=20, halves=halves
    )
    height, width = 26, 26
    if fit == "shorter_side":
        short = min(shape)
        height, width = (26 * side // short for side in shape)
    whole = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    halve = round if halves == "even" else int
    top, left = halve((height - 23) / 2), halve((width - 23) / 2)
    expected = np.asarray(whole)[top : top + 20, left : left + 20].astype(int)
    assert_close(images.prepare(image, (20, 20), how), expected, 1)


def test_at_another_size_all_sides_are_in_proportion():
    ramp = np.repeat(np.arange(240, dtype=np.uint8)[None, :, None], 240, 0)
    ramp = np.repeat(ramp, 3, 2)
    how = Preparation(fit="shorter_side", resized=240, cropped=120, kept=120)
    for side in (120, 60, 30):
        pixels = images.prepare(ramp, (side, side), how)
        assert_close(pixels[0, [0, -1], 0], (60, 179), 120 // side)


def test_a_strip_of_a_pixel_is_never_resized_whole():
    """Resized to 224 on its shorter side it would have 20 thousand million pixels."""
    strip = np.full((1, 400_000, 3), 7, np.uint8)
    how = Preparation(fit="shorter_side")
    assert_close(images.prepare(strip, (224, 224), how), 7, 0)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(resized=224, cropped=256), "resized to 224, cropped to 256"),
        (dict(kept=0), "must be at least 1"),
    ],
)
def test_a_preparation_that_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Preparation(**fields)


def photograph(size=(640, 480)):
    return Image.fromarray(skimage.data.astronaut()).resize(size)


@pytest.mark.parametrize("how", [{}, dict(fit="shorter_side", filter="bicubic")])
def test_a_jpeg_decoded_at_a_scale_is_nearly_the_whole_one_made_smaller(how):
    turned = Image.Exif()
    turned[0x0112] = 6
    sources = {
        "plain": encode(photograph(), "JPEG", quality=90),
        "turned": encode(photograph(), "JPEG", quality=90, exif=turned),
        "grey": encode(photograph().convert("L"), "JPEG", quality=90),
        "cmyk": encode(photograph((1000, 990)).convert("CMYK"), "JPEG", quality=90),
    }
    scaled = Preparation(**how, jpegs="scaled")
    for name, source in sources.items():
        expected = images.read_image(source, (112, 112), Preparation(**how)).astype(int)
        pixels = images.read_image(source, (112, 112), scaled)
        difference = np.abs(pixels - expected).mean()
        nearest = Preparation(**how | dict(filter="nearest"))
        aliased = images.read_image(source, (112, 112), nearest)
        assert 0.1 < difference < 3, name
        assert 2 * difference < np.abs(aliased - expected).mean(), name


@pytest.mark.parametrize("size", [112, 224])
def test_a_jpeg_decoded_at_a_scale_is_as_near_as_its_recipe_says(size):
    rgb = encode(photograph(), "JPEG", quality=90)
    cmyk = encode(photograph((1000, 990)).convert("CMYK"), "JPEG", quality=90)
    for source, filter_, rare in ((rgb, "bilinear", 25), (cmyk, "bicubic", 60)):
        whole, scaled = (
            images.read_image(source, (size, size), Preparation(**how, filter=filter_))
            for how in ({}, dict(jpegs="scaled"))
        )
        difference = np.abs(whole.astype(int) - scaled)
        assert difference.mean() < 3 and difference.max() < 100
        assert np.quantile(difference, 0.999) < rare


def test_only_jpegs_much_larger_than_asked_for_are_decoded_at_a_scale():
    scaled = Preparation(jpegs="scaled")
    png, jpeg = encode(photograph(), "PNG"), encode(photograph(), "JPEG")
    for source, size in ((png, (32, 32)), (jpeg, (480, 320)), (jpeg, (700, 700))):
        expected = images.read_image(source, size)
        np.testing.assert_array_equal(images.read_image(source, size, scaled), expected)
        np.testing.assert_array_equal(
            images.prepare(images.read_whole(source), size), expected
        )
