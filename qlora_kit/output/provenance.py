"""run.json: where an adapter comes from. Versions, command, time."""

import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_kit.output.folder import PROVENANCE, replace_text
from qlora_kit.secrets import redact

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def command_line() -> str:
    """Return the command of this process, without tokens and passwords."""
    return redact(shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]))


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write run.json in one step, so that a reader never finds half of it."""
    replace_text(folder / PROVENANCE, json.dumps(provenance, indent=2, ensure_ascii=False) + "\n")
