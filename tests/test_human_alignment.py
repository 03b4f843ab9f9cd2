"""Models beside humans: files of responses, decisions, and measures counted by hand.

On the 85,120 published human responses these functions give shape bias 0.9587,
accuracy 0.7228 and error consistency 0.4312; printed are 0.96, 0.72 and 0.43.
"""

import dataclasses

import numpy as np
import pytest
import sklearn.metrics

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import human_alignment, human_responses, sixteen_classes
from vit22b_transfer.evaluation.human_responses import Responses

HEADER = "subj,Session,trial,rt,object_response,category,condition,imagename"


def test_indices_are_those_of_the_benchmark():
    counts = {name: len(own) for name, own in sixteen_classes.IMAGENET.items()}
    assert counts == {
        **dict.fromkeys(("airplane", "knife", "oven"), 1),
        **dict.fromkeys(("bicycle", "elephant", "keyboard"), 2),
        **dict.fromkeys(("car", "clock"), 3),
        **{"bear": 4, "chair": 4, "boat": 5, "cat": 6, "bottle": 7, "truck": 8},
        **{"bird": 49, "dog": 109},
    }
    every = [n for own in sixteen_classes.IMAGENET.values() for n in own]
    assert len(set(every)) == len(every) == 207 and sum(every) == 55426
    assert list(counts) == sorted(counts)


def test_a_decision_is_the_largest_mean_and_the_later_of_equal_ones():
    shares = np.zeros((3, 1000))
    shares[0, [404, 151]] = 0.1, 0.9  # One of 109 dogs: their mean is less.
    shares[1, [281, 282, 404]] = 0.4, 0.4, 0.2  # The sum of cats is more.
    shares[2, [499, 766]] = 0.5  # knife, oven
    found = sixteen_classes.decisions(shares)
    assert found == ("airplane", "airplane", "oven")
    own = {"cat": [0], "dog": [1, 2]}
    found = sixteen_classes.decisions(np.array([[0.3, 0.5, 0.2], [0.4, 0.3, 0.3]]), own)
    assert found == ("dog", "cat")
    with pytest.raises(UserError, match="'dog' stands for .* classes 0 to 1"):
        sixteen_classes.decisions(np.full((1, 2), 0.5), own)


def test_files_are_read_in_any_case_and_order_and_written_again(tmp_path):
    first = tmp_path / "contrast_subject-01_session_1.csv"
    first.write_text(
        f"{HEADER}\n"
        "subject-01,1,1,0.8,oven,oven,c30,0001_cop_s01_c30_oven_10_n03041632_7380.png\n"
        "subject-01,1,2,NaN,na,dog,c30,0002_cop_s01_c30_dog_10_n02085620_1.png\n"
    )
    second = tmp_path / "other.csv"
    second.write_bytes(
        b"\xef\xbb\xbfImageName,Condition,Category,Object_Response,Subj\r\n"
        b'"a_b.png",c15,Cat,CAT,me\r\n\r\n'
    )
    found = human_responses.read([first, second])
    assert found.observers == ("subject-01", "subject-01", "me")
    assert found.answers == ("oven", "na", "cat")
    assert found.correct() == (True, False, True) and found.unanswered() == 1
    ids = [human_responses.image_id(image) for image in found.images]
    assert ids == ["n03041632_7380.png", "n02085620_1.png", "b.png"]
    written = tmp_path / "written.csv"
    human_responses.write(written, found)
    assert human_responses.read([written]) == found
    line = (
        "subject-01,1,1,NaN,oven,oven,c30,0001_cop_s01_c30_oven_10_n03041632_7380.png"
    )
    assert written.read_text().splitlines()[:2] == [HEADER.lower(), line]
    # `0001_...bear_00_bear1.png` and `bear1.png` are one picture.
    assert human_responses.image_id("bear1.png") == "bear1.png"


