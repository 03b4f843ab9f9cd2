"""Layouts of data sets: found by names, refused where not whole or not safe."""

import json
import os
import re
import shutil
from pathlib import Path

import drawn_suite
import pytest

from vit22b_transfer import UserError
from vit22b_transfer.experiments import layouts, surveys

DOCS = (Path(__file__).parent.parent / "docs" / "suite.md").read_text()
EVERY = [pytest.param(layout, id=name) for name, layout in layouts.LAYOUTS.items()]


def lay_out(root, layout, leave_out=()):
    """Every part of a layout with as little as it may have; its name."""
    name = f"{layout.name}/one" if layout.several else layout.name
    place = root / layout.place / "one" if layout.several else root / layout.place
    place.mkdir(parents=True, exist_ok=True)
    for part in layout.parts:
        if part.name in leave_out:
            continue
        path = place / part.paths[0]
        if part.kind == layouts.FILE:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("cat\ndog\n")
            continue
        folder = "cue-conflict/cat" if part.name == "stimuli" else "cat"
        inside = path / folder if part.kind == layouts.CLASSES else path
        inside.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "csv") if part.kind == layouts.FILES else ("png",):
            (inside / f"1.{suffix}").write_bytes(b"12345")
    return name


@pytest.mark.parametrize("layout", EVERY)
def test_each_layout_is_found_by_its_parts_and_described(tmp_path, layout):
    name = lay_out(tmp_path, layout)
    survey = surveys.survey(str(tmp_path))
    assert [*survey.found] == [name] and not survey.refused and not survey.unknown
    found = survey.found[name]
    assert found.paths.keys() == {part.name for part in layout.parts}
    for part in layout.parts:
        assert os.path.normpath(part.paths[0]) in DOCS, part.paths[0]
    assert f"`{layout.place or 'train'}" in DOCS
    wildcard = f"{layout.name}/*" if layout.several else layout.name
    assert survey.named(wildcard) == [found]


@pytest.mark.parametrize("layout", EVERY)
def test_a_layout_without_a_part_is_refused_by_its_name(tmp_path, layout):
    for part in layout.parts:
        folder = tmp_path / part.name
        folder.mkdir()
        name = lay_out(folder, layout, leave_out=[part.name])
        survey = surveys.survey(str(folder))
        if part.optional:
            assert name in survey.found
        elif len(layout.parts) == 1 and not layout.place:
            assert not survey.refused and "in the folder" in survey.why_not(name)
        else:
            said = "no image in" if part.paths[0] == "." else f"{part.paths[0]}"
            assert said in survey.refused[name] and said in survey.why_not(name)


@pytest.fixture
def root(tmp_path):
    lay_out(tmp_path, layouts.LAYOUTS["imagenet"])
    return tmp_path


def refusal(root):
    return surveys.survey(str(root)).refused["imagenet"]


def test_what_another_layout_of_the_same_place_needs_is_said(root):
    survey = surveys.survey(str(root))
    assert survey.why_not("few_shot/*") == "no few_shot/ in the folder"
    (root / "val").rename(root / "validation")
    assert "imagenet" in surveys.survey(str(root)).found
    (root / "val").mkdir()
    assert refusal(root) == "val and validation are both there; which is meant?"


def test_links_that_lead_out_or_to_folders_are_not_followed(root):
    inside = root / "train" / "cat" / "2.png"
    inside.symlink_to(root / "train" / "cat" / "1.png")
    found = surveys.survey(str(root)).found["imagenet"]
    assert found.counts == {"train": 2, "validation": 1}
    out = root.parent / "secret.png"
    out.write_bytes(b"1")
    (root / "train" / "cat" / "3.png").symlink_to(out)
    assert "3.png is a link that leads out of it" in refusal(root)
    (root / "train" / "cat" / "3.png").unlink()
    (root / "train" / "dog").symlink_to(root / "train" / "cat")
    assert "dog is a link to no plain file" in refusal(root)
    (root / "train" / "dog").unlink()
    shutil.move(root / "val", root / "elsewhere")
    (root / "val").symlink_to(root / "elsewhere")
    assert "links are not followed" in refusal(root)


def test_a_link_in_place_of_a_whole_layout_is_refused(tmp_path):
    lay_out(tmp_path / "outside", layouts.LAYOUTS["imagenet_v2"])
    (tmp_path / "data").mkdir()
    linked = tmp_path / "data" / "imagenet_v2"
    linked.symlink_to(tmp_path / "outside" / "imagenet_v2")
    assert "is a link" in surveys.survey(str(linked.parent)).refused["imagenet_v2"]


def test_what_is_no_plain_file_is_never_opened(root):
    os.mkfifo(root / "train" / "cat" / "2.png")
    assert refusal(root).endswith("2.png is no plain file")
    (root / "train" / "cat" / "2.png").unlink()
    (root / "classes.txt").unlink()
    os.mkfifo(root / "classes.txt")
    assert refusal(root) == "classes.txt is no plain file"


