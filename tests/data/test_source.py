"""Hub rows, local files and folders -> documents. Rows are written by hand; nothing is downloaded."""

import ast
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from qlora_kit.config import DataSettings
from qlora_kit.data.documents import join_lines
from qlora_kit.data.source import check_source, estimate_tokens, list_source_files, open_source
from qlora_kit.errors import UserError
from tests.written_out import joined


@pytest.fixture
def write(tmp_path):
    """write(name, content) -> path of a new file below the test's folder."""

    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def data_config(path, **changes) -> DataSettings:
    return DataSettings(**{"dataset": str(path), "subset": None, "eval_split": None, **changes})


def documents_of(path, **changes) -> list[str]:
    source = open_source(data_config(path, **changes), [str(path)], "train", "data.dataset")
    assert source.is_text
    return joined(source.documents())


def rule_of(path, **changes) -> str:
    return open_source(data_config(path, **changes), [str(path)], "train", "data.dataset").find_join_rule()


def records_of(path, **changes) -> list[tuple[str, str, dict]]:
    source = open_source(data_config(path, **changes), [str(path)], "train", "data.dataset")
    return [(place, part.format, record) for part, place, record in source.records()]


def problem_of(path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        documents_of(path, **changes)
    (problem,) = caught.value.problems
    assert "\n" not in str(problem) and problem.remedy
    return str(problem)


# Wikitext's rows

WIKITEXT_ROWS = [
    "",
    " = Tides = \n",
    "",
    " The sea rises . \n",
    " = = Cause = = \n",
    "",
    " The Moon . \n",
    " = Salt = \n",
    " NaCl . \n",
]


@pytest.fixture
def join_rows(write):
    """join_rows(rows) -> the documents of a table that has them as rows, and the rule that joined them."""

    def join_rows(rows: list[str]) -> tuple[list[str], str]:
        path = write("rows.jsonl", as_jsonl(*({"text": row} for row in rows)))
        return documents_of(path), rule_of(path)

    return join_rows


def test_rows_are_joined_at_titles_and_not_at_section_headings(join_rows):
    documents, rule = join_rows(WIKITEXT_ROWS)
    assert documents == ["\n = Tides = \n\n The sea rises . \n = = Cause = = \n\n The Moon . \n", " = Salt = \n NaCl . \n"]
    assert "joined" in rule


def test_joining_loses_no_row_and_no_blank_one(join_rows):
    joined = "".join(join_rows(WIKITEXT_ROWS)[0])
    assert joined.split("\n")[:-1] == [row.rstrip("\n") for row in WIKITEXT_ROWS]


@pytest.mark.parametrize("title", [" = A = ", " = E = mc2 = ", " = C # = ", " = 1984 = "])
def test_these_lines_begin_a_document(join_rows, title):
    assert len(join_rows([" = First = ", " text ", title, " text "])[0]) == 2


@pytest.mark.parametrize("line", [" = = Part = = ", " = = = Sub = = = ", "= Bare =", " x = y ", " = open ", " = "])
def test_these_lines_do_not_begin_a_document(join_rows, line):
    assert len(join_rows([" = First = ", " text ", line, " text "])[0]) == 1


def test_text_before_the_first_title_is_a_document_of_its_own(join_rows):
    documents, _ = join_rows([" foreword ", " = Title = ", " text "])
    assert documents == [" foreword \n", " = Title = \n text \n"]


def test_rows_without_titles_are_one_document_each_unchanged(join_rows):
    assert join_rows(["one\n", "  two", "", "three = 3"]) == (["one\n", "  two", "three = 3"], "one document a row")


def test_a_document_longer_than_what_is_read_at_once_is_one_document(write):
    lines = [" = A = \n", *(f"line {number} \n" for number in range(200_000)), " = B = \n", "end\n"]
    assert documents_of(write("a.txt", "".join(lines))) == ["".join(lines[:-2]), "".join(lines[-2:])]
    fragments = list(join_lines(lines))
    assert max(len(text) for text, _ in fragments) < 2**21


# Text files


def test_a_text_file_without_titles_is_one_document(write):
    assert documents_of(write("a.txt", "one\n\ntwo\n")) == ["one\n\ntwo\n"]


def test_a_text_file_with_titles_is_split_there(write):
    assert documents_of(write("a.txt", " = A = \n a \n = B = \n b \n")) == [" = A = \n a \n", " = B = \n b \n"]


def test_byte_order_mark_and_windows_line_ends_leave_no_trace(write):
    assert documents_of(write("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")) == ["one\ntwo\n"]
    # the title must be recognized behind a byte order mark, and before a carriage return
    assert len(documents_of(write("b.txt", b"\xef\xbb\xbf = A = \r\n a \r\n = B = \r\n"))) == 2


@pytest.mark.parametrize("head", ["", " = Title = \n"])
def test_unicode_line_separators_are_ordinary_characters(write, head):
    text = head + "one\u2028two\u2029three\u0085four\x0bfive\x0csix\x1cseven\n"  # str.splitlines would cut at each
    assert documents_of(write("a.txt", text)) == [text]


def test_a_folder_is_read_in_the_order_of_its_names(write, tmp_path):
    write("books/b.txt", "second")
    write("books/a.md", "first")
    write("books/c/a.rst", "third")
    write("books/cover.png", b"\0")
    assert documents_of(tmp_path / "books") == ["first", "second", "third"]


def test_a_folder_without_text_is_one_problem(write, tmp_path):
    write("pictures/cover.png", b"\0")
    assert "pictures: has no .txt" in problem_of(tmp_path / "pictures")


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
def test_what_is_not_text_is_one_problem_with_the_file(write, name, content, reason):
    path = write(name, content)
    problem = problem_of(path)
    assert problem.startswith(f"{path}: {reason}")


def test_a_missing_file_is_one_problem(tmp_path):
    assert "nowhere.txt: does not exist" in problem_of(tmp_path / "nowhere.txt")


# Tables


def as_jsonl(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_each_kind_of_table_gives_a_document_a_row(write, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["one", "two, or\nmore"]}), tmp_path / "a.parquet")
    write("a.jsonl", as_jsonl({"n": 1, "text": "one"}, {"n": 2, "text": "two, or\nmore"}))
    write("a.json", json.dumps([{"text": "one"}, {"text": "two, or\nmore"}]))
    write("a.csv", 'n,text\n1,one\n2,"two, or\nmore"\n')
    for name in ("a.parquet", "a.jsonl", "a.json", "a.csv"):
        assert documents_of(tmp_path / name) == ["one", "two, or\nmore"], name


