"""Read .txt, .json, .jsonl, .csv and .parquet files piece by piece, so that no file has to fit into memory.

Files are UTF-8, with or without a byte order mark, and every kind of line end becomes `\\n`. An error names the file, and the
line or record in it.
"""

import codecs
import csv
import json
import pickle
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from qlora_kit.config import GIB
from qlora_kit.errors import UserError
from qlora_kit.limited_worker import LimitedWorker, LimitExceeded

Row = tuple[str, dict[str, Any]]  # the place of a record in its file, such as `line 3`, and the record

CHUNK = 2**20  # characters read at once
LONGEST_RECORD = 2**24  # bytes of a line or of a record of a .parquet file, or characters of a record in a .json file
ROWS_AT_ONCE = 256  # of a parquet file
NOT_SPACE = re.compile(r"\S")
csv.field_size_limit(LONGEST_RECORD)


class RepeatedKey(ValueError):
    """A key that stands twice in one object, of which a dictionary would keep the last."""


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise RepeatedKey(_find_repeated([key for key, _ in pairs]))
    return record


def _find_repeated(names: list[str]) -> str | None:
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


DECODER = json.JSONDecoder(object_pairs_hook=_build_object)


def read_text(path: Path) -> Iterator[str]:
    """Yield a text file in chunks of CHUNK characters, with `\\n` as line end.

    Raises:
        UserError: the file is not UTF-8, or holds NUL bytes.
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
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the block before
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return done - pending + error.start
            done += len(block)
    return done - len(decoder.getstate()[0])  # the file ends within a character


def read_text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends; a line longer than CHUNK characters comes in several pieces."""
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
    """Yield the records of a .json, .jsonl, .csv or .parquet file with their places.

    Raises:
        UserError: the file is malformed at a line or record, or a record is longer than LONGEST_RECORD.
    """
    read = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    return read[path.suffix.lower()](path)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers and with `\\n` as line end."""
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
            record = DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            problem = f"line {number} is not valid JSON ({_explain_json_error(error)})"
            raise UserError(path, None, problem, "correct the line") from None
        if isinstance(record, list) and number == 1:
            raise UserError(path, None, "line 1 begins an array", "put one object on each line, or rename the file to .json")
        yield f"line {number}", _require_object(path, f"line {number}", record)


def _explain_json_error(error: Exception) -> str:
    if isinstance(error, RepeatedKey):
        return f"an object has the key {str(error)!r} twice"
    return error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep, or a number too long"


def _require_object(path: Path, place: str, record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        problem = f"{place} holds {type(record).__name__}, expected an object"
        raise UserError(path, None, problem, "write each record with the names of its fields")
    return record


def _read_json(path: Path) -> Iterator[Row]:
    """Yield the objects of an array, or objects one after the other."""
    stream, number = _JsonStream(path), 0
    is_array = stream.skip("[")
    while (stream.peek() != "]") if is_array else stream.peek():
        if is_array and number and not stream.skip(","):
            stream.fail("expected ,")
        number += 1
        yield f"record {number}", _require_object(path, f"record {number}", stream.read_value())
    if is_array and stream.skip("]") and stream.peek():
        stream.fail("more after the array")


class _JsonStream:
    """A reader of JSON values that holds no more than one record and one chunk of the file."""

    def __init__(self, path: Path):
        self.path, self.chunks = path, read_text(path)
        self.text, self.at, self.line = "", 0, 1  # `line` is the line on which `text` begins

    def peek(self) -> str:
        """Return the next character that is not a space; empty at the end of the file."""
        while not (found := NOT_SPACE.search(self.text, self.at)):
            self.at = len(self.text)
            if not self._read_chunk():
                return ""
        self.at = found.start()
        return found.group()

    def skip(self, character: str) -> bool:
        """Skip the next character that is not a space if it is this one; return whether it was."""
        found = self.peek() == character
        self.at += found
        return found

    def read_value(self) -> Any:
        """Return the next JSON value.

        Raises:
            UserError: it is malformed, or longer than LONGEST_RECORD.
        """
        self.peek()
        while True:
            try:
                value, self.at = DECODER.raw_decode(self.text, self.at)
                return value
            except (ValueError, RecursionError) as error:
                # The record may continue in the next chunk.
                position = error.pos - self.at if isinstance(error, json.JSONDecodeError) else 0
                if isinstance(error, RepeatedKey) or len(self.text) - self.at > LONGEST_RECORD or not self._read_chunk():
                    self.at += position
                    self.fail(_explain_json_error(error))

    def fail(self, reason: str) -> NoReturn:
        """Raise a UserError for the current line."""
        problem = f"line {self.line + self.text.count(chr(10), 0, self.at)} is not valid JSON ({reason})"
        raise UserError(self.path, None, problem, f"correct the record, which may have at most {LONGEST_RECORD:,} characters")

    def _read_chunk(self) -> bool:
        chunk = next(self.chunks, "")
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)


def _read_csv(path: Path) -> Iterator[Row]:
    number = 0
    rows = csv.reader((line for _, line in _read_lines(path)), strict=True)
    try:
        header = next(rows, [])
        if (repeated := _find_repeated(header)) is not None:
            raise UserError(path, None, f"has the column {repeated!r} twice", "rename or remove one of them")
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
    """Yield records that a process of its own reads: a small file may hold one that takes all memory."""
    import pyarrow.parquet  # noqa: F401  here, because it takes half a second

    rows, number = _read_parquet_here(path), 0
    worker = LimitedWorker[None, list[bytes]](lambda _: _take_pickled(rows, path), extra_bytes=GIB + path.stat().st_size)
    try:
        while records := worker.call(None):
            for record in records:
                number += 1
                yield f"record {number}", pickle.loads(record)
    except LimitExceeded as limit:
        raise UserError(path, None, f"cannot be read after record {number} ({limit})", "write smaller records") from None
    finally:
        worker.close()


def _take_pickled(rows: Iterator[Row], path: Path) -> list[bytes]:
    """Return the next records, at most ROWS_AT_ONCE and about LONGEST_RECORD bytes; none at the end."""
    taken: list[bytes] = []
    size = 0
    for place, record in islice(rows, ROWS_AT_ONCE):
        taken.append(pickle.dumps(record))
        size += len(taken[-1])
        if len(taken[-1]) > LONGEST_RECORD:
            raise UserError(path, None, f"{place} is longer than {LONGEST_RECORD:,} bytes", "split it")
        if size > LONGEST_RECORD:
            break
    return taken


def _read_parquet_here(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path, memory_map=True) as file:
            _check_names(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    yield f"record {number}", drop_filled_keys(record)
    except MemoryError:  # an ArrowException may be one
        raise
    except UnicodeDecodeError:
        raise UserError(path, None, f"text after record {number} is not UTF-8", "save it as UTF-8") from None
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # the last: a date that Python does not have
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(path, None, f"is not readable as parquet after record {number} ({reason})", "write it again") from None


def _check_names(path: Path, fields: Iterable[Any]) -> None:
    """Check that no column, and no field within one, has the name of another beside it."""
    fields = list(fields)
    if (repeated := _find_repeated([field.name for field in fields])) is not None:
        raise UserError(path, None, f"has the column {repeated!r} twice", "rename or remove one of them")
    for field in fields:
        inner = field.type
        while hasattr(inner, "value_type"):  # a list
            inner = inner.value_type
        if hasattr(inner, "fields"):
            _check_names(path, inner.fields)


def drop_filled_keys(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of an Arrow table without the nulls that it has within a column for keys that only other records have."""
    return {key: _drop_nulls(value) if isinstance(value, list | dict) else value for key, value in record.items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_drop_nulls(one) for one in value] if any(isinstance(one, list | dict) for one in value) else value
    return {key: _drop_nulls(one) for key, one in value.items() if one is not None} if isinstance(value, dict) else value