def test_what_is_odd_is_counted_and_said(root):
    (root / "train" / "cat" / "notes.txt").write_text("x")
    (root / "train" / "cat" / "deeper").mkdir()
    (root / "train" / "cat" / "deeper" / "2.JPG").write_bytes(b"2")
    (root / "train" / "beside.png").write_bytes(b"2")
    (root / "train" / ".DS_Store").write_bytes(b"2")
    (root / "imagenet_v3").mkdir()
    (root / "with\nbreak").mkdir()
    survey = surveys.survey(str(root))
    found = survey.found["imagenet"]
    assert found.counts["train"] == 2 and found.classes["train"] == ("cat",)
    assert sorted(found.notes.values()) == [1, 1, 1]
    told = "\n".join(surveys.told(survey))
    assert "imagenet: 2 images of train, 1 images of validation" in told
    assert "1 images beside the folders of classes, left out" in told
    assert "imagenet_v3: no known layout; is imagenet_v2 meant?" in told
    assert "with\\nbreak: no known layout" in told


def test_what_is_looked_at_is_bounded(root, monkeypatch):
    deep = root / "train" / "cat" / "/".join("d" * (surveys.MOST_DEPTH + 1))
    deep.mkdir(parents=True)
    assert "deeper than 12" in refusal(root)
    shutil.rmtree(root / "train" / "cat" / "d")
    monkeypatch.setattr(surveys, "MOST_FILES", 2)
    assert refusal(root) == "more than 2 files"
    (root / "few_shot").mkdir()
    for number in range(3):
        (root / "few_shot" / str(number)).mkdir()
    monkeypatch.setattr(surveys, "MOST_SETS", 2)
    assert "3 entries" in surveys.survey(str(root)).refused["few_shot"]


def test_names_of_data_sets_are_plain(tmp_path):
    for name in ("a b", "$HOME", ".hidden", "x" * 65):
        (tmp_path / "few_shot" / name).mkdir(parents=True)
    (tmp_path / "few_shot" / "file").write_text("x")
    refused = surveys.survey(str(tmp_path)).refused
    assert len(refused) == 5 and not surveys.survey(str(tmp_path)).found
    assert "no folder" in refused["few_shot/file"]
    with pytest.raises(UserError, match="not a directory"):
        surveys.survey(str(tmp_path / "few_shot" / "file"))
    with pytest.raises(UserError, match=r"holds a \$"):
        surveys.survey(str(tmp_path / "few_shot" / "$HOME"))


def test_a_digest_is_of_names_sizes_and_times_wherever_they_lie(root):
    first = surveys.survey(str(root)).found["imagenet"]
    other = root.parent / "copy"
    shutil.copytree(root, other / "imagenet")  # which keeps the times
    assert surveys.survey(str(other)).found["imagenet"].digest == first.digest
    other = other / "imagenet"
    picture = other / "val" / "cat" / "1.png"
    changed, time = [], picture.stat().st_mtime_ns
    picture.write_bytes(b"54321")
    os.utime(picture, ns=(time, time + 1))
    changed.append(surveys.survey(str(other)).found["imagenet"])
    picture.write_bytes(b"123456")
    os.utime(picture, ns=(time, time))
    changed.append(surveys.survey(str(other)).found["imagenet"])
    picture.rename(other / "val" / "cat" / "2.png")
    changed.append(surveys.survey(str(other)).found["imagenet"])
    (other / "classes.txt").write_text("dog\ncat\n")
    changed.append(surveys.survey(str(other)).found["imagenet"])
    digests = {first.digest, *(one.digest for one in changed)}
    assert len(digests) == 5 and len({one.task for one in changed}) == 4


def test_the_last_survey_of_a_folder_is_kept(root):
    made = surveys.survey(str(root))
    assert surveys.made_survey(str(root)) is made
    assert surveys.survey(str(root)) is not made


# --- What lists and tables say, before a tower is run ---


def test_imagenet_may_lie_in_a_folder_of_its_name(tmp_path):
    lay_out(tmp_path, layouts.LAYOUTS["few_shot"])
    (tmp_path / "few_shot" / "one").rename(tmp_path / "imagenet")
    (tmp_path / "few_shot").rmdir()
    (tmp_path / "imagenet" / "imagenet_real.json").write_text("[[0]]")
    survey = surveys.survey(str(tmp_path))
    assert [*survey.found] == ["imagenet", "imagenet_real"] and not survey.unknown
    assert survey.found["imagenet"].place == str(tmp_path / "imagenet")
    (tmp_path / "imagenet_real.json").write_text("[[0]]")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    survey = surveys.survey(str(tmp_path))
    assert not survey.found
    assert "classes.txt and imagenet/train are both there" in survey.refused["imagenet"]
    both = "imagenet_real.json and imagenet/imagenet_real.json are both there"
    assert both in survey.refused["imagenet_real"]
    empty = tmp_path / "empty"
    (empty / "imagenet").mkdir(parents=True)
    said = surveys.survey(str(empty)).refused["imagenet"]
    assert said == "train/, val/, classes.txt missing"


