"""Plex's score of a tower (Tran et al. 2022), out of what probes and measures wrote."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import selective
from vit22b_transfer.experiments import measured
from vit22b_transfer.host import json_files

# The metrics of a score, by Plex's category; of a line of `measures.jsonl`, or of
# `probes.jsonl`, which has shots among its settings.
CATEGORIES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "prediction": (("calibration", "accuracy"), ("calibration", "nll")),
    "uncertainty": (
        ("calibration", "ece"),
        ("selective", "calibration_auc"),
        ("selective", "collaborative_accuracy"),
        ("open_set", "auroc"),
    ),
    "adaptation": (("FewShot", "few_shot_accuracy"),),
}


def score(results: Sequence[str], *, output_dir: str) -> list[dict]:
    """Plex's score: the mean over categories of the mean of normalised metrics.

    results: files of lines that the measures and probes wrote, of one tower. Of a
      metric that was measured several times (splits, shots, fractions) each counts; of
      the same thing measured again the last. Calibration counts before any
      temperature, open-set recognition by its score `msp`. A category without a metric
      is left out, and told.

    Raises:
      UserError: for a file that holds no such lines, none that counts, or lines of
        several towers.
    """
    metrics: dict[str, dict[str, tuple[float, int]]] = {name: {} for name in CATEGORIES}
    towers = set()
    for line in _lines(results):
        kind = line.get("measure", line.get("probe"))
        settings, value = line.get("settings"), line.get("value")
        if not isinstance(settings, dict) or not isinstance(value, float | int):
            continue
        metric = "few_shot_accuracy" if kind == "FewShot" else line.get("metric")
        if settings.get("when") == "after" or settings.get("score", "msp") != "msp":
            continue
        for category, wanted in CATEGORIES.items():
            if (kind, metric) in wanted:
                told = {k: settings.get(k) for k in ("fraction", "shots", "features")}
                data = [line.get(name) for name in ("test", "outside")]
                name = f"{json.dumps([data, told])}/{metric}"
                metrics[category][name] = (float(value), int(line.get("classes", 0)))
                towers.add(json.dumps(line.get("features"), sort_keys=True))
    if len(towers) > 1:
        raise UserError(
            f"the {len(results)} files of results have lines of {len(towers)} towers "
            "or image sizes; give those of one."
        )
    left_out = [name for name, own in metrics.items() if not own]
    found = selective.reliability_scores({k: own for k, own in metrics.items() if own})
    findings = [measured.Finding(name, value) for name, value in found.items()]
    counts = {name: len(own) for name, own in metrics.items()}
    return measured.report(
        "reliability_score",
        findings,
        protocol={"results": list(results), "metrics": counts},
        facts={"features": json.loads(towers.pop())},
        notes={"categories_without_a_metric": left_out} if left_out else {},
        output_dir=output_dir,
    )


def _lines(results: Sequence[str]) -> list[Mapping[str, Any]]:
    found = []
    for path in results:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = list(file)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        for number, text in enumerate(lines, 1):
            line = json_files.parse(text, path, line=number)
            if not isinstance(line, dict):
                raise UserError(f"{path}, line {number} is no result of a measure.")
            found.append(line)
    return found
