"""Local files: encodings, line ends and each kind of table; a malformed file is one problem with its place."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.builders import as_jsonl, documents_of, problem_of, records_of


def test_byte_order_mark_and_windows_line_ends_leave_no_trace(write):
    assert documents_of(write("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")) == ["one\ntwo\n"]
    # the title must be recognised after a byte order mark, and before a carriage return
    assert len(documents_of(write("b.txt", b"\xef\xbb\xbf = A = \r\n a \r\n = B = \r\n"))) == 2


@pytest.mark.parametrize("head", ["", " = Title = \n"])
def test_unicode_line_separators_are_ordinary_characters(write, head):
    text = head + "one\u2028two\u2029three\u0085four\x0bfive\x0csix\x1cseven\n"  # str.splitlines would cut at each
    assert documents_of(write("a.txt", text)) == [text]


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_file_is_one_problem(write, content):
    path = write("a.txt", content)
    assert problem_of(path).startswith(f"{path}: is empty. ")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pdf", b"%PDF-1.7", "has a suffix other than .txt .md"),
        ("a", b"text", "has a suffix other than .txt .md"),
        ("a.txt", b"text\0text", "holds NUL bytes"),
        ("a.txt", "text".encode("utf-16"), "holds NUL bytes"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text (byte 3)"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", "is not UTF-8 text (byte 0)"),
    ],
)
def test_a_file_that_is_not_text_is_one_problem(write, name, content, reason):
    path = write(name, content)
    assert problem_of(path).startswith(f"{path}: {reason}")


def test_each_kind_of_table_gives_a_document_a_row(write, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["one", "two, or\nmore"]}), tmp_path / "a.parquet")
    write("a.jsonl", as_jsonl({"n": 1, "text": "one"}, {"n": 2, "text": "two, or\nmore"}))
    write("a.json", json.dumps([{"text": "one"}, {"text": "two, or\nmore"}]))
    write("a.csv", 'n,text\n1,one\n2,"two, or\nmore"\n')
    for name in ("a.parquet", "a.jsonl", "a.json", "a.csv"):
        assert documents_of(tmp_path / name) == ["one", "two, or\nmore"], name


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "one"}\n\nnot json\n', "line 3 is not valid JSON (Expecting value). Correct the line."),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two\n', "line 2 is not valid JSON (Invalid control character at)"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', "line 2 holds list, expected an object"),
        ("a.jsonl", b'[{"text": "one"}]\n', "line 1 begins an array. Put one object on each line"),
        ("a.jsonl", b'{"text": "a\x00b"}\n', "line 1 holds NUL bytes"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8 text (byte 13)"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1: text holds half a character"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not valid JSON (nested too deep"),
        ("a.json", b'[{"text": "one"},\n {"text": two}]', "line 2 is not valid JSON (Expecting value). Correct the record"),
        ("a.json", b'[{"text": "one"}\n {"text": "two"}]', "line 2 is not valid JSON (expected ,)"),
        ("a.json", b'[{"text": "one"},\n{"text": "two"', "line 2 is not valid JSON (Expecting ',' delimiter)"),
        ("a.json", b'[{"text": "one"}\n', "line 2 is not valid JSON (expected ,)"),
        ("a.json", b'[{"text": "one"}]\n]', "line 2 is not valid JSON (more after the array)"),
        ("a.json", b'[{"text": "one"}, 7]', "record 2 holds int, expected an object"),
        ("a.json", b"[]", "has no record"),
        ("a.csv", b'text\n1,2,3\n"open\n', "record 1 (line 2) has 3 fields and the header 1"),
        ("a.csv", b'text\none\n"open\n', "record 2 (line 3) is not valid CSV"),
        ("a.csv", b"text\n", "has no record"),
        ("a.csv", b"text\na\x00b\n", "line 2 holds NUL bytes"),
        ("a.parquet", b"not parquet", "is not readable as parquet"),
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text": "two", "text": "2"}\n',
            "line 2 is not valid JSON (an object has the key 'text' twice)",
        ),
        (
            "a.json",
            b'[{"text": "one"},\n {"text": [{"n": 1, "n": 2}]}]',
            "line 2 is not valid JSON (an object has the key 'n' twice)",
        ),
        ("a.csv", b"text,n,text\n1,2,3\n", "has the column 'text' twice. Rename or remove one of them."),
    ],
)
def test_a_malformed_table_is_one_problem_with_file_and_place(write, name, content, reason):
    path = write(name, content)
    assert problem_of(path).startswith(f"{path}: {reason}")


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ([("text", pyarrow.string()), ("text", pyarrow.string())], "text"),
        ([("turns", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("role", pyarrow.string())])))], "role"),
    ],
)
def test_a_parquet_file_with_a_name_twice_is_one_problem(tmp_path, columns, name):
    """A dictionary would keep the last without a word."""
    pyarrow.parquet.write_table(pyarrow.schema(columns).empty_table(), tmp_path / "a.parquet")
    assert problem_of(tmp_path / "a.parquet").startswith(f"{tmp_path / 'a.parquet'}: has the column {name!r} twice")


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pyarrow.array(["a", "x " * 10_000_000]), "record 2 is longer than 16,777,216 bytes"),
        (
            pyarrow.array([1, 10**15], pyarrow.timestamp("ms")),
            "is not readable as parquet after record 0 (date value",
        ),
        (pyarrow.array([1, 10**8], pyarrow.date32()), "is not readable as parquet after record 0 (date value"),
        # a word of 10 MB, in each of 128 records
        (
            pyarrow.DictionaryArray.from_arrays([0] * 128, ["y" * 10_000_000]),
            "cannot be read after record 0 (it takes",
        ),
    ],
    ids=["long record", "time", "date", "dictionary"],
)
def test_what_a_small_parquet_file_makes_too_large_is_one_problem(tmp_path, column, reason):
    table = pyarrow.table({"text": ["one"] * len(column), "other": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert problem_of(tmp_path / "a.parquet").startswith(f"{tmp_path / 'a.parquet'}: {reason}")


def test_the_nulls_that_parquet_has_for_the_keys_of_other_records_are_no_keys(tmp_path):
    calls = [[{"arguments": {"city": "Rome"}}, {"arguments": {"days": 3}}], [{"arguments": {"city": "Oslo"}}]]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "n": [1, None], "calls": calls}), tmp_path / "a.parquet")
    assert [record for _, _, record in records_of(tmp_path / "a.parquet")] == [
        {"text": "a", "n": 1, "calls": calls[0]},
        {"text": "b", "n": None, "calls": calls[1]},
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.jsonl", "line 1 is longer than 16,777,216 bytes"),
        ("a.csv", "line 1 is longer than 16,777,216 bytes"),
        (
            "a.json",
            "line 1 is not valid JSON (Unterminated string starting at). Correct the record, which may have at most 16,777,216",
        ),
    ],
)
def test_a_line_of_100_mb_is_refused(write, name, reason):
    path = write(name, b'{"text": "' + b"x " * 50_000_000)
    assert problem_of(path).startswith(f"{path}: {reason}")


def test_a_table_that_changed_is_read_again(write):
    documents_of(write("a.jsonl", as_jsonl({"text": "old"})))
    assert documents_of(write("a.jsonl", as_jsonl({"text": "new text"}))) == ["new text"]  # and not from a cache


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.jsonl", [b'{"text": "one"}', b"", b'{"text": "t\xc3\xa9a"}']),
        ("a.json", [b"[", b'{"text": "one"},', b'{"text": "t\xc3\xa9a"}', b"]"]),
        ("b.json", [b'{"text":', b'"one"}', b'{"text": "t\xc3\xa9a"}']),  # objects one after the other
        ("a.csv", [b"n,text", b"1,one", b'2,"t\xc3\xa9a"', b""]),
    ],
)
def test_byte_order_mark_and_line_ends_leave_no_trace_in_tables(write, bom, end, name, lines):
    assert documents_of(write(name, bom + end.join(lines))) == ["one", "t\xe9a"]


def test_line_ends_within_a_field_are_equal_too(write):
    assert documents_of(write("a.csv", b'text\r\n"one\r\ntwo"\r\n')) == ["one\ntwo"]


def test_an_array_is_read_across_the_borders_of_chunks(write, monkeypatch):
    records = [{"text": f"{number} \u00e9 {'x' * (number % 40)}", "n": [number, {"a": None}]} for number in range(200)]
    for chunk in (16, 17, 61):
        monkeypatch.setattr("qlora_kit.data.files.CHUNK", chunk)
        path = write("a.json", json.dumps(records, indent=chunk % 2 or None))
        assert [record for _, _, record in records_of(path)] == records
