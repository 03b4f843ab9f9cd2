"""What an image processor's file says: honoured, or refused by name."""

import json

import numpy as np
import pytest
import seqio
import tiny_imports
from PIL import Image
from torch_peers import import_peer

from vit22b_transfer import UserError, cli
from vit22b_transfer.data import converters, image_lengths, vocabularies
from vit22b_transfer.data import preprocessors as pp
from vit22b_transfer.data.sources import ImageFolderSource
from vit22b_transfer.models.preparation import Preparation
from vit22b_transfer.weights.families import image_processors as ip

transformers = import_peer("transformers")

NUMBERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}


def read(preprocessor, usual="CLIPImageProcessor", size=(224, 224), patch_size=16):
    config = {"preprocessor": preprocessor}
    return ip.of_hugging_face(config, usual, ip.IMAGENET, size, patch_size)


@pytest.mark.parametrize("name", ip.PROCESSORS)
def test_what_a_file_leaves_unsaid_is_the_default_of_its_class(name):
    theirs, ours = getattr(transformers, name), ip.PROCESSORS[name]
    assert theirs.resample == NUMBERS[ours.filter]
    assert (tuple(theirs.image_mean), tuple(theirs.image_std)) == ours.pixels
    assert theirs.do_resize and theirs.do_rescale and theirs.do_normalize
    cropped = getattr(theirs, "do_center_crop", None)
    assert bool(cropped) == (ours.crop is not None)
    assert not cropped or set(theirs.crop_size.values()) == {ours.crop}
    if name != "Siglip2ImageProcessor":  # it counts patches
        assert theirs.size == ours.size
        assert theirs.default_to_square == ours.to_square


def test_values_of_a_file_become_fields_of_the_tower():
    images = read(
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 230, "width": 230},
            "resample": 1,
            "rescale_factor": 0.01,
            "image_mean": 0.25,
            "image_std": [0.5, 0.25, 1.0],
        }
    )
    assert images.size == (224, 224)
    assert images.fields == {
        "preparation": Preparation(
            filter="lanczos", fit="shorter_side", resized=256, cropped=230, kept=224
        ),
        "pixel_mean": (0.25,) * 3,
        "pixel_std": (0.5, 0.25, 1.0),
        "pixel_scale": 0.01,
    }


@pytest.mark.parametrize(
    "said, expected",
    [
        (dict(do_normalize=False), ((0.0,) * 3, (1.0,) * 3, 1 / 255)),
        (dict(do_rescale=False), (*ip.CLIP, 1.0)),
        (
            dict(image_mean=None, image_std=None, rescale_factor=None),
            (*ip.CLIP, 1 / 255),
        ),
        (dict(image_mean=[0.5], image_std=2), ((0.5,) * 3, (2.0,) * 3, 1 / 255)),
    ],
    ids=str,
)
def test_steps_that_are_left_out_or_unsaid(said, expected):
    fields = read(dict(do_resize=True) | said).fields
    found = tuple(fields[f"pixel_{x}"] for x in ("mean", "std", "scale"))
    assert found == expected


@pytest.mark.parametrize(
    "said, message",
    [
        (dict(do_resize=False), "do_resize = False: images keep their sizes"),
        (dict(do_center_crop=False), "shorter side to 224 and cuts nothing off"),
        (dict(do_pad=True), "do_pad = True; here images are resized"),
        (dict(crop_to_patches=True), "crop_to_patches = True"),
        (
            dict(size={"longest_edge": 9}),
            "size = {'longest_edge': 9}; known are height",
        ),
        (dict(crop_size={"shortest_edge": 9}), "crop_size = .* known are height"),
        (dict(size=200), r"resizes to 200 and cuts out \(224, 224\)"),
        (dict(size=[300, 200], crop_size=100), "of the same shape"),
        (dict(resample=6), "resample = 6"),
        (dict(resample="bicubic"), "resample = 'bicubic'"),
        (dict(image_std=[0.5, 0.5]), "image_std = .* list of 3"),
        (dict(image_std=0), "image_std = 0"),
        (dict(rescale_factor=0), "rescale_factor = 0"),
        (dict(do_normalize="no"), "do_normalize = 'no'"),
        (dict(crop_size=1 << 30), "from 1 to"),
        (dict(offset=True), "offset = True, which is not known here"),
        (dict(image_processor_type="FuyuImageProcessor"), "Fuyu.*known are ViTImage"),
    ],
    ids=str,
)
def test_what_cannot_be_done_here_is_refused_by_name(said, message):
    with pytest.raises(UserError, match=message):
        read(dict(do_rescale=True) | said)


def test_a_processor_for_rgb_alone_is_said():
    assert "takes RGB images alone" in read(dict(do_convert_rgb=False)).facts[0]
    assert read(dict(do_convert_rgb=None)).facts == ()


@pytest.mark.parametrize(
    "said, message",
    [
        (dict(crop_mode="border"), "crop_mode = 'border'"),
        (dict(interpolation="random"), "interpolation = 'random'"),
        (dict(input_size=[3, 224, 256]), "input_size = .*only squares"),
        (dict(input_size=[1, 224, 224]), "only squares of 3 channels"),
        (dict(crop_pct=1.5), "crop_pct = 1.5, more than 1"),
    ],
    ids=str,
)
def test_a_transform_of_timms_that_cannot_be_done_is_refused(said, message):
    with pytest.raises(UserError, match=message):
        ip.of_timm(dict(crop_pct=0.9) | said, 224, 16)
