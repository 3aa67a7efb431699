"""Read names that users type, and files that anyone may have made, in bounded memory."""

import json
import stat
from pathlib import Path
from typing import Any

from qlora_kit.errors import UserError

LARGEST_JSON = 2**24  # bytes of a settings file; `{}` again and again takes 25 times its size in memory


def user_path(name: str, key: str) -> Path:
    """Return the path of a name, `~` expanded; nothing need be there, and asking whether something is raises no error.

    Args:
        key: the flag or config key that holds the name.

    Raises:
        UserError: the name is no path (NUL, half a character, too long), its user is unknown, its links run in a circle, or a
            folder on the way may not be searched.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever needs it says so
    except OSError as error:
        raise UserError(key, name, f"cannot be used ({error.strerror})", "correct the name or its permissions") from None
    except UnicodeEncodeError:
        raise UserError(key, name, "is no path (it holds half a character)", "correct it") from None
    except (RuntimeError, ValueError) as error:  # ~nosuchuser; a NUL
        raise UserError(key, name, f"is no path ({str(error).rstrip('.').lower()})", "correct it") from None
    return path


def read_regular_file(path: Path, limit: int = LARGEST_JSON) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or a device or a pipe, which need never end.
    """
    if regular_size(path) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return content


def regular_size(path: Path) -> int:
    """Return the size of a file in bytes; links are followed, as the Hub's cache has them.

    Raises:
        OSError: there is no such file.
        ValueError: it is a folder, a device or a pipe.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    return status.st_size


def parse_json(content: bytes | str) -> Any:
    """Return the value that JSON text states.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python's stack allows.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path, key: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        key: the flag or config key that led to the file.

    Raises:
        UserError: the file is missing, too large, or holds no JSON object.
    """
    try:
        content = parse_json(read_regular_file(path))
    except (OSError, ValueError) as error:
        raise UserError(key, path, f"cannot be read as JSON ({error})", "copy it again from its source") from None
    if not isinstance(content, dict):
        raise UserError(key, path, "holds no JSON object", "copy it again from its source")
    return content
