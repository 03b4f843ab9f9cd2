import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vit22b_transfer.demo import scene_layout, scene_text, scenes
from vit22b_transfer.demo.scene_layout import COLORS, SHAPES, SceneConfig
from vit22b_transfer.demo.scenes import COMPOSITIONAL, describe_scene
from vit22b_transfer.evaluation import text_metrics, vqa_metrics

CONFIG = SceneConfig()
ORDINARY_SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    target = tmp_path_factory.mktemp("scenes") / "data"
    sizes = {"train": 300, "validation": 10, "test": 100, COMPOSITIONAL: 40}
    scenes.write_scenes(target, config=CONFIG, seed=3, sizes=sizes)
    return target


def read(path):
    return json.loads(path.read_text())


@given(
    split=st.sampled_from(scenes.SPLITS),
    index=st.integers(0, 10**6),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([64, 97, 224]),
    grid=st.sampled_from([2, 3]),
    max_objects=st.integers(2, 4),
)
def test_any_scene_is_described_truthfully(split, index, seed, size, grid, max_objects):
    config = SceneConfig(image_size=size, grid=grid, max_objects=max_objects)
    described = describe_scene(config, seed=seed, split=split, index=index)
    assert described.image.shape == (size, size, 3)
    assert described.image.dtype == np.uint8
    objects = described.scene.objects
    assert 1 <= len(objects) <= max_objects
    assert len({o.pair for o in objects}) == len(objects)
    for o in objects:
        assert o.radius <= o.x <= size - o.radius
        assert o.radius <= o.y <= size - o.radius
        for other in objects:
            if other is not o:
                distance = np.hypot(o.x - other.x, o.y - other.y)
                assert distance > o.radius + other.radius
    assert len(set(described.captions)) == 5
    for caption in described.captions:
        assert caption == caption.lower()
        assert len(caption.split()) <= 14
        assert all(o.name.split()[0] in caption for o in objects)
        for color in COLORS:
            expected = [o.color for o in objects].count(color)
            assert caption.replace(",", "").split().count(color) == expected
    assert len({q.kind for q in described.questions}) == len(described.questions)
    for question, answers in zip(described.questions, described.answers, strict=True):
        words = {question.answer}
        if question.answer.isdigit():
            words.add(scene_text._NUMBER_WORDS[int(question.answer)])
        assert [a["answer_id"] for a in answers] == list(range(1, 11))
        assert sum(a["answer"] == question.answer for a in answers) >= 7
        assert sum(a["answer"] in words for a in answers) >= 9


def test_answers_follow_from_the_objects():
    for index in range(200):
        described = describe_scene(CONFIG, seed=1, split="train", index=index)
        by_shape = collections.defaultdict(list)
        by_color = collections.defaultdict(list)
        by_name = {}
        for o in described.scene.objects:
            by_shape[o.shape].append(o)
            by_color[o.color].append(o)
            by_name[o.name] = o
        for q in described.questions:
            words = q.text.rstrip("?").split()
            if q.kind == "color":
                [thing] = by_shape[words[4]]
                assert thing.color == q.answer
            elif q.kind == "shape":
                [thing] = by_color[words[4]]
                assert thing.shape == q.answer
            elif q.kind == "size":
                assert by_name[" ".join(words[-2:])].size == q.answer
            elif q.kind == "exists":
                assert (" ".join(words[-2:]) in by_name) == (q.answer == "yes")
            elif q.form == "count/shape":
                singular = {"crosses": "cross"}.get(words[2], words[2][:-1])
                assert str(len(by_shape[singular])) == q.answer
            elif q.form == "count/color":
                assert str(len(by_color[words[2]])) == q.answer
            elif q.form == "count/all":
                assert str(len(described.scene.objects)) == q.answer
            elif q.kind == "compare":
                one, other = (
                    by_name[" ".join(words[2:4])],
                    by_name[" ".join(words[-2:])],
                )
                shift = {
                    "left": other.column - one.column,
                    "right": one.column - other.column,
                    "above": other.row - one.row,
                    "below": one.row - other.row,
                }[words[4]]
                assert abs(shift) == 1
                assert (shift > 0) == (q.answer == "yes")
            else:
                anchor = by_name[" ".join(words[-2:])]
                answers = {
                    "left": [o for o in by_name.values() if o.column < anchor.column],
                    "right": [o for o in by_name.values() if o.column > anchor.column],
                    "above": [o for o in by_name.values() if o.row < anchor.row],
                    "below": [o for o in by_name.values() if o.row > anchor.row],
                }[words[3]]
                assert [o.shape for o in answers] == [q.answer]


