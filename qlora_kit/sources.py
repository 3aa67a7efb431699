"""Where text comes from: a Hub data set, a local file, or a folder of them -> documents.

Wikitext's rows are lines: they are joined to documents at its ` = Title = ` lines. In any other table a row is a document,
and a text file without such lines is one document. Tokens and blocks are made in dataset.py.
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_kit.config import UserError
from qlora_kit.hub import FILE_SUFFIXES, is_local
from qlora_kit.settings import DataConfig

TITLE = re.compile(r"^ = [^=](.*[^=])? = $")  # ` = Title = `, and not ` = = Section = = `
TABLE_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # the other kinds are text
WIKITEXT_2_TOKENS = 2_400_000  # training split, Qwen2.5 tokenizer, rounded: used to estimate a run's length only


def check_source(data: DataConfig) -> None:
    """Find out before the model is loaded whether a local source can be read; Hub sources are checked when loaded.

    Raises:
        UserError: missing, empty, or of a kind that is not text.
    """
    if is_local(data.dataset):
        for path in source_files(data.dataset):
            _check_file(path, "data.dataset")
    if isinstance(data.eval_split, str) and is_file_name(data.eval_split):
        for path in source_files(data.eval_split, "data.eval_split"):
            _check_file(path, "data.eval_split")
    elif is_local(data.dataset) and isinstance(data.eval_split, str) and data.eval_split != data.train_split:
        raise UserError(
            f"data.eval_split: {data.eval_split}: a local source has no named splits; "
            "hold out a share (--set data.eval_split=0.1), name another file, or null for no evaluation"
        )


def is_file_name(eval_split: str) -> bool:
    """A split's name may also be that of a folder here, such as `test`: only a file, or a written-out path, is taken for one."""
    return Path(eval_split).is_file() or "/" in eval_split or eval_split.startswith(("~", "."))


def source_files(name: str, key: str = "data.dataset") -> list[Path]:
    """The files of a local source in a stable order."""
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{key}: {name}: no such file or folder; name a text file, or a Hub data set such as Salesforce/wikitext")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in FILE_SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{key}: {name}: the folder holds no {' '.join(FILE_SUFFIXES)} file; add one")
    return files


def _check_file(path: Path, key: str) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(65536)
    except OSError as error:
        raise UserError(f"{key}: {path}: cannot be read ({error.strerror}); check its permissions") from None
    if not start.strip():
        raise UserError(f"{key}: {path}: the file is empty; put text into it, or name another")
    if path.suffix.lower() in TABLE_SUFFIXES:
        return
    if path.suffix.lower() not in FILE_SUFFIXES:
        kinds = " ".join(FILE_SUFFIXES)
        raise UserError(
            f"{key}: {path}: not a kind of file that is read ({kinds}); convert it, or rename it to .txt if it is text"
        )
    if b"\0" in start:
        raise UserError(f"{key}: {path}: not text (it holds NUL bytes); save it as UTF-8 text")


def estimate_tokens(data: DataConfig) -> float | None:
    """Training tokens of one epoch, roughly and before anything is read; None for a Hub data set of unknown size."""
    tokens: float
    if is_local(data.dataset):
        tokens = sum(path.stat().st_size for path in source_files(data.dataset)) / 4  # about 4 bytes of English a token
    elif data.subset and data.subset.startswith("wikitext-2"):
        tokens = WIKITEXT_2_TOKENS
    else:
        return None
    return min(tokens, (data.max_train_samples or math.inf) * data.max_length)


def load_documents(data: DataConfig, name: str, split: str, key: str) -> tuple[list[str], str]:
    """All documents of one source, and the rule by which its rows were joined.

    Raises:
        UserError: the source or the split does not exist, cannot be reached, or holds no text.
    """
    if is_local(name):
        documents, rule = _local_documents(data, name, key)
    else:
        documents, rule = join_rows(_hub_rows(data, name, split))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{key}: {name}: holds no text; name another source")
    return documents, rule


