"""What the image processors of public towers do to a file, in our configurations.

Hugging Face's `preprocessor_config.json` names a class and what differs from it; timm's
`pretrained_cfg` says all. Every field is used, known to change no pixel, or refused.
"""

import dataclasses
import fractions
import math
from collections.abc import Mapping
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.host.file_errors import brief
from vit22b_transfer.models.preparation import FILTERS, Preparation
from vit22b_transfer.weights.families import tower_rows as tr
from vit22b_transfer.weights.files import config_values

Config = Mapping[str, Any]
Size = tuple[int, int]

# Mean and deviation of pixels in [0, 1], per channel.
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
# Pillow's numbers, which preprocessor_config.json uses.
_NUMBERS = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
# The largest side that a processor may ask for: 4 times the largest published.
_MOST = 16_384


@dataclasses.dataclass(frozen=True)
class Processor:
    """A class of Hugging Face's: what a file leaves unsaid.

    size: {"height": ..., "width": ...} or {"shortest_edge": ...}; crop: the side of the
      centre that is cut out, None where the class cuts none. to_square: what one number
      for a size means.
    """

    filter: str
    pixels: tuple
    size: Config
    crop: int | None = None
    to_square: bool = True

    @property
    def number(self) -> int:
        """The filter's number."""
        return next(n for n, name in _NUMBERS.items() if name == self.filter)


def _square(side: int) -> Config:
    return {"height": side, "width": side}


PROCESSORS = {
    "ViTImageProcessor": Processor("bilinear", HALF, _square(224)),
    "DeiTImageProcessor": Processor("bicubic", HALF, _square(256), crop=224),
    "SiglipImageProcessor": Processor("bicubic", HALF, _square(224), to_square=False),
    "CLIPImageProcessor": Processor(
        "bicubic", CLIP, {"shortest_edge": 224}, crop=224, to_square=False
    ),
    "BitImageProcessor": Processor(
        "bicubic", CLIP, {"shortest_edge": 224}, crop=224, to_square=False
    ),
    "DINOv3ViTImageProcessor": Processor("bilinear", IMAGENET, _square(224)),
    "GotOcr2ImageProcessor": Processor("bicubic", CLIP, _square(384)),
    "Siglip2ImageProcessor": Processor("bilinear", HALF, _square(256)),
}
_USED = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
    *("image_processor_type", "feature_extractor_type", "default_to_square"),
}
# What changes no pixel.
_IRRELEVANT = {
    *("_valid_processor_keys", "processor_class", "auto_map", "model_input_names"),
    *("return_tensors", "data_format", "input_data_format", "device"),
    *("disable_grouping", "image_seq_length", "image_seq_len", "transformers_version"),
    # Where images are neither padded nor cut into tiles, which is refused.
    *("pad_size", "size_divisor", "min_patches", "max_patches"),
}
# Steps that these towers' own processors leave out.
_OFF = ("do_pad", "crop_to_patches", "do_flip_channel_order", "do_reduce_labels")


@dataclasses.dataclass(frozen=True)
class Images:
    """How a source's images are made.

    size: of the run's images, whole patches. fields: of the tower's configuration.
    """

    size: Size
    fields: Mapping[str, Any]
    facts: tuple[str, ...] = ()

    def with_pixels(self, pixels: tuple, scale: float) -> "Images":
        """The same with mean and deviation, and a factor of pixels from 0 to 255."""
        mean, deviation = pixels
        fields = dict(pixel_mean=mean, pixel_std=deviation, pixel_scale=scale)
        return dataclasses.replace(self, fields={**self.fields, **fields})