def test_a_scene_depends_only_on_seed_split_and_index():
    first = describe_scene(CONFIG, seed=5, split="test", index=7)
    again = describe_scene(CONFIG, seed=5, split="test", index=7)
    np.testing.assert_array_equal(first.image, again.image)
    assert first.captions == again.captions
    assert first.questions == again.questions
    assert first.answers == again.answers
    for changed in ({"seed": 6}, {"split": "train"}, {"index": 8}):
        other = describe_scene(
            CONFIG, **{"seed": 5, "split": "test", "index": 7} | changed
        )
        assert (other.image != first.image).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", scene_layout.SIZES)
def test_objects_are_drawn_where_the_scene_says(shape, size):
    radius = scene_layout._RADIUS[size] * 32
    thing = scene_layout.SceneObject("blue", shape, size, 0, 1, 47.0, 17.5, radius, 0.1)
    image = scene_layout.draw(scene_layout.Scene(64, 2, (240, 240, 240), (thing,)))
    rows, columns = np.nonzero((image != 240).any(axis=-1))
    assert abs((rows.min() + rows.max() + 1) / 2 - thing.y) < 0.3 * radius
    assert abs((columns.min() + columns.max() + 1) / 2 - thing.x) < 0.3 * radius
    assert 1.2 * radius < np.ptp(columns) + 1 <= 2 * radius + 2
    assert (image[17, 46] == COLORS["blue"]).all()


@pytest.mark.slow
def test_held_out_pairs_occur_in_the_compositional_split_only():
    rare = {f"{color} {shape}" for color, shape in CONFIG.held_out_pairs}
    seen_colors, seen_shapes = set(), set()
    for split in ORDINARY_SPLITS:
        for index in range(150):
            described = describe_scene(CONFIG, seed=0, split=split, index=index)
            seen_colors |= {o.color for o in described.scene.objects}
            seen_shapes |= {o.shape for o in described.scene.objects}
            assert not rare & {o.name for o in described.scene.objects}
            said = " | ".join(
                described.captions + [q.text for q in described.questions]
            )
            assert not any(name in said for name in rare)
    assert seen_colors == set(CONFIG.colors)
    assert seen_shapes == set(CONFIG.shapes)
    for index in range(150):
        described = describe_scene(CONFIG, seed=0, split=COMPOSITIONAL, index=index)
        here = rare & {o.name for o in described.scene.objects}
        assert here
        for caption in described.captions:
            assert all(name.split()[0] in caption for name in here)
        for question in described.questions:
            assert set(question.pairs) & set(CONFIG.held_out_pairs)


@pytest.mark.slow
def test_files_have_the_form_of_coco_and_vqav2(directory):
    ids = set()
    for split, count in (("train", 300), (COMPOSITIONAL, 40)):
        paths = scenes.scene_paths(directory, split)
        captions = read(paths.captions)
        assert set(captions) == {"info", "images", "annotations"}
        assert len(captions["images"]) == count
        assert len(captions["annotations"]) == 5 * count
        for image in captions["images"]:
            assert set(image) == {"id", "file_name", "width", "height"}
            ids.add(image["id"])
        assert set(captions["annotations"][0]) == {"id", "image_id", "caption"}
        with Image.open(paths.images / captions["images"][0]["file_name"]) as image:
            assert (image.format, image.size) == ("JPEG", (64, 64))
        questions = read(paths.questions)["questions"]
        answers = read(paths.answers)["annotations"]
        assert set(questions[0]) == {"image_id", "question_id", "question"}
        assert [q["question_id"] for q in questions] == [
            a["question_id"] for a in answers
        ]
        assert set(answers[0]) == {
            "image_id",
            "question_id",
            "question_type",
            "answer_type",
            "multiple_choice_answer",
            "answers",
        }
        assert {a["answer_type"] for a in answers} == {"yes/no", "number", "other"}
    assert len(ids) == 340


