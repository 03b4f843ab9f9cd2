"""What runs the rows of the suite: recipes, what is set of them, numbers of results."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from vit22b_transfer.experiments import suite_findings
from vit22b_transfer.experiments.suite_results import Finding

_ROOM = "vit22b_transfer.experiments."
PROBE = f"{_ROOM}probe.run_probe"
LINEAR, ZERO_SHOT = "linear", "zero_shot"


@dataclasses.dataclass(frozen=True)
class Part:
    """What runs a row, or a part of it, on one layout.

    name: of its numbers, beside the paper's. layouts: all that it needs; of
    "few_shot/*" each set of that folder is a part of its own, its name in place of "*".
    recipe: a gin file. finding: makes numbers of what the function returns. settings:
    macros by name, as gin writes values; {task} is the name of the first layout's task,
    {PART} the path of a part of any of them, None for one that is not there, and what
    else `commands.suite` knows. function: what the recipe configures.
    head: whether a head of `HEADS` is asked, which is learned at need, and whose file
    is then the macro HEAD. texts: whether the tower must be one of a model of
    image-text pairs. needs: optional parts of the first layout that it needs.
    least_side: of the pictures that the tower is shown, in pixels.
    """

    name: str
    layouts: tuple[str, ...]
    recipe: str
    finding: Callable[..., Finding]
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    function: str = PROBE
    head: str = ""
    texts: bool = False
    needs: tuple[str, ...] = ()
    least_side: int = 0

    def root(self) -> Callable[..., Any]:
        """The function, imported now."""
        module, _, name = self.function.rpartition(".")
        return getattr(importlib.import_module(module), name)


_TASK = {"PROBE_TASK": "'{task}'"}
_PROBES, _MEASURES = "gin_configs/probes/", "gin_configs/measures/"
# Metrics of depth by the paper's names.
_DEPTH = {
    "mse": "MSE",
    "abs_rel": "AbsRel",
    "delta_1.1": "delta < 1.1",
    "delta_1.25": "delta < 1.25",
    "delta_1.25^2": "delta < 1.25^2",
}


def linear(name: str, layout: str) -> Part:
    """One linear layer by SGD."""
    recipe = f"{_PROBES}linear.gin"
    return Part(name, (layout,), recipe, suite_findings.accuracy, _TASK)


def zero_shot() -> Part:
    """Names of classes; those of class_names.txt if it is there."""
    names = {"zero_shot.ZeroShot.class_list": "{names}"}
    return Part(
        "ImageNet",
        ("imagenet",),
        f"{_PROBES}zero_shot.gin",
        suite_findings.accuracy,
        {**_TASK, **names},
        texts=True,
    )


# What a kept head is learned by: the parts of rows 1 and 9.
HEADS = {LINEAR: linear("ImageNet", "imagenet"), ZERO_SHOT: zero_shot()}


def few_shot(name: str, layout: str) -> Part:
    """Ridge regression on a few images of each class."""
    recipe = f"{_PROBES}few_shot.gin"
    return Part(name, (layout,), recipe, suite_findings.few_shot, _TASK)


def measure(
    name: str,
    layouts: tuple[str, ...],
    kind: str,
    function: str,
    shown: Mapping[str, str],
    settings: Mapping[str, str] | None = None,
    **fields: Any,
) -> Part:
    """A trust measure; `shown` as of `suite_findings.measured`."""
    finding = functools.partial(suite_findings.measured, shown=shown)
    fields = {"head": LINEAR, "finding": finding} | fields
    return Part(
        name,
        layouts,
        f"{_MEASURES}{kind}.gin",
        settings=settings or {},
        function=f"{_ROOM}{function}",
        **fields,
    )


def _variant(name: str, layout: str, labels: str, **fields: Any) -> Part:
    """The head on another test set of ImageNet's classes."""
    settings = {"TEST_TASK": "'{task}'", "TEST_SPLIT": "'test'", "LABELS": labels}
    shown = {"accuracy": "%", "accuracy_of_subset": "%"}
    return measure(
        name,
        (layout, "imagenet"),
        "accuracy",
        "variants.accuracy",
        shown,
        settings,
        **fields,
    )


def variants(**fields: Any) -> list[Part]:
    """A head on ImageNet-v2, ObjectNet, -R and -A."""
    return [
        _variant("ImageNet-v2", "imagenet_v2", "'same'", **fields),
        _variant("ObjectNet", "objectnet", "'objectnet'", **fields),
        _variant("ImageNet-R", "imagenet_r", "{labels_r}", **fields),
        _variant("ImageNet-A", "imagenet_a", "{labels_a}", **fields),
    ]


