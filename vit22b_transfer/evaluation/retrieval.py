"""Retrieval of image-text pairs: how often what belongs together is found nearest.

The definition is that of big_vision's evaluators: texts of an image are all right for
it, a text has one right image; recall@k is the share of queries with a right answer
among the k nearest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vit22b_transfer import UserError

AT = (1, 5, 10)
# Queries whose distances are in memory at a time.
_AT_A_TIME = 1024


def first_right_ranks(
    queries: Float[np.ndarray, "queries embed"],
    candidates: Float[np.ndarray, "candidates embed"],
    query_ids: Int[np.ndarray, " queries"],
    candidate_ids: Int[np.ndarray, " candidates"],
) -> Int[np.ndarray, " queries"]:
    """For each query the place, from 0, of the nearest candidate with its id.

    Nearest by dot product; of equally near ones the first stands first. At least one
    candidate must have each id.
    """
    ranks = []
    for start in range(0, len(queries), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        distances = -(queries[part] @ candidates.T)
        order = np.argsort(distances, axis=1, kind="stable")
        right = candidate_ids[order] == query_ids[part, None]
        ranks.append(np.argmax(right, axis=1))
    return np.concatenate(ranks)


def recall(
    images: Float[np.ndarray, "pairs embed"],
    texts: Float[np.ndarray, "pairs embed"],
    image_ids: Sequence[str],
) -> dict[str, float]:
    """`image_to_text_recall@k` and `text_to_image_recall@k` for k of 1, 5, 10, in %.

    Row i is a pair; rows with one image id are one image with several texts, and its
    first row is taken for the image. A k above the number of candidates is left out.

    Raises:
      UserError: without any pair, or if images and texts are not equally many.
    """
    if not len(images) == len(texts) == len(image_ids) or not len(images):
        raise UserError(
            f"retrieval needs as many images as texts, at least one pair, but got "
            f"{len(images)} images, {len(texts)} texts and {len(image_ids)} ids."
        )
    places: dict[str, int] = {}
    ids = np.array([places.setdefault(name, len(places)) for name in image_ids])
    _, first = np.unique(ids, return_index=True)
    own = np.arange(len(first))
    results = {}
    for name, ranks, candidates in (
        ("image_to_text", first_right_ranks(images[first], texts, own, ids), len(ids)),
        ("text_to_image", first_right_ranks(texts, images[first], ids, own), len(own)),
    ):
        for k in AT:
            if k <= candidates:
                results[f"{name}_recall@{k}"] = 100.0 * float(np.mean(ranks < k))
    return results


def metrics(
    targets: Sequence[str],
    predictions: Sequence[Any],
    aux_values: Mapping[str, Any],
) -> dict[str, float]:
    """`recall` of a split's predictions, for the `metric_fns` of a task.

    targets: the image id of each example; "" of one that has no text.
    predictions: embeddings of the images, unless these are in aux_values, as
      `image_embeddings`; aux_values: `text_embeddings`.

    Raises:
      UserError: for an example without text.
    """
    if empty := sum(not target for target in targets):
        raise UserError(
            f"{empty} of {len(targets)} examples have no text to find. Leave them out, "
            "or choose a split with captions."
        )
    # Predictions are token ids to SeqIO's own evaluator, and so no embeddings there.
    images = np.asarray(aux_values.get("image_embeddings", predictions), np.float32)
    return recall(images, np.asarray(aux_values["text_embeddings"]), targets)


def image_id(
    prediction: Any,
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
) -> Any:
    """The example's image id for a target, the embedding as it is otherwise.

    The `postprocess_fn` of tasks of image-text pairs; `prediction` of a target is its
    text, and without one the id is "".
    """
    if not is_target:
        return prediction
    assert example is not None
    name = example["image_id"]
    name = name.decode() if isinstance(name, bytes) else str(name)
    return name if prediction else ""
