"""A probe run on a tower's frozen features: its numbers, with the protocol beside."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.experiments import features, outcomes
from vit22b_transfer.experiments import vectors as named
from vit22b_transfer.experiments.attentive import AttentiveProbe
from vit22b_transfer.experiments.labelled import Sets
from vit22b_transfer.experiments.zero_shot import ZeroShot
from vit22b_transfer.host import json_files, locks, progress, tables, whole_files

RESULTS_FILE = "probes.jsonl"


@runtime_checkable
class Probe(Protocol):
    """A probe of vectors: a frozen dataclass whose fields are its whole protocol.

    features: the sets of vectors that it takes or chooses from (`vectors.VECTORS`).
    """

    @property
    def features(self) -> Sequence[Sequence[str]]:
        """Names of the vectors of each set."""
        ...

    def run(self, train: Sets, test: Sets) -> list[outcomes.Outcome]:
        """Its results."""
        ...


@dataclasses.dataclass(frozen=True)
class Split:
    """A labelled split of a task."""

    task: str
    split: str


def run_probe(
    probe: Probe | AttentiveProbe | ZeroShot,
    *,
    source: features.FeatureSource,
    train: Split | None,
    test: Split,
    output_dir: str,
) -> list[outcomes.Outcome]:
    """The results of a probe that learns from one split and is judged on another.

    Features are made first, or read if they are there. Prints the protocol and a table
    of the numbers, with 95 % intervals over the test images, and appends a JSON line
    for each to `output_dir/probes.jsonl`: value, interval, protocol, tower, data, and
    what was counted on the way.

    train: None for the zero-shot probe, which learns nothing.

    Raises:
      UserError: if something does not fit together.
    """
    if (train is None) != isinstance(probe, ZeroShot):
        said = "learns nothing" if train is not None else "learns from a split"
        raise UserError(
            f"{type(probe).__name__} {said}: run_probe.train is {train}. Take the file "
            "of gin_configs/probes as it is."
        )
    path = os.path.join(
        whole_files.writable_directory(output_dir, "output directory"), RESULTS_FILE
    )
    parts = {"test": test} if train is None else {"train": train, "test": test}
    found, splits = _results(probe, source, parts)
    facts = {
        "classes": splits["test"].num_classes,
        "protocol": _protocol(probe),
        "features": source.facts(),
    }
    for name, split in splits.items():
        images = {"images": len(split.labels)}
        facts[name] = dataclasses.asdict(parts[name]) | images
    left_out = {
        name: count for split in splits.values() for name, count in split.notes.items()
    }
    name = type(probe).__name__
    lines = [_line(name, outcome, facts, left_out) for outcome in found]
    append_lines(path, lines)
    show(lines)
    progress.console().print(f"written to {path}", markup=False)
    return found


def _results(
    probe: Any, source: features.FeatureSource, parts: Mapping[str, Split]
) -> tuple[list[outcomes.Outcome], dict[str, features.SplitFeatures]]:
    """The outcomes of a probe, and the features of the splits by name."""
    sets = [tuple(names) for names in getattr(probe, "features", ())]
    vectors: list[str] | None = None
    if not isinstance(probe, AttentiveProbe):
        vectors = list(dict.fromkeys(name for names in sets for name in names))
        named.check(vectors, source.tower)
    names: Sequence[str] = ()
    if isinstance(probe, ZeroShot):  # asked before hours of work
        task = parts["test"].task
        names = probe.names(source.class_names(task), source.number_of_classes(task))
    splits = {
        name: source.read(part.task, part.split, vectors)
        for name, part in parts.items()
    }
    if isinstance(probe, AttentiveProbe):
        return probe.run(splits["train"], splits["test"]), splits
    if isinstance(probe, ZeroShot):
        pooled = splits["test"].joined(*probe.features)
        mesh = source.partitioning
        found = probe.run(pooled, names, source.checkpoint, mesh, source.batch_size)
        return found, splits
    joined = [
        {names: split.joined(names) for names in sets} for split in splits.values()
    ]
    return probe.run(*joined), splits


def append_lines(path: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Puts JSON lines behind those that are in a file; all of them or none.

    Raises:
      UserError: if a line of the file is no JSON object: it is some other file.
    """
    with locks.held(path):
        known = ""
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                known = file.read()
            for number, line in enumerate(known.splitlines(), 1):
                json_files.parse(line, path, line=number, advice="Move it away.")
        with whole_files.replacing(path) as file:
            file.write(known)
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def show(
    lines: Sequence[Mapping[str, Any]], *, console: rich.console.Console | None = None
) -> None:
    """Prints the protocol that lines have in common, and a table of their numbers."""
    said = progress.console() if console is None else console
    first = lines[0]
    data = "{task} {split}, {images} images"
    classes = f", {first['classes']} classes" if "classes" in first else ""
    said.print(f"{first['probe']}{classes}", markup=False)
    for name in ("train", "test"):
        if name in first:
            said.print(f"  {name}: {data.format(**first[name])}", markup=False)
    for group in ("protocol", "features"):
        for name, value in first[group].items():
            said.print(f"  {name}: {json.dumps(value)}", markup=False)
    names, values, intervals = [], [], []
    several = len({line["metric"] for line in lines}) > 1
    for line in lines:
        low, high = line["interval"]
        title = _title(line["settings"]) or line["probe"]
        names.append(line["metric"] if several else title)
        values.append(f"{line['value']:.4f}")
        intervals.append(f"{low:.4f} to {high:.4f}")
    kind = first["interval_kind"].rpartition(", over")[0]
    columns = {"value" if several else first["metric"]: values, kind: intervals}
    tables.print_table(console or rich.console.Console(), names, columns)
    told = {}
    for line in lines:
        told |= line["notes"]
    if len(lines) == 1:
        told = {**first["settings"], **told}
    for name, value in told.items():
        if name not in ("tried", "features"):
            said.print(f"  {name}: {value}", markup=False)


def _protocol(probe: Any) -> dict[str, Any]:
    """The fields of a probe as JSON values; of a model what it is."""
    fields = {}
    for field in dataclasses.fields(probe):
        value = getattr(probe, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        fields[field.name] = value
    if "model" in fields:
        fields["text_tower"] = repr(fields.pop("model").module.text)
    return fields


def _line(probe, outcome, facts, left_out) -> dict[str, Any]:
    low, high = outcome.interval
    return {
        "probe": probe,
        "metric": outcome.metric,
        "value": outcome.value,
        "interval": [low, high],
        "interval_kind": f"{outcomes.INTERVAL}, over {len(outcome.scores)} images",
        "settings": dict(outcome.settings),
        "notes": {**outcome.notes, **left_out},
        **facts,
    }


def _title(settings: Mapping[str, Any]) -> str:
    """What tells a number from the others: `pooled, shots 5`."""
    parts = ["+".join(settings["features"])] if "features" in settings else []
    for name, value in settings.items():
        if name in ("shots", "neighbours", "rate", "strength", "prompts"):
            parts.append(f"{name} {value:.4g}")
    return ", ".join(parts)
