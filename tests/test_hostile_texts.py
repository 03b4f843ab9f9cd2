"""Texts and values of strangers in annotations: named, counted, and nothing else."""

import copy
import json
import os
import unicodedata

import pytest
from hostile_files import replaced
from PIL import Image

from vit22b_transfer import UserError
from vit22b_transfer.data import image_sets, records, sources, vocabularies

HALF = "a \ud83d\x1b[2J\n"  # half of an emoji, and what would clear a terminal


@pytest.fixture
def folder(tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"no image: it is not read")
    return tmp_path


# Of each kind of annotations two records, and how to make a source of them.


def coco(folder, content, **options):
    (folder / "c.json").write_text(json.dumps(content))
    files = sources.CaptionFiles(folder / "c.json", folder)
    return sources.CocoCaptionsSource({"train": files}, **options)


COCO = {
    "images": [{"id": "1", "file_name": "1.png"}, {"id": "2", "file_name": "2.png"}],
    "annotations": [
        {"id": "11", "image_id": "1", "caption": "a cube"},
        {"id": "12", "image_id": "2", "caption": "a ball"},
    ],
}


def vqa(folder, content, **options):
    for name in ("questions", "annotations"):
        (folder / f"{name}.json").write_text(json.dumps({name: content[name]}))
    files = sources.VqaFiles(
        folder / "questions.json",
        folder,
        folder / "annotations.json",
        image_file="{image_id}.png",
    )
    return sources.VqaSource({"train": files}, **options)


VQA = {
    "questions": [
        {"question_id": "1", "image_id": "1", "question": "what?"},
        {"question_id": "2", "image_id": "2", "question": "what?"},
    ],
    "annotations": [
        {
            "question_id": number,
            "image_id": number,
            "multiple_choice_answer": "cube",
            "answers": [{"answer": "cube"}, {"answer": "ball"}],
        }
        for number in ("1", "2")
    ],
}


def lines(folder, content, **options):
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, content)))
    files = sources.CaptionFiles(folder / "c.jsonl", folder)
    return sources.CaptionFileSource({"train": files}, **options)


LINES = [
    {"file_name": "1.png", "captions": ["a cube"]},
    {"file_name": "2.png", "captions": ["a ball"]},
]


def sets(folder, content, **options):
    (folder / "s.jsonl").write_text("\n".join(map(json.dumps, content)))
    files = sources.CaptionFiles(folder / "s.jsonl", folder)
    return image_sets.ImageSetSource({"train": files}, images_per_example=1, **options)


SETS = [
    {
        "file_names": [name],
        "id": name,
        "question": "?",
        "target": "a",
        "references": [""],
    }
    for name in ("1.png", "2.png")
]

KINDS = {"coco": (coco, COCO), "vqa": (vqa, VQA), "lines": (lines, LINES)}
KINDS["sets"] = (sets, SETS)


