"""The table of the paper's experiments: what each needs, and what runs it.

Rows and numbers are those of ViT-22B (Dehghani et al. 2023) in the paper's order. A
new experiment is one entry of `ROWS`: the layouts that it needs (`layouts.LAYOUTS`), a
recipe and the function that the recipe configures, and what makes numbers of its
result (`suite_findings`).
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit22b_transfer.experiments import suite_findings
from vit22b_transfer.experiments.suite_results import Finding

PROBE = "vit22b_transfer.experiments.probe.run_probe"


@dataclasses.dataclass(frozen=True)
class Part:
    """What runs a row, or a part of it, on one layout.

    name: of its numbers, beside the paper's. layouts: all that it needs; of
    "few_shot/*" each set of that folder is a part of its own, its name in place of "*".
    recipe: a gin file. function: what the recipe configures. settings: macros by name,
    as gin writes values; {task} is the name of the first layout's task, {PART} the path
    of a part of it, None for one that is not there. finding: makes numbers of what the
    function returns.
    texts: whether the tower must be one of a model of image-text pairs.
    """

    name: str
    layouts: tuple[str, ...]
    recipe: str
    finding: Callable[..., Finding]
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    function: str = PROBE
    texts: bool = False

    def root(self) -> Callable[..., Any]:
        """The function, imported now."""
        module, _, name = self.function.rpartition(".")
        return getattr(importlib.import_module(module), name)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the paper's table.

    paper: ViT-22B's numbers by the names that ours have. sure: whether they are known
    from the paper or its authors, not from memory. parts: what runs it; none for an
    experiment that is not run here, and then `elsewhere` says why and what to do.
    """

    number: int
    name: str
    data: str
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unit: str = "%"
    sure: bool = True
    parts: Sequence[Part] = ()
    elsewhere: str = ""


_TASK = {"PROBE_TASK": "'{task}'"}
_LINEAR = "gin_configs/probes/linear.gin"


def _linear(name: str, layout: str) -> Part:
    return Part(name, (layout,), _LINEAR, suite_findings.accuracy, _TASK)


def _few_shot(name: str, layout: str) -> Part:
    recipe = "gin_configs/probes/few_shot.gin"
    return Part(name, (layout,), recipe, suite_findings.few_shot, _TASK)


_NAMED = {"zero_shot.ZeroShot.class_list": "{names}"}
_NOT_BUILT = "not built yet"