def test_a_picture_of_the_benchmark_says_condition_and_class():
    name = "0001_eid_s01_64-3-10_car_10_n04285008_8113.png"
    assert human_responses.stimulus(name) == ("64-3-10", "car")
    for other in ("dog10-bird2.png", "0001_ske_s01_0_tiger_00_a.png"):
        with pytest.raises(UserError, match="does not say condition and class"):
            human_responses.stimulus(other)


def test_conditions_are_one_however_they_are_written():
    key = human_responses.condition_key
    for written, said in (
        ("0.00", "0.0"),
        ("3", "3.0"),
        ("inf", "inf"),
        ("true", "True"),
        ("0", "0.0"),
    ):
        assert key(written) == key(said)
    assert key("1-10-10") != key("1-3-10") and key("0.55") != key("0.45")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        (HEADER, "a header alone"),
        ("subj,category\nme,cat\n", "line 1: the header is to have"),
        (HEADER.replace("rt", "trial") + "\n" + "x," * 7 + "x\n", "once, but has"),
        (f"{HEADER}\nme,1,1,1,cat,cat,0\n", "line 2: 7 fields, but the header has 8"),
        (f"{HEADER}\nme,1,1,1,cat,tiger,0,a.png\n", "'tiger' is none of the classes"),
        (f"{HEADER}\nme,1,1,1,\x1b[2J,cat,0,a.png\n", r"'\\\\x1b\[2j' is none"),
        (f"{HEADER}\n,1,1,1,cat,cat,0,a.png\n", "the observer or the picture is empty"),
        (f"{HEADER}\nme,1,1,1,cat,cat,0,{'a' * 400}\n", "a field of 400 characters"),
        (f'{HEADER}\n"me,1,1,1,cat,cat,0,a.png\n', "not closed"),
    ],
)
def test_a_file_that_is_no_table_of_responses_is_refused(tmp_path, text, message):
    path = tmp_path / "file.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        human_responses.read([path])


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "huge.csv", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="1099511627776 bytes, more than"):
        human_responses.read([tmp_path / "huge.csv"])


def test_consistency_is_cohens_kappa():
    a = np.array([1, 1, 0, 1, 0, 0, 1, 1, 0, 1], bool)
    b = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0, 0], bool)
    found = human_alignment.consistency(a, b)
    assert found == pytest.approx((0.7, 0.5, 0.4))
    assert found.error == pytest.approx(sklearn.metrics.cohen_kappa_score(a, b))
    ones = np.ones(3, bool)
    assert human_alignment.consistency(ones, ones) == (1, 1, 1)
    assert human_alignment.consistency(ones, ~ones) == (0, 0, 0)


def trials(observer, rows, condition="0"):
    """Responses of one observer from `category answer picture` rows."""
    columns = zip(*(row.split() for row in rows), strict=True)
    categories, answers, images = columns
    return Responses(
        (observer,) * len(rows), answers, categories, (condition,) * len(rows), images
    )


CUES = [
    "cat cat 1_s_cat1-dog2.png",
    "cat dog 2_s_cat3-dog10.png",
    "cat na 3_s_cat2-car1.png",
    "cat cat 4_s_cat2-cat1.png",
    "dog dog 5_s_dog1-car3.png",
    "dog dog 6_s_dog1-cat3.png",
    "dog bird 7_s_dog2-cat3.png",
]


def test_shape_bias_is_over_the_answers_for_one_of_two_cues():
    cues = trials("me", CUES)
    assert human_alignment.shape_bias(cues) == (3, 1, 2, 0.75)
    found = human_alignment.shape_bias_by_category(cues)
    assert found == {"cat": (1, 1, 1, 0.5), "dog": (2, 0, 1, 1.0)}
    nothing = human_alignment.shape_bias(trials("me", CUES[2:4]))
    assert nothing[:3] == (0, 0, 1) and np.isnan(nothing.bias)


