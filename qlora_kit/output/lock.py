"""One run in an output folder at a time.

The operating system's own lock on a file goes when its process does, however that ends. Where there is none (Windows, some
network file systems), the process that the file names is asked after. Imports no torch.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

from qlora_kit.errors import UserError

LOCK = ".lock"


class OutputLock:
    """Held from `take` to the end of the `with` block; holds the file .lock with the id of the process.

    `with` takes it at once where the folder exists. A new folder is made, and locked, only when there is something to write.
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
            with suppress(OSError):  # Windows removes no open file; there a process that is gone is asked after
                self.path.unlink()  # while it is still locked: nobody else can hold it
            os.close(self.handle)
            self.handle = None

    def take(self) -> bool:
        """Make the folder if need be and hold it from here on; False when it is held already.

        Raises:
            UserError: another process holds it.
        """
        if self.handle is not None:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        while self.handle is None:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            owner = os.read(handle, 20).decode(errors="replace").strip()
            if not _locked(handle, owner):
                os.close(handle)
                raise UserError(
                    f"training.output_dir: {self.folder}: another run (process {owner or 'unknown'}) is writing there; "
                    "wait for its end, or name another --output_dir"
                )
            if self._is_still_there(handle):
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, f"{os.getpid():<10}\n".encode())
                self.handle = handle
            else:  # its holder removed it between opening and locking: what we locked has no name any more
                os.close(handle)
        return True

    def _is_still_there(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(handle))
        except FileNotFoundError:
            return False


def _locked(handle: int, owner: str) -> bool:
    """Whether the file is ours now."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        from psutil import pid_exists

        return not (owner.isdigit() and int(owner) != os.getpid() and pid_exists(int(owner)))
