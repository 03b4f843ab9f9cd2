"""Text files in lines: where they end, what CSV rows hold, which line is named."""

import csv
import io
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit22b_transfer import UserError
from vit22b_transfer.data import annotations, records, text_files

# All at which `str.splitlines` ends a line, but for \n, \r and \r\n.
NO_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
CAPTION = "a red" + "cube".join(NO_ENDS) + "on the floor"


def caption_lines(path):
    return list(annotations.read_caption_lines(path, records.BadRecords("error", "")))


def written(folder, kind, captions, end="\n"):
    """A caption file of a kind, whose lines end with `end`."""
    rows = {
        "jsonl": [
            json.dumps({"file_name": "a.jpg", "caption": caption}, ensure_ascii=False)
            for caption in captions
        ],
        "csv": ["file_name,caption", *(f"a.jpg,{caption}" for caption in captions)],
        "txt": [f"a.jpg\t{caption}" for caption in captions],
    }[kind]
    path = folder / f"c.{kind}"
    path.write_bytes((end.join(rows) + end).encode())
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_caption_with_any_character_that_ends_no_line_stays_whole(
    tmp_path, kind, end
):
    path = written(tmp_path, kind, [CAPTION, "a cat"], end)
    found = caption_lines(path)
    first = 2 if kind == "csv" else 1
    assert found == [
        (f"line {first}", "a.jpg", CAPTION),
        (f"line {first + 1}", "a.jpg", "a cat"),
    ]
    assert list(annotations.read_texts([path])) == ([CAPTION, "a cat"])


def test_a_malformed_line_is_named_as_an_editor_counts(tmp_path):
    path = tmp_path / "c.jsonl"
    line = json.dumps({"file_name": "a.jpg", "caption": CAPTION}, ensure_ascii=False)
    path.write_text(f'{line}\n\n{line}\n{{"file_name": \n', encoding="utf-8")
    with pytest.raises(UserError, match=r"c\.jsonl, line 4, column 15: malformed"):
        caption_lines(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_ends_of_old_macs_are_refused_not_taken_for_one_line(tmp_path, kind):
    path = written(tmp_path, kind, ["a", "b"], "\r")
    with pytest.raises(UserError, match=r"end with \\r alone"):
        caption_lines(path)


# CSV


FIELDS = st.text(st.sampled_from("a \",\n\x85\u2028\0;'\t"), max_size=6)


@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=5),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_pythons_csv_writes_is_read_with_the_line_of_each_row(
    tmp_path_factory, rows, quoting, end
):
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator=end).writerows(rows)
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    path.write_bytes(out.getvalue().encode())
    if not out.getvalue().strip():
        return  # a file of white space is refused
    expected, line = [], 1
    for row in rows:
        expected.append((line, list(row)))
        line += 1 + sum(field.count("\n") for field in row)
    assert list(text_files.csv_rows(path)) == expected


@pytest.mark.parametrize(
    "rows, line",
    [
        ('a.jpg,x\nb.jpg,"open\nc.jpg,y\n', 3),
        ('a.jpg,x\nb.jpg,"open\nc.jpg,"y, z"\nd.jpg,w\n', 3),
        ('a.jpg,x\nb.jpg,"open\nc.jpg,a screen of 5"\nd.jpg,w\n', 3),
        ('a.jpg,"two\nlines"\nb.jpg,"open\n', 4),
        ('"a.jpg",x\n"b\n.jpg","open', 4),
        ('a.jpg,"a "red" cube"\n', 2),
        ('a.jpg,"' + "x" * 200_000 + "\n", 2),
    ],
    ids=[
        "to the end",
        "to the next quote",
        "to a quote at the end of a row",
        "behind a field of two lines",
        "in the second line of a row",
        "within a field",
        "beyond the limit of Python's csv",
    ],
)
def test_a_quote_that_is_not_closed_is_an_error_that_names_its_line(
    tmp_path, rows, line
):
    path = tmp_path / "c.csv"
    path.write_text(f"file_name,caption\n{rows}")
    with pytest.raises(UserError, match=rf"c\.csv, line {line}: .*quote.* opens"):
        list(annotations.read_caption_lines(path, records.BadRecords("skip", "")))


def test_real_fields_of_several_lines_and_of_any_length_are_read(tmp_path):
    path = tmp_path / "c.csv"
    long = "long " * 40_000
    path.write_bytes(
        b'file_name,caption\r\na.jpg,"a cube,\r\nred, see b.jpg"\r\n'
        + f'b.jpg,"{long}"\r\nc.jpg,5" wide\0\r\n'.encode()
    )
    assert caption_lines(path) == [
        ("line 2", "a.jpg", "a cube,\nred, see b.jpg"),
        ("line 4", "b.jpg", long),
        ("line 5", "c.jpg", '5" wide\0'),
    ]


@pytest.mark.parametrize(
    "header", ["name,caption", "file_name,caption,caption", '""', "file_name;caption"]
)
def test_a_header_without_each_column_once_is_refused(tmp_path, header):
    path = tmp_path / "c.csv"
    path.write_text(f"{header}\na.jpg,x,y\n")
    with pytest.raises(UserError, match=r"c\.csv: the header must have columns"):
        caption_lines(path)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        text_files.read_text(tmp_path / "none.txt")
    with pytest.raises(UserError, match="is not a file"):
        text_files.read_text(pathlib.Path(tmp_path))
    (tmp_path / "c.txt").write_bytes("a\tb".encode("utf-16"))
    with pytest.raises(UserError, match=r"c\.txt is not UTF-8 text"):
        text_files.read_text(tmp_path / "c.txt")
