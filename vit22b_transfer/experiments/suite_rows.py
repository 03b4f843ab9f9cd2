"""The table of the paper's experiments: what each needs, and what runs it.

Rows and numbers are those of ViT-22B (Dehghani et al. 2023) in the paper's order. A
new experiment is one entry of `ROWS`, whose parts (`suite_parts`) name the layouts that
they need (`layouts.LAYOUTS`), a recipe and the function that the recipe configures, and
what makes numbers of its result (`suite_findings`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from vit22b_transfer import UserError
from vit22b_transfer.experiments import suite_findings
from vit22b_transfer.experiments import suite_parts as run
from vit22b_transfer.experiments.suite_parts import Part


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


ROWS: tuple[Row, ...] = (
    Row(
        1,
        "linear probe",
        "ImageNet",
        {"ImageNet": 89.5},
        parts=[run.linear("ImageNet", "imagenet")],
    ),
    Row(
        2,
        "same head",
        "ImageNet-ReaL",
        {"ReaL": 90.9},
        parts=[
            run.measure(
                "ReaL",
                ("imagenet", "imagenet_real"),
                "several_labels",
                "variants.several_labels",
                {"accuracy": "%"},
                {"TEST_TASK": "'{task}'", "JUDGEMENTS": "{judgements}"},
            )
        ],
    ),
    Row(
        3,
        "same head",
        "ImageNet-v2",
        {"ImageNet-v2": 83.2},
        parts=run.variants()[:1],
    ),
    Row(
        4,
        "same head",
        "ObjectNet",
        {"ObjectNet": 74.3},
        sure=False,
        parts=run.variants()[1:2],
    ),
    Row(
        5,
        "same head",
        "ImageNet-R, -A",
        {"ImageNet-R": 87.4, "ImageNet-A": 83.8},
        parts=run.variants()[2:],
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
            run.linear("iNaturalist 2017", "inaturalist_2017"),
            run.linear("iNaturalist 2018", "inaturalist_2018"),
        ],
    ),
    Row(
        8,
        "few-shot",
        "ImageNet and others",
        sure=False,
        parts=[
            run.few_shot("ImageNet", "imagenet"),
            run.few_shot("*", "few_shot/*"),
        ],
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
        parts=[run.zero_shot(), *run.variants(head=run.ZERO_SHOT, texts=True)],
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
        parts=[
            run.segmentation(name, "ade20k", "linear", FRACTION=str(share), **run.TUNED)
            for name, share in (
                ("1/16", 0.0625),
                ("1/8", 0.125),
                ("1/4", 0.25),
                ("1/2", 0.5),
                ("1", 1.0),
            )
        ],
    ),
    Row(
        12,
        "segmentation, linear",
        "ADE20k",
        {"mIoU": 34.6},
        parts=[run.segmentation("mIoU", "ade20k", "linear")],
    ),
    Row(
        13,
        "segmentation, UperNet",
        "ADE20k",
        {"mIoU": 52.7},
        parts=[run.segmentation("mIoU", "ade20k", "upernet")],
    ),
    Row(
        14,
        "UperNet, all tuned",
        "ADE20k",
        {"mIoU": 55.3},
        parts=[run.segmentation("mIoU", "ade20k", "upernet", **run.TUNED)],
    ),
    Row(
        15,
        "segmentation",
        "Pascal Context, VOC",
        sure=False,
        parts=[
            run.segmentation("Context", "pascal_context", "linear", **run.TUNED),
            run.segmentation("VOC", "pascal_voc", "linear", **run.TUNED),
        ],
    ),
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
        parts=run.depths("dpt"),
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
        parts=run.depths("linear"),
    ),
    Row(
        18,
        "video",
        "Kinetics-400",
        {"Kinetics-400": 88.0},
        parts=[run.video("Kinetics-400", "kinetics400")],
    ),
    Row(
        19,
        "video",
        "Moments in Time",
        {"Moments in Time": 44.9},
        sure=False,
        parts=[run.video("Moments in Time", "moments_in_time")],
    ),
    Row(
        20,
        "parity",
        "CelebA",
        sure=False,
        parts=run.fairness(suite_findings.parity),
    ),
    Row(
        21,
        "subgroups",
        "CelebA",
        sure=False,
        parts=run.fairness(
            functools.partial(suite_findings.subgroups, metric="accuracy")
        ),
    ),
    Row(
        22,
        "ECE",
        "CelebA",
        sure=False,
        parts=run.fairness(functools.partial(suite_findings.subgroups, metric="ece")),
    ),
    Row(
        23,
        "humans",
        "cue-conflict",
        {"shape bias": 87.0},
        parts=[run.humans("shape bias", {}, finding=suite_findings.shape_bias)],
    ),
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
        parts=[
            run.humans(
                "",
                {
                    "accuracy_difference": "accuracy difference",
                    "observed_consistency": "observed consistency",
                    "error_consistency": "error consistency",
                },
                needs=("humans",),
            )
        ],
    ),
    Row(
        25,
        "distortions",
        "17 sets",
        {"accuracy": 83.7},
        parts=[run.humans("accuracy", {"ood_accuracy": "%"})],
    ),
    Row(
        26,
        "Plex",
        "ImageNet, strange images",
        sure=False,
        parts=[
            run.strangers("*", "ood/*"),
            run.selective("ImageNet"),
            run.corruptions("corrupted"),
        ],
    ),
    Row(
        27,
        "calibration",
        "ImageNet and shifts",
        sure=False,
        parts=[
            run.calibration("ImageNet", "imagenet", "validation"),
            run.calibration("ImageNet-v2", "imagenet_v2", "test"),
        ],
    ),
    Row(
        28,
        "distillation",
        "ImageNet",
        {"ViT-B/16": 88.6, "ViT-L/16": 89.6},
        elsewhere="train a student with gin_configs/runs/distill.gin, then give the "
        "suite that tower",
    ),
    Row(
        29,
        "perceptual similarity",
        "BAPPS",
        sure=False,
        parts=[
            run.measure(
                "",
                ("bapps",),
                "perceptual_similarity",
                "perceptual.similarity",
                {"two_afc": "2AFC%", "people": "people%"},
                {"IMAGES_TASK": "'{task}'", "JUDGEMENTS": "{test}"},
                head="",
            )
        ],
    ),
    Row(
        30,
        "attribution",
        "ImageNet",
        parts=[
            run.measure(
                "saliency",
                ("imagenet",),
                "saliency",
                "saliency.overlays",
                {"evenness/gradient": "evenness"},
                {
                    "IMAGES_TASK": "'{task}'",
                    "IMAGES_SPLIT": "'validation'",
                    "METHODS": "('gradient',)",
                },
                head="",
            )
        ],
    ),
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
