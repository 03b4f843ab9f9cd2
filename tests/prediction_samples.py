"""Files of predictions as a run writes them, of drawn answers and captions."""

import json

import numpy as np
import seqio
from PIL import Image

from tasks.captioning import register_captioning
from tasks.vqa import register_vqa
from vit22b_transfer.data import sources

CAPTIONS, QUESTIONS = "sample_captions", "sample_vqa"
WORDS = "a the red blue dog cat sits runs on under mat tree".split()


def register(folder):
    """The two tasks, over files in a folder that may not be there."""
    for name in (CAPTIONS, QUESTIONS):
        seqio.TaskRegistry.remove(name)
    captions = sources.CaptionFiles(folder / "captions.json", folder)
    register_captioning(CAPTIONS, sources.CocoCaptionsSource({"test": captions}))
    files = sources.VqaFiles(
        folder / "questions.json", folder, folder / "annotations.json"
    )
    register_vqa(QUESTIONS, sources.VqaSource({"test": files}))


def draw(folder, lines, *, size=24):
    """The images of lines and the file of their captions: the split of `CAPTIONS`."""
    images, annotations = [], []
    for line in lines:
        number = int(line["image_id"])
        name = f"{number}.png"
        images.append({"id": number, "file_name": name})
        pixels = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((size, size)).save(folder / name)
        for text in line["references"]:
            entry = {"id": len(annotations), "image_id": number, "caption": text}
            annotations.append(entry)
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "captions.json").write_text(content)


def write(path, lines, task="", split="test"):
    """A file of lines, and its record if a task is named."""
    with open(path, "w", encoding="utf-8") as file:
        for index, line in enumerate(lines):
            line = {"index": index} | line
            if "error" not in line:
                line |= {"score": -1.0}
            file.write(json.dumps(line) + "\n")
    if task:
        record = {"fingerprint": {"task": task, "split": split}}
        path.with_name(f"{path.name}.run.json").write_text(json.dumps(record))
    return str(path)


def answers(*, images=30, seed=0, skill=0.5, unread=0):
    """Lines of 1 to 4 questions an image; the questions are those of seed 0."""
    rng, luck = np.random.default_rng(0), np.random.default_rng(seed)
    lines = []
    for image in range(images):
        ease = luck.normal(skill, 0.3)
        for _ in range(rng.integers(1, 5)):
            number = len(lines)
            kind = ["yes/no", "number", "other"][rng.integers(3)]
            right = f"word{rng.integers(9)}"
            said = ["no idea"] * 8 + [right] * 2 if rng.random() < 0.2 else [right] * 10
            lines.append(
                {
                    "image_id": str(image),
                    "question_id": str(1000 + number),
                    "prompt": f"answer en what is {number}?",
                    "prediction": right if luck.random() < ease else "nothing",
                    "target": right,
                    "references": said,
                    "metadata": {"answer_type": kind},
                }
            )
    for line in lines[:unread]:
        del line["prediction"]
        line["error"] = "is cut off"
    return lines


def captions(*, images=24, seed=0):
    """Lines of an image each; the references are those of seed 0."""
    rng, luck = np.random.default_rng(0), np.random.default_rng(seed)
    lines = []
    for image in range(images):
        references = [" ".join(rng.choice(WORDS, 7)) for _ in range(3)]
        words = references[0].split()
        changed = luck.random(7) < 0.3
        said = [
            luck.choice(WORDS) if c else w for w, c in zip(words, changed, strict=True)
        ]
        lines.append(
            {
                "image_id": str(500 + image),
                "prompt": "caption en",
                "prediction": " ".join(said[: luck.integers(4, 8)]),
                "target": references[0],
                "references": references,
            }
        )
    return lines
