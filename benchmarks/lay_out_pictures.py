"""Lays out real pictures as folders of classes and as image-text pairs.

    python benchmarks/lay_out_pictures.py digits OUT
    python benchmarks/lay_out_pictures.py fashion /usr/share/datasets/fashion-mnist OUT
    python benchmarks/lay_out_pictures.py emoji package OUT
    python benchmarks/lay_out_pictures.py styles google/package twitter/package OUT

`digits` are the 1,797 of scikit-learn (8 x 8 grey levels; of the extra `test`), the
last 450 of them, mostly of other writers, for validation. `fashion` is Debian's
dataset-fashion-mnist (60,000 and 10,000 pictures of 28 x 28; MIT). `emoji` is what `npm
pack emoji-datasource-google@16.0.0` gives, unpacked (64 x 64; Apache-2.0 and OFL).
`styles` are the emoji of two such packages, the second emoji-datasource-twitter@16.0.0
(CC-BY 4.0): what they show (their category) as classes, without skin tones, drawn as
by the first; every fifth for validation, and those as drawn by the second lie in
OUT/imagenet_v2, so that `vit22b suite` judges the same head on another style.

Classes: OUT/train/CLASS/*.png, OUT/validation/CLASS/*.png and OUT/classes.txt, as
gin_configs/recipes/image_folder.gin takes them. Emoji: OUT/images with OUT/train.json
and OUT/validation.json, as gin_configs/recipes/my_pairs.gin takes them;
OUT/words.jsonl, the words of each name as labels, of OUT/classes.txt; and
OUT/held_out.csv, pictures whose names none of the others has: those of validation.json.
"""

import argparse
import collections
import csv
import gzip
import json
import pathlib
import re

import numpy as np
import PIL.Image

FASHION = (
    *("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt"),
    *("sneaker", "bag", "ankle boot"),
)
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
DIGITS_TO_VALIDATE = 450
HELD_OUT_EVERY = 6
VALIDATED_EVERY = 5


def lay_out_classes(out, splits, names):
    """`splits`: name -> (images [N, H, W] uint8, labels [N] that count `names`)."""
    for split, (images, labels) in splits.items():
        for name in names:
            (out / split / name).mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            picture = PIL.Image.fromarray(image).convert("RGB")
            picture.save(out / split / names[label] / f"{number:05}.png")
        print(f"{split}: {len(images)} pictures of {len(names)} classes")
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in names))


def digits(out):
    """Scikit-learn's digits, whose 17 grey levels become 0 to 255."""
    from sklearn import datasets

    read = datasets.load_digits()
    images = np.round(read.images * (255 / 16)).astype(np.uint8)
    last = len(images) - DIGITS_TO_VALIDATE
    splits = {
        "train": (images[:last], read.target[:last]),
        "validation": (images[last:], read.target[last:]),
    }
    lay_out_classes(out, splits, [str(number) for number in range(10)])


def read_idx(path):
    """The array of a gzipped idx file of bytes: its rank and sizes, then its values."""
    content = gzip.open(path).read()
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no idx file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def fashion(folder, out):
    """Fashion-MNIST's training and test pictures."""
    lay_out_classes(
        out,
        {
            split: tuple(
                read_idx(folder / f"{name}-{kind}-ubyte.gz")
                for kind in ("images-idx3", "labels-idx1")
            )
            for split, name in (("train", "train"), ("validation", "t10k"))
        },
        FASHION,
    )


def named_emoji(package):
    """(file name, base name, whole name) of all pictures with one skin tone or none."""
    for entry in json.loads((package / "emoji.json").read_text()):
        base = " ".join(re.findall(r"[a-z0-9]+", entry["name"].lower()))
        yield entry["image"], base, base
        for code, other in entry.get("skin_variations", {}).items():
            if code in TONES:  # of two people there may be two
                yield other["image"], base, f"{base} {TONES[code]}"


def on_white(package, file_name):
    """A picture of the one style that a package has."""
    (style,) = (package / "img").iterdir()
    picture = PIL.Image.open(style / "64" / file_name).convert("RGBA")
    white = PIL.Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def styles(package, other, out):
    """Categories of emoji; those of validation as `other` draws them as well."""
    entries = [
        entry
        for entry in json.loads((package / "emoji.json").read_text())
        if entry["category"] != "Component"  # skin tones alone
    ]
    entries.sort(key=lambda entry: entry["sort_order"])  # like ones are neighbours
    made = collections.Counter()
    for number, entry in enumerate(entries):
        validated = number % VALIDATED_EVERY == 0
        name = re.sub("[^a-z]+", "_", entry["category"].lower())
        drawn = {"validation" if validated else "train": package}
        if validated:
            drawn["imagenet_v2"] = other
        for split, drawer in drawn.items():
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            on_white(drawer, entry["image"]).save(folder / entry["image"])
            made[split, name] += 1
    names = sorted({name for _, name in made})
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    for split in ("train", "validation", "imagenet_v2"):
        count = sum(made[split, name] for name in names)
        print(f"{split}: {count} pictures of {len(names)} classes")


def held_out(bases):
    """Every sixth of the men and women in a role that somebody else has as well."""
    roles = collections.Counter(re.sub(r"^(wo)?man ", "", base) for base in bases)
    found = [
        base
        for base in sorted(bases)
        if (role := re.match(r"(?:wo)?man (.*)", base)) and roles[role[1]] > 1
    ]
    return set(found[::HELD_OUT_EVERY])


def emoji(package, out):
    """Pictures on white, their names in lower case with the skin tone behind."""
    rows = list(named_emoji(package))
    apart = held_out({base for _, base, _ in rows})
    (out / "images").mkdir(parents=True)
    for file_name, _, _ in rows:
        on_white(package, file_name).save(out / "images" / file_name)
    parts = {
        "train": [row for row in rows if row[1] not in apart],
        "validation": [row for row in rows if row[1] in apart],
    }
    for split, part in parts.items():
        coco = {
            "images": [
                {"id": number, "file_name": file_name}
                for number, (file_name, _, _) in enumerate(part)
            ],
            "annotations": [
                {"id": number, "image_id": number, "caption": name}
                for number, (_, _, name) in enumerate(part)
            ],
        }
        (out / f"{split}.json").write_text(json.dumps(coco))
        print(f"{split}: {len(part)} pictures, {len({r[1] for r in part})} names")
    counts = collections.Counter(w for r in parts["train"] for w in set(r[2].split()))
    words = sorted(word for word, count in counts.items() if count > 1)
    (out / "classes.txt").write_text("".join(f"{word}\n" for word in words))
    with open(out / "words.jsonl", "w") as lines:
        for file_name, _, name in parts["train"]:
            labels = sorted(set(name.split()) & set(words))
            if labels:
                line = {"file_name": file_name, "labels": labels}
                lines.write(json.dumps(line) + "\n")
    with open(out / "held_out.csv", "w", newline="") as lines:
        table = csv.writer(lines)
        table.writerow(["file_name", "caption"])
        table.writerows([file_name, name] for file_name, _, name in parts["validation"])
    print(f"{len(words)} words that two pictures or more have")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for function, count in ((digits, 0), (fashion, 1), (emoji, 1), (styles, 2)):
        kind = kinds.add_parser(function.__name__, help=function.__doc__)
        kind.set_defaults(function=function, folders=[])
        if count:
            kind.add_argument(
                "folders", type=pathlib.Path, nargs=count, help="what was unpacked"
            )
        kind.add_argument("out", type=pathlib.Path, help="a folder to be made")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True)
    args.function(*args.folders, args.out)


if __name__ == "__main__":
    main()
