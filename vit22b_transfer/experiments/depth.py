"""Depth from one image by a head on a tower's patches (ViT-22B, section 4.4).

Each metric is of an image's valid pixels, at the size of its depth map; the number is
its mean over test images.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.data import paired_folders
from vit22b_transfer.evaluation import depth_metrics, intervals
from vit22b_transfer.experiments import dense_pictures, head_training
from vit22b_transfer.experiments.dense_runs import DenseProtocol, DenseRun
from vit22b_transfer.experiments.features import FeatureSource
from vit22b_transfer.experiments.outcomes import Measured
from vit22b_transfer.inference import windows
from vit22b_transfer.models import dense


@dataclasses.dataclass(frozen=True)
class DepthProtocol(DenseProtocol):
    """`DenseProtocol`, and what depths are.

    depths: the range in which they are learned and judged, and how a head says them.
    judged_part: as `part` of `depth_metrics.valid_pixels`.
    """

    depths: dense.Depth = dataclasses.field(kw_only=True)
    judged_part: Sequence[int] | None = None


def run_depth(
    protocol: DepthProtocol,
    *,
    source: FeatureSource,
    data: paired_folders.DepthFolder,
    output_dir: str,
) -> list[Measured]:
    """The `depth_metrics.METRICS` of a head; otherwise as `run_segmentation`.

    Test images without a valid pixel are left out and counted.

    Raises:
      UserError: if something does not fit together.
    """
    name, depths = "Depth", protocol.depths
    checked = DenseRun(
        name,
        protocol,
        depths,
        source,
        data,
        output_dir,
        no_label=0,
        first_steps=(dense.WARM_UP, dense.WARM_UP_STEPS),
    ).checked()
    _check_judged(data, checked.test_pairs, protocol)
    output_dir = checked.run.output_dir
    folder = head_training.pictures_of(output_dir, name, checked.directory)
    count = len(checked.test_pairs.pairs)
    drawn = dense_pictures.spread(count, protocol.pictures)
    by_image: dict[str, list[float]] = {name: [] for name in depth_metrics.METRICS}
    pictures, without = [], 0
    limits = (depths.least, depths.most)
    for number, image, labels, metres in checked.predicted(windows.values_at):
        valid = depth_metrics.valid_pixels(labels, *limits, protocol.judged_part)
        if not valid.any():
            without += 1
            continue
        scores = depth_metrics.image_scores(metres, labels, valid)
        for metric, score in scores.items():
            by_image[metric].append(score)
        if number in drawn:
            path = dense_pictures.picture_path(folder, number)
            shown = (0.0, float(labels[valid].max()))
            dense_pictures.draw_depths(path, image, metres, labels, shown)
            pictures.append(path)
    judged = count - without
    notes = dict(checked.left_out)
    if without:
        notes["test images without a valid depth, left out"] = without
    found = []
    for metric, values in by_image.items():
        sums = np.array(values)
        interval = intervals.bootstrap(sums, np.ones(judged, int))
        first = {"notes": notes, "pictures": pictures} if not found else {}
        found.append(
            Measured(
                metric,
                interval.value,
                (interval.low, interval.high),
                judged,
                interval_kind=f"bootstrap ({interval.method}), 95 %",
                **first,
            )
        )
    head_training.tell(found, output_dir, checked.facts)
    return found


def _check_judged(data, pairs, protocol):
    """Raises UserError, before hours of work, unless two test images can be judged."""
    depths, found = protocol.depths, 0
    for pair in pairs.pairs:
        _, labels = data.read(pair)
        valid = depth_metrics.valid_pixels(
            labels, depths.least, depths.most, protocol.judged_part
        )
        found += bool(valid.any())
        if found == 2:
            return
    raise UserError(
        f"{found} of {len(pairs.pairs)} test images have a pixel whose depth is above "
        f"{depths.least} and below {depths.most} metres; an interval needs two. Look "
        "at units_per_metre and at the range of depths."
    )
