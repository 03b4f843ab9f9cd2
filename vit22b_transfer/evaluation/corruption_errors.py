"""Mean corruption error: errors under the fifteen corruptions, beside AlexNet's."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

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
    columns = {name: np.array(own, np.float64)[:, None] for name, own in errors.items()}
    found = scores_of_images(columns, np.array([clean_error], np.float64))
    return {name: float(own[0]) for name, own in found.items()}


def scores_of_images(
    errors: Mapping[str, Float[np.ndarray, "severities images"]],
    clean_errors: Float[np.ndarray, " images"],
) -> dict[str, Float[np.ndarray, " images"]]:
    """`mean_corruption_error` of each image; that of all is the mean over images.

    errors: of each corruption, whether an image is wrong at each severity (0 or 1).

    Raises:
      UserError: as `mean_corruption_error`.
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
        own = errors[name]
        if len(own) != len(SEVERITIES) or not np.all((own >= 0) & (own <= 1)):
            raise UserError(
                f"{name} is to have an error in [0, 1] for each severity from 1 to 5, "
                f"but has {own[:8, 0].tolist()}."
            )
        mean = np.mean(own, axis=0)
        ratios[f"ce/{name}"] = 100 * mean / ALEXNET[name]
        more = mean - clean_errors
        relative.append(100 * more / (ALEXNET[name] - ALEXNET_CLEAN))
    if not np.all((clean_errors >= 0) & (clean_errors <= 1)):
        raise UserError(f"the clean error {clean_errors[:8]} is outside [0, 1].")
    return {
        "mce": np.mean(list(ratios.values()), axis=0),
        "relative_mce": np.mean(relative, axis=0),
        **ratios,
    }
