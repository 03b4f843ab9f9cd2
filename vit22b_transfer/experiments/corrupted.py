"""A kept head on corrupted pictures: error under each corruption, and their mean.

Pictures are corrupted on the fly, as the tower sees them (resized), each by chance of
its own (`evaluation.corruptions`). Features and logits of each corruption and severity
are kept: what was stopped goes on with the next.
"""

import dataclasses
import functools
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import (
    corruption_blurs,
    corruption_errors,
    corruption_weather,
    corruptions,
)
from vit22b_transfer.experiments import measure_pictures, measured
from vit22b_transfer.experiments.features import Split
from vit22b_transfer.experiments.judged import Judge
from vit22b_transfer.host import progress, whole_files

NOT_AS_PUBLISHED = (
    "corrupted here: frost is drawn, pictures are not stored as JPEG afterwards; the "
    "numbers are not those of ImageNet-C's files"
)


def robustness(
    judge: Judge,
    test: Split,
    *,
    names: Sequence[str] = corruptions.NAMES,
    severities: Sequence[int] = corruptions.SEVERITIES,
) -> list[dict]:
    """Errors under corruptions; with all fifteen and all severities mCE as well.

    Told are the clean `error`, the `error` of each corruption and severity, and of all
    severities of one (`corruption_error`); then `mce` and `relative_mce`, in %, over
    AlexNet's errors on ImageNet-C (100 is AlexNet), which mean something for a head of
    ImageNet's classes alone. A picture has the error by severity.

    Raises:
      UserError: for an unknown corruption or severity; if pictures are smaller than 32
        pixels; as `Judge.of`.
    """
    if not names or not severities or len({*names}) < len(names):
        raise UserError(
            f"names={tuple(names)} and severities={tuple(severities)}: give one of "
            "each at least, and each once."
        )
    changes = {(n, s): change(n, s) for n in names for s in severities}
    clean = judge.of(test)
    labels = clean.labels_of_head()
    findings = [measured.share("error", clean.logits.argmax(axis=1) != labels)]
    errors: dict[str, list[float]] = {name: [] for name in names}
    wrong: dict[str, list[np.ndarray]] = {name: [] for name in names}
    towers = {}
    label = f"{clean.what}: corruptions"
    with progress.Progress(
        progress.console(), label, total=len(changes), unit="corruptions"
    ) as bar:
        for number, ((name, severity), made) in enumerate(changes.items()):
            found = judge.of(test, change=made, towers=towers)
            if found.ids != clean.ids:
                raise UserError(
                    f"{found.what} has {len(found.ids)} images, {clean.what} "
                    f"{len(clean.ids)} or others: the data have changed meanwhile."
                )
            missed = found.logits.argmax(axis=1) != labels
            settings = {"corruption": name, "severity": severity}
            findings.append(measured.share("error", missed, settings))
            errors[name].append(float(missed.mean()))
            wrong[name].append(missed)
            bar.show(number + 1)
    findings += [
        measured.share("corruption_error", np.mean(own, axis=0), {"corruption": name})
        for name, own in wrong.items()
    ]
    every = (tuple(names), tuple(severities))
    if every == (corruptions.NAMES, corruptions.SEVERITIES):
        findings += _over_alexnet(clean.logits.argmax(axis=1) != labels, wrong)
    folder = whole_files.writable_directory(judge.output_dir, "output directory")
    stem = os.path.basename(clean.path).removesuffix(".npz")
    picture = os.path.join(folder, f"corruptions-{stem}.png")
    x = np.array([0, *severities], np.float64)
    mean = [findings[0].value, *np.mean(list(errors.values()), axis=0).tolist()]
    lines = {"mean": (x, mean)}
    lines |= {name: (x, [mean[0], *own]) for name, own in errors.items()}
    title = ("error by severity (0: none)", "blue: mean; red: each corruption")
    measure_pictures.curve(picture, title, lines)
    return measured.report(
        "corruptions",
        findings,
        protocol={
            "corruptions": list(names),
            "severities": list(severities),
            "form": NOT_AS_PUBLISHED,
            "denominators": "AlexNet's errors on ImageNet-C",
        },
        facts=judge.facts(test=test) | {"classes": clean.head.classes},
        notes={"images": len(labels), **clean.notes},
        output_dir=judge.output_dir,
        pictures=[picture],
    )


def _over_alexnet(
    missed: Bool[np.ndarray, " images"], wrong: Mapping[str, list[np.ndarray]]
) -> list[measured.Finding]:
    """`mce` and `relative_mce` are means over images; `ce/NAME` scaled shares.

    missed: whether each image is wrong without corruption. wrong: the same under each
    of the five severities of each corruption.
    """
    errors = {name: np.stack(own).astype(np.float64) for name, own in wrong.items()}
    scores = corruption_errors.scores_of_images(errors, missed.astype(np.float64))
    found = [measured.mean(name, scores.pop(name)) for name in ("mce", "relative_mce")]
    for name, own in scores.items():
        scale = 100 / corruption_errors.ALEXNET[name.removeprefix("ce/")]
        share = measured.share(name, own / scale)
        low, high = share.interval or (0.0, 1.0)
        found.append(
            dataclasses.replace(
                share, value=scale * share.value, interval=(scale * low, scale * high)
            )
        )
    return found


def change(name: str, severity: int):
    """A corruption as what is done to each picture of a split.

    Raises:
      UserError: for an unknown corruption or severity.
    """
    from vit22b_transfer.data.changed_images import Change

    # Which says what is wrong with name or severity.
    corruptions.corrupted(np.zeros((32, 32, 3), np.uint8), name, severity, "")
    function = functools.partial(_corrupted, corruption=name, severity=severity)
    return Change(f"{name} {severity}", function, _version())


def _corrupted(image, image_id, *, corruption, severity):
    return corruptions.corrupted(image, corruption, severity, image_id)


@functools.cache
def _version() -> str:
    """A hash of the code that corrupts: other code makes features of its own."""
    modules = (corruptions, corruption_blurs, corruption_weather)
    text = "".join(map(inspect.getsource, modules))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
