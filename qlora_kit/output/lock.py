"""One run per output folder.

The operating system releases a lock on a file when its process ends, however it ends. Some network file systems have no locks:
there the file counts as locked while the process whose number it holds is alive. Imports no torch.
"""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from psutil import pid_exists

from qlora_kit.errors import UserError

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class OutputLock:
    """Holds the file .lock, which contains the process number, from `take` to the end of the `with` block.

    `with` takes it at once if the folder exists. A new folder is created, and locked, only when there is something to write.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        self.handle: int | None = None

    def __enter__(self) -> "OutputLock":
        if self.folder.is_dir():
            self.take()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.handle is not None:
            with suppress(OSError):  # a broken disk must not hide how the run ended
                self.path.unlink()  # while it is locked, so that it is no other run's file
            os.close(self.handle)
            self.handle = None

    def take(self) -> bool:
        """Create the folder if it does not exist, and lock it; return False if it was locked already.

        Raises:
            UserError: another process has locked it.
        """
        if self.handle is not None:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        while self.handle is None:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            owner = os.read(handle, 20).decode(errors="replace").strip()
            if not _lock(handle, owner):
                os.close(handle)
                problem = f"is in use by another run (process {owner or 'unknown'})"
                raise UserError("training.output_dir", self.folder, problem, "wait for its end, or use another --output_dir")
            if self._is_current(handle):
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, f"{os.getpid():<10}\n".encode())
                self.handle = handle
            else:  # its holder deleted the file between our open and our lock: the locked file has no name any more
                os.close(handle)
        return True

    def _is_current(self, handle: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.path), os.fstat(handle))
        return False


def _lock(handle: int, owner: str) -> bool:
    """Lock an open file that holds the process number `owner`; return whether it worked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return not (owner.isdigit() and int(owner) != os.getpid() and pid_exists(int(owner)))
