"""Accuracy by VQAv2's types of answers and questions, from annotations to the table."""

import io
import json

import numpy as np
import pytest
import rich.console
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.vqa import register_vqa
from vit22b_transfer import UserError
from vit22b_transfer.data import sources
from vit22b_transfer.data.question_kinds import Answers, answers_and_predictions
from vit22b_transfer.evaluation import evaluate, question_slices, vqa_metrics

TASK = "question_slices"


def answers(text, **kinds):
    return Answers([text] * 10, kinds)


def test_each_type_has_its_accuracy_and_its_number_of_questions():
    targets = [
        answers("yes", answer_type="yes/no", question_type="is the"),
        answers("no", answer_type="yes/no", question_type="are they"),
        answers("2", answer_type="number", question_type="how many"),
    ]
    metrics = vqa_metrics.vqa(targets, ["yes", "yes", "2"])
    assert metrics == {
        "vqa_accuracy": pytest.approx(2 / 3),
        "vqa_accuracy/answer_type=yes/no": 0.5,
        "vqa_accuracy_count/answer_type=yes/no": 2,
        "vqa_accuracy/answer_type=number": 1,
        "vqa_accuracy_count/answer_type=number": 1,
        "vqa_accuracy/question_type=are they": 0,
        "vqa_accuracy_count/question_type=are they": 1,
        "vqa_accuracy/question_type=how many": 1,
        "vqa_accuracy_count/question_type=how many": 1,
        "vqa_accuracy/question_type=is the": 1,
        "vqa_accuracy_count/question_type=is the": 1,
        "exact_match": pytest.approx(2 / 3),
    }
    plain = [list(target) for target in targets]
    assert set(vqa_metrics.vqa(plain, ["a"] * 3)) == {"vqa_accuracy", "exact_match"}
    one = vqa_metrics.exact_match(targets, ["yes", "yes", "2"])
    assert one["exact_match/answer_type=yes/no"] == 0.5


def slices_of(metrics, kind):
    """(mean, count) of each slice of a kind."""
    mark = f"accuracy_count/{kind}="
    return {
        name.removeprefix(mark): (metrics[name.replace("_count", "", 1)], count)
        for name, count in metrics.items()
        if name.startswith(mark)
    }


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["yes/no", "number", "other", "", None]),
            st.one_of(st.text(max_size=70), st.integers(0, 300).map(str)),
            st.floats(0, 1),
        ),
        min_size=1,
        max_size=150,
    )
)
@settings(max_examples=40, deadline=None)
def test_the_slices_of_a_kind_add_up_to_the_whole(questions):
    targets, scores = [], []
    for answer_type, question_type, score in questions:
        kinds = {"answer_type": answer_type, "question_type": question_type}
        targets.append(answers("a", **{k: v for k, v in kinds.items() if v}))
        scores.append(score)
    metrics = question_slices.by_kind("accuracy", targets, scores)
    for kind in ("answer_type", "question_type"):
        slices = slices_of(metrics, kind)
        assert bool(slices) == any(kind in target.kinds for target in targets)
        if slices:
            assert sum(count for _, count in slices.values()) == len(scores)
            total = sum(mean * count for mean, count in slices.values())
            assert total == pytest.approx(sum(scores))


def test_types_of_strangers_are_escaped_cut_and_of_a_bounded_number():
    hostile = ["\x1b[2J", "[bold]x", "a" * 200, "[not said]", "\u202eno"]
    targets = [answers("a", question_type=text) for text in hostile]
    targets += [answers("a", question_type=f"rare {n}") for n in range(1000)]
    targets += [answers("a", question_type="common")] * 3 + [answers("a")]
    metrics = question_slices.by_kind("accuracy", targets, [1.0] * len(targets))
    slices = slices_of(metrics, "question_type")
    assert len(slices) == question_slices.MAX_SLICES + 1
    assert list(slices)[0] == "common"
    # 5 hostile ones, 1000 rare ones, a common one, one not said: 100 stand alone.
    assert list(slices)[-1] == "[907 rarer ones]"
    assert sum(count for _, count in slices.values()) == len(targets)
    first = question_slices.by_kind("accuracy", targets[:5] + targets[-1:], [1.0] * 6)
    shown = set(slices_of(first, "question_type"))
    assert all(text.isprintable() and len(text) <= 42 for text in shown)
    assert {"\\[bold]x", "\\[not said]", "[not said]", "\\x1b[2J"} <= shown
    screen = io.StringIO()
    console = rich.console.Console(file=screen, width=80)
    evaluate.print_scores({"a task": evaluate.Scores(first, 6, 0, 0)}, console=console)
    printed = screen.getvalue()
    assert "accuracy/question_type=\\[bold]x" in printed and "1.0000 of 1" in printed
    assert "_count" not in printed and "\x1b" not in printed


