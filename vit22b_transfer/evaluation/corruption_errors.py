"""Mean corruption error: errors under the fifteen corruptions, beside AlexNet's."""

from collections.abc import Mapping, Sequence

import numpy as np

from vit22b_transfer import UserError
from vit22b_transfer.evaluation.corruptions import NAMES, SEVERITIES

# AlexNet's error under each, the mean over severities, and without any: Hendrycks &
# Dietterich 2019, with the digits of AugMix's code (Hendrycks et al. 2020).
ALEXNET: Mapping[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
ALEXNET_CLEAN = 0.4348


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]], clean_error: float
) -> dict[str, float]:
    """`mce` and `relative_mce` in %, and `ce/NAME` of each corruption; AlexNet has 100.

    The error of a corruption is the mean over its severities over AlexNet's; relative,
    both less the error without corruption (arXiv 1903.12261). The mean is
    over all fifteen: with other corruptions, or fewer, it could not be compared.

    errors: for each corruption the errors of its five severities, in [0, 1].
    clean_error: of the same model without corruption, in [0, 1].

    Raises:
      UserError: if a corruption or severity is missing or added, or an error is outside
        [0, 1].
    """
    if set(errors) != set(NAMES):
        missing = [name for name in NAMES if name not in errors]
        added = [name for name in errors if name not in NAMES]
        raise UserError(
            f"the mean corruption error is over fifteen corruptions; missing: "
            f"{', '.join(missing) or 'none'}, not among them: "
            f"{', '.join(added) or 'none'}."
        )
    ratios, relative = {}, []
    for name in NAMES:
        own = np.asarray(errors[name], np.float64)
        if own.shape != (len(SEVERITIES),) or not np.all((own >= 0) & (own <= 1)):
            raise UserError(
                f"{name} is to have an error in [0, 1] for each severity from 1 to 5, "
                f"but has {list(errors[name])[:8]}."
            )
        ratios[f"ce/{name}"] = 100 * float(np.mean(own)) / ALEXNET[name]
        more = float(np.mean(own)) - clean_error
        relative.append(100 * more / (ALEXNET[name] - ALEXNET_CLEAN))
    if not 0 <= clean_error <= 1:
        raise UserError(f"the clean error {clean_error} is outside [0, 1].")
    return {
        "mce": float(np.mean(list(ratios.values()))),
        "relative_mce": float(np.mean(relative)),
        **ratios,
    }
