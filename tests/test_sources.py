import json
import logging
import pathlib

import numpy as np
import pytest
import seqio
import tensorflow as tf
from PIL import Image

from vit22b_transfer.data.sources import (
    CaptionFiles,
    CaptionFileSource,
    CocoCaptionsSource,
    ImageFolderSource,
    VqaFiles,
    VqaSource,
)


def write_images(folder, *names):
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (4, 4), (9, 9, 9)).save(folder / name)
    return folder


def coco_content():
    """Three images; image 2 has two captions."""
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 4, "height": 4}
            for i in (1, 2, 3)
        ],
        "annotations": [
            {"id": 11, "image_id": 2, "caption": "a red circle"},
            {"id": 12, "image_id": 1, "caption": " a cat "},
            {"id": 13, "image_id": 2, "caption": "one circle"},
            {"id": 14, "image_id": 3, "caption": "café"},
        ],
    }


def answers(*texts):
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": number}
        for number, text in enumerate(texts, start=1)
    ]


def vqa_content():
    """Two questions about image 1, one about image 2."""
    questions = [
        {"image_id": 1, "question_id": 10, "question": "how many?"},
        {"image_id": 1, "question_id": 11, "question": "what color?"},
        {"image_id": 2, "question_id": 20, "question": "is it?"},
    ]
    annotations = [
        {"question_id": 20, "image_id": 2, "answers": answers(*["yes"] * 9, "no")},
        {"question_id": 10, "image_id": 1, "answers": answers("4", "four", "4")},
        {
            "question_id": 11,
            "image_id": 1,
            "multiple_choice_answer": "blue",
            "answers": answers("red", "blue", "red", "blue"),
        },
    ]
    return {"questions": questions}, {"annotations": annotations}


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", "1.png", "2.png", "3.png")


@pytest.fixture
def coco(tmp_path, folder):
    """A function: changed COCO content, policy -> source over it."""

    def make(content, on_bad_record="error"):
        path = tmp_path / "captions.json"
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        files = CaptionFiles(captions=path, images=folder)
        return CocoCaptionsSource(
            {"train": files, "test": files}, on_bad_record=on_bad_record
        )

    return make


@pytest.fixture
def vqa(tmp_path, folder):
    def make(questions, annotations, on_bad_record="error"):
        (tmp_path / "questions.json").write_text(json.dumps(questions))
        (tmp_path / "annotations.json").write_text(json.dumps(annotations))
        files = VqaFiles(
            questions=tmp_path / "questions.json",
            images=folder,
            annotations=tmp_path / "annotations.json",
            image_file="{image_id}.png",
        )
        return VqaSource({"train": files}, on_bad_record=on_bad_record)

    return make


def examples(source, split="train", **options):
    dataset = source.get_dataset(split, shuffle=False, **options)
    return list(dataset.as_numpy_iterator())


# What good files give


def test_each_caption_is_a_training_example(coco, folder):
    source = coco(coco_content())
    found = examples(source)
    assert source.num_records("train") == source.num_input_examples("train") == 4
    assert [e["target"].decode() for e in found] == [
        "a red circle",
        "a cat",
        "one circle",
        "café",
    ]
    assert [e["image_id"] for e in found] == [b"2", b"1", b"2", b"3"]
    assert found[0]["image_path"].decode() == str(folder / "2.png")
    assert found[0]["question_id"] == found[0]["question"] == b""
    assert list(found[2]["references"]) == [b"a red circle", b"one circle"]


def test_each_image_is_an_evaluation_example_with_all_references(coco):
    found = examples(coco(coco_content()), "test")
    assert [e["image_id"] for e in found] == [b"2", b"1", b"3"]
    assert list(found[0]["references"]) == [b"a red circle", b"one circle"]
    assert list(found[1]["references"]) == [b"a cat"]


def test_each_question_is_an_example_with_all_answers(vqa):
    found = examples(vqa(*vqa_content()))
    assert [e["question_id"] for e in found] == [b"10", b"11", b"20"]
    assert [e["question"] for e in found] == [b"how many?", b"what color?", b"is it?"]
    assert [e["image_id"] for e in found] == [b"1", b"1", b"2"]
    # The most frequent answer; VQAv2's own choice among equally frequent ones.
    assert [e["target"] for e in found] == [b"4", b"blue", b"yes"]
    assert list(found[0]["references"]) == [b"4", b"four", b"4"]
    assert len(found[2]["references"]) == 10


def test_questions_without_an_annotations_file_have_no_answers(tmp_path, folder):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(vqa_content()[0]))
    files = VqaFiles(path, folder, image_file="{image_id}.png")
    found = examples(VqaSource({"test": files}), "test")
    assert [e["target"] for e in found] == [b""] * 3
    assert found[0]["references"].shape == (0,)


