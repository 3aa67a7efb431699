"""Hub rows, local files and folders -> documents. Rows are written by hand; nothing is downloaded."""

import ast
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from qlora_kit.config import UserError
from qlora_kit.settings import DataConfig
from qlora_kit.sources import check_source, estimate_tokens, join_rows, load_documents, source_files


@pytest.fixture
def write(tmp_path):
    """write(name, content) -> path of a new file below the test's folder."""

    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def data_config(path, **changes) -> DataConfig:
    return DataConfig(**{"dataset": str(path), "subset": None, "eval_split": None, **changes})


def documents_of(path, **changes) -> list[str]:
    data = data_config(path, **changes)
    return load_documents(data, data.dataset, data.train_split, "data.dataset")[0]


def problem_of(path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        documents_of(path, **changes)
    (problem,) = caught.value.problems
    assert "\n" not in problem and ";" in problem  # one line, with a remedy
    return problem


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


def test_rows_are_joined_at_titles_and_not_at_section_headings():
    documents, rule = join_rows(WIKITEXT_ROWS)
    assert documents == ["\n = Tides = \n\n The sea rises . \n = = Cause = = \n\n The Moon . \n", " = Salt = \n NaCl . \n"]
    assert "joined" in rule


def test_joining_loses_no_row_and_no_blank_one():
    joined = "".join(join_rows(WIKITEXT_ROWS)[0])
    assert joined.split("\n")[:-1] == [row.rstrip("\n") for row in WIKITEXT_ROWS]


@pytest.mark.parametrize("title", [" = A = ", " = E = mc2 = ", " = C # = ", " = 1984 = "])
def test_these_lines_begin_a_document(title):
    assert len(join_rows([" = First = ", " text ", title, " text "])[0]) == 2


@pytest.mark.parametrize("line", [" = = Part = = ", " = = = Sub = = = ", "= Bare =", " x = y ", " = open ", " = "])
def test_these_lines_do_not_begin_a_document(line):
    assert len(join_rows([" = First = ", " text ", line, " text "])[0]) == 1


def test_text_before_the_first_title_is_a_document_of_its_own():
    documents, _ = join_rows([" foreword ", " = Title = ", " text "])
    assert documents == [" foreword \n", " = Title = \n text \n"]


def test_rows_without_titles_are_one_document_each_unchanged():
    rows = ["one\n", "  two", "", "three = 3"]
    assert join_rows(rows) == (rows, "one document a row")


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
    assert "holds no .txt" in problem_of(tmp_path / "pictures")


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_file_is_one_problem(write, content):
    problem = problem_of(write("a.txt", content))
    assert problem.startswith("data.dataset: ") and "a.txt: the file is empty" in problem


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pdf", b"%PDF-1.7", "not a kind of file that is read"),
        ("a", b"text", "not a kind of file that is read"),
        ("a.txt", b"text\0text", "NUL bytes"),
        ("a.txt", "text".encode("utf-16"), "NUL bytes"),
        ("a.txt", b"caf\xe9", "not UTF-8 text (byte 3)"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", "not UTF-8 text (byte 0)"),
    ],
)
def test_what_is_not_text_is_one_problem_with_the_file(write, name, content, reason):
    path = write(name, content)
    problem = problem_of(path)
    assert reason in problem and str(path) in problem


def test_a_missing_file_is_one_problem(tmp_path):
    assert "nowhere.txt: no such file" in problem_of(tmp_path / "nowhere.txt")


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
    problem = problem_of(write(name, content))
    assert problem.startswith("data.text_field: text: ") and "title, body" in problem


@pytest.mark.parametrize("wrong", [5, ["x"], {"x": 1}])
def test_a_record_that_is_not_text_is_named_by_its_number(write, wrong):
    problem = problem_of(write("a.jsonl", as_jsonl({"text": "one"}, {"text": "two"}, {"text": wrong})))
    assert problem.startswith("data.text_field: text: ") and "record 3" in problem and type(wrong).__name__ in problem


def test_records_without_text_are_passed_over(write):
    assert documents_of(write("a.jsonl", as_jsonl({"text": "one"}, {"text": None}, {"text": " "}, {"n": 1}))) == ["one"]


