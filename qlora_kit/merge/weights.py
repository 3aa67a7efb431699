"""Base weights + adapter -> merged weights in safetensors files, one tensor in memory at a time.

W + scale · B A is computed in fp32 and rounded once, to the dtype that W has in the base's file. W is the file's own matrix, or
what loading in 4 bits makes of it: quantized and unpacked again, so that the sum is what was trained. All else is
copied as it is.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapter.fold import rounded, unpack
from qlora_kit.adapter.lora_pairs import LoraPair
from qlora_kit.config import ModelSettings, QuantizationSettings
from qlora_kit.errors import UserError
from qlora_kit.model.load import build_skeleton, pack_skeleton
from qlora_kit.model.weight_files import Stored, read_base

MERGEABLE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Packing:
    """How loading packed the base's matrices for training."""

    settings: QuantizationSettings
    dtype: torch.dtype  # that weights were loaded in before they were packed
    device: str


@dataclass(frozen=True)
class Recipe:
    """What becomes of one matrix."""

    pair: LoraPair | None = None
    packed: bool = False  # in training
    transposed: bool = False  # (in, out), as GPT-2's Conv1D keeps it


@dataclass
class Merge:
    """The base's tensors by name, and what becomes of those that are not copied as they are."""

    tensors: dict[str, Stored]
    recipes: dict[str, Recipe] = field(default_factory=dict)
    packing: Packing | None = None  # None: onto the base's own weights

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())

    def tensor(self, stored: Stored) -> torch.Tensor:
        """The merged tensor, of the dtype and shape of the base's.

        Raises:
            UserError: it holds values that are no numbers.
        """
        weight, recipe = stored.read(), self.recipes.get(stored.name)
        if recipe is None:
            return weight
        exact = weight.to(torch.float32, copy=True)
        if recipe.packed and self.packing:
            exact = as_trained(exact, self.packing, recipe.transposed)
        if recipe.pair:
            a, b = recipe.pair.read()  # (r, in), (out, r)
            if recipe.transposed:
                a, b = b.T, a.T
            exact.addmm_(b, a, alpha=recipe.pair.scale)
        return rounded(exact, weight.dtype, stored.name)


def as_trained(weight: torch.Tensor, packing: Packing, transposed: bool) -> torch.Tensor:
    """A matrix, fp32 on the CPU, quantized as loading quantizes it and unpacked again, in fp32 and not in the compute dtype."""
    rows = weight.T if transposed else weight  # (out, in): one scale per 64 weights of a row
    unpacked: Any = bitsandbytes.nn.Params4bit(
        rows.to(packing.dtype).contiguous(),
        requires_grad=False,
        compress_statistics=packing.settings.use_double_quant,
        quant_type=packing.settings.quant_type,
    )
    exact = unpack(unpacked.to(packing.device)).cpu()
    return exact.T if transposed else exact


# What is to be merged


def plan_merge(folder: Path, model: ModelSettings, pairs: dict[str, LoraPair], packing: Packing | None, adapter: str) -> Merge:
    """What becomes of each tensor of the base model in `folder`; reads no weights.

    Args:
        pairs: by the module that they belong to.
        adapter: the flag and its value, as messages name them.

    Raises:
        UserError: the adapter does not fit the base model: names the module and what is wrong with it.
    """
    merge = Merge(read_base(folder), packing=packing)
    skeleton = build_skeleton(folder, model)
    for module, pair in pairs.items():
        name, recipe = _recipe(module, pair, skeleton, merge.tensors, f"{adapter}: does not fit {folder}")
        merge.recipes[name] = recipe
    if packing:
        _add_packed(merge, skeleton)
    return merge


def _recipe(module: str, pair: LoraPair, model: PreTrainedModel, tensors: dict[str, Stored], misfit: str) -> tuple[str, Recipe]:
    """Which tensor an adapter's pair belongs to, and how it lies there."""
    kind, remedy = dict(model.named_modules()).get(module), "use the base model it was trained on"
    if kind is None:
        raise UserError(f"{misfit}: it has no module {module}; {remedy}")
    if kind is model.get_output_embeddings() and model.config.tie_word_embeddings:
        raise UserError(f"{misfit}: {module} is the embedding too, which must not change; use the adapter as it is")
    name = _stored_name(module, model, tensors)
    if name is None or tensors[name].dtype not in MERGEABLE:
        raise UserError(f"{misfit}: no file of it holds {module}.weight in 16 or 32 bits; {remedy}")
    transposed = isinstance(kind, Conv1D)
    shape = tensors[name].shape[::-1] if transposed else tensors[name].shape
    if shape != pair.shape:
        there, here = (" x ".join(map(str, sizes)) for sizes in (shape, pair.shape))
        raise UserError(f"{misfit}: {module} is {there} there and {here} in the adapter; {remedy}")
    return name, Recipe(pair, transposed=transposed)


def _stored_name(module: str, model: PreTrainedModel, tensors: dict[str, Stored]) -> str | None:
    """The name of a module's weight in the files; some leave the model's prefix out, as GPT-2's on the Hub do."""
    name = f"{module}.weight"
    return next((n for n in (name, name.removeprefix(f"{model.base_model_prefix}.")) if n in tensors), None)


def _add_packed(merge: Merge, model: PreTrainedModel) -> None:
    """Mark what loading packs, which is more than the adapter's targets."""
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    pack_skeleton(model)
    for module, kind in model.named_modules():
        if isinstance(kind, bitsandbytes.nn.Linear4bit) and (name := _stored_name(module, model, merge.tensors)):
            pair = merge.recipes[name].pair if name in merge.recipes else None
            merge.recipes[name] = Recipe(pair, packed=True, transposed=module in transposed)
