"""Examples with several images each: JSON lines that name the files."""

from collections.abc import Mapping

from vit22b_transfer import UserError
from vit22b_transfer.data.annotations import jsonl_entries, missing_field, wrong_text
from vit22b_transfer.data.indexed_source import IndexedSource
from vit22b_transfer.data.records import Record, resolve_path
from vit22b_transfer.data.sources import CaptionFiles


class ImageSetSource(IndexedSource):
    """A `.jsonl` file of examples with the same number of images, and their folder.

    A line is `{"file_names": ["left.png", "right.png"], "question": "same colour?",
    "target": "yes"}`. `question` may be missing where the prompt has none; without
    `target` there is nothing to learn or to score. `references` may list all texts that
    count as right; by default `target` alone. `id` names the example in predictions; by
    default its file names do.
    """

    def __init__(
        self,
        split_to_files: Mapping[str, CaptionFiles],
        *,
        images_per_example: int,
        on_bad_record: str = "error",
        paths_outside: bool = False,
    ):
        if images_per_example < 1:
            raise UserError(
                f"images_per_example is {images_per_example}; it must be at least 1."
            )
        self._count = images_per_example
        super().__init__(
            split_to_files, on_bad_record=on_bad_record, paths_outside=paths_outside
        )

    def _resolved(self, files: CaptionFiles) -> CaptionFiles:
        return CaptionFiles(resolve_path(files.captions), resolve_path(files.images))

    def _origin(self, files: CaptionFiles) -> str:
        return str(files.captions)

    def _read(self, split, files, bad):
        folder, records = self._folder(files.images), []
        for where, entry in jsonl_entries(files.captions):
            problem = missing_field(entry, file_names=list) or self._problem(entry)
            if problem:
                bad.add("malformed entry", f"{where}: {problem}")
                continue
            names = entry["file_names"]
            found = [folder.find(name) for name in names]
            paths = [path for path, _ in found if path is not None]
            if len(paths) < len(names):
                name, problem = next(
                    (name, problem)
                    for name, (path, problem) in zip(names, found, strict=True)
                    if path is None
                )
                bad.add(problem, f"{where}: {name!r} is not in {folder.root}")
                continue
            target = entry.get("target", "").strip()
            references = entry.get("references") or ([target] if target else [])
            name = str(entry.get("id", " ".join(names)))
            records.append(
                Record(
                    paths[0],
                    image_id=name,
                    question_id=name,
                    question=entry.get("question", "").strip(),
                    target=target,
                    references=tuple(references),
                    image_paths=tuple(paths),
                )
            )
        return records

    def _problem(self, entry):
        """What is wrong with an entry that has file names; "" if nothing is."""
        names = entry["file_names"]
        if len(names) != self._count:
            return f"{len(names)} file_names, but images_per_example is {self._count}"
        if not all(isinstance(name, str) and name.strip() for name in names):
            return f"file_names {names!r} are no texts"
        for name in names:
            if problem := wrong_text(name):
                return f"file_names: {problem}"
        for field, kind in {"question": str, "target": str, "id": (str, int)}.items():
            if field in entry and (problem := missing_field(entry, **{field: kind})):
                return problem
        references = entry.get("references", [])
        if not isinstance(references, list):
            return "field 'references' is no list of texts"
        for reference in references:
            if problem := wrong_text(reference):
                return f"field 'references': {problem}"
        return ""
