"""Readers of data: annotations, images, vocabularies, caches, predictions, results."""

import json
import os
import shutil
import tempfile
import types
import unittest.mock
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from harness import Reader
from PIL import Image, PngImagePlugin

from vit22b_transfer.data import (
    feature_cache,
    feature_shards,
    image_sets,
    images,
    labelled_sources,
    pixel_labels,
    preprocessors,
    sources,
    streams,
    tasks,
    vocabularies,
)
from vit22b_transfer.demo import scenes
from vit22b_transfer.evaluation import (
    evaluate,
    example_numbers,
    human_alignment,
    human_responses,
    paired_files,
    result_files,
    run_files,
    text_metrics,
)
from vit22b_transfer.inference.prediction_files import PredictionFiles
from vit22b_transfer.reports import compare_page, report_page

# What Pillow says of broken tags, once for each place; not what it does.
warnings.filterwarnings("ignore", module=r"PIL\.")

TASK = "fuzz_predictions"
TOKENS = feature_shards.TokenFormat(length=2, width=3, dtype="float32", storage="exact")
SPECS = {
    "image_id": tf.TensorSpec([], tf.string),
    "inputs": tf.TensorSpec([None], tf.int32),
}
FORMATS = ("jpg", "png", "webp", "gif", "tif", "bmp")


def readers() -> list[Reader]:
    annotated = [
        Reader("coco", _coco, _read_coco, share=0.3),
        Reader("captions", _captions, _read_captions, share=0.3),
        Reader("vqa", _vqa, _read_vqa, share=0.3),
        Reader("image sets", _image_sets, _read_image_sets, share=0.3),
        Reader("labels", _labels, _read_labels, share=0.3),
        Reader("human responses", _responses, _read_responses, share=0.3),
        Reader("texts", _texts, _read_texts),
        Reader("vocabulary", _vocabulary, _read_vocabulary, share=0.2),
    ]
    pictures = [
        Reader(name, lambda folder, name=name: _picture(folder, name), _read_pictures)
        for name in FORMATS
    ]
    pictures += [
        Reader("masks", _masks, _read_masks, damage="*.png"),
        Reader("depth maps", _depths, _read_depths, damage="*.png"),
    ]
    written = [
        Reader("predictions", _predictions, _read_predictions),
        Reader("begun predictions", _begun, _read_begun, names=["out.jsonl"]),
        Reader("report of a run", _run, _read_run, share=0.3, names=["out.jsonl"]),
        Reader("metrics.json", _metrics, _read_metrics, share=0.3),
        Reader("cached features", _cache, _read_cache, share=0.3),
        Reader("scenes", _scenes, _read_scenes, share=0.2),
    ]
    return annotated + pictures + written


