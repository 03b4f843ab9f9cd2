"""Data before a training: images, near duplicates, leaks, texts, the pipeline."""

import io
import json

import html_checks
import numpy as np
import photographs
import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shell_commands import no_tasks

from tasks.captioning import register_captioning
from vit22b_transfer import UserError, cli
from vit22b_transfer.data import (
    data_check,
    images,
    near_duplicates,
    sources,
    text_checks,
)
from vit22b_transfer.data.preprocessors import ReadingOptions
from vit22b_transfer.reports import check_page

TASK = "checked_captions"
EVIL = "<script>alert(1)</script> of a page"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs in two splits: one leaks, others are odd, and texts too."""
    folder = tmp_path_factory.mktemp("checked")
    photographs.write(folder)
    wide = Image.open(folder / "wide.jpg").convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.open(folder / "grey.png")
    small = wide.resize((wide.width // 2, wide.height // 2))
    small.save(folder / "leak.jpg", quality=60)
    square = Image.open(folder / "square.png").convert("RGB")
    square.resize((90, 90)).save(folder / "small.jpg")
    wide.convert("CMYK").save(folder / "print.jpg")
    grey.save(folder / "turned.jpg", exif=turned)
    (folder / "cut.jpg").write_bytes((folder / "wide.jpg").read_bytes()[:2000])
    splits = {
        "train": {
            "wide.jpg": ["a rocket", "a rocket stands </s>"],
            "print.jpg": ["a rocket \x07 in print"],
            "square.png": ["é" * 40, EVIL],
            "turned.jpg": ["a man"],
            "cut.jpg": ["nothing"],
            "gone.jpg": ["not there"],
        },
        "test": {
            "leak.jpg": ["a rocket at night"],
            "odd.png": ["a cup", "  "],
            "small.jpg": ["a woman"],
        },
    }
    for split, captions in splits.items():
        entries = [{"id": n, "file_name": name} for n, name in enumerate(captions)]
        texts = [
            {"image_id": n, "caption": text}
            for n, values in enumerate(captions.values())
            for text in values
        ]
        texts = [{"id": n} | entry for n, entry in enumerate(texts)]
        if split == "test":
            texts.append({"id": 99, "image_id": 77, "caption": "of no image"})
        content = {"images": entries, "annotations": texts}
        (folder / f"{split}.json").write_text(json.dumps(content))
    files = {n: sources.CaptionFiles(folder / f"{n}.json", folder) for n in splits}
    files["late"] = sources.CaptionFiles(folder / "late.json", folder)
    seqio.TaskRegistry.remove(TASK)
    register_captioning(
        TASK,
        sources.CocoCaptionsSource(files, on_bad_record="skip"),
        options=ReadingOptions(on_bad_image="skip"),
    )
    return folder


@pytest.fixture(scope="module")
def checked(folder):
    return data_check.check(TASK, None, size=32, limits={"targets": 30})


def names(paths):
    return sorted(path.rpartition("/")[2] for path in paths)


def test_records_that_do_not_fit_together_are_counted_by_reason(checked):
    train, test, late = checked.splits
    assert train.left_out == {"missing image file": 1}
    assert test.left_out == {"annotation without image": 1, "empty caption": 1}
    assert "gone.jpg" in train.said and "annotation 99" in test.said
    assert (train.records, test.records) == (7, 3)
    assert "late.json" in late.problem and not late.records


def test_odd_images_are_named(checked):
    train, test, _ = checked.splits
    assert names(train.unread) == ["cut.jpg"]
    assert "truncated" in next(iter(train.unread.values()))
    assert names(train.cmyk) == ["print.jpg"] and names(train.turned) == ["turned.jpg"]
    assert (train.images, train.looked_at, test.images) == (5, 5, 3)


def test_a_test_image_that_was_trained_on_is_found(checked):
    leak, other = checked.leaks
    assert names(path for _, path in leak) == ["leak.jpg", "print.jpg", "wide.jpg"]
    assert names(path for _, path in other) == ["small.jpg", "square.png"]
    assert {split for split, _ in leak} == {split for split, _ in other}
    assert checked.duplicates == [leak, other] and not checked.plain
    alone = data_check.check(TASK, ["train"], size=32, limits={})
    assert len(alone.duplicates) == 1 and not alone.leaks


def test_texts_are_counted(checked):
    texts = checked.splits[0].texts["targets"]
    assert texts.count == 7 and texts.past == 2 and texts.limit == 30
    assert (texts.control, texts.special, texts.unknown, texts.changed) == (1, 1, 0, 0)
    assert texts.samples["past"] == ["é" * 40, EVIL]
    assert texts.lengths["longest"] == 81  # bytes, and EOS
    inputs = checked.splits[0].texts["inputs"]
    assert inputs.lengths["median"] == len("caption en") + 1 and inputs.past is None


def test_the_sheet_is_what_training_reads(folder, checked):
    sheet = checked.pipeline.sheet
    assert len(sheet) == 7 and checked.pipeline.examples_per_second > 0
    expected = images.read_image(str(folder / "wide.jpg"), (32, 32))
    np.testing.assert_array_equal(sheet[0][1], expected)
    assert not sheet[6][1].any() and "truncated" in sheet[6][0]  # the cut one


def test_a_pipeline_that_stops_is_said(folder):
    seqio.TaskRegistry.remove("strict_captions")
    files = sources.CaptionFiles(folder / "train.json", folder)
    register_captioning("strict_captions", sources.CocoCaptionsSource({"a": files}))
    found = data_check.check(
        "strict_captions", ["a"], size=32, limits={}, most_images=2
    )
    assert "missing image file" in found.pipeline.problem
    assert found.splits[0].looked_at == 2 and found.splits[0].images == 5
    with pytest.raises(UserError, match="has no split 'b'; it has a"):
        data_check.check("strict_captions", ["b"], size=32, limits={})
    with pytest.raises(UserError, match="no split of .* can be read: .*late.json"):
        data_check.check(TASK, ["late"], size=32, limits={})


# ----- Near duplicates ------------------------------------------------------------


def changed(pixels, how):
    image = Image.fromarray(pixels)
    if how == "smaller":
        image = image.resize((image.width // 2, image.height // 2))
    if how == "brighter":
        image = Image.fromarray(
            np.minimum(pixels.astype(int) + 4, 255).astype(np.uint8)
        )
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=50 if how == "coarser" else 90)
    return np.asarray(Image.open(packed))


@pytest.fixture(scope="module")
def photos(folder):
    some = ("wide.jpg", "square.png", "grey.png", "odd.png", "huge.jpg", "logo.png")
    return [images.read_whole(str(folder / name)) for name in some]


@pytest.mark.parametrize("how", ["smaller", "brighter", "coarser"])
def test_a_photograph_is_near_itself_however_saved_and_no_other(photos, how):
    looks = [near_duplicates.look(pixels) for pixels in photos]
    looks += [near_duplicates.look(changed(pixels, how)) for pixels in photos]
    found = near_duplicates.groups(looks, [bytes([n]) for n in range(12)])
    assert found == ([[n, n + 6] for n in range(6)], 0)


def test_a_mirrored_photograph_is_another(photos):
    looks = [near_duplicates.look(p) for p in (photos[0], photos[0][:, ::-1].copy())]
    assert not near_duplicates.groups(looks, [b"a", b"b"]).groups


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_are_those_of_all_pairs(data):
    """Chains of flipped bits and shifted colours, against every pair."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    looks = []
    for _ in range(data.draw(st.integers(1, 24))):
        if looks and rng.random() < 0.7:
            before = looks[rng.integers(len(looks))]
            bits = before.hash
            for bit in rng.choice(64, rng.integers(0, 7), replace=False):
                bits ^= 1 << int(bit)
            shift = rng.integers(0, 8)
            colors = np.clip(before.colors.astype(int) + shift, 0, 255).astype(np.uint8)
        else:
            bits = int(rng.integers(0, 2**64, dtype=np.uint64))
            colors = rng.integers(0, 200, 192).astype(np.uint8)
        looks.append(near_duplicates.Look(bits, colors))
    count = len(looks)
    reach = np.eye(count, dtype=bool)
    for one in range(count):
        for other in range(count):
            bits = (looks[one].hash ^ looks[other].hash).bit_count()
            a, b = looks[one].colors.astype(float), looks[other].colors.astype(float)
            reach[one, other] |= bits <= 4 and np.abs(a - b).mean() <= 6
    for _ in range(count):
        reach |= (reach.astype(int) @ reach) > 0
    expected = {tuple(np.flatnonzero(row).tolist()) for row in reach if row.sum() > 1}
    found = near_duplicates.groups(looks, [bytes([n]) for n in range(count)])
    assert {tuple(group) for group in found.groups} == expected and not found.plain


