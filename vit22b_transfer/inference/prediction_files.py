"""JSON-lines files of predictions: ordered, resumable, every example exactly once.

PATH appears when it is complete. Until then files beside it hold what there is:

    PATH.run.json             the manifest: what makes it (the fingerprint); in the end
                              its summary; what it was made with, which is not compared
    PATH.begun                whole batches, gathered from runs that were stopped
    PATH.host-00000-of-00002  lines of this run, written by one of its hosts
    PATH.shard-00003-of-00008.000  lines of a job that does a part of the batches

The parts are merged by index, so a stopped run may be continued on another number of
hosts or shards. Each line is a JSON object with an `index`; a line counts only with its
end of line, a batch only with all its lines.
"""

import contextlib
import dataclasses
import glob
import hashlib
import heapq
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files, locks, whole_files

Fingerprint = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recovered:
    """What stopped runs had left: whole lines kept, and lines dropped to be made again.

    `num_dropped` counts cut and unreadable lines, and those of batches that are not
    whole.
    """

    num_lines: int = 0
    num_dropped: int = 0


class PredictionFiles:
    """The file `path` and what stands beside it until it is complete.

    Process 0 alone enters `lock`, as long as any host writes. Every host calls
    `is_complete`, process 0 alone `recover`; then every host appends its own lines in
    the order of their indices, and process 0 alone calls `merge`.
    """

    def __init__(
        self,
        path: str,
        fingerprint: Fingerprint,
        *,
        host: int = 0,
        num_hosts: int = 1,
        about: Mapping[str, Any] | None = None,
    ):
        self.path = path
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._about = json.loads(json.dumps(about or {}))
        self._record_path = f"{path}.run.json"
        self._begun_path = f"{path}.begun"
        self._host_paths = [
            f"{path}.host-{i:05d}-of-{num_hosts:05d}" for i in range(num_hosts)
        ]
        self._host_path = self._host_paths[host]

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keeps others from writing while it is entered; what is complete needs none.

        Raises:
          UserError: if another process is writing; it names it.
        """
        try:
            if self.is_complete():
                return contextlib.nullcontext()
        except (UserError, OSError):
            pass  # said once nobody else can be changing what is looked at
        return locks.held(self.path)

    def is_complete(self) -> bool:
        """Whether `path` is there already, made in the very way the fingerprint says.

        Raises:
          UserError: if something else was written there, finished or not.
        """
        record = self.record()
        if record is None:
            for path in (self.path, *self.parts()):
                if os.path.exists(path):
                    raise UserError(
                        f"{path} exists, but no {self._record_path} says what made it. "
                        "Nothing is overwritten: move it away or choose another output."
                    )
            return False
        self._check_fingerprint(record["fingerprint"])
        if "summary" not in record:
            return False
        if not os.path.isfile(self.path) or _sha256(self.path) != record["sha256"]:
            raise UserError(
                f"{self.path} was changed or removed since it was written (see "
                f"{self._record_path}). Restore it, or remove both files."
            )
        return True

    def summary(self) -> dict[str, int]:
        """Of the complete file: `num_examples`, `num_bad_images`, `num_empty`."""
        record = self.record()
        assert record is not None
        return record["summary"]

    def recover(self, block: int) -> Recovered:
        """Gathers the lines of stopped runs, as many as make whole blocks."""
        self._remove_unfinished()
        if self.record() is None:
            self.begin()
        parts = self.parts()
        num_kept = 0
        with whole_files.replacing(self._begun_path, "wb") as out:
            for _, lines in whole_batches(merged(parts), block):
                out.writelines(lines)
                num_kept += block
            all_lines = {index for path in parts for index, _ in _lines(path)}
            cut = sum(_has_rest(path) for path in parts)
        for path in set(parts) - {self._begun_path}:
            os.remove(path)
        return Recovered(num_kept, len(all_lines) - num_kept + cut)

    def begin(self) -> None:
        """Writes the manifest."""
        record = {"fingerprint": self.fingerprint, "made_with": self._about}
        _write_json(self._record_path, record)

    def kept(self) -> str:
        """Half a sentence on the lines that a run which starts now goes on from."""
        num_lines = sum(1 for _ in _contiguous(merged(self.parts())))
        return f"{num_lines} lines of {os.path.basename(self.path)} are kept"

    def begun(self, block: int) -> list[int]:
        """Numbers of the batches that `recover` gathered: all others are to be made."""
        return [number for number, _ in whole_batches(_lines(self._begun_path), block)]

    @contextlib.contextmanager
    def writer(self) -> Iterator["LineWriter"]:
        """A writer of this host's lines."""
        with open(self._host_path, "wb") as file:
            yield LineWriter(file)

    def merge(self, *, of_hosts: bool = True) -> dict[str, int]:
        """Puts `path` in place, records and returns its summary, removes the parts.

        of_hosts: whether every host of this run has written a part.

        Raises:
          UserError: if a host's lines or an index are missing.
        """
        for path in self._host_paths if of_hosts else ():
            if not os.path.exists(path):
                raise UserError(
                    f"{path} is missing: with several hosts the output must lie on a "
                    "file system that all of them share."
                )
        counts = {"num_examples": 0, "num_bad_images": 0, "num_empty": 0}
        parts = self.parts()
        last = max((index for path in parts for index, _ in _lines(path)), default=-1)
        with whole_files.replacing(self.path, "wb") as out:
            for line in _contiguous(merged(parts)):
                out.write(line)
                example = json.loads(line)
                counts["num_examples"] += 1
                counts["num_bad_images"] += "error" in example
                counts["num_empty"] += is_empty(example)
            if counts["num_examples"] != last + 1:
                raise UserError(
                    f"{self.path}: example {counts['num_examples']} is in none of "
                    f"{', '.join(map(os.path.basename, parts))}, but example {last} is."
                )
        record = {
            "fingerprint": self.fingerprint,
            "made_with": self._about,
            "summary": counts,
            "sha256": _sha256(self.path),
        }
        _write_json(self._record_path, record)
        self.remove_left()
        return counts

    def remove_left(self) -> None:
        """Removes the parts of a complete file, and what was killed in merging it.

        It needs no lock: of what is complete nobody writes anything.
        """
        self._remove_unfinished()
        for path in self.parts():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def _remove_unfinished(self) -> None:
        for path in (self.path, self._record_path, self._begun_path):
            with contextlib.suppress(FileNotFoundError):
                whole_files.remove_unfinished(path)

    def record(self) -> dict[str, Any] | None:
        """The manifest; None before anything was begun. UserError if it is damaged."""
        if not os.path.exists(self._record_path):
            return None
        advice = f"Restore it, or remove {self.path}* and start again."
        record = json_files.read_object(self._record_path, advice=advice)
        is_whole = "summary" not in record or (
            isinstance(record["summary"], dict) and "sha256" in record
        )
        if not (isinstance(record.get("fingerprint"), dict) and is_whole):
            raise UserError(
                f"{self._record_path} is no record of predictions: it lacks its "
                f"fingerprint, or the sum of what it describes. {advice}"
            )
        return record

    def parts(self) -> list[str]:
        """The files that hold lines until the whole one is there."""
        begun = [self._begun_path] if os.path.exists(self._begun_path) else []
        name = glob.escape(self.path)
        hosts = glob.glob(f"{name}.host-*-of-*")
        shards = glob.glob(f"{name}.shard-*-of-*.[0-9][0-9][0-9]")
        return [*begun, *sorted(hosts), *sorted(shards)]

    def _check_fingerprint(self, found: Fingerprint) -> None:
        differences = [
            f"{name} was {found.get(name)!r} and is {self.fingerprint.get(name)!r}"
            for name in sorted({*found, *self.fingerprint})
            if found.get(name) != self.fingerprint.get(name)
        ]
        if differences:
            raise UserError(
                f"{self.path} was begun by another run: {'; '.join(differences)}. "
                "Nothing is overwritten: choose another output, or remove "
                f"{self.path}*."
            )


