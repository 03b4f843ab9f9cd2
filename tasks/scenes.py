"""Tasks on the drawn scenes in the directory $VIT22B_DATA_DIR.

`vit22b demo` draws them; `vit22b_transfer.demo.scenes.write_scenes` does it alone. The
`_compositional` tasks show color-shape pairs that the other splits never show.
"""

import seqio
import tensorflow as tf

from tasks.captioning import register_captioning
from tasks.classification import register_classification
from tasks.contrastive import register_pairs
from tasks.vqa import register_vqa
from vit22b_transfer.data import objectives
from vit22b_transfer.data.sources import (
    CaptionFiles,
    CocoCaptionsSource,
    VqaFiles,
    VqaSource,
)
from vit22b_transfer.demo import scene_layout, scenes
from vit22b_transfer.evaluation import label_metrics

DIRECTORY = "$VIT22B_DATA_DIR"
ORDINARY = ("train", "validation", "test")
# Of `scenes_labels`: what a caption names, as every caption names all of it.
CLASSES = (*scene_layout.COLORS, *scene_layout.SHAPES)


def _captions(split):
    paths = scenes.scene_paths(DIRECTORY, split)
    return CaptionFiles(paths.captions, paths.images)


def _questions(split):
    paths = scenes.scene_paths(DIRECTORY, split)
    return VqaFiles(paths.questions, paths.images, paths.answers, scenes.IMAGE_FILE)


@seqio.map_over_dataset
def _labelled(example):
    """The image and, in place of its caption, the classes that this names."""
    words = tf.strings.split(tf.strings.regex_replace(example["target"], "[,:]", ""))
    named = tf.reduce_any(words[:, None] == tf.constant(CLASSES)[None], axis=0)
    labels = tf.cast(tf.where(named)[:, 0], tf.int32)
    return {
        "image_path": example["image_path"],
        "image_id": example["image_id"],
        "labels": labels,
        "references": tf.gather(tf.constant(CLASSES), labels),
    }


register_captioning(
    "scenes_captioning", CocoCaptionsSource({s: _captions(s) for s in ORDINARY})
)
register_classification(
    "scenes_labels",
    CocoCaptionsSource({s: _captions(s) for s in ORDINARY}),
    metric_fns=(label_metrics.multi_label,),
    before=[_labelled],
)
register_pairs("scenes_pairs", CocoCaptionsSource({s: _captions(s) for s in ORDINARY}))
register_vqa("scenes_vqa", VqaSource({s: _questions(s) for s in ORDINARY}))
register_captioning(
    "scenes_captioning_compositional",
    CocoCaptionsSource({"test": _captions(scenes.COMPOSITIONAL)}),
)
register_vqa(
    "scenes_vqa_compositional",
    VqaSource({"test": _questions(scenes.COMPOSITIONAL)}),
)
seqio.MixtureRegistry.add(
    # An answer is a token or two, a caption a dozen: more questions even that out.
    "scenes_mixture",
    [("scenes_captioning", 1.0), ("scenes_vqa", 3.0)],
)
objectives.mixture(
    # Three objectives of one tower: gin_configs/recipes/scenes_mixed.gin.
    "scenes_mixed",
    [
        ("scenes_captioning", 1.0),
        ("scenes_vqa", 3.0),
        ("scenes_labels", 1.0),
        ("scenes_pairs", 3.0),
    ],
)