def test_plain_images_are_counted_and_equal_files_found(monkeypatch):
    monkeypatch.setattr(near_duplicates, "_MOST", 3)
    white = near_duplicates.look(np.full((9, 9, 3), 255, np.uint8))
    found = near_duplicates.groups([white] * 5, [b"a", b"b", b"c", b"a", b"d"])
    assert found == ([[0, 3]], 5)


# ----- Texts ----------------------------------------------------------------------


class Letters(seqio.Vocabulary):
    """Pad 0, EOS 1, unknown 2, then a to z and a blank."""

    def __init__(self):
        super().__init__(extra_ids=0)

    _base_vocab_size = property(lambda self: 30)
    bos_id = property(lambda self: None)
    eos_id = property(lambda self: 1)
    unk_id = property(lambda self: 2)

    def _encode(self, s):
        return [ord(c) - 94 if "a" <= c <= "z" else 29 if c == " " else 2 for c in s]

    def _decode(self, ids):
        return "".join("q" if i == 3 else chr(i + 94) if i < 29 else " " for i in ids)

    def _encode_tf(self, s):
        raise NotImplementedError

    def _decode_tf(self, ids):
        raise NotImplementedError


def test_what_a_vocabulary_lacks_is_named():
    texts = ["bcd", "bcd", "bö", "bö", "a", "x\u202ey", "b\ufffd", " "]
    found = text_checks.check(texts, Letters(), limit=3, eos=False)
    assert (found.count, found.unknown, found.empty) == (8, 4, 1)
    assert found.unknown_characters == {"ö": 2, "\u202e": 1, "\ufffd": 1}
    assert found.changed == 1 and found.samples["changed"] == ["a"]  # read as q
    assert found.control == 2 and found.past == 0
    assert found.pieces == len({"b", "c", "d", "a", "x", "y", " ", "unknown"})
    assert found.lengths == {"median": 2, "95 %": 3, "99 %": 3, "longest": 3}
    family = "\U0001f468\u200d\U0001f469"  # joined by a character of format
    assert text_checks.check([family], Letters(), limit=None, eos=False).control == 0


