"""Layouts of data sets: found by names, refused where not whole or not safe."""

import os
import shutil
from pathlib import Path

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
        inside = path / "cat" if part.kind == layouts.CLASSES else path
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


def test_a_digest_is_of_names_and_sizes_wherever_they_lie(root):
    first = surveys.survey(str(root)).found["imagenet"]
    other = root.parent / "copy"
    shutil.copytree(root, other)
    assert surveys.survey(str(other)).found["imagenet"].digest == first.digest
    picture = other / "val" / "cat" / "1.png"
    picture.write_bytes(b"54321")
    assert surveys.survey(str(other)).found["imagenet"].digest == first.digest
    changed = []
    picture.write_bytes(b"123456")
    changed.append(surveys.survey(str(other)).found["imagenet"])
    picture.rename(other / "val" / "cat" / "2.png")
    changed.append(surveys.survey(str(other)).found["imagenet"])
    (other / "classes.txt").write_text("dog\ncat\n")
    changed.append(surveys.survey(str(other)).found["imagenet"])
    digests = {first.digest, *(one.digest for one in changed)}
    assert len(digests) == 4 and len({one.task for one in changed}) == 3


def test_the_last_survey_of_a_folder_is_kept(root):
    made = surveys.survey(str(root))
    assert surveys.made_survey(str(root)) is made
    assert surveys.survey(str(root)) is not made