def join_rows(rows: Iterable[str]) -> tuple[list[str], str]:
    """Rows -> documents: joined at Wikitext's title lines when there are any, else one document a row.

    A joined document keeps every character of its rows: nothing is stripped but the line ends are made equal.
    """
    rows = list(rows)
    lines = [row.rstrip("\r\n") for row in rows]
    if not any(TITLE.match(line) for line in lines):
        return rows, "one document a row"
    documents: list[list[str]] = [[]]
    for line in lines:
        if TITLE.match(line) and any(part.strip() for part in documents[-1]):
            documents.append([])
        documents[-1].append(line)
    return ["\n".join(document) + "\n" for document in documents], "rows joined at ' = Title = ' lines"


def _local_documents(data: DataConfig, name: str, key: str) -> tuple[list[str], str]:
    documents, rules = [], []
    for path in source_files(name, key):
        _check_file(path, key)
        if path.suffix.lower() in TABLE_SUFFIXES:
            part, rule = join_rows(_table_rows(data, path, key))
        else:
            part, rule = _text_documents(path, key)
        documents += part
        rules.append(rule)
    return documents, ", ".join(dict.fromkeys(rules))


def _text_documents(path: Path, key: str) -> tuple[list[str], str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    documents, rule = join_rows(text.removesuffix("\n").split("\n"))
    if rule == "one document a row":
        return [text], "one document a file"
    return documents, rule


def _table_rows(data: DataConfig, path: Path, key: str) -> list[str]:
    from datasets import Dataset, load_dataset

    kind = TABLE_SUFFIXES[path.suffix.lower()]
    try:
        words_for_missing = {"keep_default_na": False} if kind == "csv" else {}  # `NA` and `None` are text
        table = load_dataset(kind, data_files=str(path), split="train", **words_for_missing)
    except Exception as error:  # datasets wraps parser errors in many classes of its own
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{key}: {path}: not readable as {kind} ({reason}); mend the file") from None
    assert isinstance(table, Dataset)
    return _column(table, data.text_field, f"{key}: {path}")


def _hub_rows(data: DataConfig, name: str, split: str) -> list[str]:
    from datasets import DatasetDict, load_dataset

    key = f"data.dataset: {name}"
    try:
        table = load_dataset(_downloaded(name), data.subset, split=split)
    except (ConnectionError, OSError):
        raise UserError(
            f"{key}: not on this machine, and the Hub cannot be reached; download it where there is a network "
            f"(hf download --repo-type dataset {name}), or name a local text file: --dataset FILE"
        ) from None
    except ValueError as error:  # unknown subset or split: the message lists what there is
        raise UserError(
            f"{key}: {' '.join(str(error).split())}; correct data.subset, data.train_split or data.eval_split"
        ) from None
    assert not isinstance(table, DatasetDict)
    return _column(table, data.text_field, key)


def _downloaded(name: str) -> str:
    """Without a network: the folder of the copy that `hf download` made, where there is one. `datasets` would not look there."""
    from huggingface_hub import snapshot_download

    if not os.environ.get("HF_HUB_OFFLINE"):
        return name
    try:
        return snapshot_download(name, repo_type="dataset", local_files_only=True)
    except OSError:
        return name


def _column(table: Any, field: str, where: str) -> list[str]:
    if field not in table.column_names:
        raise UserError(f"data.text_field: {field}: {where} has no such column; it has {', '.join(table.column_names)}")
    try:
        rows = table[field][:]
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text; save it as UTF-8") from None
    wrong = next((number for number, row in enumerate(rows, 1) if row is not None and not isinstance(row, str)), None)
    if wrong is not None:
        raise UserError(
            f"data.text_field: {field}: {where}: record {wrong} holds {type(rows[wrong - 1]).__name__}, not text; "
            "name a text column"
        )
    return [row or "" for row in rows]