class LineWriter:
    """Appends blocks of lines, each on disk when `write` returns."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._last = -1

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends the lines, whose indices must rise."""
        for line in lines:
            assert line["index"] > self._last, "lines out of order"
            self._last = line["index"]
        os.stat(self._file.name)  # a removed file can be written, and is lost
        self._file.write(b"".join(map(_encoded, lines)))
        _flush(self._file)


def read_lines(path: str) -> Iterator[dict[str, Any]]:
    """The objects of a complete predictions file.

    Raises:
      UserError: if it cannot be read; naming the line that is no JSON object, has the
        wrong index or a field of the wrong type.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        for number, text in enumerate(file):
            line = _parsed(text)
            if line is None or line["index"] != number:
                shown = ascii(text[:80].decode("utf-8", "replace").rstrip())
                raise UserError(
                    f"{path}, line {number + 1}: a prediction with index {number} was "
                    f"expected, got {shown}."
                )
            yield line


def is_empty(line: Mapping[str, Any]) -> bool:
    """Whether a prediction was made and is blank."""
    prediction = line.get("prediction")
    return isinstance(prediction, str) and not prediction.strip()


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The object of a line, None if it is not one as `_encoded` writes them."""
    try:
        line = json_files.parse(text, "")
        if b"\\u" in text:  # of these only halves of characters are never written
            _encoded(line)
    except ValueError:
        return None
    is_line = (
        isinstance(line, dict)
        and type(line.get("index")) is int
        and ("error" in line or _is_prediction(line))
        and isinstance(line.get("metadata", {}), dict)
        and all(isinstance(text, str) for text in _texts(line))
    )
    return line if is_line else None


