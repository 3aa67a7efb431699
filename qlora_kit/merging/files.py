"""Safetensors files of a model: what they hold, tensor by tensor, and new ones written the same way.

A file is the length of its header, the header (each tensor's dtype, shape and place) and the tensors' bytes. With
dtypes and shapes known beforehand the header is written first and the tensors follow, so that no more than one is held.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from qlora_kit.errors import UserError
from qlora_kit.hub import read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of the base model."""

    name: str
    file: Path
    dtype: str  # as safetensors writes it: BF16
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)

    def read(self) -> torch.Tensor:
        with open_weights(self.file) as tensors:  # again for each tensor: an open file keeps every page that was read
            return tensors.get_tensor(self.name)


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """
    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); copy or download it again") from None


def read_base(folder: Path) -> dict[str, Stored]:
    """The tensors of a base model's safetensors files, in their order.

    Raises:
        UserError: the files are missing, damaged, or already quantized.
    """
    if "quantization_config" in read_json(folder / "config.json", "model.name"):
        raise UserError(f"model.name: {folder}: its weights are quantized; name the 16-bit model that they were made from")
    tensors = {}
    for path in _weight_files(folder):
        with open_weights(path) as file:
            for name in file.keys():
                part = file.get_slice(name)
                tensors[name] = Stored(name, path, part.get_dtype(), tuple(part.get_shape()))
    if strange := next((stored for stored in tensors.values() if stored.dtype not in BYTES), None):
        raise UserError(f"{strange.file}: {strange.name} is {strange.dtype}; merge onto a model in 16 or 32 bits")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """As transformers looks for them: one file, else those of the index."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        raise UserError(
            f"model.name: {folder}: neither {WHOLE} nor {INDEX}; save the model with save_pretrained and name that folder"
        )
    return [folder / name for name in dict.fromkeys(read_json(folder / INDEX, "model.name")["weight_map"].values())]


def divide(tensors: Iterable[Stored], limit: int) -> dict[str, list[Stored]]:
    """Tensors by the file they are written to: the base's own files where none is larger than `limit` bytes, else new ones.

    A tensor larger than the limit has a file of its own.
    """
    parts: dict[str, list[Stored]] = {}
    for stored in tensors:
        parts.setdefault(stored.file.name, []).append(stored)
    if max(map(_nbytes, parts.values())) <= limit:
        return parts
    new: list[list[Stored]] = [[]]
    for stored in (stored for part in parts.values() for stored in part):
        if new[-1] and _nbytes(new[-1]) + stored.nbytes > limit:
            new.append([])
        new[-1].append(stored)
    if len(new) == 1:
        return {WHOLE: new[0]}
    return {f"model-{number:05}-of-{len(new):05}.safetensors": part for number, part in enumerate(new, 1)}


def _nbytes(part: list[Stored]) -> int:
    return sum(stored.nbytes for stored in part)


def write_weights(
    tensors: dict[str, Stored],
    tensor_of: Callable[[Stored], torch.Tensor],
    folder: Path,
    limit: int,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Write all tensors, and an index where there are several files.

    Args:
        tensor_of: what is written in a tensor's place, of the same dtype and shape.
        limit: bytes of a file.
        on_bytes: called with the bytes of each tensor that is done.

    Returns:
        The names of the files.
    """
    parts = divide(tensors.values(), limit)
    for file_name, part in parts.items():
        part.sort(key=lambda stored: -BYTES[stored.dtype])  # wider ones first: each begins at a multiple of its width
        with (folder / file_name).open("wb") as file:
            _write_header(file, part)
            for stored in part:
                file.write(_raw(tensor_of(stored)))
                on_bytes(stored.nbytes)
    if list(parts) != [WHOLE]:
        places = {stored.name: file_name for file_name, part in parts.items() for stored in part}
        index = {"metadata": {"total_size": sum(map(_nbytes, parts.values()))}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return list(parts)


def _write_header(file: BinaryIO, part: list[Stored]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for stored in part:
        header[stored.name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [at, at + stored.nbytes]}
        at += stored.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
