"""Where data comes from: a Hub data set, local files or folders, or a list of them -> running text, or records of known formats.

How files are read: readers.py; how text becomes documents: documents.py; how records become tokens: encoding.py.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_kit.config import DataSettings
from qlora_kit.data.documents import SourceFile, check_format, find_join_rule, locate_errors, read_documents
from qlora_kit.data.files import Row, read_records
from qlora_kit.data.formats import recognise_format
from qlora_kit.data.tokenizing import Fragment
from qlora_kit.errors import UserError
from qlora_kit.model.hub import FILE_SUFFIXES, is_local

TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")  # the other kinds are text
WIKITEXT_2_TOKENS = 2_400_000  # training split, Qwen2.5 tokenizer, rounded: used to estimate a run's length only


@dataclass(frozen=True)
class Source:
    """Running text, as documents, or records of known formats."""

    parts: list[SourceFile]
    text_field: str
    format_recognised: bool  # the format was recognised, and not stated

    @property
    def formats(self) -> list[str]:
        return list(dict.fromkeys(part.format for part in self.parts))

    @property
    def is_text(self) -> bool:
        return self.formats == ["text"]

    @property
    def fingerprint(self) -> str:
        said = [(part.fingerprint, part.format) for part in self.parts]
        return hashlib.sha256(repr((said, self.text_field)).encode()).hexdigest()

    def records(self) -> Iterator[tuple[SourceFile, str, dict[str, Any]]]:
        """File, place in it and fields of each record.

        Raises:
            UserError: a record of another format than those before it.
        """
        for part in self.parts:
            for place, record in part.rows():
                if self.format_recognised:
                    with locate_errors(part.name, place):
                        check_format(record, part.format, self.text_field)
                yield part, place, record

    def documents(self) -> Iterator[Fragment]:
        for part in self.parts:
            yield from read_documents(part, self.text_field)

    def find_join_rule(self) -> str:
        """How rows became documents."""
        return ", ".join(dict.fromkeys(find_join_rule(part, self.text_field) for part in self.parts))


# Before anything is loaded


def check_source(data: DataSettings) -> None:
    """Find out before the model is loaded whether a local source can be read; Hub sources are checked when loaded.

    Raises:
        UserError: missing, empty, or of a kind that is not text.
    """
    local = [name for name in data.names if is_local(name)]
    for name in local:
        for path in list_source_files(name):
            _check_file(path)
    if isinstance(data.eval_split, str) and is_file_name(data.eval_split):
        for path in list_source_files(data.eval_split, "data.eval_split"):
            _check_file(path)
    elif local and isinstance(data.eval_split, str) and data.eval_split != data.train_split:
        remedy = "use a share (--set data.eval_split=0.1), another file, or null for no evaluation"
        raise UserError("data.eval_split", data.eval_split, "is a named split, which a local source does not have", remedy)


def is_file_name(eval_split: str) -> bool:
    """A split's name may also be that of a folder here, such as `test`: only a file, or a written-out path, is taken for one."""
    return Path(eval_split).is_file() or "/" in eval_split or eval_split.startswith(("~", "."))


def list_source_files(name: str, key: str = "data.dataset") -> list[Path]:
    """The files of a local source in a stable order."""
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(key, name, "does not exist", "use a text file, or a Hub data set such as Salesforce/wikitext")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in FILE_SUFFIXES and file.is_file())
    if not files:
        raise UserError(key, name, f"has no {' '.join(FILE_SUFFIXES)} file", "add one")
    return files


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(65536)
    except OSError as error:
        raise UserError(path, None, f"cannot be read ({error.strerror})", "check its permissions") from None
    if not start.removeprefix(b"\xef\xbb\xbf").strip():
        raise UserError(path, None, "is empty", "put text into it, or use another file")
    if path.suffix.lower() in TABLE_SUFFIXES:
        return
    if path.suffix.lower() not in FILE_SUFFIXES:
        problem = f"has a suffix other than {' '.join(FILE_SUFFIXES)}"
        raise UserError(path, None, problem, "convert it, or rename it to .txt if it is text")
    if b"\0" in start:
        raise UserError(path, None, "holds NUL bytes, so it is not text", "save it as UTF-8 text")