def _is_prediction(line):
    return "prediction" in line and isinstance(line.get("score"), int | float)


def _texts(line):
    """The values that must be texts."""
    references = line.get("references", [])
    yield from references if isinstance(references, list) else [None]
    yield from (line.get(name, "") for name in ("target", "prompt"))


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(index, line) up to the first line that is cut, unreadable or out of order."""
    last = -1
    with open(path, "rb") as file:
        for line in file:
            parsed = _parsed(line) if line.endswith(b"\n") else None
            if parsed is None or parsed["index"] <= last:
                return
            last = parsed["index"]
            yield last, line


def _has_rest(path: str) -> bool:
    """Whether a cut or unreadable line follows the good ones."""
    return sum(len(line) for _, line in _lines(path)) != os.path.getsize(path)


def merged(paths: Iterable[str]) -> Iterator[tuple[int, bytes]]:
    """(index, line) of all parts by index; the same one may come several times."""
    return heapq.merge(*map(_lines, paths), key=lambda item: item[0])


def index_of(item: tuple[int, bytes]) -> int:
    """That of an (index, line)."""
    return item[0]


def whole_batches(
    lines: Iterable[tuple[int, bytes]], block: int
) -> Iterator[tuple[int, list[bytes]]]:
    """(number, its lines) of each batch of which all `block` lines are there."""
    one_each = (next(same) for _, same in itertools.groupby(lines, index_of))
    batches = itertools.groupby(one_each, lambda item: item[0] // block)
    for number, of_batch in batches:
        found = [line for _, line in of_batch]
        if len(found) == block:
            yield number, found


def _contiguous(lines: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """Lines 0, 1, ... up to the first index that is missing; each once.

    The same line may lie in two parts after a stop between writing and removing them.
    """
    expected = 0
    for index, line in lines:
        if index > expected:
            return
        if index == expected:
            yield line
            expected += 1


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_json(path: str, value: Any) -> None:
    with whole_files.replacing(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
