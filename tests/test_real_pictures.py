"""Real pictures: laid out as they are, and learned better than scikit-learn does."""

import csv
import gzip
import importlib
import json

import numpy as np
import PIL.Image
import pytest
from gin_files import ROOT

from vit22b_transfer.data import annotations


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_files_become_a_folder_for_each_class(benchmark, tmp_path):
    layout, rng = benchmark("lay_out_pictures"), np.random.default_rng(0)
    expected = {}
    for split, name in (("train", "train"), ("validation", "t10k")):
        images = rng.integers(0, 256, (12, 28, 28), np.uint8)
        labels = (np.arange(12) * 7 % 10).astype(np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
        expected[split] = images, labels
    out = tmp_path / "out"
    layout.main(["fashion", str(tmp_path), str(out)])
    names = (out / "classes.txt").read_text().splitlines()
    assert names == list(layout.FASHION)
    for split, (images, labels) in expected.items():
        paths = sorted((out / split).rglob("*.png"), key=lambda path: path.name)
        assert [path.parent.name for path in paths] == [names[n] for n in labels]
        for path, image in zip(paths, images, strict=True):
            found = np.asarray(PIL.Image.open(path))
            np.testing.assert_array_equal(found, np.stack([image] * 3, axis=-1))
    with pytest.raises(SystemExit, match="no idx file"):
        (tmp_path / "text.gz").write_bytes(gzip.compress(b"a text"))
        layout.read_idx(tmp_path / "text.gz")


def test_emoji_become_pairs_of_which_whole_names_are_held_out(benchmark, tmp_path):
    layout, entries = benchmark("lay_out_pictures"), []
    folder = tmp_path / "img" / "google" / "64"
    folder.mkdir(parents=True)
    for number, name in enumerate(
        ["MAN FARMER", "WOMAN FARMER", "MAN DANCING", "WOMAN DANCING", "MAN", "SUN"]
    ):
        tones = layout.TONES if name != "SUN" else {}
        files = [f"{number}.png", *(f"{number}-{tone}.png" for tone in tones)]
        for file in files:
            PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(folder / file)
        pairs = {"1F3FB-1F3FC": {"image": "of two people.png"}}
        more = {t: {"image": f} for t, f in zip(tones, files[1:], strict=True)}
        entries.append({"name": name, "image": files[0], "skin_variations": more})
        entries[-1]["skin_variations"] |= pairs
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    out = tmp_path / "out"
    layout.main(["emoji", str(tmp_path), str(out)])
    texts = {
        split: set(annotations.read_texts([out / f"{split}.json"], "error"))
        for split in ("train", "validation")
    }
    assert len(texts["train"]) == 4 * 6 + 1 and len(texts["validation"]) == 6
    assert {text.split()[1] for text in texts["validation"]} == {"dancing"}
    assert not texts["train"] & texts["validation"]
    known = {word for text in texts["train"] for word in text.split()}
    assert {word for text in texts["validation"] for word in text.split()} <= known
    with open(out / "held_out.csv") as lines:
        held_out = list(csv.DictReader(lines))
    assert {line["caption"] for line in held_out} == texts["validation"]
    words = (out / "classes.txt").read_text().splitlines()
    lines = [json.loads(x) for x in (out / "words.jsonl").read_text().splitlines()]
    assert "skin" in words and "sun" not in words  # a word of one picture
    assert all(set(line["labels"]) <= set(words) for line in lines)
    files = {line["file_name"] for line in lines}
    assert not files & {line["file_name"] for line in held_out}
    for name in files:
        assert np.asarray(PIL.Image.open(out / "images" / name)).min() == 255


def test_emoji_in_two_styles_are_the_same_ones_for_validation(benchmark, tmp_path):
    layout, kinds = benchmark("lay_out_pictures"), ["Food & Drink", "Flags"]
    entries = [
        {"image": f"{n}.png", "sort_order": n, "category": kinds[n % 2]}
        for n in range(20)
    ]
    entries.append({"image": "20.png", "sort_order": 30, "category": "Component"})
    for style, grey in (("google", 10), ("twitter", 200)):
        folder = tmp_path / style / "img" / style / "64"
        folder.mkdir(parents=True)
        (tmp_path / style / "emoji.json").write_text(json.dumps(entries))
        for entry in entries:
            colour = (grey, grey, grey, 255)
            PIL.Image.new("RGBA", (64, 64), colour).save(folder / entry["image"])
    out, styles = tmp_path / "out", [str(tmp_path / s) for s in ("google", "twitter")]
    layout.main(["styles", *styles, str(out)])
    assert (out / "classes.txt").read_text().splitlines() == ["flags", "food_drink"]
    found = {
        split: {
            f"{path.parent.name}/{path.stem}": np.asarray(PIL.Image.open(path))[0, 0, 0]
            for path in (out / split).rglob("*.png")
        }
        for split in ("train", "validation", "imagenet_v2")
    }
    assert len(found["train"]) == 16 and set(found["train"].values()) == {10}
    assert found["validation"].keys() == found["imagenet_v2"].keys()
    assert not found["validation"].keys() & found["train"].keys()
    assert set(found["validation"].values()) == {10}
    assert set(found["imagenet_v2"].values()) == {200}
    assert "food_drink/0" in found["validation"] and "flags/5" in found["validation"]


@pytest.mark.slow
def test_a_tower_on_digits_is_right_more_often_than_a_linear_classifier(
    benchmark, tmp_path
):
    pytest.importorskip("sklearn", reason="pip install -e '.[test]'")
    folder = tmp_path / "digits"
    benchmark("lay_out_pictures").main(["digits", str(folder)])
    counts = [len(list((folder / s).rglob("*.png"))) for s in ("train", "validation")]
    assert counts == [1347, 450]
    script = benchmark("real_pictures")
    arguments = ["--side", "8", "--patch", "4", "--steps", "500", "--seeds", "0"]
    rows = script.main([str(folder), *arguments])
    (linear,) = rows["logistic regression, 1347 pictures"]
    (tower,) = rows["tower, 500 steps (the teacher)"]
    assert 90 < linear < 94 < tower
