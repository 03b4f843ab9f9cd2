"""The standard layouts of data sets that the suite knows, by the names of their parts.

docs/suite.md describes each for those who lay them out; `surveys` finds them.
"""

import dataclasses
from collections.abc import Mapping

# How a part is told: a folder with a folder of images for each class; a folder with
# images anywhere in it; a folder with files anywhere in it; a file.
CLASSES, IMAGES, FILES, FILE = "class folders", "images", "files", "file"


@dataclasses.dataclass(frozen=True)
class Part:
    """A folder or file of a layout. paths: relative to the layout; the first is taken.

    optional: whether the layout is whole without it.
    """

    name: str
    paths: tuple[str, ...]
    kind: str
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """A standard layout.

    name: of the layout, and of its folder unless `folder` is given ("" is the folder of
      data sets itself). several: each folder in `folder` is such a layout. inside:
      another folder that its parts may lie in, all of them.
    """

    name: str
    parts: tuple[Part, ...]
    folder: str | None = None
    several: bool = False
    inside: str = ""

    @property
    def place(self) -> str:
        """Its folder, relative to the folder of data sets."""
        return self.name if self.folder is None else self.folder


@dataclasses.dataclass(frozen=True)
class Found:
    """A layout that is there.

    place: its folder. paths: absolute, by part. counts: images (or files) by part.
    digest: of the names, sizes and modification times of all of its files, and of the
    content of those that are parts themselves. notes: what is odd in it, by what it is,
    counted. classes: names of the folders of classes that have an image, by part.
    """

    name: str
    place: str
    paths: Mapping[str, str]
    counts: Mapping[str, int]
    digest: str
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The name of its layout: "few_shot" of "few_shot/pets"."""
        return self.name.partition("/")[0]

    @property
    def task(self) -> str:
        """The name of its task (`tasks.suite`), another one where its files are."""
        return f"suite_{self.name.replace('/', '_')}_{self.digest[:8]}"


def _labelled(
    name: str, folder: str | None = None, several: bool = False, inside: str = ""
) -> Layout:
    return Layout(
        name,
        (
            Part("train", ("train",), CLASSES),
            Part("validation", ("val", "validation"), CLASSES),
            Part("classes", ("classes.txt",), FILE),
            Part("names", ("class_names.txt",), FILE, optional=True),
        ),
        folder,
        several,
        inside,
    )


def _whole(name: str, kind: str, folder: str | None = None, several=False) -> Layout:
    """A layout of one part, which is its folder."""
    return Layout(name, (Part("test", (".",), kind),), folder, several)


def _pixels(name: str, labels: str) -> Layout:
    parts = [
        Part(f"{kind}_{split}", (f"{kind}/{split}",), IMAGES)
        for kind in ("images", labels)
        for split in ("training", "validation")
    ]
    if labels == "annotations":
        parts.append(Part("classes", ("classes.txt",), FILE))
    return Layout(name, tuple(parts))


def _video(name: str) -> Layout:
    return Layout(
        name,
        (
            Part("training", ("training",), CLASSES),
            Part("validation", ("validation",), CLASSES),
            Part("classes", ("classes.txt",), FILE),
        ),
    )


# By name. docs/suite.md has a line for each; a test compares.
LAYOUTS = {
    layout.name: layout
    for layout in (
        _labelled("imagenet", "", inside="imagenet"),
        Layout(
            "imagenet_real",
            (Part("judgements", ("imagenet_real.json",), FILE),),
            "",
            inside="imagenet",
        ),
        _whole("imagenet_v2", CLASSES),
        _whole("objectnet", CLASSES),
        _whole("imagenet_r", CLASSES),
        _whole("imagenet_a", CLASSES),
        _labelled("inaturalist_2017"),
        _labelled("inaturalist_2018"),
        _labelled("few_shot", several=True),
        _pixels("ade20k", "annotations"),
        _pixels("pascal_context", "annotations"),
        _pixels("pascal_voc", "annotations"),
        _pixels("waymo_depth", "depths"),
        _pixels("nyu_depth", "depths"),
        _pixels("kitti_depth", "depths"),
        _video("kinetics400"),
        _video("moments_in_time"),
        Layout(
            "celeba",
            (
                Part("images", ("images",), IMAGES),
                Part("table", ("attributes.csv",), FILE),
            ),
        ),
        Layout(
            "model_vs_human",
            (
                Part("stimuli", ("stimuli",), CLASSES),
                Part("humans", ("humans",), FILES, optional=True),
                Part("sixteen", ("sixteen.json",), FILE, optional=True),
            ),
        ),
        _whole("ood", IMAGES, several=True),
        _whole("bapps", FILES),
    )
}
# The part of each that holds images without labels, for tasks of these.
UNLABELLED = {
    "celeba": "images",
    "model_vs_human": "stimuli",
    "ood": "test",
    "bapps": "test",
}
