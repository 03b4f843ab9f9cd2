"""Texts of classes: cleaned names in cleaned templates, behind a split's images.

The rules are those of big_vision's and CLIP's zero-shot evaluations. A split of images
whose captions are class names becomes one of images and prompts: a model of image-text
pairs embeds both, and a metric (`evaluation.zero_shot`) finds for each image the class
whose prompts are nearest.
"""

import dataclasses
import difflib
import re
import string
from collections.abc import Sequence
from typing import Any

from vit22b_transfer import UserError
from vit22b_transfer.data.indexed_source import IndexedSource
from vit22b_transfer.data.records import BadRecords, Record, quoted

NAME_FIELD = "{}"
# What stands in `question_id` of a row that is a prompt and no image.
PROMPT = "prompt"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cleaned(text: str, *, keep: str = "") -> str:
    """`text` in lower case, without punctuation, one space between words.

    An underscore is a space. keep: a text that stays as it is, such as "{}".
    """
    text = text.replace("_", " ")
    parts = text.split(keep) if keep else [text]
    text = keep.join(part.translate(_NO_PUNCTUATION) for part in parts)
    return re.sub(r"\s+", " ", text.lower()).strip()


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The texts of each class: its cleaned name in every cleaned template.

    Raises:
      UserError: for no template or one without "{}", fewer than two classes, a name
        that is empty when cleaned, or two that are then equal.
    """
    if not templates:
        raise UserError("no template for class names; the least is '{}', the name.")
    for template in templates:
        if template.count(NAME_FIELD) != 1:
            raise UserError(
                f"template {template!r} must hold {NAME_FIELD} once, where the name "
                "of a class stands."
            )
    if len(class_names) < 2:
        raise UserError(
            f"{len(class_names)} class names: there must be two or more to choose from."
        )
    seen: dict[str, str] = {}
    for name in class_names:
        clean = cleaned(name)
        if not clean:
            raise UserError(
                f"class name {quoted(name)} has no letters or digits; give it a name."
            )
        if clean in seen:
            raise UserError(
                f"class names {seen[clean]!r} and {name!r} are one text, {clean!r}, "
                "when cleaned; rename one of them."
            )
        seen[clean] = name
    forms = [cleaned(template, keep=NAME_FIELD) for template in templates]
    # Not str.format: a template is a text of the user's.
    return [[form.replace(NAME_FIELD, clean) for form in forms] for clean in seen]


class ClassPromptsSource(IndexedSource):
    """The images of another source, whose targets are class names, and the prompts.

    Each image keeps its place; its `target` becomes the first prompt of its class and
    its `references` the name of its class. Behind them stands a record without an image
    for each prompt of each class: `question_id` is "prompt", `references` its class.

    class_names: all classes there are to choose from, in the split or not.

    Raises:
      UserError: as of `prompts`; when a split is read, for an image of another class.
    """

    def __init__(
        self,
        images: IndexedSource,
        class_names: Sequence[str],
        templates: Sequence[str],
    ):
        texts = prompts(class_names, templates)
        self._images = images
        self._prompts = dict(zip(class_names, texts, strict=True))
        # The policy of bad records is that of the images' own source.
        super().__init__(images._split_to_files)

    def _resolved(self, files: Any) -> Any:
        return self._images._resolved(files)

    def _origin(self, files: Any) -> str:
        return self._images._origin(files)

    def report(self) -> dict[str, dict[str, int]]:
        """Records that the images' source skipped: split -> reason -> count."""
        return self._images.report()

    def _read(self, split: str, files: Any, bad: BadRecords) -> list[Record]:
        del files, bad
        records = []
        for record in self._images._load(split):
            if record.target not in self._prompts:
                names = list(self._prompts)
                near = difflib.get_close_matches(record.target, names, n=3, cutoff=0.0)
                raise UserError(
                    f"image {record.image_id!r} has the class {record.target!r}, which "
                    f"is none of the {len(names)} class names; nearest: "
                    f"{', '.join(map(repr, near))}. Correct the label, or name the "
                    "class."
                )
            records.append(
                dataclasses.replace(
                    record,
                    target=self._prompts[record.target][0],
                    references=(record.target,),
                )
            )
        for name, texts in self._prompts.items():
            for text in texts:
                records.append(
                    Record(
                        image_path="",
                        image_id="",
                        question_id=PROMPT,
                        target=text,
                        references=(name,),
                    )
                )
        return records
