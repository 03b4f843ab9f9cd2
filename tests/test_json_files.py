import pytest

from vit22b_transfer import UserError
from vit22b_transfer.host import json_files

HOSTILE = {
    "cut": (b'{"a": [1,\n 2', "line 2, column 3: malformed JSON"),
    "empty": (b"", "line 1, column 1: malformed JSON"),
    "zeros": (b"\0" * 8, "malformed JSON"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "nested objects": (b'{"a":' * 100_000, "nested too deeply"),
    "digits": (b"[" + b"1" * 5000 + b"]", "4300 digits"),
    "latin-1": (b'["caf\xe9"]', "not UTF-8 text .* at byte 5"),
}


@pytest.mark.parametrize("content, message", HOSTILE.values(), ids=HOSTILE)
def test_what_is_wrong_is_named_with_the_file(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        json_files.read(path, advice="Fetch it again.")
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith(" Fetch it again.")


def test_a_line_is_named_by_its_number():
    with pytest.raises(UserError, match=r"x\.jsonl, line 7, column 2: malformed JSON"):
        json_files.parse("{'a': 1}", "x.jsonl", line=7)


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        json_files.read(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        json_files.read(tmp_path)


def test_an_object_is_an_object(tmp_path):
    path = tmp_path / "some.json"
    path.write_text('\N{BYTE ORDER MARK}{"a": 1}', encoding="utf-8")
    assert json_files.read_object(path) == {"a": 1}
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"holds no JSON object but \[1, 2\]"):
        json_files.read_object(path)
