"""Tokens on disk: written a batch at a time, found again by what they were made from, read through a memory map.

A folder below the cache of `datasets` holds one source as it was tokenized:

    ids.bin       int32, the tokens of all documents or records, one after the other
    trained.bin   bool, whether each is trained; records only, for of running text every token is
    ends.bin      int64, where each document or record ends in them
    about.json    what else is known: how rows became documents

It is written under another name and moved into place whole.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

FILES = {"ids.bin": "int32", "trained.bin": "bool", "ends.bin": "int64"}
ABOUT = "about.json"


@dataclass(frozen=True)
class Tokens:
    """Documents or records as tokens, memory-mapped."""

    ids: "np.ndarray"  # (tokens,) int32
    trained: "np.ndarray"  # (tokens,) bool; empty for running text
    ends: "np.ndarray"  # (documents,) int64
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ends)


class TokenWriter:
    """Appends to the files of a folder that is being made."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.files = {name: stack.enter_context((folder / name).open("wb")) for name in FILES}
        self.tokens = 0
        self.about: dict[str, Any] = {}

    def append(self, ids: "np.ndarray", trained: "np.ndarray | None" = None) -> None:
        """Tokens of the document or record that is open."""
        self.files["ids.bin"].write(ids.tobytes())
        if trained is not None:
            self.files["trained.bin"].write(trained.tobytes())
        self.tokens += len(ids)

    def end_document(self) -> None:
        """The document or record ends here."""
        self.files["ends.bin"].write(self.tokens.to_bytes(8, sys.byteorder))


@contextmanager
def write_tokens(folder: Path) -> Iterator[TokenWriter]:
    """A writer whose files stand in `folder` when all went well, and nowhere otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        with ExitStack() as stack:
            writer = TokenWriter(staging, stack)
            yield writer
        (staging / ABOUT).write_text(json.dumps(writer.about), encoding="utf-8")
        try:
            os.rename(staging, folder)
        except OSError:
            if not (folder / ABOUT).is_file():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_tokens(folder: Path) -> Tokens | None:
    """What `write_tokens` left in `folder`; None where nothing stands there."""
    if not (folder / ABOUT).is_file():
        return None
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    ids, trained, ends = (_map_file(folder / name, dtype) for name, dtype in FILES.items())
    return Tokens(ids, trained, ends, about)


def _map_file(path: Path, dtype: str) -> "np.ndarray":
    import numpy as np

    if path.stat().st_size == 0:  # cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def find_cache_folder() -> Path:
    """`qlora_kit` beside the caches of the `datasets` library, whose settings it obeys."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"), "qlora_kit").expanduser()
