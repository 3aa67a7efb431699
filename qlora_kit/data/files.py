"""Local files -> running text or records with their place, a stretch at a time, so that no file has to fit into memory.

UTF-8 with or without a byte order mark, and line ends of every system, give the same text. What is broken is one line that
names the file and the place in it.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qlora_kit.errors import UserError

Row = tuple[str, dict[str, Any]]  # the place in its file, such as `line 3`, and the record

CHUNK = 2**20  # characters read at once
LONGEST_RECORD = 2**24  # bytes of a line, or characters of a record in a JSON array
LONGEST_TOKEN = 16  # characters that a literal, an escape or a sign takes, which the end of a chunk may cut
SPACE = re.compile(r"\s*")
csv.field_size_limit(LONGEST_RECORD)


def read_text(path: Path, where: str) -> Iterator[str]:
    """A text file in chunks of CHUNK characters, line ends as `\\n`.

    Args:
        where: the setting and the file, as messages name them.

    Raises:
        UserError: not UTF-8, or NUL bytes.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            while chunk := file.read(CHUNK):
                if "\0" in chunk:
                    raise UserError(f"{where}: not text (it holds NUL bytes); save it as UTF-8 text")
                yield chunk
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text (byte {_first_bad_byte(path)}); save it as UTF-8") from None


def _first_bad_byte(path: Path) -> int:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return done - waiting + error.start
            done += len(block)
    return done - len(decoder.getstate()[0])  # the file ends within a character


def read_text_lines(path: Path, where: str) -> Iterator[str]:
    """The lines of a text file with their ends; one longer than CHUNK characters comes in parts."""
    rest = ""
    for chunk in read_text(path, where):
        *lines, rest = (rest + chunk).split("\n")
        yield from (f"{line}\n" for line in lines)
        if len(rest) > CHUNK:
            yield rest
            rest = ""
    if rest:
        yield rest


def read_records(path: Path, where: str) -> Iterator[Row]:
    """The records of a .json, .jsonl, .csv or .parquet file.

    Raises:
        UserError: broken at a line or record, or a record longer than LONGEST_RECORD.
    """
    read = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    return read[path.suffix.lower()](path, where)


def _lines(path: Path, where: str) -> Iterator[tuple[int, str]]:
    """Lines by number, ends as `\\n`."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_RECORD + 1):
            number += 1
            if len(line) > LONGEST_RECORD:
                raise UserError(
                    f"{where}: line {number} is longer than {LONGEST_RECORD:,} bytes; put one record on each line, or split it"
                )
            if b"\0" in line:
                raise UserError(f"{where}: line {number} holds NUL bytes; save the file as UTF-8 text")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: line {number}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
            yield number, text[:-2] + "\n" if text.endswith("\r\n") else text


def _read_json_lines(path: Path, where: str) -> Iterator[Row]:
    for number, line in _lines(path, where):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = _where_broken(error, 0)[1]
            raise UserError(f"{where}: line {number}: broken JSON ({reason}); mend this line") from None
        if isinstance(record, list) and number == 1:
            raise UserError(f"{where}: line 1: begins an array; put one object on each line, or name the file .json")
        yield f"line {number}", _object(record, f"{where}: line {number}")


def _where_broken(error: Exception, at: int) -> tuple[int, str]:
    """The position and the reason of a JSON error; `at` where it states none."""
    if isinstance(error, json.JSONDecodeError):
        return error.pos, error.msg
    return at, "nested too deep, or a number too long"


def _object(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{place}: holds {type(record).__name__}; expected an object with named fields")
    return record


def _read_json(path: Path, where: str) -> Iterator[Row]:
    """An array of objects, or objects one after the other."""
    stream, number = _JsonStream(path, where), 0
    is_array = stream.skip("[")
    while (stream.peek() != "]") if is_array else stream.peek():
        if is_array and number:
            stream.expect(",")
        number += 1
        yield f"record {number}", _object(stream.value(), f"{where}: record {number}")
    if is_array:
        stream.expect("]")
        if stream.peek():
            stream.fail("more after the array")


class _JsonStream:
    """Reads JSON values off a file, of which no more than a record and a chunk is held."""

    def __init__(self, path: Path, where: str):
        self.chunks, self.where = read_text(path, where), where
        self.text, self.at, self.line = "", 0, 1  # `line` is that of the beginning of `text`
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        chunk = next(self.chunks, "")
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            match = SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def skip(self, character: str) -> bool:
        found = self.peek() == character
        self.at += found
        return found

    def expect(self, character: str) -> None:
        if not self.skip(character):
            self.fail(f"expected {character}")

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self.at = self.decode(self.text, self.at)
                return value
            except (ValueError, RecursionError) as error:
                at, reason = _where_broken(error, self.at)
                may_go_on = at >= len(self.text) - LONGEST_TOKEN or reason.startswith("Unterminated string")
                if len(self.text) - self.at > LONGEST_RECORD:
                    raise UserError(
                        f"{self.where}: the record that begins on line {self.line_number()} does not end within "
                        f"{LONGEST_RECORD:,} characters; close it, or split it"
                    ) from None
                offset = at - self.at
                if not may_go_on or not self.more():
                    self.at += offset
                    self.fail(reason)

    def line_number(self) -> int:
        return self.line + self.text.count("\n", 0, self.at)

    def fail(self, reason: str) -> NoReturn:
        raise UserError(f"{self.where}: line {self.line_number()}: broken JSON ({reason}); mend this line")


def _read_csv(path: Path, where: str) -> Iterator[Row]:
    number = 0
    rows = csv.reader((line for _, line in _lines(path, where)), strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            if not row:  # an empty line
                continue
            number += 1
            if len(row) != len(header):
                raise UserError(
                    f"{where}: record {number} (line {rows.line_num}) has {len(row)} fields where the header has {len(header)}; "
                    "quote fields that hold commas"
                )
            yield f"record {number}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{where}: record {number + 1} (line {rows.line_num}): not readable as CSV ({error}); look for an open quote"
        ) from None


def _read_parquet(path: Path, where: str) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"record {number}", record
    except UnicodeDecodeError:
        raise UserError(f"{where}: after record {number}: not UTF-8 text; save it as UTF-8") from None
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: not readable as parquet ({reason}); write it again") from None
