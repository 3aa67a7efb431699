"""Write safetensors files tensor by tensor.

Dtypes and shapes are known beforehand, so that the header is written first and the tensors follow: only one tensor is in memory.
The format is described in model/weight_files.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory

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
    shards = assign_shards(tensors, limit)
    for file_name, names in shards.items():
        # Wider ones first: each begins at a multiple of its width.
        shard = sorted((tensors[name] for name in names), key=lambda stored: -BYTES[stored.dtype])
        with (folder / file_name).open("wb") as file:
            _write_header(file, shard)
            for stored in shard:
                file.write(tensor_of(stored).contiguous().reshape(-1).view(torch.uint8).numpy().data)
                on_bytes(stored.nbytes)
    if list(shards) != [WHOLE]:
        weight_map = {name: file_name for file_name, names in shards.items() for name in names}
        total = sum(stored.nbytes for stored in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return list(shards)


def assign_shards(tensors: dict[str, StoredTensor], limit: int) -> dict[str, list[str]]:
    """Return the names of tensors by file: the base's own files if none is larger than `limit` bytes, else new ones.

    A tensor larger than the limit has a file of its own.
    """
    own: dict[str, list[str]] = {}
    for name, stored in tensors.items():
        own.setdefault(stored.file.name, []).append(name)
    if all(sum(tensors[name].nbytes for name in names) <= limit for names in own.values()):
        return own
    return split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda stored: stored.nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    ).filename_to_tensors


def _write_header(file: BinaryIO, shard: list[StoredTensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for stored in shard:
        header[stored.name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, start + stored.nbytes]}
        start += stored.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
