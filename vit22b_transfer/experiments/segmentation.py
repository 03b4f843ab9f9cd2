"""Segmentation by a head on a tower's patches (ViT-22B, section 4.3; rows of ADE20k).

A test image is cut into windows, whose logits are averaged, resized bilinearly to the
size of its mask and judged there. The mean intersection over union is of the whole set.
"""

import numpy as np

from vit22b_transfer.data import paired_folders
from vit22b_transfer.evaluation import intervals, segmentation_metrics
from vit22b_transfer.experiments import dense_pictures, head_training
from vit22b_transfer.experiments.dense_runs import DenseProtocol, DenseRun
from vit22b_transfer.experiments.features import FeatureSource
from vit22b_transfer.experiments.outcomes import Measured
from vit22b_transfer.inference import windows
from vit22b_transfer.models import dense

METRIC = "mean_iou"


def run_segmentation(
    protocol: DenseProtocol,
    *,
    source: FeatureSource,
    data: paired_folders.SegmentationFolder,
    output_dir: str,
) -> list[Measured]:
    """Mean intersection over union, and the share of right pixels, of a head.

    source: the tower; its image size is that of crops and windows, its batch size is
    that of windows. The head is learned from the training split, or read if it has
    been; it goes on where it was stopped. Prints protocol and numbers, with 95 %
    intervals over test images, appends a JSON line for each to
    `output_dir/probes.jsonl`, and draws pictures of some images.

    Raises:
      UserError: if something does not fit together.
    """
    names = data.class_names()
    count = len(names)
    name = "Segmentation"
    checked = DenseRun(
        name,
        protocol,
        dense.Segmentation(count),
        source,
        data,
        output_dir,
        no_label=dense.NO_CLASS,
    ).checked()
    output_dir = checked.run.output_dir
    notes = dict(checked.left_out)
    for split, pairs in ((data.train, checked.used), (data.test, checked.test_pairs)):
        if missing := paired_folders.tell_missing_classes(pairs, names, split):
            notes[f"{split}: classes in no mask"] = missing
    folder = head_training.pictures_of(output_dir, name, checked.directory)
    images = len(checked.test_pairs.pairs)
    drawn = dense_pictures.spread(images, protocol.pictures)
    counts, pictures = [], []
    for number, image, labels, given in checked.predicted(windows.classes_at):
        matrix = segmentation_metrics.confusion(labels, given, count)
        counts.append(segmentation_metrics.counts_of(matrix))
        if number in drawn:
            path = dense_pictures.picture_path(folder, number)
            dense_pictures.draw_classes(path, image, given, labels, names)
            pictures.append(path)
    by_image = np.stack(counts)
    found = _measured(by_image, names, notes, pictures)
    head_training.tell(found, output_dir, {**checked.facts, "classes": count})
    return found


def _measured(by_image, names, notes, pictures):
    scores = segmentation_metrics.scores(by_image.sum(axis=0))
    mean = segmentation_metrics.mean_interval(by_image)
    right, true, _ = by_image.sum(axis=2).T
    labelled = true > 0
    notes = dict(notes)
    if empty := int(np.sum(~labelled)):
        notes["test images without a labelled pixel"] = empty
    for text, number in (
        ("classes that occur nowhere, left out of the mean", scores.absent),
        ("classes in no test mask but predicted, 0 in the mean", scores.only_given),
    ):
        if number:
            notes[text] = number
    of_class = {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(names, scores.of_class, strict=True)
    }
    settings = {"iou": of_class, "mean_accuracy": scores.mean_accuracy}
    found = [
        Measured(
            METRIC,
            mean.value,
            (mean.low, mean.high),
            len(by_image),
            settings,
            notes,
            pictures,
            f"bootstrap ({mean.method}), 95 %",
        )
    ]
    if np.sum(labelled) > 1:
        share = intervals.bootstrap(right[labelled].astype(float), true[labelled])
        found.append(
            Measured(
                "pixel_accuracy",
                share.value,
                (share.low, share.high),
                int(np.sum(labelled)),
                interval_kind=f"bootstrap ({share.method}), 95 %",
            )
        )
    return found
