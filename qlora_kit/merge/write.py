"""Write safetensors files tensor by tensor.

Dtypes and shapes are known beforehand, so that the header is written first and the tensors follow: only one tensor is in memory.
The format is described in model/weight_files.py.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qlora_kit.model.weight_files import BYTES, INDEX, WHOLE, StoredTensor


def write_weights(
    tensors: dict[str, StoredTensor],
    tensor_of: Callable[[StoredTensor], torch.Tensor],
    folder: Path,
    limit: int,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Write all tensors, and an index if there are several files.

    Args:
        tensor_of: returns the tensor to write in a tensor's place, of the same dtype and shape.
        limit: bytes of a shard.
        on_bytes: called with the bytes of each tensor that was written.

    Returns:
        The names of the files.
    """
    shards = assign_shards(tensors.values(), limit)
    for file_name, shard in shards.items():
        shard.sort(key=lambda stored: -BYTES[stored.dtype])  # wider ones first: each begins at a multiple of its width
        with (folder / file_name).open("wb") as file:
            _write_header(file, shard)
            for stored in shard:
                file.write(_raw_bytes(tensor_of(stored)))
                on_bytes(stored.nbytes)
    if list(shards) != [WHOLE]:
        weight_map = {stored.name: file_name for file_name, shard in shards.items() for stored in shard}
        index = {"metadata": {"total_size": sum(map(_nbytes, shards.values()))}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return list(shards)


def assign_shards(tensors: Iterable[StoredTensor], limit: int) -> dict[str, list[StoredTensor]]:
    """Return the tensors by the file to write them to: the base's own files if none is larger than `limit` bytes, else new ones.

    A tensor larger than the limit has a file of its own.
    """
    own: dict[str, list[StoredTensor]] = {}
    for stored in tensors:
        own.setdefault(stored.file.name, []).append(stored)
    if max(map(_nbytes, own.values())) <= limit:
        return own
    new: list[list[StoredTensor]] = [[]]
    for stored in (stored for shard in own.values() for stored in shard):
        if new[-1] and _nbytes(new[-1]) + stored.nbytes > limit:
            new.append([])
        new[-1].append(stored)
    if len(new) == 1:
        return {WHOLE: new[0]}
    return {f"model-{number:05}-of-{len(new):05}.safetensors": shard for number, shard in enumerate(new, 1)}


def _nbytes(shard: list[StoredTensor]) -> int:
    return sum(stored.nbytes for stored in shard)


def _write_header(file: BinaryIO, shard: list[StoredTensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for stored in shard:
        header[stored.name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, start + stored.nbytes]}
        start += stored.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