def test_a_table_of_wikitext_rows_is_joined_at_titles(write):
    rows = [{"text": row} for row in WIKITEXT_ROWS]
    assert len(documents_of(write("a.jsonl", as_jsonl(*rows)))) == 2


def test_the_text_column_can_be_named(write):
    path = write("a.jsonl", as_jsonl({"text": "no", "body": "yes"}))
    assert documents_of(path, text_field="body") == ["yes"]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", '{"title": "x", "body": "y"}\n'), ("a.csv", "title,body\nx,y\n")])
def test_a_missing_text_column_is_one_problem_that_lists_the_others(write, name, content):
    path = write(name, content)
    for changes in ({}, {"format": "text"}):
        problem = problem_of(path, **changes)
        assert problem.startswith(f"{path}: ") and "title, body" in problem and "(data.text_field)" in problem


def test_a_record_without_the_text_of_those_before_it_is_one_problem(write):
    problem = problem_of(write("a.jsonl", as_jsonl({"text": "one"}, MESSAGES)))
    assert "a.jsonl: line 2: text is missing among the keys messages" in problem


@pytest.mark.parametrize("wrong", [5, ["x"], {"x": 1}])
def test_a_record_that_is_not_text_is_named_by_its_number(write, wrong):
    problem = problem_of(write("a.jsonl", as_jsonl({"text": "one"}, {"text": "two"}, {"text": wrong})))
    assert f"a.jsonl: line 3: text holds {type(wrong).__name__}, expected text" in problem


