"""T5's buckets of relative positions (Raffel et al. 2020, section 2.1)."""

import numpy as np
from jaxtyping import Int


def buckets(
    query_length: int,
    key_length: int,
    *,
    count: int,
    max_distance: int,
    bidirectional: bool,
) -> Int[np.ndarray, "queries keys"]:
    """Bucket of each (query, key) pair: exact when near, logarithmic when far.

    Bidirectional, half of them are for keys behind the query; else those are all 0.
    """
    distance = np.arange(key_length)[None, :] - np.arange(query_length)[:, None]
    buckets, num_buckets = np.zeros_like(distance), count
    if bidirectional:
        num_buckets //= 2
        buckets += (distance > 0) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = num_buckets // 2
    # float32 as in T5: float64 puts some far distances into the next bucket
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    far = exact + (
        np.log(ratio)
        / np.log(np.float32(max_distance / exact))
        * np.float32(num_buckets - exact)
    ).astype(np.int64)
    far = np.minimum(far, num_buckets - 1)
    return buckets + np.where(distance < exact, distance, far)