def test_real_vqav2_file_names_are_made_from_the_image_id(tmp_path):
    folder = write_images(tmp_path / "val2014", "COCO_val2014_000000000042.png")
    path = tmp_path / "questions.json"
    question = {"image_id": 42, "question_id": 1, "question": "why?"}
    path.write_text(json.dumps({"questions": [question]}))
    pattern = "COCO_val2014_{image_id:012d}.png"
    source = VqaSource({"test": VqaFiles(path, folder, image_file=pattern)})
    assert source.record("test", 0).image_path.endswith("val2014_000000000042.png")


CAPTION_FILES = {
    "c.jsonl": '{"file_name": "1.png", "captions": ["a, b", "c"]}\n\n'
    '{"file_name": "2.png", "caption": "d"}\n',
    "c.csv": 'id,file_name,caption\n1,1.png,"a, b"\n2,1.png,c\n3,2.png,d\n',
    "c.txt": "1.png\ta, b\n1.png\tc\n\n2.png\td\n",
}


@pytest.mark.parametrize("name", list(CAPTION_FILES))
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_captions_beside_a_folder_are_read(tmp_path, folder, name, mark):
    path = tmp_path / name
    path.write_text(mark + CAPTION_FILES[name], encoding="utf-8")
    files = CaptionFiles(path, folder)
    source = CaptionFileSource({"train": files, "test": files})
    found = [(e["image_id"], e["target"]) for e in examples(source)]
    assert found == [(b"1.png", b"a, b"), (b"1.png", b"c"), (b"2.png", b"d")]
    first, second = examples(source, "test")
    assert list(first["references"]) == [b"a, b", b"c"]
    assert list(second["references"]) == [b"d"]


def test_a_folder_gives_its_images_in_the_order_of_their_paths(tmp_path, caplog):
    folder = write_images(tmp_path / "new", "b.png", "a/z.jpg", "a/B.JPEG")
    for name in ("notes.md", "a/b.heic", "a/a.psd", "x.md"):
        (folder / name).write_text("hello")
    with caplog.at_level(logging.WARNING):
        found = examples(ImageFolderSource({"test": folder}), "test")
    assert [e["image_id"] for e in found] == [b"a/B.JPEG", b"a/z.jpg", b"b.png"]
    assert "4 files do not end in .bmp" in caplog.text
    assert "left out: a/a.psd, a/b.heic, notes.md, ..." in caplog.text
    # What lies there for another reader is nothing to warn of.
    source = ImageFolderSource({"test": folder}, beside=(".psd", ".heic"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        source.num_records("test")
    assert "2 files do not end in .bmp" in caplog.text
    assert all(e["target"] == b"" and not len(e["references"]) for e in found)


# Random access


def test_records_come_in_the_order_asked_for(coco):
    source = coco(coco_content())
    order = tf.data.Dataset.from_tensor_slices(np.array([3, 0, 0, 2], np.int64))
    found = [e["image_id"] for e in source.records("train", order).as_numpy_iterator()]
    assert found == [b"3", b"2", b"2", b"2"]


def test_shuffling_is_global_and_repeatable(tmp_path):
    write_images(tmp_path / "i", *(f"{n:03}.png" for n in range(100)))
    source = ImageFolderSource({"test": tmp_path / "i"})
    plain = [e["image_id"] for e in examples(source, "test")]

    def shuffled(seed):
        dataset = source.get_dataset("test", shuffle=True, seed=seed)
        return [e["image_id"] for e in dataset.as_numpy_iterator()]

    assert shuffled(1) == shuffled(1) != shuffled(2)
    assert sorted(shuffled(1)) == plain
    moved = [abs(plain.index(name) - i) for i, name in enumerate(shuffled(1))]
    assert np.mean(moved) > 20


def test_shards_partition_the_records(coco):
    source = coco(coco_content())
    assert source.supports_arbitrary_sharding
    found = [
        [e["target"] for e in examples(source, shard_info=seqio.ShardInfo(i, 3))]
        for i in range(3)
    ]
    assert [len(f) for f in found] == [2, 1, 1]
    assert sorted(sum(found, [])) == sorted(e["target"] for e in examples(source))


def test_iterators_can_be_saved_and_restored(coco, tmp_path):
    iterator = iter(coco(coco_content()).get_dataset("train", shuffle=False))
    next(iterator)
    checkpoint = tf.train.Checkpoint(iterator=iterator)
    path = checkpoint.save(tmp_path / "state")
    expected = next(iterator)["target"].numpy()
    checkpoint.restore(path)
    assert next(iterator)["target"].numpy() == expected


def test_construction_touches_no_file_and_variables_are_read_at_use(
    coco, folder, monkeypatch
):
    monkeypatch.delenv("CAPTIONS_ROOT", raising=False)
    source = CocoCaptionsSource(
        {
            "train": CaptionFiles(
                "$CAPTIONS_ROOT/captions.json", "${CAPTIONS_ROOT}/images"
            )
        }
    )
    with pytest.raises(ValueError, match="environment variable CAPTIONS_ROOT, which"):
        source.num_records("train")
    coco(coco_content())
    monkeypatch.setenv("CAPTIONS_ROOT", str(folder.parent))
    assert source.num_records("train") == 4


def test_relative_paths_are_resolved_at_use(coco, folder, monkeypatch):
    coco(coco_content())
    source = CocoCaptionsSource({"train": CaptionFiles("captions.json", "images")})
    monkeypatch.chdir(folder.parent)
    assert pathlib.Path(source.record("train", 0).image_path).is_absolute()


# Bad input: whole files


def test_malformed_json_names_file_line_and_column(coco):
    with pytest.raises(
        ValueError, match=r"captions\.json, line 2, column 15: malformed"
    ):
        coco('{"images": [],\n"annotations" 3}').num_records("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"captions\.json is empty"),
        ("[1, 2]", "is not a COCO captions file.*found no JSON object"),
        ('{"questions": []}', r"list 'images' is expected.*\['questions'\]"),
        ('{"images": [], "annotations": []}', "has no usable record"),
    ],
)
def test_files_of_another_kind_are_refused(coco, text, message):
    with pytest.raises(ValueError, match=message):
        coco(text, on_bad_record="skip").num_records("train")


def test_text_in_another_encoding_is_named(coco, tmp_path):
    source = coco(coco_content())
    (tmp_path / "captions.json").write_bytes(b'{"caption": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"captions\.json is not UTF-8"):
        source.num_records("train")


def test_missing_files_and_folders_are_named(tmp_path, folder, coco):
    absent = CocoCaptionsSource({"train": CaptionFiles(tmp_path / "no.json", folder)})
    with pytest.raises(ValueError, match=r"no\.json does not exist"):
        absent.num_records("train")
    coco(coco_content())
    files = CaptionFiles(tmp_path / "captions.json", tmp_path / "no_images")
    with pytest.raises(ValueError, match="no_images is not a directory"):
        CocoCaptionsSource({"train": files}).num_records("train")
    with pytest.raises(ValueError, match="not a directory"):
        ImageFolderSource({"test": tmp_path / "nowhere"}).num_records("test")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no usable record"):
        ImageFolderSource({"test": tmp_path / "bare"}).num_records("test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.xml", "<a/>", r"suffix '\.xml'.*\.jsonl, \.csv, \.txt"),
        ("c.jsonl", '{"file_name": "1.png", "caption": "a"}\n{"file', "line 2, column"),
        ("c.csv", "image,caption\n1.png,a\n", r"columns file_name and caption, found"),
    ],
)
def test_caption_files_that_cannot_be_parsed_are_named(
    tmp_path, folder, name, text, message
):
    (tmp_path / name).write_text(text)
    source = CaptionFileSource({"train": CaptionFiles(tmp_path / name, folder)})
    with pytest.raises(ValueError, match=message):
        source.num_records("train")