def test_records_without_text_are_passed_over(write):
    assert documents_of(write("a.jsonl", as_jsonl({"text": "one"}, {"text": None}, {"text": " "}))) == ["one"]


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
        ("a.json", b'[{"text": "one"},\n {"text": two}]', "line 2 is not valid JSON (Expecting value)"),
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
    ],
)
def test_a_broken_table_is_one_problem_with_file_and_place(write, name, content, reason):
    path = write(name, content)
    problem = problem_of(path)
    assert problem.startswith(f"{path}: {reason}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.jsonl", "line 1 is longer than 16,777,216 bytes"),
        ("a.csv", "line 1 is longer than 16,777,216 bytes"),
        ("a.json", "the record on line 1 is longer than 16,777,216 characters"),
    ],
)
def test_a_line_of_100_mb_is_refused(write, name, reason):
    path = write(name, b'{"text": "' + b"x " * 50_000_000)
    assert reason in problem_of(path)


def test_text_without_any_space_for_a_million_characters_is_refused(write):
    assert "1,000,000 characters without a space or line end" in problem_of(write("a.txt", "x" * 2_200_000))
    assert "line 1: the text holds more than 1,000,000 characters" in problem_of(
        write("a.jsonl", as_jsonl({"text": "x" * 1_000_001}))
    )


def test_a_table_that_changed_is_read_anew(write):
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


def test_an_array_is_read_over_the_borders_of_what_is_read_at_once(write, monkeypatch):
    records = [{"text": f"{number} \u00e9 {'x' * (number % 40)}", "n": [number, {"a": None}]} for number in range(200)]
    for chunk in (16, 17, 61):
        monkeypatch.setattr("qlora_kit.data.files.CHUNK", chunk)
        path = write("a.json", json.dumps(records, indent=chunk % 2 or None))
        assert [record for _, _, record in records_of(path)] == records


# Records

ALPACA = {"instruction": "Say hi", "input": "", "output": "Hi"}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def test_records_come_with_their_place_and_format(write):
    path = write("a.jsonl", as_jsonl(ALPACA) + "\n" + as_jsonl(ALPACA))
    assert records_of(path) == [("line 1", "alpaca", ALPACA), ("line 3", "alpaca", ALPACA)]
    path = write("a.json", json.dumps([MESSAGES]))
    assert records_of(path) == [("record 1", "messages", MESSAGES)]


def test_another_format_in_the_same_file_is_one_problem_with_its_line(write):
    path = write("a.jsonl", as_jsonl(ALPACA, ALPACA, MESSAGES))
    with pytest.raises(UserError, match=r"a\.jsonl: line 3: the format is messages and that of the records before it alpaca"):
        records_of(path)


def test_files_of_a_folder_may_be_of_different_formats(write, tmp_path):
    write("chats/a.jsonl", as_jsonl(ALPACA))
    write("chats/b.json", json.dumps([MESSAGES]))
    assert [kind for _, kind, _ in records_of(tmp_path / "chats")] == ["alpaca", "messages"]


def test_text_beside_records_is_one_problem(write, tmp_path):
    write("mixed/a.txt", "text")
    write("mixed/b.jsonl", as_jsonl(ALPACA))
    problem = problem_of(tmp_path / "mixed")
    assert "a.txt: is running text, and " in problem and "b.jsonl holds alpaca records" in problem


def test_an_unknown_record_is_one_problem_with_its_place_and_keys(write):
    problem = problem_of(write("a.jsonl", as_jsonl({"question": "?", "answer": "!"})))
    assert "a.jsonl: line 1: the keys are question, answer, expected messages" in problem


def test_a_text_file_is_not_read_as_records(write):
    problem = problem_of(write("a.txt", "text"), format="alpaca")
    assert problem.startswith("data.format: alpaca: ") and "a.txt, which is running text" in problem


def test_several_sources_are_read_in_their_order(write):
    paths = [str(write("b.txt", "one")), str(write("a.jsonl", as_jsonl({"text": "two"})))]
    data = DataSettings(dataset=paths, subset=None, eval_split=None)
    check_source(data)
    source = open_source(data, data.names, "train", "data.dataset")
    assert (joined(source.documents()), source.find_join_rule()) == (["one", "two"], "one document a file, one document a row")


# What is checked before a model is loaded


def test_the_samples_pass_the_check(root):
    check_source(data_config(root / "samples" / "articles.txt", eval_split=0.1))


@pytest.mark.parametrize("eval_split", [None, 0.1, "train"])
def test_a_local_source_needs_no_split(write, eval_split):
    check_source(data_config(write("a.txt", "text"), eval_split=eval_split))


