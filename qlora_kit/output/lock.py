"""One run per output folder.

The operating system releases a lock on a file when its process ends, however it ends. Some network file systems have no locks:
there the file counts as locked while the process whose number it holds is alive. Imports no torch.
"""

import errno
import fcntl
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from psutil import pid_exists

from qlora_kit.errors import UserError

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
PROCESS_NUMBER = re.compile(r"[0-9]{1,9}")


class OutputLock:
    """Holds the file .lock, which contains the process number, from `take` to the end of the `with` block.

    `with` takes it at once if the folder exists. A new folder is created, and locked, only when there is something to write.

    Args:
        key, flag: what names the folder, and what names another one, in messages.
    """

    def __init__(self, folder: Path, key: str = "training.output_dir", flag: str = "--output_dir"):
        self.folder, self.path = folder, folder / LOCK
        self.key, self.flag = key, flag
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
            UserError: another process has locked it, or it cannot be locked.
        """
        if self.handle is not None:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while self.handle is None:
                self._try()
        except OSError as error:
            remedy = f"delete it if no run writes there, or use another {self.flag}"
            raise UserError(self.key, self.path, f"cannot be used as a lock ({error.strerror})", remedy) from None
        return True

    def _try(self) -> None:
        # Neither a link is followed, whose target would be overwritten, nor a pipe waited for.
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            owner = os.read(handle, 20).decode(errors="replace").strip()
            if not _lock(handle, owner):
                problem = f"is in use by another run (process {owner or 'unknown'}, which holds {LOCK})"
                raise UserError(self.key, self.folder, problem, f"wait for its end, or use another {self.flag}")
            if self._is_current(handle):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
                self.handle = handle
        finally:
            if self.handle is None:  # also where its holder deleted the file between our open and our lock
                os.close(handle)

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
        return not (PROCESS_NUMBER.fullmatch(owner) and int(owner) != os.getpid() and pid_exists(int(owner)))
