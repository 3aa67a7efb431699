"""Running text as documents: Wikitext's lines joined at its titles, and a share held out, a fragment at a time.

Wikitext's rows are lines: they are joined to documents at its ` = Title = ` lines. In any other table of text a row is a
document, and a text file without such lines is one document. A document may be larger than memory: it is a run of fragments,
the last of which says that it ends there.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from qlora_kit.data.files import Row, read_text, read_text_lines
from qlora_kit.data.formats import recognise_format, require_text
from qlora_kit.data.tokenizing import LONGEST_WORD, Fragment, check_word_length
from qlora_kit.errors import BadRecord, UserError

Fragments = Callable[[], Iterator[Fragment]]  # from the beginning at each call

TITLE = re.compile(r"^ = [^=](.*[^=])? = $")  # ` = Title = `, and not ` = = Section = = `
AT_TITLES, A_ROW, A_FILE = "rows joined at ' = Title = ' lines", "one document a row", "one document a file"
MIN_DOCUMENTS_TO_HOLD_OUT = 10  # documents: with fewer, a share is cut off the end of the text
FRAGMENT = 2**20  # characters
TEXTS = ("text", "instruction")  # formats that differ by what the text says, not by the keys


@dataclass(frozen=True)
class SourceFile:
    """A text file, or a table: a file of records, or one split of a Hub data set."""

    name: str  # the path, or the data set and its split: the key of messages
    fingerprint: str  # of the content
    path: Path | None  # of a text file
    rows: Callable[[], Iterator[Row]]  # of a table, from the beginning at each call
    format: str = "text"


@contextmanager
def locate_errors(name: str, place: str) -> Iterator[None]:
    """Say where a bad record is."""
    try:
        yield
    except BadRecord as error:
        raise UserError(name, None, f"{place}: {error}", "correct the record, or remove it") from None


def check_format(record: dict[str, Any], expected: str, text_field: str) -> None:
    """
    Raises:
        BadRecord: the record is of another format than `expected`.
    """
    found = recognise_format(record, text_field)
    if found != expected and not {found, expected} <= set(TEXTS):
        raise BadRecord(f"the format is {found} and that of the records before it {expected}")


def read_documents(part: SourceFile, text_field: str) -> Iterator[Fragment]:
    """Documents that hold more than blanks."""
    if part.path:
        if find_join_rule(part, text_field) == AT_TITLES:
            return join_lines(read_text_lines(part.path))
        return _read_as_one_document(part.path)
    if find_join_rule(part, text_field) == AT_TITLES:
        return join_lines(text.rstrip("\r\n") + "\n" for text in _read_texts(part, text_field))
    return ((text, True) for text in _read_texts(part, text_field) if text.strip())


@cache  # a pass over the whole where there is no title
def find_join_rule(part: SourceFile, text_field: str) -> str:
    """How the rows of a part become documents."""
    if part.path:
        return AT_TITLES if _has_title(read_text_lines(part.path)) else A_FILE
    return AT_TITLES if _has_title(text.rstrip("\r\n") for text in _read_texts(part, text_field)) else A_ROW


def _read_texts(part: SourceFile, text_field: str) -> Iterator[str]:
    """The text of each row of a table; one without a value is empty."""
    for place, record in part.rows():
        with locate_errors(part.name, place):
            text = _read_text_field(record, text_field)
        yield text


def _read_text_field(record: dict[str, Any], text_field: str) -> str:
    if text_field not in record:
        raise BadRecord(f"{text_field} is missing among the keys {', '.join(map(str, record)) or 'none'} (data.text_field)")
    if record[text_field] is None:
        return ""
    text = require_text(record[text_field], text_field)
    check_word_length(text)
    return text


def _has_title(lines: Iterable[str]) -> bool:
    return any(line.startswith(" = ") and TITLE.match(line) for line in lines)


def join_lines(lines: Iterable[str]) -> Iterator[Fragment]:
    """Lines with their ends, joined to documents that begin at titles; every character of the lines is kept."""
    waiting: list[str] = []
    characters, has_words = 0, False
    for line in lines:
        if has_words and line.startswith(" = ") and TITLE.match(line):
            yield "".join(waiting), True
            waiting, characters, has_words = [], 0, False
        elif characters > FRAGMENT:
            yield "".join(waiting), False
            waiting, characters = [], 0
        waiting.append(line)
        characters += len(line)
        has_words = has_words or not line.isspace()
    if has_words:
        text = "".join(waiting)
        yield text if text.endswith("\n") else text + "\n", True


def _read_as_one_document(path: Path) -> Iterator[Fragment]:
    """A text without titles.

    Raises:
        UserError: more than LONGEST_WORD characters without a space.
    """

    def checked() -> Iterator[str]:
        for chunk in read_text(path):
            if len(chunk) > LONGEST_WORD and not re.search(r"\s", chunk):
                problem = f"holds {LONGEST_WORD:,} characters without a space or line end"
                raise UserError(path, None, problem, "break it into lines of text")
            yield chunk

    return _end_last(checked())


def _end_last(texts: Iterable[str]) -> Iterator[Fragment]:
    """Texts as the fragments of one document."""
    for text, following in pairwise(chain(texts, [""])):
        yield text, not following


def hold_out(documents: Fragments, fraction: float, seed: int) -> tuple[Fragments, Fragments]:
    """Whole documents drawn by seed for evaluation; the rest, in their order, for training.

    A source with fewer than MIN_DOCUMENTS_TO_HOLD_OUT documents is cut near its end instead, at a line's end.
    """
    count = sum(ends for _, ends in documents())
    if count >= MIN_DOCUMENTS_TO_HOLD_OUT:
        chosen = choose_held_out(count, fraction, seed)
        return (lambda: _select_documents(documents(), chosen, False)), (lambda: _select_documents(documents(), chosen, True))
    cut = _find_cut(documents, fraction)
    return (lambda: _end_last(_slice_texts(_join_documents(documents()), 0, cut))), (
        lambda: _end_last(_slice_texts(_join_documents(documents()), cut, None))
    )


def choose_held_out(count: int, fraction: float, seed: int) -> set[int]:
    """Numbers of the documents or records held out, of `count`: at least one, and not all."""
    share = min(max(1, round(fraction * count)), count - 1)
    return set(random.Random(seed).sample(range(count), share))


def _select_documents(fragments: Iterable[Fragment], numbers: set[int], wanted: bool) -> Iterator[Fragment]:
    number = 0
    for text, ends in fragments:
        if (number in numbers) == wanted:
            yield text, ends
        number += ends


def _join_documents(fragments: Iterable[Fragment]) -> Iterator[str]:
    """All documents as one text, a line's end between them."""
    between = ""
    for text, ends in fragments:
        yield between + text
        between = "\n" if ends else ""


def _find_cut(documents: Fragments, fraction: float) -> int:
    """Characters before the cut: behind the last line end of the training share, where there is one."""
    wanted = round(sum(map(len, _join_documents(documents()))) * (1 - fraction))
    cut = done = 0
    for text in _join_documents(documents()):
        if (at := text.rfind("\n", 0, max(wanted - done, 0))) >= 0:
            cut = done + at + 1
        done += len(text)
    return cut or wanted


def _slice_texts(texts: Iterable[str], begin: int, end: int | None) -> Iterator[str]:
    """The characters from `begin` to `end` of texts that follow each other."""
    done = 0
    for text in texts:
        part = text[max(begin - done, 0) : None if end is None else max(end - done, 0)]
        done += len(text)
        if part:
            yield part
