"""Zero-shot classification: the class whose texts are nearest to an image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.data.class_prompts import PROMPT

AT = (1, 5)


def class_embeddings(
    texts: Float[np.ndarray, "prompts embed"],
    classes: Int[np.ndarray, " prompts"],
    count: int,
) -> Float[np.ndarray, "classes embed"]:
    """For each class the mean of the embeddings of its prompts, of length one.

    classes: of each prompt, from 0 to `count` - 1; each class has at least one.
    """
    sums = np.zeros((count, texts.shape[1]), np.float64)
    np.add.at(sums, classes, texts)
    means = sums / np.bincount(classes, minlength=count)[:, None]
    return means / (np.linalg.norm(means, axis=1, keepdims=True) + 1e-8)


def accuracy(
    images: Float[np.ndarray, "images embed"],
    labels: Int[np.ndarray, " images"],
    classes: Float[np.ndarray, "classes embed"],
) -> dict[str, float]:
    """`top1` and `top5` in %: whether the right class is among the nearest ones.

    Of equally near classes the first stands first. With fewer than six classes there
    is no top5.
    """
    order = np.argsort(-(images @ classes.T), axis=1, kind="stable")
    right = order == labels[:, None]
    return {
        f"top{k}": 100.0 * float(np.mean(right[:, :k].any(axis=1)))
        for k in AT
        if k == 1 or k < len(classes)
    }


def metrics(
    targets: Sequence[tuple[str, bool]],
    predictions: Sequence[Any],
    aux_values: Mapping[str, Any],
) -> dict[str, float]:
    """`accuracy` of a split that `data.class_prompts` made, and its `classes`.

    targets: (class name, whether the row is a prompt) of each example.
    predictions: embeddings of the images, unless these are in aux_values, as
      `image_embeddings`; aux_values: `text_embeddings`.

    Raises:
      UserError: for a split without prompts, or without images.
    """
    is_prompt = np.array([prompt for _, prompt in targets], bool)
    names = [name for name, _ in targets]
    known = list(dict.fromkeys(np.array(names, object)[is_prompt]))
    if len(known) < 2 or all(is_prompt):
        raise UserError(
            f"{len(known)} classes with prompts and {int(np.sum(~is_prompt))} images: "
            "zero-shot classification needs two classes and an image. The task's "
            "source must be a data.class_prompts.ClassPromptsSource."
        )
    place = {name: i for i, name in enumerate(known)}
    labels = np.array([place[name] for name in names])
    texts = np.asarray(aux_values["text_embeddings"])[is_prompt]
    classes = class_embeddings(texts, labels[is_prompt], len(known))
    # Predictions are token ids to SeqIO's own evaluator, and so no embeddings there.
    found = np.asarray(aux_values.get("image_embeddings", predictions), np.float32)
    images = found[~is_prompt]
    found = accuracy(images, labels[~is_prompt], classes)
    return found | {"classes": float(len(known))}


def class_of(
    prediction: Any,
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
) -> Any:
    """(Class name, whether the row is a prompt) for a target, else the embedding.

    The `postprocess_fn` of zero-shot tasks.
    """
    if not is_target:
        return prediction
    assert example is not None
    (name,) = example["references"]
    question = example["question_id"]
    return _text(name), _text(question) == PROMPT


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
