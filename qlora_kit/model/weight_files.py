"""Read safetensors tensor by tensor.

A file is the length of its JSON header in 8 bytes, little end first, then the header (each tensor's dtype, shape and place), then
the tensors' bytes (github.com/huggingface/safetensors). Imports no torch until a tensor is read.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import UserError
from qlora_kit.model.hub import read_json

if TYPE_CHECKING:
    import torch

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    name: str
    file: Path
    dtype: str  # as safetensors writes it: BF16
    shape: tuple[int, ...]
    place: tuple[int, int]  # of its first byte in the file, and of the byte after its last

    @property
    def nbytes(self) -> int:
        """Return the bytes that the tensor takes in the file."""
        return BYTES[self.dtype] * math.prod(self.shape)

    def read(self) -> "torch.Tensor":
        """Read the tensor; raises UserError if the file is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as tensors:  # opened for each tensor: an open file keeps every page read
                return tensors.get_tensor(self.name)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.file, error) from None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, sorted; none is read.

    Raises:
        OSError, ValueError: the file cannot be read, is no safetensors file, or ends before its last tensor.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError("no safetensors header")
        header = json.loads(file.read(length))
    try:
        header.pop("__metadata__", None)
        tensors = {name: _stored(name, path, 8 + length, header[name]) for name in sorted(header)}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no safetensors header: {error!r}") from None
    end, size = max((stored.place[1] for stored in tensors.values()), default=0), path.stat().st_size
    if size < end:
        raise ValueError(f"{size:,} bytes of {end:,}")
    return tensors


def _stored(name: str, path: Path, start: int, entry: dict) -> StoredTensor:
    first, end = entry["data_offsets"]
    return StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), (start + first, start + end))


def read_base(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a base model's safetensors files by name; none is read.

    Raises:
        UserError: a file is missing or damaged, or the weights are already quantized.
    """
    if "quantization_config" in read_json(folder / "config.json", "model.name"):
        raise UserError("model.name", folder, "has quantized weights", "use the 16-bit model that they were made from")
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            tensors |= read_header(path)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
    for stored in tensors.values():
        if stored.dtype not in BYTES:
            raise UserError(str(stored.file), None, f"holds {stored.name} in {stored.dtype}", "use a model in 16 or 32 bits")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads: the one file, or else those of the index, which may be missing."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        remedy = "save the model with save_pretrained and use that folder"
        raise UserError("model.name", folder, f"has neither {WHOLE} nor {INDEX}", remedy)
    return [folder / name for name in dict.fromkeys(read_json(folder / INDEX, "model.name")["weight_map"].values())]


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:100]
    return UserError(str(path), None, f"is missing or damaged ({reason})", "copy or download it again")
