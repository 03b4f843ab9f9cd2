"""Depth: errors of metres, of each image over its valid pixels; then means over images.

That order is big_vision's and DINOv3's: an image of few valid pixels counts as much as
any other. A pixel is valid if its true depth is known and lies between two limits.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from vit22b_transfer import UserError

# Shares of pixels whose ratio of depths is below so much.
RATIOS = {
    "delta_1.1": 1.1,
    "delta_1.25": 1.25,
    "delta_1.25^2": 1.25**2,
    "delta_1.25^3": 1.25**3,
}
METRICS = ("mse", "rmse", "abs_rel", "log10", *RATIOS)


def valid_pixels(
    depths: Float[np.ndarray, "rows columns"],
    least: float,
    most: float,
    part: Sequence[int] | None = None,
) -> Bool[np.ndarray, "rows columns"]:
    """Where a depth, in metres, is above `least` and below `most`; 0 is unknown.

    part: (top, bottom, left, right) in pixels of what alone is judged; (45, 471, 41,
      601) is Eigen's crop of NYU's 480x640 pixels.

    Raises:
      UserError: if that part does not lie in the map.
    """
    valid = (depths > max(least, 0.0)) & (depths < most)
    if part is None:
        return valid
    top, bottom, left, right = part
    rows, columns = depths.shape
    if not (0 <= top < bottom <= rows and 0 <= left < right <= columns):
        raise UserError(
            f"the judged part {tuple(part)}, (top, bottom, left, right), does not lie "
            f"in a depth map of {rows} rows and {columns} columns. Leave it out, or "
            "give that of these maps."
        )
    inside = np.zeros_like(valid)
    inside[top:bottom, left:right] = True
    return valid & inside


def image_scores(
    predicted: Float[np.ndarray, "rows columns"],
    depths: Float[np.ndarray, "rows columns"],
    valid: Bool[np.ndarray, "rows columns"],
) -> dict[str, float]:
    """The `METRICS` of an image.

    mse (square metres), rmse (metres), abs_rel: mean of |error| / depth; log10: mean of
    the absolute difference of logarithms; delta_r: share of pixels where the larger of
    prediction / depth and depth / prediction is below r.

    Raises:
      UserError: if no pixel is valid, or a prediction there is not finite and above 0.
    """
    if not valid.any():
        raise UserError("no pixel of the depth map is valid, so it cannot be judged.")
    said = predicted[valid].astype(np.float64)
    true = depths[valid].astype(np.float64)
    if not (np.isfinite(said).all() and said.min() > 0):
        raise UserError(
            "a predicted depth is not finite or not above 0 metres; the head or its "
            "checkpoint is broken."
        )
    square = float(np.mean((said - true) ** 2))
    ratio = np.maximum(said / true, true / said)
    found = {
        "mse": square,
        "rmse": float(np.sqrt(square)),
        "abs_rel": float(np.mean(np.abs(said - true) / true)),
        "log10": float(np.mean(np.abs(np.log10(said / true)))),
    }
    return found | {name: float(np.mean(ratio < r)) for name, r in RATIOS.items()}
