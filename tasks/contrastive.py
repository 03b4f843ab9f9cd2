"""Tasks of image-text pairs, whatever their data: retrieval, zero-shot classification.

An example is an image and one of its captions. A model that is trained on captions as
well reads the same task: these have its features. In a mixed run (`models.mixed`) they
are pairs and no captions.
"""

from collections.abc import Sequence

import seqio
import tensorflow as tf
from seqio.vocabularies import Vocabulary

from tasks.image_text import register
from vit22b_transfer.data import objectives, preprocessors
from vit22b_transfer.data.class_prompts import ClassPromptsSource
from vit22b_transfer.data.indexed_source import IndexedSource
from vit22b_transfer.evaluation import retrieval, zero_shot

TEMPLATES = ("a photo of a {}", "{}", "this is a {}", "a picture of the {}")
# In a mixed run these examples are pairs, though they have the features of captions.
PAIRS = objectives.marked("contrastive")


def register_pairs(
    name: str,
    source: seqio.DataSource,
    *,
    vocabulary: Vocabulary | None = None,
    options: preprocessors.ReadingOptions | None = None,
    lower_case: bool = True,
) -> seqio.Task:
    """A task of pairs, scored by retrieval within the split.

    lower_case: captions are lower-cased, as SigLIP's tokenizers have them.
    """
    return register(
        name,
        source,
        prompt="",
        vocabulary=vocabulary,
        options=options,
        before=[*([_lower_case] if lower_case else []), PAIRS],
        postprocess_fn=retrieval.image_id,
        metric_fns=(retrieval.metrics,),
    )


def register_zero_shot(
    name: str,
    source: IndexedSource,
    class_names: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    vocabulary: Vocabulary | None = None,
    options: preprocessors.ReadingOptions | None = None,
) -> seqio.Task:
    """A task of images whose captions are class names, to be scored, not learned.

    Behind the images stand the classes' prompts; names and templates are cleaned.
    """
    return register(
        name,
        ClassPromptsSource(source, class_names, templates),
        prompt="",
        vocabulary=vocabulary,
        options=options,
        before=[PAIRS],
        postprocess_fn=zero_shot.class_of,
        metric_fns=(zero_shot.metrics,),
    )


@seqio.map_over_dataset
def _lower_case(example):
    target = tf.strings.lower(example["target"], encoding="utf-8")
    return {**example, "target": target}
