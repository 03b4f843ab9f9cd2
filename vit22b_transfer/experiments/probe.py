"""A probe run on a tower's frozen features: its numbers, with the protocol beside."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import rich.console

from vit22b_transfer import UserError
from vit22b_transfer.experiments import features, heads, judged, outcomes
from vit22b_transfer.experiments import vectors as named
from vit22b_transfer.experiments.attentive import AttentiveProbe
from vit22b_transfer.experiments.labelled import Sets
from vit22b_transfer.experiments.split_features import SplitFeatures
from vit22b_transfer.experiments.zero_shot import ZeroShot
from vit22b_transfer.host import json_files, locks, progress, tables, whole_files

RESULTS_FILE = "probes.jsonl"


@runtime_checkable
class Learner(Protocol):
    """A probe with a head that is learned once and kept."""

    def learned(self, train: Any) -> heads.Head:
        """The head, of sets of vectors or of tokens."""
        ...


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


def run_probe(
    probe: Probe | AttentiveProbe | ZeroShot,
    *,
    source: features.FeatureSource,
    train: features.Split | None,
    test: features.Split,
    output_dir: str,
) -> list[outcomes.Outcome]:
    """The results of a probe that learns from one split and is judged on another.

    Features are made first, or read if they are there. Prints the protocol and a table
    of the numbers, with 95 % intervals over the test images, and appends a JSON line
    for each to `output_dir/probes.jsonl`: value, interval, protocol, tower, data, and
    what was counted on the way.

    A head that is learned (all but few-shot and nearest neighbours) is kept, as
    `kept_head` says, and so are its logits of the test images: the next test split
    costs no learning.

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
    name, facts = type(probe).__name__, {}
    if isinstance(probe, Learner | ZeroShot):
        learn_on = test if train is None else train
        file = kept_head(probe, source=source, split=learn_on, directory=output_dir)
        found, facts, left_out = _judged(probe, file, source, test, output_dir)
    else:
        found, splits = _results(probe, source, parts)
        left_out = {k: n for split in splits.values() for k, n in split.notes.items()}
        facts = {"classes": splits["test"].num_classes, "protocol": _protocol(probe)}
        facts["features"] = source.facts()
        for part, split in splits.items():
            images = {"images": len(split.labels)}
            facts[part] = dataclasses.asdict(parts[part]) | images
    found = [
        dataclasses.replace(outcome, notes={**outcome.notes, **left_out})
        for outcome in found
    ]
    lines = [_line(name, outcome, facts) for outcome in found]
    append_lines(path, lines)
    show(lines)
    progress.console().print(f"written to {path}", markup=False)
    return found


def kept_head(
    probe: Learner | ZeroShot,
    *,
    source: features.FeatureSource,
    split: features.Split,
    directory: str,
) -> str:
    """The file of the head that a probe learns from a split, learned now at the latest.

    It lies in `directory/heads`, under a name of all that decides it: protocol, tower,
    images, labels. A file that is there is not learned anew.

    probe: one that has a head: linear, logistic, attentive, zero-shot. split: what it
      learns from; of the zero-shot probe one whose classes are named.

    Raises:
      UserError: as the probe.
    """
    names = source.class_names(split.task)
    vectors = _vectors(probe, source)
    facts = {
        "probe": type(probe).__name__,
        "protocol": _protocol(probe),
        "features": source.facts(),
    }
    if isinstance(probe, ZeroShot):
        classes = source.number_of_classes(split.task)
        texts = probe.names(names, classes)
        mesh = source.partitioning
        head = probe.head(texts, source.checkpoint, mesh, source.batch_size)
        # A split has the names of its task's list, which may be WordNet's numbers.
        own = head.class_names if names is None else tuple(names)
        facts["texts_of"] = list(texts)
        head = dataclasses.replace(head, class_names=own, facts={**head.facts, **facts})
        decided = [own, head.facts["settings"]]
    else:
        head, decided = None, [source.identity(split.task, split.split, vectors)]
    told = {**facts, "features": {**facts["features"], "checkpoint": ""}}
    digest = hashlib.sha256(json.dumps([told, decided], sort_keys=True).encode())
    path = os.path.join(
        whole_files.writable_directory(directory, "output directory"),
        "heads",
        f"{facts['probe']}-{digest.hexdigest()[:16]}.npz",
    )
    if os.path.exists(path):
        heads.read(path)  # which says if it is none
        progress.console().print(f"{path} is there: nothing is learned", markup=False)
        return path
    if head is None and not isinstance(probe, ZeroShot):
        data = source.read(split.task, split.split, vectors)
        sets = _sets(probe)
        of_sets = {some: data.joined(some) for some in sets} if sets else data
        head = probe.learned(of_sets)
        train = dataclasses.asdict(split) | {"images": len(data.labels)}
        facts |= {"train": train, "left_out": dict(data.notes)}
        names = None if names is None else tuple(names)
        head = dataclasses.replace(
            head, class_names=names, facts={**head.facts, **facts}
        )
    assert head is not None
    head.write(path)
    return path


def _judged(
    probe: Any, file: str, source: features.FeatureSource, test: features.Split, where
) -> tuple[list[outcomes.Outcome], dict[str, Any], dict[str, Any]]:
    """The outcomes of a kept head, the facts of their lines, what was left out."""
    found = judged.Judge(file, source, where).of(test)
    head, labels = found.head, found.labels_of_head()
    if isinstance(probe, ZeroShot):
        told = probe.outcomes(head, found.logits, labels)
    else:
        told = [head.outcome(found.logits, labels)]
    facts = {"classes": head.classes, "protocol": head.facts["protocol"]}
    facts["features"] = source.facts()
    if "train" in head.facts:
        facts["train"] = head.facts["train"]
    facts["test"] = dataclasses.asdict(test) | {"images": len(labels)}
    facts |= {"head": file, "logits": found.path}
    return told, facts, {**head.facts.get("left_out", {}), **found.notes}


def _sets(probe: Any) -> list[tuple[str, ...]]:
    return [tuple(names) for names in getattr(probe, "features", ())]


def _vectors(probe: Any, source: features.FeatureSource) -> list[str] | None:
    """The names of all vectors that a probe reads; None for all tokens."""
    if isinstance(probe, AttentiveProbe):
        return None
    vectors = list(dict.fromkeys(name for names in _sets(probe) for name in names))
    named.check(vectors, source.tower)
    return vectors


def _results(
    probe: Any, source: features.FeatureSource, parts: Mapping[str, features.Split]
) -> tuple[list[outcomes.Outcome], dict[str, SplitFeatures]]:
    """The outcomes of a probe without a head, and the features of the splits."""
    vectors = _vectors(probe, source)
    splits = {
        name: source.read(part.task, part.split, vectors)
        for name, part in parts.items()
    }
    joined = [
        {names: split.joined(names) for names in _sets(probe)}
        for split in splits.values()
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


def _line(probe, outcome, facts) -> dict[str, Any]:
    low, high = outcome.interval
    return {
        "probe": probe,
        "metric": outcome.metric,
        "value": outcome.value,
        "interval": [low, high],
        "interval_kind": f"{outcomes.INTERVAL}, over {len(outcome.scores)} images",
        "settings": dict(outcome.settings),
        "notes": dict(outcome.notes),
        **facts,
    }


def _title(settings: Mapping[str, Any]) -> str:
    """What tells a number from the others: `pooled, shots 5`."""
    parts = ["+".join(settings["features"])] if "features" in settings else []
    for name, value in settings.items():
        if name in ("shots", "neighbours", "rate", "strength", "prompts"):
            parts.append(f"{name} {value:.4g}")
    return ", ".join(parts)