# Bad input: single records


def changed(content, part, index, **fields):
    content[part][index].update(fields)
    return content


def extended(content, part, entry):
    content[part].append(entry)
    return content


def without(content, part, index):
    del content[part][index]
    return content


BAD_COCO = {
    "annotation without image": (
        extended(
            coco_content(), "annotations", {"id": 15, "image_id": 99, "caption": "x"}
        ),
        "annotation 15 is about image 99",
        4,
    ),
    "image without captions": (without(coco_content(), "annotations", 3), "image 3", 3),
    "empty caption": (
        changed(coco_content(), "annotations", 0, caption=" \n"),
        "annotation 11 of image 2",
        3,
    ),
    "duplicate image id": (
        extended(coco_content(), "images", {"id": 3, "file_name": "3.png"}),
        r"image 3 \(3\.png\)",
        4,
    ),
    "duplicate annotation id": (
        extended(
            coco_content(), "annotations", {"id": 14, "image_id": 1, "caption": "x"}
        ),
        "annotation 14",
        4,
    ),
    "missing image file": (
        changed(coco_content(), "images", 0, file_name="gone.png"),
        r"image 1: gone\.png is not in",
        3,
    ),
    "malformed entry": (
        extended(
            coco_content(), "annotations", {"id": 15, "image_id": 1, "caption": None}
        ),
        "field 'caption' has a wrong type",
        4,
    ),
}


