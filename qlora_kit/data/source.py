"""Open the data set that a run names: a Hub data set, local files or folders, or a list of them.

The result is a Source of running text, or of records of known formats.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.config import Config, DataSettings
from qlora_kit.data.documents import SourceFile, check_format, find_join_rule, locate_errors, read_documents
from qlora_kit.data.files import Row, drop_filled_keys, read_records
from qlora_kit.data.folder import list_files
from qlora_kit.data.formats import Record, recognise_format
from qlora_kit.data.splits import choose_files, is_file_name
from qlora_kit.data.tokenizing import Fragment
from qlora_kit.errors import UserError
from qlora_kit.model.hub import FILE_SUFFIXES, is_local
from qlora_kit.untrusted import user_path

if TYPE_CHECKING:
    from datasets import Dataset

TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")  # the others are text
WIKITEXT_2_TOKENS = 2_400_000  # training split, Qwen2.5 tokenizer, rounded: used to estimate a run's length only


@dataclass(frozen=True)
class Source:
    """Files of running text, or of records."""

    files: list[SourceFile]
    text_field: str
    format_recognised: bool  # in each file's first record, so that the others must match; else it is set

    @property
    def formats(self) -> list[str]:
        """The formats of the files, each once."""
        return list(dict.fromkeys(file.format for file in self.files))

    @property
    def is_text(self) -> bool:
        """True for running text."""
        return self.formats == ["text"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content and of the settings by which it is read."""
        parts = [(file.fingerprint, file.format) for file in self.files]
        return hashlib.sha256(repr((parts, self.text_field)).encode()).hexdigest()

    def records(self) -> Iterator[tuple[SourceFile, str, Record]]:
        """Yield each record with its file and its place in it.

        Raises:
            UserError: a record has another format than the records before it.
        """
        for file in self.files:
            for place, record in file.rows():
                if self.format_recognised:
                    with locate_errors(file.name, place):
                        check_format(record, file.format, self.text_field)
                yield file, place, record

    def documents(self) -> Iterator[Fragment]:
        """Yield the documents of all files as fragments."""
        for file in self.files:
            yield from read_documents(file, self.text_field)

    def find_join_rule(self) -> str:
        """Return how rows became documents, in words."""
        return ", ".join(dict.fromkeys(find_join_rule(file, self.text_field) for file in self.files))


def check_source(data: DataSettings) -> None:
    """Check, before the model is loaded, that local sources can be read; Hub data sets are checked when they are opened.

    Raises:
        UserError: a file is missing, empty or not text; or as choose_files.
    """
    chosen = choose_files(data)
    for paths in [*chosen.train.values(), *chosen.evaluation.values()]:
        for path in paths:
            _check_file(path)


def list_local_inputs(config: Config) -> list[str]:
    """Return the files and folders of this machine that a run reads."""
    split = config.data.eval_split
    names = [(name, "data.dataset") for name in config.data.names] + [(config.model.name, "model.name")]
    names += [(split, "data.eval_split")] if isinstance(split, str) and is_file_name(split) else []
    return [str(user_path(name, key)) for name, key in names if is_local(name)]


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
    """Return the approximate training tokens of one epoch, without reading the data; None for an unknown Hub data set."""
    tokens: float
    if all(is_local(name) for name in data.names):
        # a token has about 4 bytes of English
        tokens = sum(path.stat().st_size for paths in choose_files(data).train.values() for path in paths) / 4
    elif data.subset and data.subset.startswith("wikitext-2"):
        tokens = WIKITEXT_2_TOKENS
    else:
        return None
    return min(tokens, (data.max_train_samples or math.inf) * data.max_length)


