"""What an archive says beside an image: its ids, a question, captions or answers."""

from collections.abc import Iterable, Mapping
from typing import Any

from vit22b_transfer.data.records import half_character

# What these are called, the first that is there being taken. A caption or an answer may
# be a list of them; TFDS writes `captions/text`.
IDS = ("image_id", "question_id")
TEXTS = (
    "caption",
    "captions",
    "captions/text",
    "text",
    "answers",
    "answer",
    "multiple_choice_answer",
)
NAMES = (*IDS, "question", *TEXTS)
# Of each text.
MOST_BYTES = 2**16


def of_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `records.Record` from what stands beside an image, by `NAMES`.

    values: texts, numbers, lists of them, or of mappings with a field `answer` or
      `text` (VQAv2, COCO); None and other names are as if they were not there.

    Of a text that UTF-8 cannot hold, or of more than `MOST_BYTES` characters, there is
    none, and `image_problem` says so.
    """
    problems: list[str] = []
    fields: dict[str, Any] = {
        name: "".join(_good([values.get(name)], problems))
        for name in (*IDS, "question")
    }
    named = (values[name] for name in TEXTS if values.get(name) is not None)
    texts = next(named, [])
    several = texts if isinstance(texts, list | tuple) else [texts]
    fields["references"] = tuple(_good(several, problems))
    if problems:
        fields["image_problem"] = f"a text beside the image {problems[0]}"
    return fields


def _good(values: Iterable[Any], problems: list[str]) -> list[str]:
    """The texts among values that can be used; of the others, why not."""
    good = []
    for text in filter(None, map(_text, values)):
        problem = half_character(text)
        if len(text) > MOST_BYTES:
            problem = f"is longer than {MOST_BYTES:,} characters"
        (problems if problem else good).append(problem or text)
    return good


def _text(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    if isinstance(value, Mapping):
        value = value.get("answer", value.get("text"))
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if value is None or isinstance(value, bool | list | tuple | dict):
        return ""
    return str(value).strip()
