"""Store token ids on disk, and read them through a memory map.

A folder in the cache of `datasets` holds one tokenized source; its name is a hash of everything that decides the tokens:

    ids.bin       int32, the tokens of all documents or records, one after the other
    trained.bin   bool, whether each token is trained; empty for running text, where every token is
    ends.bin      int64, where each document or record ends in them
    about.json    how rows became documents, or the formats and end tokens of the records; size and SHA-256 of the files above

The folder is written under another name, flushed to the disk, and renamed when it is complete.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_kit.output.abandoned import own_folder, remove_abandoned
from qlora_kit.output.folder import staged_folder
from qlora_kit.untrusted import parse_json, read_regular_file

FILES = {"ids.bin": "int32", "trained.bin": "bool", "ends.bin": "int64"}
ABOUT, WRITING = "about.json", ".writing-"


class DamagedTokens(Exception):
    """The reason why stored tokens are not those that were written."""


@dataclass(frozen=True)
class Tokens:
    """Documents or records as tokens, memory-mapped."""

    ids: np.ndarray  # (tokens,) int32
    trained: np.ndarray  # (tokens,) bool; empty for running text
    ends: np.ndarray  # (documents,) int64
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ends)


class TokenWriter:
    """A writer that appends to the files of a folder under construction."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.files = {name: stack.enter_context((folder / name).open("wb")) for name in FILES}
        self.tokens = 0
        self.about: dict[str, Any] = {}

    def append(self, ids: np.ndarray, trained: np.ndarray | None = None) -> None:
        """Append tokens to the current document or record."""
        self.files["ids.bin"].write(ids.tobytes())
        if trained is not None:
            self.files["trained.bin"].write(trained.tobytes())
        self.tokens += len(ids)

    def end_document(self) -> None:
        """End the current document or record."""
        self.files["ends.bin"].write(self.tokens.to_bytes(8, sys.byteorder))


@contextmanager
def write_tokens(folder: Path) -> Iterator[TokenWriter]:
    """Give a writer whose files are moved to `folder` at the end, and deleted after an error.

    What killed processes left half-written beside it is deleted first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent, WRITING)
    with own_folder(folder.parent, WRITING) as own, staged_folder(folder, own / folder.name) as staging:
        with ExitStack() as stack:
            writer = TokenWriter(staging, stack)
            yield writer
        files = {name: _describe(staging / name) for name in FILES}
        (staging / ABOUT).write_text(json.dumps({"about": writer.about, "files": files}), encoding="utf-8")


def read_tokens(folder: Path) -> Tokens | None:
    """Return the tokens that write_tokens stored in `folder`; None if there are none.

    Raises:
        DamagedTokens: a file is not as it was written, as a power failure or a bad disk may leave it.
    """
    if not folder.is_dir():
        return None
    try:
        content = parse_json(read_regular_file(folder / ABOUT))
        about, files = content["about"], content["files"]
        for name in FILES:
            if _describe(folder / name) != files[name]:
                raise DamagedTokens(f"{name} is not as it was written")
        ids, trained, ends = (_map_file(folder / name, dtype) for name, dtype in FILES.items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedTokens(f"{ABOUT} or a file that it names is damaged ({error})") from None
    return Tokens(ids, trained, ends, about)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _map_file(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def find_cache_folder() -> Path:
    """Return the folder `qlora_kit` in the cache of the `datasets` library, which its environment variables can move."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.path.expanduser(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets")), "qlora_kit")