def open_source(data: DataSettings, names: list[str], split: str, key: str) -> Source:
    """Open the named files and data sets; the first record of each table is read to recognise its format.

    Args:
        split: data.train_split or data.eval_split; any other split is one of a Hub data set, and takes local files whole.
        key: the flag or config key that holds the names, for messages.

    Raises:
        UserError: a source or split does not exist, cannot be reached or has no known format, or text and records are mixed.
    """
    files: list[SourceFile] = []
    for name in dict.fromkeys(names):
        if is_local(name):
            files += map(_open_file, _list_paths(data, name, split, key))
        else:
            files.append(_open_hub_table(data, name, split, key))
    files = [replace(file, format=_find_format(file, data)) for file in files]
    source = Source(files, data.text_field, format_recognised=data.format == "auto")
    if "text" in source.formats and not source.is_text:
        text, other = (next(file for file in files if (file.format == "text") == is_text) for is_text in (True, False))
        problem = f"is running text, and {other.name} holds {other.format} records"
        raise UserError(key, text.name, problem, "use one kind at a time")
    return source


def _list_paths(data: DataSettings, name: str, split: str, key: str) -> list[Path]:
    if split in (data.train_split, data.eval_split):
        chosen = choose_files(data, key)
        return (chosen.train if split == data.train_split else chosen.evaluation)[name]
    return [file.path for file in list_files(name, key)]


def _open_file(path: Path) -> SourceFile:
    _check_file(path)
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    if path.suffix.lower() in TABLE_SUFFIXES:
        return SourceFile(str(path), fingerprint, None, lambda: read_records(path))
    return SourceFile(str(path), fingerprint, path, lambda: iter(()))


def _find_format(file: SourceFile, data: DataSettings) -> str:
    """Return the format of a file.

    Raises:
        UserError: a table is empty or its first record has no known format, or data.format is one of records for a text file.
    """
    if file.path:
        if data.format not in ("auto", "text"):
            remedy = "convert it to .jsonl, or set data.format to auto"
            raise UserError("data.format", data.format, f"cannot be the format of {file.path}, which is running text", remedy)
        return "text"
    place, record = next(file.rows(), ("", None))
    if record is None:
        raise UserError(file.name, None, "has no record", "put records into it, or use another file")
    if data.format != "auto":
        return data.format
    with locate_errors(file.name, place):
        return recognise_format(record, data.text_field)


def _open_hub_table(data: DataSettings, name: str, split: str, key: str) -> SourceFile:
    table = _load_hub_table(data, name, split, key)

    def rows() -> Iterator[Row]:
        return ((f"record {number}", drop_filled_keys(record)) for number, record in enumerate(table, 1))

    return SourceFile(f"{name}, {split}", table._fingerprint, None, rows)


def _load_hub_table(data: DataSettings, name: str, split: str, key: str) -> "Dataset":
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    flag = key if key.startswith("--") else "--dataset"
    key = key if key.startswith("--") else "data.dataset"  # data.eval_split names a split of data.dataset
    try:
        table = load_dataset(_find_download(name), data.subset, split=split)
    except (ConnectionError, OSError) as error:
        if isinstance(error, DatasetNotFoundError) and not os.environ.get("HF_HUB_OFFLINE"):
            problem = "is neither a file here nor a data set on the Hub"
            raise UserError(key, name, problem, "correct the name, or log in if the data set is private") from None
        remedy = (
            f"download it where there is a network (hf download --repo-type dataset {name}), or use a local file: {flag} FILE"
        )
        raise UserError(key, name, "is not on this machine, and the Hub cannot be reached", remedy) from None
    except ValueError as error:  # an unknown subset or split: the message lists those that exist
        remedy = "correct data.subset, data.train_split or data.eval_split"
        if key == flag:
            remedy = f"add its subset, {flag} {name}:SUBSET, or download a file of it and use that"
        raise UserError(key, name, f"cannot be loaded ({' '.join(str(error).split())})", remedy) from None
    except (DatasetsError, RuntimeError) as error:  # files with different columns, or a data set that is a program
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(key, name, f"cannot be read ({reason})", "use another data set, or a local file") from None
    assert not isinstance(table, DatasetDict)
    return table


def _find_download(name: str) -> str:
    """Return the folder of `hf download` for an offline process, because `datasets` does not search there; else the name."""
    from huggingface_hub import snapshot_download

    if not os.environ.get("HF_HUB_OFFLINE"):
        return name
    try:
        return snapshot_download(name, repo_type="dataset", local_files_only=True)
    except OSError:
        return name