def noisy(observer, right, order=1):
    """Two conditions that count and one that does not, with pictures of one set."""
    result = Responses()
    for condition, marks in right.items():
        rows = [
            f"cat {'cat' if mark == '1' else 'dog'} {observer}_s_cat_{number}.png"
            for number, mark in enumerate(marks)
        ]
        result = result.joined(trials(observer, rows[::order], condition))
    return result


def test_averages_are_over_conditions_then_people_then_data_sets():
    model = noisy("net", {"0.00": "0000", "0.1": "1100", "0.35": "111000"})
    ann = noisy("ann", {"0.0": "1111", "0.10": "1110", "0.35": "111000"}, order=-1)
    bob = noisy("bob", {"0.0": "1111", "0.10": "0011", "0.35": "000111"}, order=-1)
    found = human_alignment.compared(model, ann, "uniform-noise")
    # 0.1: accuracies 1/2 and 3/4, 3 of 4 alike, expected 1/2; 0.35: all alike.
    assert found == pytest.approx(
        {
            "accuracy_difference": (1 / 16 + 0) / 2,
            "observed_consistency": (3 / 4 + 1) / 2,
            "error_consistency": (1 / 2 + 1) / 2,
        }
    )
    people = {"uniform-noise": ann.joined(bob), "cue-conflict": trials("ann", CUES)}
    models = {"uniform-noise": model, "cue-conflict": trials("net", CUES)}
    total = human_alignment.alignment(models, people)
    assert total == pytest.approx(
        {
            "accuracy_difference": (1 / 32 + 0) / 2 / 2,
            "observed_consistency": ((7 / 8 + 0) / 2 + 1) / 2,
            "error_consistency": ((3 / 4 - 1) / 2 + 1) / 2,
            "ood_accuracy": (5 / 10 + 4 / 7) / 2,
            "shape_bias": 0.75,
        }
    )
    alone = human_alignment.humans_alone({"uniform-noise": ann.joined(bob)})
    assert alone["error_consistency"] == pytest.approx((-1 / 2 - 1) / 2)
    assert alone["ood_accuracy"] == pytest.approx(11 / 20)
    assert human_alignment.kept(model, "uniform-noise")[1] == 4


def test_conditions_of_a_set_without_excluded_ones_are_not_told_apart():
    people, model = trials("ann", CUES, "0"), trials("net", CUES, "NaN")
    found = human_alignment.compared(model, people, "cue-conflict")
    assert found["observed_consistency"] == 1


def test_ranks_are_means_over_the_three_measures():
    rows = [(0.02, 0.7, 0.3), (0.01, 0.7, 0.2), (0.03, 0.6, 0.1)]
    results = [dict(zip(human_alignment.MEASURES, row, strict=True)) for row in rows]
    found = human_alignment.mean_ranks(results)
    assert found == pytest.approx([(2 + 1.5 + 1) / 3, (1 + 1.5 + 2) / 3, 3])


MODEL = noisy("net", {"0.1": "1100"})


@pytest.mark.parametrize(
    "people, data_set, message",
    [
        (MODEL, "uniform_noise", "the nearest is 'uniform-noise'"),
        (noisy("a", {"0.2": "1100"}), "uniform-noise", "other conditions"),
        (noisy("a", {"0.1": "110"}), "uniform-noise", "1 pictures .* such as '3.png'"),
        (MODEL.joined(MODEL), "uniform-noise", "'0.png' twice"),
        (MODEL.joined(noisy("a", {"0.1": "1"})), "uniform-noise", "2 observers"),
        (noisy("a", {"0.9": "11"}), "uniform-noise", "none of the 2 trials"),
    ],
)
def test_trials_that_are_not_the_same_are_refused(people, data_set, message):
    with pytest.raises(UserError, match=message):
        human_alignment.compared(MODEL, people, data_set)


def test_responses_have_equal_columns():
    fields = [field.name for field in dataclasses.fields(Responses)]
    kept = trials("me", CUES).where(n % 2 for n in range(7))
    assert {len(getattr(kept, name)) for name in fields} == {3}
