"""Temporary folders that tell a killed process from one that still writes: each is locked by the process that made it."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def own_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a temporary folder in `parent`, locked while the block runs and removed after it; a killed process leaves it."""
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks: then no other process can take the lock either
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_abandoned(parent: Path, prefix: str) -> list[Path]:
    """Remove the folders that killed processes left, and return them."""
    return [folder for folder in parent.glob(f"{prefix}*") if _remove_unlocked(folder)]


def _remove_unlocked(folder: Path) -> bool:
    with suppress(OSError):  # another process removes it at the same time, or it may not be read
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            return True
        finally:
            os.close(handle)
    return False