def test_a_table_without_any_text_is_one_problem(write):
    assert "holds no text" in problem_of(write("a.jsonl", as_jsonl({"text": ""})))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "one"}\nnot json\n'),
        ("a.csv", b'text\n1,2,3\n"open\n'),
        ("a.parquet", b"not parquet"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n'),
    ],
)
def test_a_broken_table_is_one_problem_with_the_file(write, name, content):
    path = write(name, content)
    assert str(path) in problem_of(path)


def test_a_table_that_changed_is_read_anew(write):
    documents_of(write("a.jsonl", as_jsonl({"text": "old"})))
    assert documents_of(write("a.jsonl", as_jsonl({"text": "new text"}))) == ["new text"]  # and not from a cache


# What is checked before a model is loaded


def test_the_samples_pass_the_check(root):
    check_source(data_config(root / "samples" / "articles.txt", eval_split=0.1))


@pytest.mark.parametrize("eval_split", [None, 0.1, "train"])
def test_a_local_source_needs_no_split(write, eval_split):
    check_source(data_config(write("a.txt", "text"), eval_split=eval_split))


def test_a_local_source_has_no_named_split(write):
    with pytest.raises(UserError, match=r"data\.eval_split: validation: .*no named splits; .*eval_split=0\.1"):
        check_source(data_config(write("a.txt", "text"), eval_split="validation"))


def test_the_evaluation_file_is_checked_as_the_training_file_is(write):
    train, empty = write("train.txt", "text"), write("eval.txt", "")
    check_source(data_config(train, eval_split=str(train)))
    for dataset in (train, "Salesforce/wikitext"):
        with pytest.raises(UserError, match=r"data\.eval_split: .*eval\.txt: the file is empty"):
            check_source(data_config(dataset, eval_split=str(empty)))


def test_a_hub_source_is_not_asked_for_before_it_is_loaded():
    check_source(DataConfig())


def test_a_hub_source_that_is_not_here_is_one_problem_without_a_network():
    problem = problem_of("nobody/nothing-of-this-name")
    assert "the Hub cannot be reached" in problem and "--dataset FILE" in problem


def test_every_file_of_a_folder_is_checked(write, tmp_path):
    write("books/a.txt", "text")
    write("books/b.txt", b"\0")
    with pytest.raises(UserError, match=r"b\.txt: not text"):
        check_source(data_config(tmp_path / "books"))


def test_suffixes_are_read_in_capitals_too(write, tmp_path):
    path = write("books/A.TXT", "text")
    assert source_files(str(tmp_path / "books")) == [path]
    check_source(data_config(path))


# The length of a run, before anything is read


def test_tokens_are_estimated_at_four_bytes_each(write, tmp_path):
    write("books/a.txt", "x" * 4000)
    write("books/b.txt", "x" * 400)
    assert estimate_tokens(data_config(tmp_path / "books")) == 1100


def test_the_estimate_counts_no_more_than_the_samples_asked_for(write):
    assert estimate_tokens(data_config(write("a.txt", "x" * 40_000), max_train_samples=2, max_length=512)) == 1024


def test_wikitext_2_is_known_and_other_hub_sources_are_not():
    assert estimate_tokens(DataConfig()) == pytest.approx(2_391_884, rel=0.1)  # with the tokenizer of GPT-2, much the same size
    assert estimate_tokens(DataConfig(dataset="nobody/nothing", subset=None)) is None


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
        "from qlora_kit.settings import DataConfig; from qlora_kit.sources import load_documents; "
        "print(load_documents(DataConfig(), 'Salesforce/wikitext', 'validation', 'data.eval_split'))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    documents, rule = ast.literal_eval(done.stdout)
    assert documents == ["\n = Title 1 = \n\n Its text . \n", " = Other = \n More . \n"]
    assert "' = Title = '" in rule


@pytest.mark.parametrize("name", ["typo.txt", "my_data.jsonl", "notes.md"])
def test_missing_file_without_a_folder_is_not_taken_for_a_hub_name(name):
    with pytest.raises(UserError, match=f"data.dataset: {name}: no such file"):
        check_source(DataConfig(dataset=name, eval_split=0.1))