def test_jpeg_files_show_the_drawn_scene(directory):
    paths = scenes.scene_paths(directory, "train")
    first = read(paths.captions)["images"][0]["file_name"]
    drawn = describe_scene(CONFIG, seed=3, split="train", index=0).image
    with Image.open(paths.images / first) as image:
        difference = np.asarray(image).astype(int) - drawn
    assert np.abs(difference).mean() < 4


def test_true_answers_and_captions_get_full_marks(directory):
    paths = scenes.scene_paths(directory, "test")
    annotations = read(paths.answers)["annotations"]
    given = [[a["answer"] for a in entry["answers"]] for entry in annotations]
    true = [entry["multiple_choice_answer"] for entry in annotations]
    assert vqa_metrics.vqa_accuracy(given, true) == {"vqa_accuracy": 1.0}

    references = collections.defaultdict(list)
    for entry in read(paths.captions)["annotations"]:
        references[entry["image_id"]].append(entry["caption"])
    true = [
        scene_text.list_objects(
            describe_scene(CONFIG, seed=3, split="test", index=index).scene
        )
        for index in range(len(references))
    ]
    scored = text_metrics.cider_d_scores(list(references.values()), true)
    assert scored.mean > text_metrics.reference_agreement(list(references.values()))


def test_the_most_common_answer_to_a_question_is_mostly_wrong(directory):
    def pairs(split):
        paths = scenes.scene_paths(directory, split)
        texts = [q["question"] for q in read(paths.questions)["questions"]]
        answers = [
            a["multiple_choice_answer"] for a in read(paths.answers)["annotations"]
        ]
        return list(zip(texts, answers, strict=True))

    by_opening = collections.defaultdict(collections.Counter)
    for text, answer in pairs("train"):
        by_opening[" ".join(text.split()[:2])][answer] += 1
    guesses = [
        by_opening[" ".join(text.split()[:2])].most_common(1)[0][0] == answer
        for text, answer in pairs("test")
    ]
    assert np.mean(guesses) < 0.5


def test_complete_data_is_reused_and_other_data_refused(directory):
    sizes = {"train": 300, "validation": 10, "test": 100, COMPOSITIONAL: 40}
    before = scenes.scene_paths(directory, "train").captions.stat().st_mtime_ns
    scenes.write_scenes(directory, config=CONFIG, seed=3, sizes=sizes)
    after = scenes.scene_paths(directory, "train").captions.stat().st_mtime_ns
    assert after == before
    with pytest.raises(ValueError, match="another seed than asked"):
        scenes.write_scenes(directory, config=CONFIG, seed=4, sizes=sizes)
    harder = dataclasses.replace(CONFIG, max_objects=4)
    with pytest.raises(ValueError, match="another config than asked"):
        scenes.write_scenes(directory, config=harder, seed=3, sizes=sizes)


def test_foreign_directories_and_broken_manifests_are_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no scenes"):
        scenes.write_scenes(tmp_path, sizes={"train": 1})
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="malformed JSON"):
        scenes.write_scenes(tmp_path, sizes={"train": 1})
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_scenes(tmp_path / "data", sizes={"train": 2})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 32}, "at least 64"),
        ({"max_objects": 5}, "max_objects"),
        ({"min_objects": 4}, "min_objects"),
        ({"colors": ("red", "gren")}, "Did you mean 'green'"),
        ({"shapes": ("circle", "circle")}, "distinct"),
        ({"questions_per_image": 8}, "questions_per_image"),
        ({"max_objects": 1}, "relation"),
        ({"held_out_pairs": (("red", "star"),)}, "unknown name 'star'"),
        (
            {"held_out_pairs": tuple(("red", s) for s in CONFIG.shapes)},
            r"color \['red'\]",
        ),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_sizes_are_checked(tmp_path):
    with pytest.raises(ValueError, match="splits are train"):
        scenes.write_scenes(tmp_path, sizes={"dev": 3})
    with pytest.raises(ValueError, match="1 to"):
        scenes.write_scenes(tmp_path, sizes={"train": 0})
    plain = SceneConfig(held_out_pairs=())
    with pytest.raises(ValueError, match="needs held_out_pairs"):
        scenes.write_scenes(tmp_path, config=plain, sizes={COMPOSITIONAL: 1})
