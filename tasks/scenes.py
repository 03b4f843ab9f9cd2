"""Tasks on the drawn scenes in the directory $VIT22B_DATA_DIR.

`vit22b demo` draws them; `vit22b_transfer.demo.scenes.write_scenes` does it alone. The
`_compositional` tasks show color-shape pairs that the other splits never show.
"""

import seqio

from tasks.captioning import register_captioning
from tasks.vqa import register_vqa
from vit22b_transfer.data.sources import (
    CaptionFiles,
    CocoCaptionsSource,
    VqaFiles,
    VqaSource,
)
from vit22b_transfer.demo import scenes

DIRECTORY = "$VIT22B_DATA_DIR"
ORDINARY = ("train", "validation", "test")


def _captions(split):
    paths = scenes.scene_paths(DIRECTORY, split)
    return CaptionFiles(paths.captions, paths.images)


def _questions(split):
    paths = scenes.scene_paths(DIRECTORY, split)
    return VqaFiles(paths.questions, paths.images, paths.answers, scenes.IMAGE_FILE)


register_captioning(
    "scenes_captioning", CocoCaptionsSource({s: _captions(s) for s in ORDINARY})
)
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