def estimate_tokens(data: DataSettings) -> float | None:
    """Training tokens of one epoch, roughly and before anything is read; None for a Hub data set of unknown size."""
    tokens: float
    if all(is_local(name) for name in data.names):
        # about 4 bytes of English a token
        tokens = sum(path.stat().st_size for name in data.names for path in list_source_files(name)) / 4
    elif data.subset and data.subset.startswith("wikitext-2"):
        tokens = WIKITEXT_2_TOKENS
    else:
        return None
    return min(tokens, (data.max_train_samples or math.inf) * data.max_length)


# Opening


def open_source(data: DataSettings, names: list[str], split: str, key: str) -> Source:
    """Names -> what can be read from them; of each table the first record is read, for its format.

    Raises:
        UserError: a source or split does not exist or cannot be reached, is of an unknown format, or text stands beside records.
    """
    parts: list[SourceFile] = []
    for name in names:
        if is_local(name):
            parts += [_open_file(path) for path in list_source_files(name, key)]
        else:
            parts.append(_open_hub_table(data, name, split, key))
    parts = [replace(part, format=_find_format(part, data)) for part in parts]
    source = Source(parts, data.text_field, format_recognised=data.format == "auto")
    if "text" in source.formats and not source.is_text:
        text, other = (next(part for part in parts if (part.format == "text") == is_text) for is_text in (True, False))
        raise UserError(
            key, text.name, f"is running text, and {other.name} holds {other.format} records", "use one kind at a time"
        )
    return source


def _open_file(path: Path) -> SourceFile:
    _check_file(path)
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    if path.suffix.lower() in TABLE_SUFFIXES:
        return SourceFile(str(path), fingerprint, None, lambda: read_records(path))
    return SourceFile(str(path), fingerprint, path, lambda: iter(()))


def _find_format(part: SourceFile, data: DataSettings) -> str:
    """
    Raises:
        UserError: the table is empty, or its first record is of no known format; or a text file is to be read as records.
    """
    if part.path:
        if data.format not in ("auto", "text"):
            remedy = "convert it to .jsonl, or set data.format to auto"
            raise UserError("data.format", data.format, f"cannot be the format of {part.path}, which is running text", remedy)
        return "text"
    place, record = next(part.rows(), ("", None))
    if record is None:
        raise UserError(part.name, None, "has no record", "put records into it, or use another file")
    if data.format != "auto":
        return data.format
    with locate_errors(part.name, place):
        return recognise_format(record, data.text_field)


# The Hub


def _open_hub_table(data: DataSettings, name: str, split: str, flag: str) -> SourceFile:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    in_config = not flag.startswith("--")  # then `flag` may be data.eval_split, which names a split of data.dataset
    key = "data.dataset" if in_config else flag
    try:
        table = load_dataset(_find_download(name), data.subset, split=split)
    except (ConnectionError, OSError) as error:
        if isinstance(error, DatasetNotFoundError) and not os.environ.get("HF_HUB_OFFLINE"):
            problem = "is neither a file here nor a data set on the Hub"
            raise UserError(key, name, problem, "correct the name, or log in if the data set is private") from None
        remedy = f"download it where there is a network (hf download --repo-type dataset {name}), or use a local text file: "
        remedy += f"{'--dataset' if in_config else flag} FILE"
        raise UserError(key, name, "is not on this machine, and the Hub cannot be reached", remedy) from None
    except ValueError as error:  # unknown subset or split: the message lists what there is
        remedy = "correct data.subset, data.train_split or data.eval_split"
        if not in_config:
            remedy = f"name its subset, {flag} {name}:SUBSET, or a file of it, downloaded"
        raise UserError(key, name, f"cannot be loaded ({' '.join(str(error).split())})", remedy) from None
    except (DatasetsError, RuntimeError) as error:  # files that do not fit together, or a data set that is a program
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(key, name, f"cannot be read ({reason})", "use another data set, or a local file") from None
    assert not isinstance(table, DatasetDict)

    def rows() -> Iterator[Row]:
        return ((f"record {number}", record) for number, record in enumerate(table, 1))

    return SourceFile(f"{name}, {split}", table._fingerprint, None, rows)


def _find_download(name: str) -> str:
    """Without a network: the folder of the copy that `hf download` made, where there is one. `datasets` would not look there."""
    from huggingface_hub import snapshot_download

    if not os.environ.get("HF_HUB_OFFLINE"):
        return name
    try:
        return snapshot_download(name, repo_type="dataset", local_files_only=True)
    except OSError:
        return name
