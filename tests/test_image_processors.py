"""What an image processor's file says: honoured, or refused by name."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import seqio
import tiny_imports
import tiny_models
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


# --- From a tower to the tasks of a run ---

HOW = Preparation(filter="bicubic", fit="shorter_side", resized=20, cropped=16, kept=16)
LENGTHS = {"images": (16, 16), "inputs": 16, "targets": 16}


@pytest.fixture
def pictures(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    return tmp_path, noise


@pytest.fixture
def register():
    names = []

    def add(folder, **options):
        names.append(f"prepared_{len(names)}")
        return seqio.TaskRegistry.add(
            names[-1],
            source=ImageFolderSource({"test": str(folder)}),
            preprocessors=pp.image_text_preprocessors(
                "caption", pp.ReadingOptions(**options)
            ),
            output_features=pp.image_text_features(vocabularies.load()),
        )

    yield add
    for name in names:
        seqio.TaskRegistry.remove(name)


def image_of(task, lengths):
    """Through SeqIO's own door, trimming included, as T5X reads."""
    converter = converters.ImageTextFeatureConverter(pack=False, preparation=HOW)
    dataset = task.get_dataset(lengths, split="test", shuffle=False)
    [example] = converter(dataset, lengths).as_numpy_iterator()
    return example["encoder_input_images"]


def test_a_task_prepares_images_as_the_runs_tower_takes_them(pictures, register):
    folder, noise = pictures
    lengths = image_lengths.prepared(LENGTHS, HOW)
    found = image_of(register(folder), lengths)
    whole = Image.fromarray(noise).resize((30, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found, np.asarray(whole)[2:18, 7:23])
    same = image_of(register(folder, resize_method="bicubic"), lengths)
    np.testing.assert_array_equal(same, found)
    several = image_lengths.prepared(LENGTHS | {"images": (2, 16, 16)}, HOW)
    assert several["images"].how == HOW


def test_a_task_that_fixes_another_filter_is_an_error_that_names_both(
    pictures, register
):
    task = register(pictures[0], resize_method="bilinear")
    with pytest.raises(UserError, match="'bilinear', but .* are bicubic, the shorter"):
        image_of(task, image_lengths.prepared(LENGTHS, HOW))


def test_lengths_that_do_not_say_how_are_refused_before_the_first_step(
    pictures, register
):
    with pytest.raises(UserError, match=r"bicubic, .*is \(16, 16\), and tasks .*T5X"):
        image_of(register(pictures[0]), LENGTHS)


def test_lengths_with_a_preparation_are_compared_with_it_and_pickled():
    one = image_lengths.prepared(LENGTHS, HOW)["images"]
    assert one == image_lengths.prepared({"images": 16}, HOW)["images"]
    assert one != (16, 16) and one != image_lengths.PreparedImages(
        (16, 16), Preparation()
    )
    assert pickle.loads(pickle.dumps(one)) == one
    assert image_lengths.prepared(LENGTHS, None) is LENGTHS


def test_an_import_writes_all_of_it_and_a_recipe_shows_it(tmp_path, capsys):
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": 20,
        "crop_size": 18,
        "rescale_factor": 0.01,
    }
    imported = tiny_imports.tower_and_t5(tmp_path, processor)
    text = (imported / "model.gin").read_text()
    assert "IMAGE_SIZE = (16, 16)" in text
    files = ("gin_configs/recipes/scenes_caption_vqa.gin", imported / "model.gin")
    arguments = [f"--gin_file={file}" for file in files]
    capsys.readouterr()
    assert cli.main(["config", "show", *arguments]) == 0
    shown = capsys.readouterr().out
    for line in (
        "preparation.Preparation.filter = 'bicubic'",
        "preparation.Preparation.fit = 'shorter_side'",
        "preparation.Preparation.resized = 20",
        "preparation.Preparation.cropped = 18",
        "preparation.Preparation.kept = 16",
        "vit.ViTConfig.pixel_scale = 0.01",
    ):
        assert line in shown


def test_caches_and_prediction_files_tell_preparations_apart():
    tower = tiny_models.tower_config(image_size=(16, 16))
    prepared = dataclasses.replace(tower, preparation=HOW)
    assert "preparation" not in tower.token_settings()
    assert "shorter side" in prepared.token_settings()["preparation"]
    model = tiny_models.image_text_model(prepared)
    said = image_lengths.described(LENGTHS, model)
    assert "bicubic" in said["images"] and json.loads(json.dumps(said)) == said
    plain = image_lengths.described(LENGTHS, tiny_models.image_text_model(tower))
    assert plain == LENGTHS