def _write(folder, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    Path(folder, name).write_text(text, encoding="utf-8")


def _all_examples(make, files):
    """Reads all that a source gives, bad records left out, then with them errors."""
    for policy in ("skip", "error"):
        source = make({"train": files, "test": files}, on_bad_record=policy)
        for split in ("train", "test"):
            source.num_records(split)
        if policy == "skip":  # TensorFlow's part, which takes longest
            list(source.get_dataset("train", shuffle=False).as_numpy_iterator())
        json.dumps(source.report(), ensure_ascii=False).encode()


# --- Annotations ---


def _coco(folder):
    for name in ("1.png", "2.png"):
        _write(folder, name, "no image: it is not read")
    _write(
        folder,
        "captions.json",
        {
            "images": [
                {"id": 1, "file_name": "1.png"},
                {"id": 2, "file_name": "2.png"},
            ],
            "annotations": [
                {"id": 1, "image_id": 1, "caption": "a cube"},
                {"id": 2, "image_id": 1, "caption": "one cube"},
                {"id": 3, "image_id": 2, "caption": "café"},
            ],
        },
    )


def _read_coco(folder):
    files = sources.CaptionFiles(os.path.join(folder, "captions.json"), folder)
    _all_examples(sources.CocoCaptionsSource, files)


def _captions(folder):
    for name in ("1.png", "2.png"):
        _write(folder, name, "no image: it is not read")
    lines = [
        {"file_name": "1.png", "captions": ["a cube", "one cube"]},
        {"file_name": "2.png", "caption": "café"},
    ]
    _write(folder, "c.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    rows = '1.png,"a cube, red",1\n2.png,"two\nlines",2\n'
    _write(folder, "c.csv", f"file_name,caption,id\n{rows}")
    _write(folder, "c.txt", "1.png\ta cube\n2.png\tcafé\n")


def _read_captions(folder):
    for name in ("c.jsonl", "c.csv", "c.txt"):
        files = sources.CaptionFiles(os.path.join(folder, name), folder)
        _all_examples(sources.CaptionFileSource, files)


def _vqa(folder):
    for name in ("0001.png", "0002.png"):
        _write(folder, name, "no image: it is not read")
    questions = [
        {"question_id": 10 + n, "image_id": image, "question": "how many?"}
        for n, image in enumerate((1, "2"))
    ]
    annotations = [
        {
            "question_id": question["question_id"],
            "image_id": question["image_id"],
            "multiple_choice_answer": "2",
            "answers": [{"answer": answer} for answer in ("two", "2", "3")],
        }
        for question in questions
    ]
    _write(folder, "questions.json", {"questions": questions})
    _write(folder, "answers.json", {"annotations": annotations})


def _read_vqa(folder):
    files = sources.VqaFiles(
        os.path.join(folder, "questions.json"),
        folder,
        os.path.join(folder, "answers.json"),
        image_file="{image_id:04d}.png",
    )
    _all_examples(sources.VqaSource, files)


def _image_sets(folder):
    for name in ("1.png", "2.png"):
        _write(folder, name, "no image: it is not read")
    line = {"file_names": ["1.png", "2.png"], "question": "same?", "target": "yes"}
    lines = [line, line | {"id": "b", "references": ["yes", "no"]}]
    _write(folder, "sets.jsonl", "\n".join(map(json.dumps, lines)) + "\n")


def _read_image_sets(folder):
    files = sources.CaptionFiles(os.path.join(folder, "sets.jsonl"), folder)

    def make(split_to_files, on_bad_record):
        return image_sets.ImageSetSource(
            split_to_files, images_per_example=2, on_bad_record=on_bad_record
        )

    _all_examples(make, files)


def _labels(folder):
    for name in ("1.png", "2.png"):
        _write(folder, name, "no image: it is not read")
    _write(folder, "classes.txt", "animal\ncat\ndog\ncar\n")
    _write(folder, "hierarchy.csv", "child,parent\ncat,animal\ndog,animal\n")
    lines = [{"file_name": "1.png", "labels": ["cat", 3]}]
    lines.append({"file_name": "2.png", "label": "dog"})
    _write(folder, "labels.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    _write(folder, "labels.csv", 'file_name,label\n1.png,"cat"\n2.png,dog\n')


def _read_labels(folder):
    def make(split_to_files, on_bad_record):
        return labelled_sources.LabelFileSource(
            split_to_files,
            classes=os.path.join(folder, "classes.txt"),
            hierarchy=os.path.join(folder, "hierarchy.csv"),
            on_bad_record=on_bad_record,
        )

    for name in ("labels.jsonl", "labels.csv"):
        path = os.path.join(folder, name)
        _all_examples(make, labelled_sources.LabelFiles(path, folder))


def _responses(folder):
    head = "subj,Session,trial,rt,object_response,category,condition,imagename"
    rows = [
        "subject-01,1,1,0.8,oven,oven,0.00,0001_nse_s01_0.00_oven_n03041632_7380.png",
        'subject-01,1,2,NaN,na,"dog",0.1,0002_nse_s01_0.10_dog_n02085620_1.png',
    ]
    _write(folder, "responses.csv", "\n".join([head, *rows]) + "\n")


def _read_responses(folder):
    found = human_responses.read([os.path.join(folder, "responses.csv")])
    human_alignment.shape_bias_by_category(found)


def _texts(folder):
    _coco(folder)
    _captions(folder)
    _vqa(folder)


def _read_texts(folder):
    """As `vit22b vocab`."""
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".png"):
            for text in vocabularies.read_texts([os.path.join(folder, name)]):
                text.encode()


def _vocabulary(folder):
    _write(folder, "texts.txt", "a red cube\na blue ball\n")
    path = os.path.join(folder, "texts.txt")
    vocabularies.train([path], os.path.join(folder, "some.model"), vocab_size=280)
    os.remove(path)


def _read_vocabulary(folder):
    vocabularies.load(os.path.join(folder, "some.model")).encode("a cube")


# --- Pictures ---


def _picture(folder, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    exif.get_ifd(0x8769)[0x829A] = 0.01
    options: dict[str, Any] = (
        {"exif": exif} if suffix in ("jpg", "png", "webp", "tif") else {}
    )
    if suffix == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("comment", "a text " * 9, zip=True)
        options |= {"dpi": (72, 72), "icc_profile": b"profile" * 9}
    Image.fromarray(pixels).save(os.path.join(folder, f"a.{suffix}"), **options)


def _read_pictures(folder):
    for name in os.listdir(folder):
        images.read_image(os.path.join(folder, name), (8, 8))


def _masks(folder):
    pixels = np.random.default_rng(0).integers(0, 3, (12, 16), np.uint8)
    Image.fromarray(pixels).save(os.path.join(folder, "grey.png"))
    palette = Image.fromarray(pixels, mode="P")
    palette.putpalette([9, 9, 9, 99, 9, 9, 9, 99, 9])
    palette.save(os.path.join(folder, "palette.png"))


def _read_masks(folder):
    for name in os.listdir(folder):
        pixel_labels.read_indices(os.path.join(folder, name))


def _depths(folder):
    pixels = np.random.default_rng(0).integers(0, 9999, (12, 16), np.uint16)
    Image.fromarray(pixels).save(os.path.join(folder, "a.png"))


def _read_depths(folder):
    for name in os.listdir(folder):
        pixel_labels.read_depths(os.path.join(folder, name), 1000.0)


# --- What we have written ourselves ---


def _lines():
    for index in range(4):
        target = {"target": "a cube", "references": ["a cube", "one cube"]}
        metadata = {"metadata": {"difficulty": index, "weights": [0.5, 1.0]}}
        line = {"index": index, "image_id": str(index), "prompt": "caption en"}
        yield line | {"prediction": "a cube", "score": -0.5} | target | metadata


def _prediction_files(folder):
    return PredictionFiles(os.path.join(folder, "out.jsonl"), {"step": 1})


def _predictions(folder):
    files = _prediction_files(folder)
    files.recover(2)
    with files.writer() as writer:
        writer.write(list(_lines()))
    files.merge()


def _run(folder):
    _predictions(folder)
    _write(folder, "out.jsonl.run.json", {"fingerprint": {"task": TASK, "split": "t"}})
    entry = {"predictions": "out.jsonl", "metrics": {"token/loss": 1.5}}
    _write(folder, "metrics.json", {f"{TASK}/t": entry})
    lines = [{"step": n, "train/loss": 1.0 / n} for n in (1, 2, 3)]
    _write(folder, "metrics.jsonl", "\n".join(map(json.dumps, lines)))
    _write(folder, "recipe.gin", "STEPS = 3\n")


def _read_run(folder):
    """As `vit22b report` and `vit22b compare` of a run and itself; no resamples."""
    _register()
    none = {"return_value": None}
    with (
        unittest.mock.patch.object(example_numbers, "interval", **none),
        unittest.mock.patch.object(example_numbers, "difference", **none),
    ):
        report_page.html(folder, tasks.check_name)
        _, (path, _) = run_files.chosen([folder, folder], None)
        made = paired_files.pair(path, path, TASK)
        compare_page.html(made, None)
    result_files.entries(made.first.lines, "coco", path)


def _read_predictions(folder):
    _register()
    evaluate.score_file(os.path.join(folder, "out.jsonl"), TASK)
    if _prediction_files(folder).is_complete():
        _prediction_files(folder).summary()


def _register():
    if TASK not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            TASK,
            source=sources.ImageFolderSource({"test": "nowhere"}),
            preprocessors=preprocessors.image_text_preprocessors("caption en"),
            output_features=preprocessors.image_text_features(seqio.ByteVocabulary()),
            postprocess_fn=preprocessors.references_and_predictions,
            metric_fns=[text_metrics.captioning],
        )


def _begun(folder):
    files = _prediction_files(folder)
    files.recover(2)
    with files.writer() as writer:
        writer.write(list(_lines())[:2])
    files.recover(2)
    with files.writer() as writer:
        writer.write(list(_lines())[2:])


def _read_begun(folder):
    with tempfile.TemporaryDirectory() as root:
        copy = os.path.join(root, "copy")
        shutil.copytree(folder, copy)
        files = _prediction_files(copy)
        if files.is_complete():
            return
        files.recover(2)
        start = len(files.begun(1))
        with files.writer() as writer:
            writer.write(list(_lines())[start:])
        assert files.merge()["num_examples"] == 4


def _metrics(folder):
    _write(folder, "metrics.json", {"task/test": {"metrics": {"bleu": 0.5}}})


def _read_metrics(folder):
    evaluate.record_scores(folder, {"other/test": {"metrics": {"bleu": 0.1}}})


def _cache_key(folder) -> Any:
    return types.SimpleNamespace(
        cache=feature_cache.FeatureCache(folder, "tower"),
        directory=os.path.join(folder, "cache"),
        split="train",
        task=types.SimpleNamespace(name="some"),
        fingerprint={"weights": "0123"},
    )


def _cache(folder):
    key = _cache_key(folder)
    features = {name: (spec.dtype.name, spec.shape) for name, spec in SPECS.items()}
    features = {
        name: (d, s.as_list() if s.rank else []) for name, (d, s) in features.items()
    }
    layout = feature_cache.Layout(3, 2, TOKENS, features)
    layout.write(key)
    for path, examples in zip(layout.paths(key.directory), layout.ranges, strict=True):
        writer = feature_shards.ShardWriter(path)
        packed = []
        for number in examples:
            row = np.full((TOKENS.length, TOKENS.width), number, np.float32)
            writer.add_row(f"hash{number}", row.tobytes())
            example = {"image_id": str(number), "inputs": np.arange(2, dtype=np.int32)}
            example = {name: tf.constant(value) for name, value in example.items()}
            packed.append((f"hash{number}", feature_shards.pack(example).numpy()))
        writer.finish(packed)


def _read_cache(folder):
    _, source = feature_cache.open_source(_cache_key(folder))
    list(streams.as_numpy(source.get_dataset("train", shuffle=False)))


def _scenes(folder):
    scenes.write_scenes(os.path.join(folder, "drawn"), sizes={"train": 1})


def _read_scenes(folder):
    scenes.write_scenes(os.path.join(folder, "drawn"), sizes={"train": 1})
