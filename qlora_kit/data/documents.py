"""Join running text to documents, and hold out a share of it.

The rows of Wikitext are lines: they are joined to documents at its ` = Title = ` lines. In any other table of text each row is a
document, and a text file without such lines is one document. A document may be larger than memory, so it is read as fragments.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

from qlora_kit.data.encoding import Fragment
from qlora_kit.data.fields import LONGEST_KEY, is_empty, require_text
from qlora_kit.data.files import Row, read_text, read_text_lines
from qlora_kit.data.formats import Record, recognise_format
from qlora_kit.data.notes import MOST_KEYS
from qlora_kit.data.tokenizing import LONGEST_WORD, check_word_length
from qlora_kit.errors import BadRecord, UserError

Fragments = Callable[[], Iterator[Fragment]]  # from the beginning at each call

TITLE = re.compile(r"^ = [^=](.*[^=])? = $")  # ` = Title = `, and not ` = = Section = = `
AT_TITLES, A_ROW, A_FILE = "rows joined at ' = Title = ' lines", "one document a row", "one document a file"
MIN_DOCUMENTS_TO_HOLD_OUT = 10
FRAGMENT = 2**20  # characters
TEXT_FORMATS = {"text", "instruction"}  # formats with the same keys, told apart by the text


@dataclass(frozen=True)
class SourceFile:
    """A text file, or a table: a file of records, or one split of a Hub data set."""

    name: str  # the path, or the data set and its split: the key of error messages
    fingerprint: str  # of the content
    path: Path | None  # of a text file
    rows: Callable[[], Iterator[Row]]  # of a table, from its beginning at each call
    format: str = "text"
    unused: set[str] = field(default_factory=set, compare=False)  # columns beside its text, once it is read


@contextmanager
def locate_errors(name: str, place: str) -> Iterator[None]:
    """Turn a BadRecord into a UserError that names the file and the place of the record in it."""
    try:
        yield
    except BadRecord as error:
        raise UserError(name, None, f"{place}: {error}", error.remedy) from None


def check_format(record: Record, expected: str, text_field: str) -> None:
    """Check that a record has the format of the records before it.

    Raises:
        BadRecord: it has another format.
    """
    found = recognise_format(record, text_field)
    if found != expected and not {found, expected} <= TEXT_FORMATS:
        raise BadRecord(f"the format is {found} and that of the records before it {expected}")


def read_documents(file: SourceFile, text_field: str) -> Iterator[Fragment]:
    """Return the documents of a file, without empty ones, as fragments."""
    if file.path:
        if find_join_rule(file, text_field) == AT_TITLES:
            return join_lines(_check_lines(file.path))
        return _end_last(_read_words(file.path))
    if find_join_rule(file, text_field) == AT_TITLES:
        return join_lines(text.rstrip("\r\n") + "\n" for text in _read_texts(file, text_field))
    return ((text, True) for text in _read_texts(file, text_field) if text.strip())


@cache  # a file without a title is read to its end
def find_join_rule(file: SourceFile, text_field: str) -> str:
    """Return how the rows of a file become documents: AT_TITLES, A_ROW or A_FILE."""
    if file.path:
        return AT_TITLES if _has_title(read_text_lines(file.path)) else A_FILE
    return AT_TITLES if _has_title(text.rstrip("\r\n") for text in _read_texts(file, text_field)) else A_ROW


def _read_texts(file: SourceFile, text_field: str) -> Iterator[str]:
    """Yield the text of each row of a table; null becomes empty text."""
    for place, record in file.rows():
        with locate_errors(file.name, place):
            if text_field not in record:
                keys = ", ".join(map(str, record)) or "none"
                raise BadRecord(f"{text_field} is missing among the keys {keys} (data.text_field)")
            if len(record) > 1 and len(file.unused) < MOST_KEYS:
                file.unused.update(
                    key[:LONGEST_KEY] for key, value in record.items() if key != text_field and not is_empty(value)
                )
            text = "" if record[text_field] is None else require_text(record[text_field], text_field)
            check_word_length(text)
        yield text


def _has_title(lines: Iterable[str]) -> bool:
    return any(line.startswith(" = ") and TITLE.match(line) for line in lines)


def join_lines(lines: Iterable[str]) -> Iterator[Fragment]:
    """Join lines, each with its end, to documents that begin at titles; every character of the lines is kept."""
    pending: list[str] = []
    characters, has_words = 0, False
    for line in lines:
        if has_words and line.startswith(" = ") and TITLE.match(line):
            yield "".join(pending), True
            pending, characters, has_words = [], 0, False
        elif characters > FRAGMENT:
            yield "".join(pending), False
            pending, characters = [], 0
        pending.append(line)
        characters += len(line)
        has_words = has_words or not line.isspace()
    if has_words:
        text = "".join(pending)
        yield text if text.endswith("\n") else text + "\n", True


def _read_words(path: Path) -> Iterator[str]:
    """Yield a text file in chunks; raises UserError where more than LONGEST_WORD characters have no space."""
    for chunk in read_text(path):
        if not re.search(r"\s", chunk):  # the last chunk may be short
            _check_words(chunk, path)
        yield chunk


def _check_lines(path: Path) -> Iterator[str]:
    """Yield a text file in lines; raises UserError where more than LONGEST_WORD characters have no space."""
    for line in read_text_lines(path):
        if len(line) > LONGEST_WORD:
            _check_words(line, path)
        yield line


def _check_words(text: str, path: Path) -> None:
    try:
        check_word_length(text)
    except BadRecord as error:
        raise UserError(path, None, str(error), "break it into lines of text") from None


def _end_last(texts: Iterable[str]) -> Iterator[Fragment]:
    """Yield texts as the fragments of one document, which ends with the last."""
    for text, following in pairwise(chain(texts, [""])):
        yield text, not following


def hold_out(documents: Fragments, fraction: float, seed: int) -> tuple[Fragments, Fragments]:
    """Split documents into a training share and a held-out share of whole documents, both in their order.

    With fewer than MIN_DOCUMENTS_TO_HOLD_OUT documents, all of them are one text, which is cut near its end after a line.

    Args:
        fraction: of the documents, or of the characters of the text, that is held out.
        seed: chooses the documents.

    Returns:
        The training share and the held-out share.
    """
    count = sum(ends for _, ends in documents())
    if count >= MIN_DOCUMENTS_TO_HOLD_OUT:
        chosen = choose_held_out(count, fraction, seed)
        return (lambda: _select(documents(), chosen, False)), (lambda: _select(documents(), chosen, True))
    cut = _find_cut(documents, fraction)
    return (lambda: _end_last(_slice(_join(documents()), 0, cut))), (lambda: _end_last(_slice(_join(documents()), cut, None)))


def choose_held_out(count: int, fraction: float, seed: int) -> set[int]:
    """Return the numbers, from 0, of the documents or records that are held out: at least one of `count`, and not all."""
    share = min(max(1, round(fraction * count)), count - 1)
    return set(random.Random(seed).sample(range(count), share))


def _select(fragments: Iterable[Fragment], chosen: set[int], wanted: bool) -> Iterator[Fragment]:
    """Yield the chosen documents, or the others if `wanted` is False."""
    number = 0
    for text, ends in fragments:
        if (number in chosen) == wanted:
            yield text, ends
        number += ends


def _join(fragments: Iterable[Fragment]) -> Iterator[str]:
    """Yield all documents as one text, with a line end between them."""
    between = ""
    for text, ends in fragments:
        yield between + text
        between = "\n" if ends else ""


def _find_cut(documents: Fragments, fraction: float) -> int:
    """Return the length of the training share in characters: up to its last line end, if it has one."""
    wanted = round(sum(map(len, _join(documents()))) * (1 - fraction))
    cut = done = 0
    for text in _join(documents()):
        if (at := text.rfind("\n", 0, max(wanted - done, 0))) >= 0:
            cut = done + at + 1
        done += len(text)
    return cut or wanted


def _slice(texts: Iterable[str], begin: int, end: int | None) -> Iterator[str]:
    """Yield the characters from `begin` to `end` of consecutive texts."""
    done = 0
    for text in texts:
        piece = text[max(begin - done, 0) : None if end is None else max(end - done, 0)]
        done += len(text)
        if piece:
            yield piece
