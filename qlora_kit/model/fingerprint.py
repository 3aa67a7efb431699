"""Tell whether two models have the same weights: a fingerprint that takes milliseconds, whatever the model's size."""

import hashlib
from pathlib import Path

from qlora_kit.model.weight_files import StoredTensor, read_header

SAMPLE = 1024  # bytes at both ends of a tensor


def weights_fingerprint(folder: Path) -> str | None:
    """Return the SHA-256 over name, dtype, shape, and first and last KiB of every tensor in the folder's *.safetensors.

    The same weights in other shards have the same fingerprint. A change of a few values in the middle of a tensor leaves the
    fingerprint as it is; training changes nearly all. None if there are no such files, or damaged ones.
    """
    try:
        headers = [read_header(path) for path in folder.glob("*.safetensors")]
        tensors = {name: _sample(stored) for header in headers for name, stored in header.items()}
    except (OSError, ValueError):
        return None
    if not tensors:
        return None
    return hashlib.sha256(repr(sorted(tensors.items())).encode()).hexdigest()


def _sample(stored: StoredTensor) -> tuple[str, tuple[int, ...], str, str]:
    first, end = stored.place
    digests = []
    with stored.file.open("rb") as file:
        for start in (first, max(first, end - SAMPLE)):
            file.seek(start)
            digests.append(hashlib.sha256(file.read(min(SAMPLE, end - start))).hexdigest())
    return (stored.dtype, stored.shape, digests[0], digests[1])
