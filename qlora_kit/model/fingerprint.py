"""Whether weights are the ones that they were: a fingerprint that takes milliseconds, whatever the model's size."""

import hashlib
import json
from pathlib import Path
from typing import Any

SAMPLE = 1024  # bytes at both ends of a tensor


def weights_fingerprint(folder: Path) -> str | None:
    """SHA-256 over name, dtype, shape, and first and last KiB of every tensor in the folder's *.safetensors.

    It goes by tensors and not by files: the same weights in other shards are the same. A change of a few values in the middle
    of a tensor goes unseen; training changes nearly all. None where there are no such files, or damaged ones.
    """
    try:
        tensors = {name: found for path in folder.glob("*.safetensors") for name, found in _tensors(path).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not tensors:
        return None
    return hashlib.sha256(repr(sorted(tensors.items())).encode()).hexdigest()


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape of each tensor in a safetensors file, from its header.

    Raises:
        OSError, ValueError: it cannot be read, is no such file, or ends before its last tensor does.
    """
    with path.open("rb") as file:
        header = _header(file)
        whole = file.tell() + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if (size := path.stat().st_size) < whole:
        raise ValueError(f"{size:,} bytes of {whole:,}")
    return {name: entry["shape"] for name, entry in header.items()}


def _tensors(path: Path) -> dict[str, tuple[Any, ...]]:
    with path.open("rb") as file:
        header = _header(file)
        data = file.tell()
        found = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            samples = []
            for at in (begin, max(begin, end - SAMPLE)):
                file.seek(data + at)
                samples.append(hashlib.sha256(file.read(min(SAMPLE, end - at))).hexdigest())
            found[name] = (entry["dtype"], tuple(entry["shape"]), *samples)
    return found


def _header(file: Any) -> dict[str, Any]:
    """The file begins with the length of a JSON header in 8 bytes, little end first (github.com/huggingface/safetensors)."""
    length = int.from_bytes(file.read(8), "little")
    if length > 100_000_000:  # the format's own limit
        raise ValueError("no safetensors header")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header
