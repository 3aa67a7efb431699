"""Read safetensors tensor by tensor."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qlora_kit.errors import UserError
from qlora_kit.model.hub import read_json

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
