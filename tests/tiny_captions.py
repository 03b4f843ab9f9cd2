"""A tiny captioned image folder, a task over it, and a checkpoint of a random model."""

import json

import numpy as np
import seqio
import tiny_models
from PIL import Image

from vit22b_transfer.checkpoints import reading, writing
from vit22b_transfer.data import preprocessors, sources
from vit22b_transfer.data.converters import ImageTextFeatureConverter
from vit22b_transfer.inference import decoding
from vit22b_transfer.models import encoder_decoder, multimodal
from vit22b_transfer.partitioning.rules import Partitioning

SIZE = tiny_models.IMAGE_SIZE[0]
LENGTHS = {"images": SIZE, "inputs": 8, "targets": 6}
BATCH_SIZE = 4
NUM_IMAGES = 10
BAD_IMAGE = 6
ONE_DEVICE = Partitioning(data=1, model=1)


def write_folder(folder):
    """Ten images, one of them truncated, the even ones with two captions."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(NUM_IMAGES):
        path = folder / f"{number}.png"
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        if number == BAD_IMAGE:
            path.write_bytes(path.read_bytes()[:60])
        captions = [f"näme {number}", "a dog"][: 1 + (number % 2 == 0)]
        for caption in captions:
            lines.append(json.dumps({"file_name": path.name, "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def register(name, folder, *, metric_fns=(), vocabulary=None, source=None):
    """A task over the folder whose bad images are skipped; replaces an earlier one."""
    files = sources.CaptionFiles(folder / "captions.jsonl", folder)
    seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=source or sources.CaptionFileSource({"train": files, "test": files}),
        preprocessors=preprocessors.image_text_preprocessors(
            "caption", preprocessors.ReadingOptions(on_bad_image="skip")
        ),
        output_features=preprocessors.image_text_features(
            vocabulary or seqio.ByteVocabulary()
        ),
        postprocess_fn=preprocessors.references_and_predictions,
        metric_fns=metric_fns,
    )


def model(
    decode_fn=decoding.greedy, *, vocabulary=None, num_encoder_layers=1, **arguments
):
    """An image-text model over bytes, its tables padded to divide among devices."""
    module = encoder_decoder.ImageTextModule(
        tiny_models.tower_config(depth=1, fused_projections=True),
        tiny_models.text_config(
            vocab_size=320, num_encoder_layers=num_encoder_layers, num_decoder_layers=1
        ),
    )
    vocabulary = vocabulary or seqio.ByteVocabulary()
    return multimodal.ImageTextModel(
        module,
        vocabulary,
        vocabulary,
        decode_fn=decode_fn,
        feature_converter_cls=ImageTextFeatureConverter,
        **arguments,
    )


def write_checkpoint(model_dir, the_model=None, *, step=7, seed=0):
    """A checkpoint of random parameters of `model()` or another; returns its path."""
    params = tiny_models.model_params(the_model or model(), seed=seed)
    writer = writing.CheckpointWriter(str(model_dir), keep=None)
    tree = {"target": params, "state": {"step": np.int32(step), "param_states": {}}}
    writer.save(step, tree, {})
    writer.close()
    return reading.checkpoint_path(str(model_dir), step)
