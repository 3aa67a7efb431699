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


def read_text(path: Path) -> Iterator[str]:
    """A text file in chunks of CHUNK characters, line ends as `\\n`.

    Raises:
        UserError: not UTF-8, or NUL bytes.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            while chunk := file.read(CHUNK):
                if "\0" in chunk:
                    raise UserError(path, None, "holds NUL bytes, so it is not text", "save it as UTF-8 text")
                yield chunk
    except UnicodeDecodeError:
        raise UserError(path, None, f"is not UTF-8 text (byte {_find_bad_byte(path)})", "save it as UTF-8") from None


def _find_bad_byte(path: Path) -> int:
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


def read_text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends; one longer than CHUNK characters comes in parts."""
    rest = ""
    for chunk in read_text(path):
        *lines, rest = (rest + chunk).split("\n")
        yield from (f"{line}\n" for line in lines)
        if len(rest) > CHUNK:
            yield rest
            rest = ""
    if rest:
        yield rest


def read_records(path: Path) -> Iterator[Row]:
    """The records of a .json, .jsonl, .csv or .parquet file.

    Raises:
        UserError: broken at a line or record, or a record longer than LONGEST_RECORD.
    """
    read = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    return read[path.suffix.lower()](path)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines by number, ends as `\\n`."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_RECORD + 1):
            number += 1
            if len(line) > LONGEST_RECORD:
                problem = f"line {number} is longer than {LONGEST_RECORD:,} bytes"
                raise UserError(path, None, problem, "put one record on each line, or split it")
            if b"\0" in line:
                raise UserError(path, None, f"line {number} holds NUL bytes", "save the file as UTF-8 text")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"line {number} is not UTF-8 text (byte {error.start})"
                raise UserError(path, None, problem, "save the file as UTF-8") from None
            yield number, text[:-2] + "\n" if text.endswith("\r\n") else text


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = _explain_json_error(error, 0)[1]
            raise UserError(path, None, f"line {number} is not valid JSON ({reason})", "correct the line") from None
        if isinstance(record, list) and number == 1:
            raise UserError(path, None, "line 1 begins an array", "put one object on each line, or rename the file to .json")
        yield f"line {number}", _require_object(path, f"line {number}", record)


def _explain_json_error(error: Exception, at: int) -> tuple[int, str]:
    """The position and the reason of a JSON error; `at` where it states none."""
    if isinstance(error, json.JSONDecodeError):
        return error.pos, error.msg
    return at, "nested too deep, or a number too long"


def _require_object(path: Path, place: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(
            path, None, f"{place} holds {type(record).__name__}, expected an object", "name the fields of each record"
        )
    return record


def _read_json(path: Path) -> Iterator[Row]:
    """An array of objects, or objects one after the other."""
    stream, number = _JsonStream(path), 0
    is_array = stream.skip("[")
    while (stream.peek() != "]") if is_array else stream.peek():
        if is_array and number:
            stream.expect(",")
        number += 1
        yield f"record {number}", _require_object(path, f"record {number}", stream.value())
    if is_array:
        stream.expect("]")
        if stream.peek():
            stream.fail("more after the array")


class _JsonStream:
    """Reads JSON values off a file, of which no more than a record and a chunk is held."""

    def __init__(self, path: Path):
        self.chunks, self.path = read_text(path), path
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
                at, reason = _explain_json_error(error, self.at)
                may_go_on = at >= len(self.text) - LONGEST_TOKEN or reason.startswith("Unterminated string")
                if len(self.text) - self.at > LONGEST_RECORD:
                    problem = f"the record on line {self.line_number()} is longer than {LONGEST_RECORD:,} characters"
                    raise UserError(self.path, None, problem, "close it, or split it") from None
                offset = at - self.at
                if not may_go_on or not self.more():
                    self.at += offset
                    self.fail(reason)

    def line_number(self) -> int:
        return self.line + self.text.count("\n", 0, self.at)

    def fail(self, reason: str) -> NoReturn:
        raise UserError(self.path, None, f"line {self.line_number()} is not valid JSON ({reason})", "correct the line")


def _read_csv(path: Path) -> Iterator[Row]:
    number = 0
    rows = csv.reader((line for _, line in _read_lines(path)), strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            if not row:  # an empty line
                continue
            number += 1
            if len(row) != len(header):
                problem = f"record {number} (line {rows.line_num}) has {len(row)} fields and the header {len(header)}"
                raise UserError(path, None, problem, "quote fields that contain commas")
            yield f"record {number}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        problem = f"record {number + 1} (line {rows.line_num}) is not valid CSV ({error})"
        raise UserError(path, None, problem, "look for an open quote") from None


def _read_parquet(path: Path) -> Iterator[Row]:
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
        raise UserError(path, None, f"text after record {number} is not UTF-8", "save it as UTF-8") from None
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(path, None, f"is not readable as parquet ({reason})", "write it again") from None
