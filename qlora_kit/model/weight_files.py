"""Read safetensors tensor by tensor.

A file is the length of its JSON header in 8 bytes, little end first, then the header (each tensor's dtype, shape and place), then
the tensors' bytes (github.com/huggingface/safetensors). Imports no torch until a tensor is read.
"""

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import UserError
from qlora_kit.untrusted import LARGEST_JSON, parse_json, read_json, regular_size

if TYPE_CHECKING:
    import torch

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
LARGEST = 2**63  # elements or bytes of a file


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
        OSError, ValueError: the file cannot be read, is no safetensors file, or ends before its last tensor; or its tensors
            overlap, or are not as large as their shapes.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, LARGEST_JSON):
            raise ValueError("no safetensors header")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no safetensors header")
    header.pop("__metadata__", None)
    tensors = {name: _stored(name, path, 8 + length, header[name]) for name in sorted(header)}
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: stored.place):
        if stored.place[0] != end:
            raise ValueError(f"{stored.name!r} does not begin where the tensor before it ends")
        end = stored.place[1]
    if size < end:
        raise ValueError(f"{size:,} bytes of {end:,}")
    return tensors


def _stored(name: str, path: Path, start: int, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"no dtype, shape and place of {name!r}") from None
    numbers = [*shape, first, end] if isinstance(shape, list) else []
    if not isinstance(dtype, str) or len(numbers) < 2 or any(type(one) is not int or not 0 <= one < LARGEST for one in numbers):
        raise ValueError(f"no dtype, shape and place of {name!r}")
    if first > end or (dtype in BYTES and end - first != BYTES[dtype] * math.prod(shape)):
        raise ValueError(f"{name!r} is not as large as its shape")
    return StoredTensor(name, path, dtype, tuple(shape), (start + first, start + end))


def read_base(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a base model's safetensors files by name; none is read.

    Raises:
        UserError: a file is missing or damaged, or the weights are already quantized.
    """
    if "quantization_config" in read_json(folder / "config.json", "model.name"):
        raise UserError("model.name", folder, "has quantized weights", "use the 16-bit model that they were made from")
    tensors = read_headers(folder)
    for stored in tensors.values():
        if stored.dtype not in BYTES:
            raise UserError(str(stored.file), None, f"holds {stored.name} in {stored.dtype}", "use a model in 16 or 32 bits")
    return tensors


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model's safetensors files by name, whatever their dtype; none is read.

    Raises:
        UserError: a file is missing or damaged, or the index names what is none of the folder's.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            tensors |= read_header(path)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads: the one file, or else those of the index, which may be missing."""
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    if not (folder / INDEX).exists():
        remedy = "save the model with save_pretrained and use that folder"
        raise UserError("model.name", folder, f"has neither {WHOLE} nor {INDEX}", remedy)
    weight_map = read_json(folder / INDEX, "model.name").get("weight_map")
    names = list(dict.fromkeys(weight_map.values())) if isinstance(weight_map, dict) and _all_texts(weight_map) else [""]
    for name in names:
        if not name.endswith(".safetensors") or ".." in name or "\\" in name or PurePosixPath(name).is_absolute():
            problem = (
                f"names {name[:100]!r}, which is no *.safetensors file of the folder" if name else "has no map of its weights"
            )
            raise UserError("model.name", folder / INDEX, problem, "copy or download it again")
    return [folder / name for name in names]


def _all_texts(weight_map: dict[str, Any]) -> bool:
    return bool(weight_map) and all(isinstance(name, str) for name in weight_map.values())


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:100]
    return UserError("model.name", path, f"is missing or damaged ({reason})", "copy or download it again")
