"""Safetensors files of a model: what they hold, tensor by tensor, and new ones written the same way.

A file is the length of its header, the header (each tensor's dtype, shape and place) and the tensors' bytes. With
dtypes and shapes known beforehand the header is written first and the tensors follow, so that no more than one is held.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qlora_kit.model.weight_files import BYTES, INDEX, WHOLE, Stored


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