@pytest.mark.parametrize("reason", list(BAD_COCO))
def test_a_bad_caption_record_is_an_error_or_counted(coco, reason, caplog):
    content, item, good = BAD_COCO[reason]
    with pytest.raises(ValueError, match=f"{reason}: .*{item}.*on_bad_record='skip'"):
        coco(content).num_records("train")
    source = coco(content, on_bad_record="skip")
    with caplog.at_level(logging.WARNING):
        assert source.num_records("train") == good
    assert source.report() == {"train": {reason: 1}}
    assert f"skipped 1 x {reason}" in caplog.text


def bad_vqa(reason):
    questions, annotations = vqa_content()
    if reason == "question without answers":
        without(annotations, "annotations", 0)
        return questions, annotations, "question 20", 2
    if reason == "question without any answer text":
        changed(annotations, "annotations", 0, answers=[])
        return questions, annotations, "question 20", 2
    if reason == "annotation without question":
        without(questions, "questions", 2)
        return questions, annotations, "question id 20", 2
    if reason == "duplicate question id":
        extended(questions, "questions", dict(questions["questions"][0]))
        return questions, annotations, "10", 3
    if reason == "duplicate annotation":
        extended(annotations, "annotations", dict(annotations["annotations"][0]))
        return questions, annotations, "question 20", 3
    if reason == "missing image file":
        changed(questions, "questions", 2, image_id=77)
        changed(annotations, "annotations", 0, image_id=77)
        return questions, annotations, r"question 20: 77\.png", 2
    if reason == "annotation of another image":
        changed(annotations, "annotations", 0, image_id=3)
        return questions, annotations, "question 20: image 2 in the questions, 3", 2
    if reason == "empty question":
        changed(questions, "questions", 2, question=" ")
        return questions, annotations, "question 20", 2
    assert reason == "malformed entry"
    extended(questions, "questions", {"image_id": 1, "question": "no id?"})
    return questions, annotations, "field 'question_id' is missing", 3


@pytest.mark.parametrize(
    "reason",
    [
        "question without answers",
        "question without any answer text",
        "annotation without question",
        "duplicate question id",
        "duplicate annotation",
        "missing image file",
        "annotation of another image",
        "empty question",
        "malformed entry",
    ],
)
def test_a_bad_question_record_is_an_error_or_counted(vqa, reason):
    questions, annotations, item, good = bad_vqa(reason)
    reason = reason.replace("any answer text", "answers")
    with pytest.raises(ValueError, match=f"{reason}: .*{item}"):
        vqa(questions, annotations).num_records("train")
    source = vqa(questions, annotations, on_bad_record="skip")
    assert source.num_records("train") == good
    assert source.report() == {"train": {reason: 1}}


@pytest.mark.parametrize(
    ("name", "text", "reason", "item"),
    [
        (
            "c.jsonl",
            '{"file_name": "9.png", "caption": "x"}',
            "missing image",
            "line 4",
        ),
        ("c.jsonl", '{"file_name": "3.png", "caption": ""}', "empty caption", "line 4"),
        ("c.jsonl", '{"file_name": "3.png"}', "malformed entry", "line 4"),
        ("c.jsonl", '{"file_name": "3.png", "captions": [7]}', "malformed", "line 4"),
        ("c.jsonl", '{"file_name": "3.png", "captions": []}', "image without", "3.png"),
        ("c.csv", "4,9.png,x", "missing image file", "line 5"),
        ("c.csv", "4,3.png,", "empty caption", "3.png"),
        ("c.csv", "4,3.png", "malformed entry", "line 5"),
        ("c.txt", "3.png no tab", "malformed entry", "line 5"),
        ("c.txt", "\tx", "missing image file", "line 5"),
    ],
)
def test_a_bad_caption_line_is_an_error_or_counted(
    tmp_path, folder, name, text, reason, item
):
    path = tmp_path / name
    path.write_text(f"{CAPTION_FILES[name]}{text}\n")
    files = {"train": CaptionFiles(path, folder)}
    with pytest.raises(ValueError, match=f"{reason}.*{item}"):
        CaptionFileSource(files).num_records("train")
    source = CaptionFileSource(files, on_bad_record="skip")
    assert source.num_records("train") == 3
    assert list(source.report()["train"].values()) == [1]


def test_unknown_policies_and_splits_name_the_nearest(coco):
    with pytest.raises(ValueError, match="Did you mean 'skip'"):
        coco(coco_content(), on_bad_record="skp")
    with pytest.raises(ValueError, match=r"split is 'trian'.*Did you mean 'train'"):
        coco(coco_content()).num_records("trian")


def test_an_image_pattern_that_does_not_fit_the_ids_is_explained(tmp_path, folder):
    path = tmp_path / "q.json"
    question = {"image_id": "abc", "question_id": 1, "question": "why?"}
    path.write_text(json.dumps({"questions": [question]}))
    source = VqaSource({"test": VqaFiles(path, folder)}, on_bad_record="skip")
    with pytest.raises(ValueError, match="cannot be filled with image_id 'abc'"):
        source.num_records("test")