@pytest.mark.parametrize("name", ["imagenet", "few_shot", "kinetics400"])
def test_a_list_that_lacks_a_class_of_the_test_split_is_refused(tmp_path, name):
    layout = layouts.LAYOUTS[name]
    found = lay_out(tmp_path, layout)
    place = tmp_path / layout.place / "one" if layout.several else tmp_path
    place = place / layout.place if name == "kinetics400" else place
    (place / "train").mkdir(exist_ok=True)
    train = place / layout.parts[0].paths[0]
    shutil.copytree(train / "cat", train / "horse")
    (place / layout.parts[1].paths[0] / "empty").mkdir()
    told = surveys.survey(str(tmp_path)).found[found]
    (note,) = told.notes
    assert "folders of train" in note and "not in classes.txt" in note
    test = place / layout.parts[1].paths[0]
    for folder in ("doog", "horse"):
        shutil.copytree(test / "cat", test / folder)
    said = surveys.survey(str(tmp_path)).refused[found]
    assert f"2 folders of {test.name} (doog, horse) are not in classes.txt" in said
    assert "nearest: dog" in said and "take these folders out" in said


@pytest.mark.parametrize(
    "name, folders, large, message",
    [
        ("imagenet_v2", ("cat", "horse"), False, "(horse) is not in classes.txt"),
        ("imagenet_v2", ("0", "2"), False, "(2) is no class ids: classes.txt has the"),
        ("imagenet_v2", ("0", "1"), False, ""),
        ("imagenet_r", ("cat", "horse"), False, "(horse) is not in classes.txt"),
        ("imagenet_r", ("cat", "dog"), False, ""),
        ("imagenet_a", ("n00000006", "cat"), True, "(cat) is none of the 200 classes"),
        ("imagenet_a", ("n00000006",), True, ""),
        ("objectnet", ("chair",), False, "ImageNet's 1000 classes, but classes.txt"),
        ("objectnet", ("chairs",), True, "is one of the 113 .*; nearest: chair"),
        ("objectnet", ("chair", "air_freshener"), True, ""),
    ],
)
def test_variants_must_fit_imagenet_s_list(tmp_path, name, folders, large, message):
    lay_out(tmp_path, layouts.LAYOUTS["imagenet"])
    if large:
        names = ["cat", *(f"n{n:08}" for n in range(1, 1000))]
        (tmp_path / "classes.txt").write_text("\n".join(names))
    for folder in folders:
        (tmp_path / name / folder).mkdir(parents=True)
        (tmp_path / name / folder / "1.png").write_bytes(b"1")
    survey = surveys.survey(str(tmp_path))
    if not message:
        assert name in survey.found
        return
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    assert re.search(pattern, survey.why_not(name))
    assert name not in survey.found and "imagenet" in survey.found


def test_judgements_and_people_are_read_before_a_tower_is_run(tmp_path):
    drawn_suite.draw(tmp_path, side=4)
    names = {"imagenet_real", "model_vs_human", "bapps", "celeba"}
    survey = surveys.survey(str(tmp_path))
    assert names <= survey.found.keys() and not survey.refused
    human = tmp_path / "model_vs_human"
    real, sixteen = tmp_path / "imagenet_real.json", human / "sixteen.json"
    (table,) = (human / "humans" / "contrast").iterdir()
    stimulus = human / "stimuli" / "contrast" / "strange.png"
    ids = json.loads(sixteen.read_text())

    def sixteens(**changes):
        return json.dumps(
            {k: v for k, v in {**ids, **changes}.items() if v is not None}
        )

    for path, content, message in (
        (real, "[[0]]", "a list of 16 lists, but has 1 entries"),
        (real, json.dumps([[4]] * 16), "class ids from 0 to 3"),
        (real, json.dumps([[]] * 16), "no label for any image"),
        (sixteen, "{", "malformed JSON"),
        (sixteen, sixteens(cat=None, kat=[0]), "missing: cat; unknown: kat"),
        (sixteen, sixteens(cat=[4]), "from 0 to 3; wrong lists: cat"),
        (sixteen, sixteens(cat=[]), "wrong lists: cat"),
        (table, "subj,imagename\n1,2\n", "the header is to have each of"),
        (stimulus, "", "strange.png' does not say condition and class"),
        (
            human / "stimuli" / "0_1_2_c30_oven_10_3.png",
            "",
            "c30_oven_10_3.png' lies in no folder of a data set",
        ),
    ):
        before = path.read_text() if path.exists() else None
        path.write_text(content)
        (refused,) = surveys.survey(str(tmp_path)).refused.values()
        assert message in refused, (message, refused)
        path.write_text(before) if before is not None else path.unlink()
    picture = next((human / "stimuli" / "contrast").iterdir())
    picture.unlink()
    (refused,) = surveys.survey(str(tmp_path)).refused.values()
    assert "1 pictures were seen by one observer alone" in refused