def segmentation(name: str, layout: str, head: str, **settings: str) -> Part:
    """A head on patches; `head` is linear or upernet, `settings` more macros."""
    ignored = "True" if layout == "ade20k" else "False"
    told = {
        "DATA_FOLDER": "{place}",
        "ZERO_IS_IGNORED": ignored,
        "SHOWN_SIZE": "{crop}",
        "STRIDE": "{crop_stride}",
    }
    finding = functools.partial(suite_findings.dense, shown={"mean_iou": "%"})
    return Part(
        name,
        (layout,),
        f"{_PROBES}segmentation_{head}.gin",
        finding,
        told | settings,
        f"{_ROOM}segmentation.run_segmentation",
    )


TUNED = {"TRAIN_TRUNK": "True", "LEARNING_RATE": "1e-5"}


def depths(head: str) -> list[Part]:
    """The paper's set, and two that are public."""
    return [
        Part(
            name,
            (layout,),
            f"{_PROBES}depth_{head}.gin",
            functools.partial(suite_findings.dense, shown=_DEPTH),
            {
                "DATA_FOLDER": "{place}",
                "UNITS_PER_METRE": units,
                "MOST_DEPTH": most,
                "SHOWN_SIZE": "{wide_crop}",
                "STRIDE": "{wide_stride}",
            },
            f"{_ROOM}depth.run_depth",
        )
        for name, layout, units, most in (
            ("", "waymo_depth", "256.0", "80.0"),
            ("NYU", "nyu_depth", "1000.0", "10.0"),
            ("KITTI", "kitti_depth", "256.0", "80.0"),
        )
    ]


def video(name: str, layout: str) -> Part:
    """Classes of clips."""
    finding = functools.partial(suite_findings.dense, shown={"accuracy": "%"})
    settings = {"DATA_FOLDER": "{place}"}
    function = f"{_ROOM}video.run_video"
    return Part(name, (layout,), f"{_PROBES}video.gin", finding, settings, function)


def fairness(finding: Callable[..., Finding]) -> list[Part]:
    """Two attributes of CelebA by gender, as the paper has."""
    return [
        measure(
            target,
            ("celeba",),
            "fairness",
            "fair.parity",
            {},
            {
                "IMAGES_TASK": "'{task}'",
                "TABLE": "{table}",
                "TARGET": repr(target),
                "GROUPS": "('Male',)",
            },
            head="",
            finding=finding,
        )
        for target in ("Attractive", "Smiling")
    ]


def humans(name: str, shown: Mapping[str, str], **fields: Any) -> Part:
    """A head beside people; `shown` as of `suite_findings.measured`."""
    return measure(
        name,
        ("model_vs_human", "imagenet"),
        "human_alignment",
        "humans.alignment",
        shown,
        {
            "TEST_TASK": "'{task}'",
            "TEST_SPLIT": "'test'",
            "HUMANS": "{humans}",
            "SIXTEEN": "{sixteen}",
        },
        **fields,
    )


_CALIBRATED = {
    "ece/before": "ECE%",
    "ece/after": "ECE, temperature%",
    "accuracy/before": "accuracy%",
}


def calibration(name: str, layout: str, split: str) -> Part:
    """Calibration of a head on a split of its classes."""
    layouts = (layout,) if layout == "imagenet" else (layout, "imagenet")
    settings = {"TEST_TASK": "'{task}'", "TEST_SPLIT": repr(split)}
    function = "reliability.calibrated"
    return measure(name, layouts, "calibration", function, _CALIBRATED, settings)


def strangers(name: str, layout: str) -> Part:
    """How a head, and distances of its features, tell images of no known class."""
    return measure(
        name,
        (layout, "imagenet"),
        "open_set",
        "reliability.strangers",
        {
            "auroc/msp": "AUROC%",
            "fpr95/msp": "FPR95%",
            "auroc/mahalanobis": "Mahalanobis AUROC%",
            "auroc/relative_mahalanobis": "relative AUROC%",
        },
        {
            "TEST_TASK": "'{imagenet_task}'",
            "OUTSIDE_TASK": "'{task}'",
            # Of few images, or features that do not vary, a covariance is singular.
            "RIDGE": "0.001",
        },
    )


def selective(name: str) -> Part:
    """What is gained if a head may refuse, or ask an oracle for 1 % of the images."""
    shown = {
        "aurra": "AURRA%",
        "calibration_auc": "calibration AUC%",
        "collaborative_auc/0.01": "oracle AUC%",
    }
    settings = {"TEST_TASK": "'{task}'"}
    layouts = ("imagenet",)
    return measure(name, layouts, "selective", "reliability.selected", shown, settings)


def corruptions(name: str) -> Part:
    """A head on the fifteen corruptions at five severities, made on the fly."""
    return measure(
        name,
        ("imagenet",),
        "corruptions",
        "corrupted.robustness",
        {"mce": "mCE"},
        {"TEST_TASK": "'{task}'"},
        least_side=32,
    )