ROWS: tuple[Row, ...] = (
    Row(
        1,
        "linear probe",
        "ImageNet",
        {"ImageNet": 89.5},
        parts=[_linear("ImageNet", "imagenet")],
    ),
    Row(2, "same head", "ImageNet-ReaL", {"ReaL": 90.9}),
    Row(3, "same head", "ImageNet-v2", {"ImageNet-v2": 83.2}),
    Row(4, "same head", "ObjectNet", {"ObjectNet": 74.3}, sure=False),
    Row(
        5,
        "same head",
        "ImageNet-R, -A",
        {"ImageNet-R": 87.4, "ImageNet-A": 83.8},
    ),
    Row(
        6,
        "scaling",
        "rows 1 to 5 of several towers",
        elsewhere="run the suite on each tower, then `vit22b suite --compare`",
    ),
    Row(
        7,
        "linear probe",
        "iNaturalist",
        sure=False,
        parts=[
            _linear("iNaturalist 2017", "inaturalist_2017"),
            _linear("iNaturalist 2018", "inaturalist_2018"),
        ],
    ),
    Row(
        8,
        "few-shot",
        "ImageNet and others",
        sure=False,
        parts=[_few_shot("ImageNet", "imagenet"), _few_shot("*", "few_shot/*")],
    ),
    Row(
        9,
        "zero-shot",
        "ImageNet and its variants",
        {
            "ImageNet": 85.9,
            "ImageNet-v2": 80.9,
            "ObjectNet": 87.6,
            "ImageNet-A": 90.1,
            "ImageNet-R": 96.0,
        },
        parts=[
            Part(
                "ImageNet",
                ("imagenet",),
                "gin_configs/probes/zero_shot.gin",
                suite_findings.accuracy,
                {**_TASK, **_NAMED},
                texts=True,
            )
        ],
    ),
    Row(
        10,
        "fine-tuned, shifts",
        "ImageNet-v2, ObjectNet, -R, -A",
        sure=False,
        elsewhere="fine-tune with gin_configs/recipes/image_folder.gin, then give the "
        "suite that tower: rows 2 to 5",
    ),
    Row(
        11,
        "segmentation, tuned",
        "ADE20k",
        {"1/16": 44.7, "1/8": 47.2, "1/4": 50.6, "1/2": 52.5, "1": 54.9},
    ),
    Row(12, "segmentation, linear", "ADE20k", {"mIoU": 34.6}),
    Row(13, "segmentation, UperNet", "ADE20k", {"mIoU": 52.7}),
    Row(14, "UperNet, all tuned", "ADE20k", {"mIoU": 55.3}),
    Row(15, "segmentation", "Pascal Context, VOC", sure=False),
    Row(
        16,
        "depth, DPT",
        "Waymo Open",
        {
            "MSE": 0.021,
            "AbsRel": 0.095,
            "delta < 1.1": 0.702,
            "delta < 1.25": 0.909,
            "delta < 1.25^2": 0.979,
        },
        unit="",
        sure=False,
    ),
    Row(
        17,
        "depth, linear",
        "Waymo Open",
        {
            "MSE": 0.039,
            "AbsRel": 0.166,
            "delta < 1.1": 0.412,
            "delta < 1.25": 0.779,
            "delta < 1.25^2": 0.960,
        },
        unit="",
        sure=False,
    ),
    Row(18, "video", "Kinetics-400", {"Kinetics-400": 88.0}),
    Row(19, "video", "Moments in Time", {"Moments in Time": 44.9}, sure=False),
    Row(20, "parity sweep", "CelebA", sure=False),
    Row(21, "subgroups", "CelebA", sure=False),
    Row(22, "subgroups, calibration", "CelebA", sure=False),
    Row(23, "humans", "cue-conflict", {"shape bias": 87.0}),
    Row(
        24,
        "humans",
        "17 sets",
        {
            "accuracy difference": 0.018,
            "observed consistency": 0.783,
            "error consistency": 0.258,
        },
        unit="",
    ),
    Row(25, "distortions", "17 sets", {"accuracy": 83.7}),
    Row(26, "reliability", "ImageNet, strange images", sure=False),
    Row(27, "calibration", "ImageNet and shifts", sure=False),
    Row(
        28,
        "distillation",
        "ImageNet",
        {"ViT-B/16": 88.6, "ViT-L/16": 89.6},
        elsewhere="train a student with gin_configs/runs/distill.gin, then give the "
        "suite that tower",
    ),
    Row(29, "perceptual similarity", "BAPPS", sure=False),
    Row(30, "attribution", "pictures"),
    Row(
        31,
        "stability",
        "",
        elsewhere="`vit22b demo --part recipe`, or benchmarks/stability.py",
    ),
    Row(
        32,
        "efficiency",
        "",
        {"tokens/s/core": 1150.0, "MFU, %": 54.9},
        unit="",
        elsewhere="`vit22b bench` with the tower's gin file",
    ),
    Row(
        33,
        "language model",
        "OK-VQA, VQAv2, COCO",
        {"OK-VQA": 66.1, "VQAv2": 80.0, "COCO, CIDEr": 138.0},
        elsewhere="fine-tune with gin_configs/recipes/vqav2.gin or coco_captions.gin, "
        "then `vit22b eval`",
    ),
)


def numbered(rows: str | None) -> tuple[Row, ...]:
    """The rows that a text such as "1,8,11-14" chooses, in the paper's order.

    Raises:
      UserError: for anything else, or a number that no row has.
    """
    from vit22b_transfer import UserError

    if rows is None:
        return ROWS
    chosen = set()
    for part in rows.split(","):
        ends = part.strip().split("-")
        if not 1 <= len(ends) <= 2 or not all(
            e.isascii() and e.isdecimal() and len(e) < 4 for e in ends
        ):
            raise UserError(f"--rows {rows[:80]}: write it as 1,8,11-14.")
        first, last = int(ends[0]), int(ends[-1])
        if not 1 <= first <= last <= len(ROWS):
            raise UserError(f"--rows {rows[:80]}: rows are 1 to {len(ROWS)}.")
        chosen |= set(range(first, last + 1))
    return tuple(row for row in ROWS if row.number in chosen)
