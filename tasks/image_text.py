"""How a task of images and texts is registered, whatever its data."""

from collections.abc import Callable, Sequence

import seqio
from seqio.vocabularies import Vocabulary

from vit22b_transfer.data import preprocessors, vocabularies


def register(
    name: str,
    source: seqio.DataSource,
    *,
    prompt: str,
    metric_fns: Sequence[Callable],
    vocabulary: Vocabulary | None = None,
    options: preprocessors.ReadingOptions | None = None,
    before: Sequence[Callable] = (),
    postprocess_fn: Callable = preprocessors.references_and_predictions,
    several_images: bool = False,
) -> seqio.Task:
    """The registered task.

    `source` yields `image_path` or `image`, `target`, and if known `references` and
    `image_id`, as those of `vit22b_transfer.data.sources` do; for a `prompt` with
    "{question}" also `question` and, if known, `question_id`. Without `vocabulary` the
    one that $VIT22B_VOCABULARY names is used, or bytes. The preprocessors `before` come
    first; a source with other feature names needs `seqio.preprocessors.rekey` there.

    `postprocess_fn(text, example=..., is_target=...)` makes what metric functions get:
    by default the references for a target, the stripped text for a prediction. Another
    one lets a metric see the whole example. With `several_images` the source yields
    `image_paths`, such as `vit22b_transfer.data.image_sets`.
    """
    if vocabulary is None:
        vocabulary = vocabularies.from_environment()
    return seqio.TaskRegistry.add(
        name,
        # SeqIO's DataSource does not satisfy its own protocol to the letter.
        source=source,  # pyright: ignore[reportArgumentType]
        preprocessors=[
            *before,
            *preprocessors.image_text_preprocessors(prompt, options),
        ],
        output_features=preprocessors.image_text_features(
            vocabulary, several_images=several_images
        ),
        postprocess_fn=postprocess_fn,
        metric_fns=metric_fns,
        shuffle_buffer_size=preprocessors.shuffle_buffer_size(source),
    )
