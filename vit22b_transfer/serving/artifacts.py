"""A model as programs that a process with JAX alone can run: `jax.export`.

    manifest.json        what goes in and comes out, how images are made, versions
    features.jaxexport   (weights, images) -> tokens of the tower
    predict.jaxexport    (weights, images, prompts) -> decoded tokens and scores
    model.safetensors    the weights, one copy for both
    vocabulary.model     SentencePiece's, if the model has one

Programs are StableHLO with a batch of any size, for CPU, CUDA and TPU each. They hold
no custom call of a library: attention is the form that is plain matrix products.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int32, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.data import image_lengths
from vit22b_transfer.data.preprocessors import QUESTION_FIELD, check_prompt
from vit22b_transfer.host import progress, whole_files
from vit22b_transfer.inference.restored import restore
from vit22b_transfer.models import multimodal, preparation, products
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.weights.files import tensor_writing

PLATFORMS = ("cpu", "cuda", "tpu")
MANIFEST, WEIGHTS, VOCABULARY = "manifest.json", "model.safetensors", "vocabulary.model"
_FORMAT = "vit22b_transfer jax.export 1"
_ENDING = ".jaxexport"
_ONE_FILE = 1 << 62
_INPUTS = {"features": ["images"], "predict": ["images", "prompts"]}

Weights = dict[str, Any]


def write(
    model: Any,
    *,
    checkpoint: str,
    feature_lengths: Mapping[str, Any],
    prompts: Sequence[str],
    output: str,
) -> str:
    """Writes the artifact of a model with a checkpoint's parameters; its directory.

    checkpoint: one, or a directory of them, of which the latest is taken.
    output: a directory that is not there yet, or empty.

    Raises:
      UserError: if the model is no image-text model of one image, or draws its answers
        at random; before anything is restored, if the directory is not empty.
    """
    if not isinstance(model, multimodal.ImageTextModel) or model.module.tower is None:
        raise UserError(
            f"a {type(model).__name__} has no image tower before a text model; only "
            "such models are exported for JAX."
        )
    for prompt in prompts:
        check_prompt(prompt)
    converter = image_lengths.converter_of(model)(pack=False)
    shapes = converter.shapes(feature_lengths)
    if len(shapes["images"]) != 3:
        raise UserError("the model takes several images at once; export one of one.")
    output = os.path.abspath(os.path.expanduser(output))
    with whole_files.new_directory(output) as folder:
        restored = restore(model, Partitioning(data=1), checkpoint, feature_lengths, 1)
        weights = {
            "/".join(path): leaf
            for path, leaf in flax.traverse_util.flatten_dict(restored.params).items()
        }
        exported = programs(model, weights, shapes)
        _write_weights(folder, weights)
        for name, program in exported.items():
            with open(os.path.join(folder, name + _ENDING), "wb") as file:
                file.write(program.serialize())
        manifest = _manifest(model, exported, shapes, prompts, restored.checkpoint)
        with open(os.path.join(folder, MANIFEST), "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
        source = getattr(model.input_vocabulary, "sentencepiece_model_file", None)
        if source is not None:
            shutil.copyfile(source, os.path.join(folder, VOCABULARY))
    return output


def functions(
    model: multimodal.ImageTextModel, length: int
) -> dict[str, Callable[..., dict[str, Array]]]:
    """What is exported, as functions of flat weights.

    length: the most tokens that are decoded, if the model does not say.
    """
    model = _plain(model)
    tower = model.module.tower
    assert tower is not None
    built = tower.without_pooling().build()

    def nested(weights: Weights) -> Any:
        paths = {tuple(name.split("/")): x for name, x in weights.items()}
        return flax.traverse_util.unflatten_dict(paths)

    def features(
        weights: Weights, images: UInt8[Any, "batch height width 3"]
    ) -> dict[str, Float[Any, "batch patches embed"]]:
        params = {"params": nested(weights)["encoder"]["tower"]}
        told: Any = built.apply(params, images)
        return {"tokens": told.tokens}

    def predict(
        weights: Weights,
        images: UInt8[Any, "batch height width 3"],
        prompts: Int32[Any, "batch length"],
    ) -> dict[str, Any]:
        zeros = jnp.zeros((images.shape[0], length), jnp.int32)
        batch = {
            "encoder_input_images": images,
            "encoder_input_tokens": prompts,
            "decoder_target_tokens": zeros,
        }
        tokens, aux = model.predict_batch_with_aux(nested(weights), batch)
        return {"tokens": tokens, **aux}

    return {"features": features, "predict": predict}


def _plain(model: multimodal.ImageTextModel) -> multimodal.ImageTextModel:
    """The model with attention of plain matrix products."""
    made = object.__new__(type(model))
    made.__dict__.update(model.__dict__)
    fields = {
        name: dataclasses.replace(part, attention_form="einsum")
        for name in ("tower", "text")
        if hasattr(part := getattr(model.module, name), "attention_form")
    }
    made.module = model.module.clone(**fields)
    return made


def programs(
    model: multimodal.ImageTextModel,
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, export.Exported]:
    """`features` and `predict` for all `PLATFORMS`, of a batch of any size.

    weights: arrays or their shapes, by their paths. shapes: of one example's `images`,
      `inputs` and `targets`.
    """
    (batch,) = export.symbolic_shape("batch", constraints=["batch >= 1"])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in weights.items()
    }
    given = {
        "images": jax.ShapeDtypeStruct((batch, *shapes["images"]), jnp.uint8),
        "prompts": jax.ShapeDtypeStruct((batch, *shapes["inputs"]), jnp.int32),
    }
    found = functions(model, shapes["targets"][0])
    made = {}
    console = progress.console(stderr=True)
    for name, function in found.items():
        exported = export.export(jax.jit(function), platforms=PLATFORMS)
        # One program for all: in the form that is fast on the fast ones.
        with products.as_on_accelerators():
            made[name] = exported(abstract, *(given[x] for x in _INPUTS[name]))
        console.print(f"exported {name} for {', '.join(PLATFORMS)}", markup=False)
    return made


def _write_weights(folder: str, weights: Weights) -> None:
    tensors = [
        tensor_writing.LazyTensor(
            name,
            tuple(leaf.shape),
            np.dtype(leaf.dtype),
            lambda leaf=leaf: np.asarray(leaf),
        )
        for name, leaf in sorted(weights.items())
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    with progress.Progress(
        progress.console(stderr=True), "weights", total=total, unit="bytes"
    ) as bar:
        tensor_writing.write_safetensors(
            folder, tensors, max_shard_bytes=_ONE_FILE, done=bar.add
        )


def _manifest(
    model: multimodal.ImageTextModel,
    exported: Mapping[str, export.Exported],
    shapes: Mapping[str, tuple[int, ...]],
    prompts: Sequence[str],
    checkpoint: str,
) -> dict[str, Any]:
    how = preparation.of_model(model) or preparation.Preparation()
    height, width, _ = shapes["images"]
    vocabulary = model.input_vocabulary
    tower: Any = model.module.tower
    grid = getattr(tower, "grid_of", None)

    def encoded(prompt: str) -> dict[str, Any]:
        if QUESTION_FIELD in prompt:
            return {"text": prompt}
        return {
            "text": prompt,
            "ids": [*vocabulary.encode(prompt), vocabulary.eos_id],
        }

    return {
        "format": _FORMAT,
        "checkpoint": os.path.basename(checkpoint),
        "versions": {n: metadata.version(n) for n in ("vit22b_transfer", "jax")},
        "platforms": list(PLATFORMS),
        "weights": WEIGHTS,
        "programs": {
            name: {
                "file": name + _ENDING,
                "inputs": ["weights", *_INPUTS[name]],
                "outputs": {
                    key: {
                        "shape": [
                            n if isinstance(n, int) else str(n) for n in leaf.shape
                        ],
                        "dtype": str(leaf.dtype),
                    }
                    for key, leaf in jax.tree.unflatten(
                        program.out_tree, program.out_avals
                    ).items()
                },
            }
            for name, program in exported.items()
        },
        "images": {
            "shape": ["batch", height, width, 3],
            "dtype": "uint8",
            "channels": "RGB, upright, transparent parts on white",
            "preparation": dataclasses.asdict(how),
            "in_words": str(how),
            "normalisation": "in the program",
        },
        "patches": list(grid(height, width)) if grid else None,
        "prompts": {
            "shape": ["batch", *shapes["inputs"]],
            "dtype": "int32",
            "of": "ids of the text, then the id that ends it, then 0",
            "known": [encoded(prompt) for prompt in prompts],
        },
        "vocabulary": {
            "file": VOCABULARY
            if getattr(vocabulary, "sentencepiece_model_file", None)
            else "bytes",
            "size": vocabulary.vocab_size,
            "extra_ids": vocabulary.extra_ids,
            "eos_id": vocabulary.eos_id,
        },
    }