@pytest.fixture
def vqa_files(tmp_path):
    """Writes questions about one image; what is added to their annotations is given."""

    def write(*added):
        Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
        ids = [{"image_id": 1, "question_id": n} for n in range(len(added))]
        questions = [{**entry, "question": "is it?"} for entry in ids]
        given = {"answers": [{"answer": "yes"}] * 10}
        annotations = [
            {**entry, **given, **kinds} for entry, kinds in zip(ids, added, strict=True)
        ]
        for name, content in (("questions", questions), ("annotations", annotations)):
            (tmp_path / f"{name}.json").write_text(json.dumps({name: content}))
        paths = [tmp_path / f"{name}.json" for name in ("questions", "annotations")]
        return sources.VqaFiles(paths[0], tmp_path, paths[1], "{image_id}.jpg")

    return write


def test_types_travel_from_the_annotations_to_the_metrics(vqa_files, tmp_path):
    kinds = {"answer_type": "yes/no", "question_type": "is it"}
    source = sources.VqaSource({"test": vqa_files(kinds, {"question_type": None})})
    seqio.TaskRegistry.remove(TASK)
    task = register_vqa(TASK, source, vocabulary=seqio.ByteVocabulary())
    lengths = {"images": 8, "inputs": 32, "targets": 8}
    dataset = task.get_dataset(lengths, "test", shuffle=False)
    lines = []
    for index, example in enumerate(dataset.as_numpy_iterator()):
        # As SeqIO's evaluator, and so T5X's, calls it.
        arrays = {name: np.array(value) for name, value in example.items()}
        for form in (example, arrays):
            target = answers_and_predictions(b"yes", example=form, is_target=True)
            assert isinstance(target, Answers)
            assert target == ["yes"] * 10
            assert target.kinds == ({} if index else kinds)
        texts = {name: example[name].decode() for name in kinds}
        lines.append(
            {"index": index, "prediction": "yes", "score": 0.0, "target": "yes"}
            | {"references": ["yes"] * 10, "metadata": texts}
        )
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    metrics = evaluate.score_file(str(path), TASK).metrics
    assert metrics["vqa_accuracy_count/answer_type=yes/no"] == 1
    assert metrics["vqa_accuracy_count/answer_type=[not said]"] == 1
    lines[0]["metadata"]["answer_type"] = ["yes/no"]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(UserError, match=r"p\.jsonl: feature 'answer_type' .* no text"):
        evaluate.score_file(str(path), TASK)


def test_annotations_without_types_make_no_feature_and_no_slice(vqa_files):
    source = sources.VqaSource({"test": vqa_files({}, {"answer_type": " "})})
    (example, _) = source.get_dataset("test", shuffle=False).as_numpy_iterator()
    assert not {"answer_type", "question_type"} & set(example)


@pytest.mark.parametrize(
    "kinds, message",
    [
        ({"answer_type": 3}, "answer_type is no text"),
        ({"question_type": ["is"]}, "question_type is no text"),
        ({"question_type": "\ud83d"}, "question_type is no text"),
        ({"question_type": "x" * 10**6}, "question_type has 1000000 characters, 200"),
    ],
)
def test_types_that_are_none_are_bad_records(vqa_files, kinds, message):
    files = vqa_files(kinds, {})
    with pytest.raises(UserError, match=f"malformed entry: .*question 0 .*{message}"):
        sources.VqaSource({"test": files}).num_records("test")
    skipping = sources.VqaSource({"test": files}, on_bad_record="skip")
    assert skipping.num_records("test") == 1
    assert skipping.report()["test"]["malformed entry"] == 1
