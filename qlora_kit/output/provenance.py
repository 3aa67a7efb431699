"""run.json: where an adapter comes from. Versions, command, time."""

import hashlib
import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_kit.output.folder import ADAPTER_FILES, PROVENANCE, digest, replace_text
from qlora_kit.secrets import redact
from qlora_kit.shipped import KIT, is_dispatched

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def code_digest() -> str:
    """Return the start of the SHA-256 over the scripts and the kit: what a version number would say only if it were kept."""
    scripts = ("inference_example.py", "quantization_utils.py", "train_qlora.py")  # beside them others' may be installed
    code = sorted([*(KIT.parent / name for name in scripts), *KIT.glob("**/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:12]


def command_line() -> str:
    """Return the command of this process, without tokens and passwords."""
    words = sys.argv[0].split() if is_dispatched() else ["python", Path(sys.argv[0]).name]
    return redact(shlex.join([*words, *sys.argv[1:]]))


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write run.json, with the digest of the adapter beside it, in one step: a reader never finds half of it."""
    content = provenance | {"adapter_sha256": digest(folder / ADAPTER_FILES[0])}
    replace_text(folder / PROVENANCE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
