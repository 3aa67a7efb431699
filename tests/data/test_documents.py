"""Running text as documents: joined at titles, without losing a line, and divided into a training and a held-out share."""

import pytest

from qlora_kit.data.documents import hold_out, join_lines
from tests.data.builders import MESSAGES, as_jsonl, documents_of, join_fragments, problem_of, source_of

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
    """Return a function that gives the documents of a table with these rows, and the rule that joined them."""

    def join_rows(rows: list[str]) -> tuple[list[str], str]:
        path = write("rows.jsonl", as_jsonl(*({"text": row} for row in rows)))
        return documents_of(path), source_of(path).find_join_rule()

    return join_rows


def test_rows_are_joined_at_titles_and_not_at_section_headings(join_rows):
    documents, rule = join_rows(WIKITEXT_ROWS)
    assert documents == ["\n = Tides = \n\n The sea rises . \n = = Cause = = \n\n The Moon . \n", " = Salt = \n NaCl . \n"]
    assert "joined" in rule


def test_joining_loses_no_row_and_no_blank_one(join_rows):
    text = "".join(join_rows(WIKITEXT_ROWS)[0])
    assert text.split("\n")[:-1] == [row.rstrip("\n") for row in WIKITEXT_ROWS]


@pytest.mark.parametrize("title", [" = A = ", " = E = mc2 = ", " = C # = ", " = 1984 = "])
def test_a_title_begins_a_document(join_rows, title):
    assert len(join_rows([" = First = ", " text ", title, " text "])[0]) == 2


@pytest.mark.parametrize("line", [" = = Part = = ", " = = = Sub = = = ", "= Bare =", " x = y ", " = open ", " = "])
def test_another_line_begins_no_document(join_rows, line):
    assert len(join_rows([" = First = ", " text ", line, " text "])[0]) == 1


def test_text_before_the_first_title_is_a_document_of_its_own(join_rows):
    documents, _ = join_rows([" foreword ", " = Title = ", " text "])
    assert documents == [" foreword \n", " = Title = \n text \n"]


def test_rows_without_titles_are_one_document_each_unchanged(join_rows):
    assert join_rows(["one\n", "  two", "", "three = 3"]) == (["one\n", "  two", "three = 3"], "one document a row")


def test_a_document_longer_than_a_fragment_is_one_document(write):
    lines = [" = A = \n", *(f"line {number} \n" for number in range(200_000)), " = B = \n", "end\n"]
    assert documents_of(write("a.txt", "".join(lines))) == ["".join(lines[:-2]), "".join(lines[-2:])]
    fragments = list(join_lines(lines))
    assert max(len(text) for text, _ in fragments) < 2**21


def test_a_text_file_without_titles_is_one_document(write):
    assert documents_of(write("a.txt", "one\n\ntwo\n")) == ["one\n\ntwo\n"]


def test_a_text_file_with_titles_is_split_there(write):
    assert documents_of(write("a.txt", " = A = \n a \n = B = \n b \n")) == [" = A = \n a \n", " = B = \n b \n"]


def test_text_without_any_space_for_a_million_characters_is_refused(write):
    for head in ("", " = Title = \n"):
        path = write("a.txt", head + "x" * 2_200_000 + "\n")
        assert problem_of(path) == (
            f"{path}: the text holds more than 1,000,000 characters without a space or line end. Break it into lines of text."
        )
    long_row = write("a.jsonl", as_jsonl({"text": "x" * 1_000_001}))
    assert "line 1: the text holds more than 1,000,000 characters" in problem_of(long_row)


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
def test_a_record_that_is_not_text_is_named_by_its_line(write, wrong):
    problem = problem_of(write("a.jsonl", as_jsonl({"text": "one"}, {"text": "two"}, {"text": wrong})))
    assert f"a.jsonl: line 3: text holds {type(wrong).__name__}, expected text" in problem


def test_records_without_text_are_left_out(write):
    assert documents_of(write("a.jsonl", as_jsonl({"text": "one"}, {"text": None}, {"text": " "}))) == ["one"]


# The held-out share


def held_out(documents: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    train, evaluation = hold_out(lambda: ((document, True) for document in documents), fraction, seed)
    return join_fragments(train()), join_fragments(evaluation())


DOCUMENTS = [f"document {number}" for number in range(40)]


def test_held_out_documents_are_disjoint_complete_and_in_order():
    train, evaluation = held_out(DOCUMENTS, 0.25, seed=1)
    assert (len(train), len(evaluation)) == (30, 10)
    assert sorted(train + evaluation) == sorted(DOCUMENTS)
    assert train == [document for document in DOCUMENTS if document in train]
    assert evaluation == [document for document in DOCUMENTS if document in evaluation]


def test_the_seed_decides_which_documents_are_held_out():
    assert held_out(DOCUMENTS, 0.25, seed=1) == held_out(DOCUMENTS, 0.25, seed=1)
    assert held_out(DOCUMENTS, 0.25, seed=1) != held_out(DOCUMENTS, 0.25, seed=2)


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [10, 40])
def test_neither_share_is_ever_empty(count, fraction):
    train, evaluation = held_out(DOCUMENTS[:count], fraction, seed=1)
    assert train and evaluation


def test_one_long_document_is_cut_near_its_end_at_a_line():
    text = "".join(f"line {number}\n" for number in range(100))
    (train,), (evaluation,) = held_out([text], 0.2, seed=1)
    assert train + evaluation == text
    assert train.endswith("\n") and evaluation.startswith("line ")
    assert len(evaluation) == pytest.approx(0.2 * len(text), abs=len("line 99\n"))


def test_a_few_documents_are_cut_without_losing_text():
    (train,), (evaluation,) = held_out(["one\n", "two\n", "three\n"], 0.3, seed=1)
    assert (train + evaluation).split() == ["one", "two", "three"]


def test_a_document_without_line_ends_is_cut_too():
    assert held_out(["x" * 100], 0.1, seed=1) == (["x" * 90], ["x" * 10])
