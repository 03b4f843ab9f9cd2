"""Metrics of pixels: tables by hand, other implementations, whole images by windows."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from tiny_runs import ONE_DEVICE
from torch_peers import torch

from vit22b_transfer import UserError
from vit22b_transfer.data import pixel_crops
from vit22b_transfer.data.placement import Placement
from vit22b_transfer.evaluation import depth_metrics, intervals, segmentation_metrics
from vit22b_transfer.inference import windows

rng = np.random.default_rng(0)

# Of class 0 three pixels are right and one is given 2; of class 1 one is right and one
# given 0; class 2 has no pixel; class 3 occurs nowhere; two pixels have no class.
LABELS = np.array([[0, 0, 0, 0], [1, 1, -1, -1]])
GIVEN = np.array([[0, 0, 0, 2], [1, 0, 1, 2]])


def test_the_scores_of_a_table_by_hand():
    matrix = segmentation_metrics.confusion(LABELS, GIVEN, 4)
    expected = [[3, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(matrix, expected)
    scores = segmentation_metrics.scores(segmentation_metrics.counts_of(matrix))
    # right / (true + given - right): 3 / 5, 1 / 2, 0 / 1, nothing
    np.testing.assert_allclose(scores.of_class, [0.6, 0.5, 0.0, np.nan])
    assert scores.mean == pytest.approx(1.1 / 3)
    assert scores.pixel_accuracy == pytest.approx(4 / 6)
    assert scores.mean_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert (scores.absent, scores.only_given) == (1, 1)


def test_the_mean_is_of_the_whole_set_as_scikit_learn_counts_it():
    labels, given = rng.integers(0, 5, (2, 3, 20, 20))
    labels[0, :4] = -1
    matrices = [
        segmentation_metrics.confusion(*pair, 6)  # one class occurs nowhere
        for pair in zip(labels, given, strict=True)
    ]
    by_image = np.stack([segmentation_metrics.counts_of(m) for m in matrices])
    scores = segmentation_metrics.scores(by_image.sum(axis=0))
    known = labels >= 0
    peer = sklearn.metrics.jaccard_score(labels[known], given[known], average=None)
    np.testing.assert_allclose(scores.of_class, [*peer, np.nan])
    found = segmentation_metrics.mean_interval(by_image, resamples=200)
    assert found.value == pytest.approx(peer.mean()) == pytest.approx(scores.mean)
    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    "labels, given, message",
    [
        (np.array([[4]]), np.array([[0]]), "a label is 4 to 4; 4 classes"),
        (np.array([[0]]), np.array([[-1]]), "a prediction is -1 to -1"),
    ],
)
def test_numbers_that_are_no_classes_are_refused(labels, given, message):
    with pytest.raises(UserError, match=message):
        segmentation_metrics.confusion(labels, given, 4)
    nothing = segmentation_metrics.confusion(np.array([[-1]]), np.array([[0]]), 4)
    with pytest.raises(UserError, match="no pixel of the masks has a class"):
        segmentation_metrics.scores(segmentation_metrics.counts_of(nothing))


def test_the_interval_of_a_number_made_of_sums_is_scipys():
    columns = rng.integers(1, 9, (12, 2)).astype(np.float64)

    def ratio(sums):
        return sums[..., 0] / sums[..., 1]

    found = intervals.bootstrap_of_sums(columns, ratio, resamples=999)
    right, number = columns.T
    same = intervals.bootstrap(right, number.astype(int), resamples=999)
    assert found[:4] == pytest.approx(same[:4]) and found.method == same.method
    peer = scipy.stats.bootstrap(
        tuple(columns.T),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="BCa",
        n_resamples=999,
        rng=np.random.default_rng(0),
    )
    interval = peer.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


# --- Depth ---


def test_the_depth_scores_of_a_table_by_hand():
    depths = np.array([[2.0, 4.0, 0.0], [1.0, 8.0, 90.0]], np.float32)
    said = np.array([[2.1, 5.0, 7.0], [2.0, 8.0, 1.0]], np.float32)
    valid = depth_metrics.valid_pixels(depths, 1e-3, 80.0)
    np.testing.assert_array_equal(valid, [[True, True, False], [True, True, False]])
    scores = depth_metrics.image_scores(said, depths, valid)
    assert scores == pytest.approx(
        {
            "mse": (0.01 + 1 + 1 + 0) / 4,
            "rmse": np.sqrt(2.01 / 4),
            "abs_rel": (0.05 + 0.25 + 1 + 0) / 4,
            "log10": (np.log10(1.05) + np.log10(1.25) + np.log10(2)) / 4,
            "delta_1.1": 0.5,
            "delta_1.25": 0.5,  # 5 / 4 is not below 1.25
            "delta_1.25^2": 0.75,
            "delta_1.25^3": 0.75,
        },
        rel=1e-5,
    )


def test_only_a_part_of_a_depth_map_is_judged_where_it_is_said():
    depths = np.full((4, 6), 3.0, np.float32)
    valid = depth_metrics.valid_pixels(depths, 0.0, 10.0, (1, 3, 2, 6))
    assert valid.sum() == 8 and valid[1:3, 2:].all()
    limits = depth_metrics.valid_pixels(depths, 3.0, 10.0)
    assert not limits.any()  # above the least, not at it
    assert not depth_metrics.valid_pixels(depths, 0.0, 3.0).any()
    with pytest.raises(UserError, match=r"\(45, 471, 41, 601\).* 4 rows and 6 columns"):
        depth_metrics.valid_pixels(depths, 0.0, 10.0, (45, 471, 41, 601))
    with pytest.raises(UserError, match="no pixel of the depth map is valid"):
        depth_metrics.image_scores(depths, depths, limits)
    with pytest.raises(UserError, match="not finite or not above 0"):
        depth_metrics.image_scores(depths * 0, depths, valid)


# --- Windows ---


def brightness(batch):
    """A model of two numbers a pixel, a function of the pixel alone."""
    red = np.asarray(batch)[..., :1].astype(np.float32)
    return np.concatenate([red, 255 - red], axis=-1)


@pytest.mark.parametrize("stride", [(8, 8), (5, 3)])
def test_windows_cover_every_pixel_and_average_what_they_say(stride):
    shapes = (8, 8), (8, 23), (19, 8)
    pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    window = windows.Windows((8, 8), stride)
    calls = []

    def predict(batch):
        calls.append(len(batch))
        return brightness(batch)

    maps = list(window.maps(iter(pictures), predict, Placement.on(ONE_DEVICE, 3)))
    for picture, found in zip(pictures, maps, strict=True):
        np.testing.assert_allclose(found[..., 0], picture[..., 0], rtol=1e-6)
    counts = [len(list(pixel_crops.windows(s, (8, 8), stride))) for s in shapes]
    assert calls == [3] * -(-sum(counts) // 3)


def test_a_pixel_in_two_windows_has_their_mean():
    picture = np.zeros((4, 6, 3), np.uint8)
    numbers = iter(range(10))

    def predict(batch):
        values = [next(numbers) for _ in batch]
        return np.ones((len(batch), 4, 4, 1), np.float32) * np.reshape(
            np.float32(values), (-1, 1, 1, 1)
        )

    (found,) = windows.Windows((4, 4), (2, 2)).maps(
        [picture], predict, Placement.on(ONE_DEVICE, 2)
    )
    np.testing.assert_allclose(found[0, :, 0], [0, 0, 0.5, 0.5, 1, 1])


def test_maps_are_resized_as_torch_does_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(windows, "_AT_A_TIME", 200)
    logits = rng.normal(size=(7, 9, 4)).astype(np.float32)
    for shape in ((15, 20), (7, 9), (4, 5)):
        resized = torch.nn.functional.interpolate(
            torch.tensor(logits).permute(2, 0, 1)[None],
            size=shape,
            mode="bilinear",
            align_corners=False,
        )[0].numpy()
        found = windows.values_at(logits[..., :1], shape)
        np.testing.assert_allclose(found, resized[0], atol=1e-5)
        classes = windows.classes_at(logits, shape)
        np.testing.assert_array_equal(classes, resized.argmax(axis=0))


@pytest.mark.parametrize("stride", [(0, 4), (4, 5)])
def test_windows_with_gaps_between_them_are_refused(stride):
    with pytest.raises(UserError, match="at least 1 and not more than the window"):
        windows.Windows((4, 4), stride)