def test_a_local_source_has_no_named_split(write):
    with pytest.raises(UserError, match=r"data\.eval_split: validation: is a named split, .*eval_split=0\.1"):
        check_source(data_config(write("a.txt", "text"), eval_split="validation"))


def test_the_evaluation_file_is_checked_as_the_training_file_is(write):
    train, empty = write("train.txt", "text"), write("eval.txt", "")
    check_source(data_config(train, eval_split=str(train)))
    for dataset in (train, "Salesforce/wikitext"):
        with pytest.raises(UserError, match=r"^.*eval\.txt: is empty"):
            check_source(data_config(dataset, eval_split=str(empty)))


def test_a_hub_source_is_not_asked_for_before_it_is_loaded():
    check_source(DataSettings())


def test_a_hub_source_that_is_not_here_is_one_problem_without_a_network():
    problem = problem_of("nobody/nothing-of-this-name")
    assert "the Hub cannot be reached" in problem and "--dataset FILE" in problem


def test_a_hub_name_that_does_not_exist_is_one_problem(monkeypatch):
    """What the library says when the Hub answers that it knows no such data set."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def unknown(*arguments, **rest):
        raise DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(datasets, "load_dataset", unknown)
    problem = problem_of("nobody/nothing")
    assert problem.startswith("data.dataset: nobody/nothing: is neither a file here nor a data set on the Hub. Correct the name")


def test_every_file_of_a_folder_is_checked(write, tmp_path):
    write("books/a.txt", "text")
    write("books/b.txt", b"\0")
    with pytest.raises(UserError, match=r"b\.txt: holds NUL bytes"):
        check_source(data_config(tmp_path / "books"))


def test_suffixes_are_read_in_capitals_too(write, tmp_path):
    path = write("books/A.TXT", "text")
    assert list_source_files(str(tmp_path / "books")) == [path]
    check_source(data_config(path))


# The length of a run, before anything is read


def test_tokens_are_estimated_at_four_bytes_each(write, tmp_path):
    write("books/a.txt", "x" * 4000)
    write("books/b.txt", "x" * 400)
    assert estimate_tokens(data_config(tmp_path / "books")) == 1100


def test_the_estimate_counts_no_more_than_the_samples_asked_for(write):
    assert estimate_tokens(data_config(write("a.txt", "x" * 40_000), max_train_samples=2, max_length=512)) == 1024


def test_wikitext_2_is_known_and_other_hub_sources_are_not():
    assert estimate_tokens(DataSettings()) == pytest.approx(2_391_884, rel=0.1)  # with the tokenizer of GPT-2, much the same size
    assert estimate_tokens(DataSettings(dataset="nobody/nothing", subset=None)) is None


def test_hub_data_set_is_read_from_the_cache_without_a_network(tmp_path, root):
    """What `hf download --repo-type dataset` leaves is enough: datasets.load_dataset by name would not find it."""
    repository, revision = tmp_path / "hub" / "datasets--Salesforce--wikitext", "0" * 40
    data = repository / "snapshots" / revision / "wikitext-2-raw-v1"
    data.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    splits = ["train", "validation"]
    for number, split in enumerate(splits):
        rows = {"text": ["", f" = Title {number} = \n", "", " Its text . \n", " = Other = \n", " More . \n"]}
        pyarrow.parquet.write_table(pyarrow.table(rows), data / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*\n" for split in splits)
    (data.parent / "README.md").write_text(f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}---\n")
    code = (
        "from qlora_kit.config import DataSettings; from qlora_kit.data.source import open_source; "
        "source = open_source(DataSettings(), ['Salesforce/wikitext'], 'validation', 'data.eval_split'); "
        "print(([text for text, _ in source.documents()], source.find_join_rule()))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    documents, rule = ast.literal_eval(done.stdout)
    assert documents == ["\n = Title 1 = \n\n Its text . \n", " = Other = \n More . \n"]
    assert "' = Title = '" in rule


@pytest.mark.parametrize("name", ["typo.txt", "my_data.jsonl", "notes.md"])
def test_missing_file_without_a_folder_is_not_taken_for_a_hub_name(name):
    with pytest.raises(UserError, match=f"data.dataset: {name}: does not exist"):
        check_source(DataSettings(dataset=name, eval_split=0.1))