def of_hugging_face(
    config: Config,
    usual: str,
    pixels: tuple,
    image_size: Size,
    patch_size: int,
    enlarged: tuple[int, int] = (1, 1),
) -> Images:
    """What the preprocessor of a completed config does.

    usual: the class where it names none. Without any file, that class with these
      `pixels` and the tower's `image_size`, and `enlarged` the proportion of the
      shorter side to what is cut out.

    Raises:
      UserError: for a class or a step that is not known, or cannot be done here.
    """
    said = config_values.part(config, "preprocessor")
    if not said:
        found = PROCESSORS[usual]
        height, width = (enlarged[0] * side // enlarged[1] for side in image_size)
        to = (height, width) if "height" in found.size else max(height, width)
        facts = (
            "there is no preprocessor_config.json: images are prepared as is usual for "
            "this family",
        )
        images = _images(found.filter, to, image_size, patch_size, facts)
        return images.with_pixels(pixels, 1 / 255)
    found = _class(said, usual)
    _check_fields(said)
    to_square = config_values.flag(said, "default_to_square", found.to_square)
    resized = _size(said, "size", found.size, to_square)
    size = resized
    if config_values.flag(said, "do_center_crop", found.crop is not None):
        crop = _square(found.crop or 224)
        size = _size(said, "crop_size", crop, to_square=True)
    if isinstance(size, int):
        raise UserError(
            f"the image processor resizes the shorter side to {size} and cuts nothing "
            "off, so that every image has its own shape; here all have one. Set "
            "do_center_crop to true and crop_size, or size to a height and a width, in "
            "preprocessor_config.json."
        )
    filter_ = _NUMBERS[
        config_values.size(said, "resample", found.number, least=0, most=5)
    ]
    facts = ()
    if said.get("do_convert_rgb") is False:
        facts = (
            "do_convert_rgb is false: its processor takes RGB images alone; here "
            "every image becomes RGB",
        )
    images = _images(filter_, resized, size, patch_size, facts)
    scale = 1.0
    if config_values.flag(said, "do_rescale", True):
        scale = config_values.number(said, "rescale_factor", 1 / 255, least=1e-12)
    if not config_values.flag(said, "do_normalize", True):
        return images.with_pixels(((0.0,) * 3, (1.0,) * 3), scale)
    mean = _channels(said, "image_mean", found.pixels[0])
    deviation = _channels(said, "image_std", found.pixels[1], least=1e-6)
    return images.with_pixels((mean, deviation), scale)


def of_timm(config: Config, side: int, patch_size: int) -> Images:
    """What timm's evaluation transform does by a `pretrained_cfg`, {} without one.

    side: of the tower's own images. Without a `pretrained_cfg` it is that of timm's
    vision transformers; with one, what it lacks is the default of timm's transform.

    Raises:
      UserError: for sizes that are no squares, or a border.
    """
    crop, mean, deviation = (0.875, *IMAGENET) if config else (0.9, *HALF)
    if config.get("input_size") is not None:
        channels, *sides = _triple(config, "input_size")
        if channels != 3 or sides[0] != sides[1]:
            raise UserError(
                f"pretrained_cfg says input_size = {brief(config['input_size'])}; "
                "only squares of 3 channels are known here."
            )
        side = sides[0]
    crop = config_values.number(config, "crop_pct", crop, least=0.01)
    crop = fractions.Fraction(crop).limit_denominator(1000)
    if crop > 1:
        raise UserError(f"pretrained_cfg says crop_pct = {float(crop)}, more than 1.")
    filter_ = config_values.text(config, "interpolation", "bicubic")
    mode = config_values.text(config, "crop_mode", "center")
    if filter_ not in FILTERS or mode not in ("center", "squash"):
        raise UserError(
            f"pretrained_cfg says interpolation = {filter_!r} and crop_mode = {mode!r};"
            f" known are {', '.join(FILTERS)} and center, squash."
        )
    kept = side // patch_size * patch_size
    sides = (crop.denominator, crop.numerator, crop.numerator)
    if kept != side:
        sides = (math.floor(side / crop), side, kept)
    resized, cropped, kept_part = sides
    how = Preparation(
        filter=filter_,  # pyright: ignore[reportArgumentType]
        fit="squash" if mode == "squash" else "shorter_side",
        halves="even",
        resized=resized,
        cropped=cropped,
        kept=kept_part,
    )
    mean = _channels(config, "mean", mean)
    deviation = _channels(config, "std", deviation, least=1e-6)
    if kept < patch_size:
        raise UserError(f"images of {side}x{side} are smaller than a patch.")
    images = Images((kept, kept), {"preparation": how})
    return images.with_pixels((mean, deviation), 1 / 255)


def squashed(pixels: tuple) -> dict[str, Any]:
    """Fields of a tower whose images were squashed, bilinear: big_vision's."""
    return dict(pixel_mean=pixels[0], pixel_std=pixels[1], preparation=Preparation())


def _class(said: Config, usual: str) -> Processor:
    """The class that a preprocessor_config.json names, or the usual one."""
    name = config_values.text(said, "feature_extractor_type", usual)
    name = config_values.text(said, "image_processor_type", name)
    plain = name.removesuffix("Fast").removesuffix("Pil")
    plain = plain.replace("FeatureExtractor", "ImageProcessor")
    if plain not in PROCESSORS:
        raise UserError(
            f"preprocessor_config.json names the image processor {brief(name)}, which "
            f"is not known here; known are {', '.join(PROCESSORS)}. If one of them "
            "does the same with these values, write its name there."
        )
    return PROCESSORS[plain]


def _check_fields(said: Config) -> None:
    """Raises UserError for a step that cannot be done, or a field that is not known."""
    for name, value in said.items():
        if name == "do_resize" and value is False:
            raise UserError(
                "preprocessor_config.json says do_resize = False: images keep their "
                "sizes; here all images of a run have one. Set it to true, and size to "
                "what the images had."
            )
        if name in _USED | _IRRELEVANT or value is None or value is False:
            continue
        if name in _OFF:
            raise UserError(
                f"preprocessor_config.json says {name} = {brief(value)}; here images "
                "are resized, cropped and normalised. Set it to false to leave it out."
            )
        raise UserError(
            f"preprocessor_config.json says {brief(name)} = {brief(value)}, which is "
            "not known here. If it changes no pixel, remove it from the file."
        )


def _size(said: Config, name: str, default: Config, to_square: bool) -> Size | int:
    """(height, width), or the shorter side alone."""
    value = said.get(name)
    if value is None:
        value = default
    if isinstance(value, Mapping):
        sides = {side: value[side] for side in value if value[side] is not None}
    elif isinstance(value, list) or to_square:
        height, width = config_values.pair(said, name)
        sides = {"height": height, "width": width}
    else:
        sides = {"shortest_edge": value}
    found = {
        side: config_values.size(sides, side, most=_MOST)
        for side in sides
        if side in ("height", "width", "shortest_edge")
    }
    if len(found) != len(sides) or set(found) not in (
        {"height", "width"},
        {"shortest_edge"} if name == "size" else {"height", "width"},
    ):
        raise UserError(
            f"preprocessor_config.json says {name} = {brief(value)}; known are height "
            "and width" + (", or shortest_edge." if name == "size" else ".")
        )
    if "shortest_edge" in found:
        return found["shortest_edge"]
    return found["height"], found["width"]


def _images(
    filter_: str, resized: Size | int, size: Size, patch_size: int, facts: tuple
) -> Images:
    """Images resized, of which `size` is cut from the centre, of that whole patches."""
    kept = tr.whole_patches(size, patch_size)
    side = max(kept)
    sides = [
        max(resized) if isinstance(resized, tuple) else resized,
        max(size),
        side,
    ]
    how = None
    if sides[0] >= sides[1]:
        how = Preparation(
            filter=filter_,  # pyright: ignore[reportArgumentType]
            fit="shorter_side" if isinstance(resized, int) else "squash",
            resized=sides[0],
            cropped=sides[1],
            kept=sides[2],
        )
    in_proportion = all(
        tuple(longest * one // side for one in kept) == what
        for longest, what in zip(sides, (resized, size, kept), strict=True)
        if isinstance(what, tuple)
    )
    if how is None or not in_proportion:
        raise UserError(
            f"the image processor resizes to {resized} and cuts out {size}, of which "
            f"patches cover {kept}; here what is cut out is not larger than what it is "
            "cut from, and of the same shape. Set size and crop_size so in "
            "preprocessor_config.json."
        )
    return Images(kept, {"preparation": how}, facts)


def _channels(
    said: Config, name: str, default: tuple, *, least: float = -1e30
) -> tuple[float, ...]:
    """One number for each channel, or one for all."""
    value = said.get(name)
    if isinstance(value, list) and len(value) != 1:
        return config_values.numbers(said, name, default, least=least)
    if value is None:
        return default
    one = {name: value[0] if isinstance(value, list) else value}
    return (config_values.number(one, name, least=least),) * 3


def _triple(said: Config, name: str) -> tuple[int, int, int]:
    value = said[name]
    if not isinstance(value, list) or len(value) != 3:
        raise UserError(
            f"pretrained_cfg says {name} = {brief(value)}; expected are channels, "
            "height and width."
        )
    one, two, three = (
        config_values.size({name: part}, name, most=_MOST) for part in value
    )
    return one, two, three