# ----- The page and the command ---------------------------------------------------


def test_the_page_shows_what_was_found(checked):
    text, tags = html_checks.checked(check_page.html(checked))
    assert "In several splits: 2 groups" in text
    assert "annotation without image" in text and "alert(1)" in text
    # Five of the leaks, and the sheet of seven.
    assert tags.count("img") == 12


def test_the_command_takes_a_task_or_files(folder, tmp_path, capsys, monkeypatch):
    out, said = tmp_path / "x.html", tmp_path / "x.json"
    arguments = ["--size", "32", "--out", str(out), "--json", str(said)]
    assert cli.main(["data-check", TASK, "--split", "test", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "2 x" not in shown and "1 x empty caption" in shown
    found = json.loads(said.read_text())
    assert found["splits"][0]["left_out"]["annotation without image"] == 1
    html_checks.checked(out.read_text())
    monkeypatch.delenv("VIT22B_VOCABULARY", raising=False)
    with no_tasks():
        files = [str(folder / "wide.jpg"), str(folder / "leak.jpg")]
        assert cli.main(["data-check", *files, "--size", "32"]) == 0
        assert "1 groups of near duplicates" in capsys.readouterr().out
        (tmp_path / "list.jsonl").write_text('{"file_name": "wide.jpg"}\n')
        arguments = [str(tmp_path / "list.jsonl"), "--size", "32"]
        rooted = [*arguments, "--images_root", str(folder), "--json", str(said)]
        assert cli.main(["data-check", *rooted]) == 0
        assert json.loads(said.read_text())["splits"][0]["unread"] == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["checked_caption"], "Nearest: checked_captions"),
        ([TASK, "--size", "0"], "--size 0: it is to be 1 or more"),
        (["no/such.jpg"], "no/such.jpg"),
        ([TASK, "--images_root", "x"], "--images_root is of files; checked_captions"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, checked, capsys):
    assert cli.main(["data-check", *arguments]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
