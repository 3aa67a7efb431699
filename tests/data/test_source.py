"""Hub data sets, local files and folders -> sources; checks and an estimate before anything is read. No test downloads."""

import ast
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from qlora_kit.config import DataSettings
from qlora_kit.data.folder import list_files
from qlora_kit.data.source import check_source, estimate_tokens, open_source
from qlora_kit.errors import UserError
from tests.data.builders import ALPACA, MESSAGES, as_jsonl, data_settings, documents_of, join_fragments, problem_of, records_of


def test_a_folder_is_read_in_the_order_of_its_names(write, tmp_path):
    write("books/b.txt", "second")
    write("books/a.md", "first")
    write("books/c/a.rst", "third")
    write("books/cover.png", b"\0")
    assert documents_of(tmp_path / "books") == ["first", "second", "third"]


def test_a_folder_without_text_is_one_problem(write, tmp_path):
    write("pictures/cover.png", b"\0")
    assert "pictures: has no .txt" in problem_of(tmp_path / "pictures")


def test_a_missing_file_is_one_problem(tmp_path):
    assert "nowhere.txt: does not exist" in problem_of(tmp_path / "nowhere.txt")


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


def test_text_mixed_with_records_is_one_problem(write, tmp_path):
    write("mixed/a.txt", "text")
    write("mixed/b.jsonl", as_jsonl(ALPACA))
    problem = problem_of(tmp_path / "mixed")
    assert problem.startswith("data.dataset: ")
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
    assert join_fragments(source.documents()) == ["one", "two"]
    assert source.find_join_rule() == "one document a file, one document a row"


# The check before a model is loaded


def test_the_samples_pass_the_check(root):
    check_source(data_settings(root / "samples" / "articles.txt", eval_split=0.1))


@pytest.mark.parametrize("eval_split", [None, 0.1, "train"])
def test_a_local_source_needs_no_split(write, eval_split):
    check_source(data_settings(write("a.txt", "text"), eval_split=eval_split))


def test_a_local_source_has_no_named_split(write):
    with pytest.raises(UserError, match=r"data\.eval_split: validation: is a named split, .*eval_split=0\.1"):
        check_source(data_settings(write("a.txt", "text"), eval_split="validation"))


def test_the_evaluation_file_is_checked_as_the_training_file_is(write):
    train, empty = write("train.txt", "text"), write("eval.txt", "")
    check_source(data_settings(train, eval_split=str(write("other.txt", "text"))))
    for dataset in (train, "Salesforce/wikitext"):
        with pytest.raises(UserError, match=r"^.*eval\.txt: is empty"):
            check_source(data_settings(dataset, eval_split=str(empty)))


def test_a_hub_source_is_not_requested_before_it_is_opened():
    check_source(DataSettings())


def test_only_the_files_that_are_used_are_opened(write, tmp_path):
    for name, text in [("train.txt", "ab"), ("notes.txt", "cd"), ("val.txt", "ef"), ("test.txt", ""), (".old.txt", "")]:
        write(f"books/{name}", text)
    data = data_settings(tmp_path / "books", eval_split="validation")
    check_source(data)
    assert estimate_tokens(data) == 1
    for split, expected in [("train", ["cd", "ab"]), ("validation", ["ef"])]:
        assert join_fragments(open_source(data, data.names, split, "data.dataset").documents()) == expected
    with pytest.raises(UserError, match=r"test\.txt: is empty"):
        open_source(data, data.names, "", "--perplexity")  # a folder to measure on is used whole


def test_every_file_of_a_folder_is_checked(write, tmp_path):
    write("books/a.txt", "text")
    write("books/b.txt", b"\0")
    with pytest.raises(UserError, match=r"b\.txt: holds NUL bytes"):
        check_source(data_settings(tmp_path / "books"))


def test_suffixes_are_read_in_capitals_too(write, tmp_path):
    path = write("books/A.TXT", "text")
    assert [file.path for file in list_files(str(tmp_path / "books"), "data.dataset")] == [path]
    check_source(data_settings(path))


@pytest.mark.parametrize("name", ["typo.txt", "my_data.jsonl", "notes.md", "~nobody-here/a.txt", "./" + "x" * 5000])
def test_a_missing_file_is_not_taken_for_a_hub_name(name):
    with pytest.raises(UserError, match=f"data.dataset: {name}: does not exist"):
        check_source(DataSettings(dataset=name, eval_split=0.1))
    with pytest.raises(UserError, match=f"data.eval_split: {name}: does not exist"):
        check_source(DataSettings(eval_split=name))


# The estimate of a run's length


def test_tokens_are_estimated_at_four_bytes_each(write, tmp_path):
    write("books/a.txt", "x" * 4000)
    write("books/b.txt", "x" * 400)
    assert estimate_tokens(data_settings(tmp_path / "books")) == 1100


def test_the_estimate_is_limited_by_max_train_samples(write):
    assert estimate_tokens(data_settings(write("a.txt", "x" * 40_000), max_train_samples=2, max_length=512)) == 1024


def test_wikitext_2_is_known_and_other_hub_sources_are_not():
    assert estimate_tokens(DataSettings()) == pytest.approx(2_391_884, rel=0.1)  # with GPT-2's tokenizer, of much the same size
    assert estimate_tokens(DataSettings(dataset="nobody/nothing", subset=None)) is None


# The Hub


def test_a_hub_source_without_a_network_and_a_copy_is_one_problem():
    problem = problem_of("nobody/nothing-of-this-name")
    assert "the Hub cannot be reached" in problem and "--dataset FILE" in problem


def test_a_hub_name_that_does_not_exist_is_one_problem(monkeypatch):
    """`datasets` raises this error when the Hub answers that it has no such data set."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*arguments, **rest):
        raise DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    problem = problem_of("nobody/nothing")
    start = "data.dataset: nobody/nothing: is neither a file here nor a data set on the Hub. Correct the name"
    assert problem.startswith(start)


def test_a_hub_data_set_is_read_from_the_cache_without_a_network(tmp_path, root):
    """The files of `hf download --repo-type dataset` are enough, though datasets.load_dataset does not find them by name."""
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