def leaves(value, path=()):
    """Paths of all values in a JSON value that are texts."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        if isinstance(child, str):
            yield (*path, key)
        else:
            yield from leaves(child, (*path, key))


def first_places():
    """(kind, path) of the texts of the first record of each kind."""
    for kind, (_, content) in KINDS.items():
        for path in leaves(content):
            outer = path[:2] if isinstance(content, dict) else path[:1]
            if outer[-1] == 0:
                yield kind, path


WRONG = [HALF, {"a": []}, [[]], 0.5, True, None]


@pytest.mark.parametrize(
    "kind, path, value",
    [
        (kind, path, value)
        for kind, path in first_places()
        for value in WRONG
        if value is not None or path[-1] != "multiple_choice_answer"  # may be missing
    ],
)
def test_a_value_that_is_no_text_is_named_and_the_other_record_is_read(
    folder, kind, path, value, caplog
):
    make, content = KINDS[kind]
    content = replaced(content, path, value)
    source = make(folder, content, on_bad_record="skip")
    left = [
        example["image_id"] for example in source.get_dataset("train", shuffle=False)
    ]
    assert [name.numpy().decode()[0] for name in left] == ["2"]
    counts = source.report()["train"]
    assert counts["malformed entry"] == 1
    with pytest.raises(UserError, match="malformed entry: ") as error:
        make(folder, content).num_records("train")
    # Of an import that an earlier test killed, asyncio tells when it is collected.
    said = [record.message for record in caplog.records if record.name != "asyncio"]
    for text in (str(error.value), *said):
        assert text.isprintable() and json.dumps(text, ensure_ascii=False).encode()
    where = {"coco": path[0], "vqa": path[0], "lines": "line 1", "sets": "line 1"}[kind]
    assert where in str(error.value) or "annotation of question 1" in str(error.value)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '[{"a":' * 50_000, "1" * 5000, '"\ud800"'], ids=len
)
def test_what_ends_pythons_parser_is_an_error_that_names_the_file(folder, kind, text):
    make, content = KINDS[kind]
    source = make(folder, content)
    for path in folder.glob("*.json*"):
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError, match=r"\.jsonl?[ ,:]") as error:
        source.num_records("train")
    assert len(str(error.value)) < 600


def test_a_huge_entry_makes_no_huge_message(folder):
    entry = {"id": ["x" * 100_000] * 9, "file_name": {"a": {"b": {"c": ["d"] * 999}}}}
    with pytest.raises(UserError, match="field 'id' has a wrong type") as error:
        coco(folder, {"images": [entry], "annotations": []}).num_records("train")
    assert len(str(error.value)) < 700


def test_all_entries_of_a_coco_file_are_named_by_id_and_place(folder):
    content = copy.deepcopy(COCO)
    content["images"] += [{"id": 3, "file_name": "gone.png"}, {"file_name": "x"}]
    content["annotations"] += [{"id": 13, "image_id": "2"}]
    source = coco(folder, content, on_bad_record="skip")
    with pytest.raises(UserError, match="image 3: gone.png is not in"):
        coco(folder, content).num_records("train")
    assert source.num_records("train") == 2
    content["images"][2:3] = []
    with pytest.raises(UserError, match=r"images\[2\]: field 'id' is missing in .*'x'"):
        coco(folder, content).num_records("train")
    content["images"][2:] = []
    with pytest.raises(
        UserError, match=r"annotations\[2\]: field 'caption' is missing"
    ):
        coco(folder, content).num_records("train")
    content["annotations"] = COCO["annotations"][:1]
    with pytest.raises(UserError, match=r"image without captions: image 2 \(2\.png\)"):
        coco(folder, content).num_records("train")


def test_texts_for_a_vocabulary_are_checked_too(folder):
    coco(folder, replaced(COCO, ("annotations", 1, "caption"), HALF))
    with pytest.raises(
        UserError, match=r"c\.json: .*annotations\[1\]: field 'caption'"
    ):
        vocabularies.train([folder / "c.json"], folder / "v.model", vocab_size=300)


def test_printable_texts_stay_as_they_are_and_others_are_escaped():
    assert records.printable("café 日本 🙂 'x'") == "café 日本 🙂 'x'"
    assert records.printable("a\n\x1b\udce9\u2028") == r"a\n\x1b\udce9\u2028"


# Ids and file names


@pytest.mark.parametrize(
    "pattern, image_id, name",
    [
        ("COCO_{image_id:012d}.png", "42", "COCO_000000000042.png"),
        ("{image_id:06}.png", "42", "000042.png"),
        ("{image_id:06d}.png", "000042", "000042.png"),
        ("{image_id}.png", "0042", "0042.png"),
        ("{image_id:0>6s}.png", 42, "000042.png"),
        ("{image_id:x>4}.png", "ab", "xxab.png"),
    ],
)
def test_an_id_of_digits_fits_a_pattern_as_a_number_and_as_a_text(
    folder, pattern, image_id, name
):
    Image.new("RGB", (4, 4)).save(folder / name)
    question = {"question_id": 1, "image_id": image_id, "question": "what?"}
    (folder / "q.json").write_text(json.dumps({"questions": [question]}))
    files = sources.VqaFiles(folder / "q.json", folder, image_file=pattern)
    record = sources.VqaSource({"test": files}).record("test", 0)
    assert os.path.basename(record.image_path) == name
    assert record.image_id == str(image_id)


def test_one_id_that_fits_no_pattern_is_one_bad_record(folder):
    (folder / "0001.png").write_bytes(b"")
    questions = [
        {"question_id": n, "image_id": image_id, "question": "what?"}
        for n, image_id in enumerate(("1", "a", "9" * 5000))
    ]
    (folder / "q.json").write_text(json.dumps({"questions": questions}))
    files = sources.VqaFiles(folder / "q.json", folder, image_file="{image_id:04d}.png")
    source = sources.VqaSource({"test": files}, on_bad_record="skip")
    assert source.num_records("test") == 1
    reason = "image id that does not fit image_file"
    assert source.report() == {"test": {reason: 2}}
    with pytest.raises(UserError, match=f"{reason}: .*image_id 'a'"):
        sources.VqaSource({"test": files}).num_records("test")
    wrong = sources.VqaFiles(folder / "q.json", folder, image_file="{id}.png")
    with pytest.raises(UserError, match="'{id}.png' cannot be filled"):
        sources.VqaSource({"test": wrong}, on_bad_record="skip").num_records("test")


def nfc(text):
    return unicodedata.normalize("NFC", text)


def nfd(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize("there, asked", [(nfc, nfd), (nfd, nfc)])
def test_a_name_in_the_other_unicode_form_is_found(tmp_path, there, asked):
    path = tmp_path / there("Zoë") / there("café.png")
    path.parent.mkdir()
    path.write_bytes(b"")
    captions = [
        {"file_name": form("Zoë/café.png"), "caption": "a cup"}
        for form in (asked, there)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, captions)))
    files = sources.CaptionFiles(tmp_path / "c.jsonl", tmp_path)
    source = sources.CaptionFileSource({"test": files})
    # Two lines of one file are one image with two captions.
    assert source.num_records("test") == 1
    record = source.record("test", 0)
    assert record.image_path == str(path) and len(record.references) == 2


def test_of_two_files_in_both_forms_the_exact_one_is_meant(tmp_path):
    for form in (nfc, nfd):
        (tmp_path / form("ộ.png")).write_bytes(form("ộ").encode())
    lines_ = [{"file_name": form("ộ.png"), "caption": "x"} for form in (nfc, nfd)]
    lines_.append({"file_name": "\u1ecd\u0302.png", "caption": "in a third form"})
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines_)))
    files = sources.CaptionFiles(tmp_path / "c.jsonl", tmp_path)
    source = sources.CaptionFileSource({"train": files}, on_bad_record="skip")
    found = [source.record("train", n).image_path for n in range(2)]
    assert found == [str(tmp_path / form("ộ.png")) for form in (nfc, nfd)]
    assert source.num_records("train") == 2
    reason = "file name in none of the Unicode forms of several"
    assert source.report() == {"train": {reason: 1}}


def test_a_folder_whose_name_is_no_unicode_is_refused_by_name(tmp_path):
    root = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(root)
    with pytest.raises(UserError, match=r"caf\\udce9 is no Unicode text") as error:
        sources.ImageFolderSource({"test": root}).num_records("test")
    assert str(error.value).isprintable()


def test_what_macos_leaves_beside_images_is_left_out_and_counted(tmp_path, caplog):
    for name in ("a.jpg", "._a.jpg", ".DS_Store", "b/._c.png", "b/.hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = sources.ImageFolderSource({"test": tmp_path})
    names = [source.record("test", n).image_id for n in range(2)]
    assert names == ["a.jpg", "b/.hidden.png"]
    assert "2 files are no images but what macOS puts beside others" in caplog.text
    assert "1 files do not end in" in caplog.text
