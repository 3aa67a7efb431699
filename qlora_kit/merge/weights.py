"""Merge base weights and an adapter, W + scale · B A, one tensor in memory at a time.

The sum is computed in fp32 and rounded once, to the dtype that W has in the base's file. W is the file's own matrix, or that
matrix quantized and dequantized as in training, so that the sum is what was trained. All other tensors are copied.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapter.fold import dequantize, round_merged
from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.adapter.lora_pairs import LoraPair
from qlora_kit.config import QuantizationSettings
from qlora_kit.errors import UserError
from qlora_kit.model.device import choose_device, usable_dtype
from qlora_kit.model.skeleton import build_skeleton, pack_skeleton
from qlora_kit.model.weight_files import StoredTensor, read_base

MERGEABLE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Packing:
    """The way in which loading packed the base's matrices for training."""

    settings: QuantizationSettings
    dtype: torch.dtype  # of the weights before they were packed
    device: str


def training_packing(source: AdapterSource, device: str) -> Packing:
    """Return how the base model was packed for training, for a device of this machine; `device` is auto, cuda or cpu."""
    device = choose_device(device, "--device")
    dtype, _ = usable_dtype(source.quantization.compute_dtype, device, insisted=False)
    return Packing(source.quantization, dtype, device)


@dataclass(frozen=True)
class Recipe:
    """The changes to one matrix.

    Attributes:
        packed: training packed it.
        transposed: stored as (in, out), as in GPT-2's Conv1D.
    """

    pair: LoraPair | None = None
    packed: bool = False
    transposed: bool = False


@dataclass
class MergePlan:
    """The base's tensors, and the recipes of those that are not copied, by name.

    Attributes:
        packing: quantize and dequantize first; None merges onto the base's own weights.
    """

    tensors: dict[str, StoredTensor]
    recipes: dict[str, Recipe] = field(default_factory=dict)
    packing: Packing | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def merge_tensor(self, stored: StoredTensor) -> torch.Tensor:
        """Return the merged tensor, of the dtype and shape of the base's; raises UserError if it contains NaN or infinity."""
        weight, recipe = stored.read(), self.recipes.get(stored.name)
        if recipe is None:
            return weight
        exact = weight.to(torch.float32, copy=True)
        if recipe.packed and self.packing:
            exact = quantize_and_dequantize(exact, self.packing, recipe.transposed)
        if recipe.pair:
            a, b = recipe.pair.read()  # (r, in), (out, r)
            if recipe.transposed:
                a, b = b.T, a.T
            exact.addmm_(b, a, alpha=recipe.pair.scale)
        return round_merged(exact, weight.dtype, stored.name)


def quantize_and_dequantize(weight: torch.Tensor, packing: Packing, transposed: bool) -> torch.Tensor:
    """Quantize a matrix as loading does and dequantize it, in fp32 and not in the compute dtype.

    Args:
        weight: (out, in), or (in, out) if `transposed`; fp32 on the CPU, as the result.
    """
    rows = weight.T if transposed else weight  # (out, in): one scale per 64 weights of a row
    packed: Any = bitsandbytes.nn.Params4bit(
        rows.to(packing.dtype).contiguous(),
        requires_grad=False,
        compress_statistics=packing.settings.use_double_quant,
        quant_type=packing.settings.quant_type,
    )
    exact = dequantize(packed.to(packing.device)).cpu()
    return exact.T if transposed else exact


def plan_merge(folder: Path, source: AdapterSource, pairs: dict[str, LoraPair], packing: Packing | None) -> MergePlan:
    """Decide what happens to each tensor of the base model in `folder`; reads no weights.

    Args:
        pairs: those of the adapter, by module.

    Raises:
        UserError: the adapter does not fit the base model; names the module and the reason.
    """
    plan = MergePlan(read_base(folder), packing=packing)
    skeleton = build_skeleton(source.model)
    modules, loaded = dict(skeleton.named_modules()), _find_parameters(skeleton, plan.tensors)
    for module, pair in pairs.items():
        try:
            stored = _find_tensor(module, modules.get(module), skeleton, loaded)
            transposed = isinstance(modules[module], Conv1D)
            _check_shape(module, pair, stored.shape[:: -1 if transposed else 1])
        except UserError as error:
            raise error.under("--adapter", source.folder) from None
        plan.recipes[stored.name] = Recipe(pair, transposed=transposed)
    if packing:
        _add_packed(plan, skeleton, loaded)
    return plan


def _find_parameters(model: PreTrainedModel, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the files' tensors by the parameter that each becomes; those that loading computes something from are left out.

    The library renames tensors while it loads them: Gemma 3's and EXAONE's have older names than their modules, and GPT-2's on
    the Hub omit a prefix. It also splits some, joins others and stacks those of experts.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    parameters, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in sorted(tensors, key=dot_natural_key):  # the order of loading, on which some renamings depend
        parameter, converter = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter, converter = name, None
        if converter is None:
            found[parameter] = tensors[name]
    return found


def _find_tensor(
    module: str, kind: torch.nn.Module | None, model: PreTrainedModel, loaded: dict[str, StoredTensor]
) -> StoredTensor:
    """Return the tensor that a module's pair changes."""
    if kind is None:
        problem = f"does not fit the base model, which has no module {module}"
        raise UserError("--adapter", None, problem, "use the base model it was trained on")
    if kind is model.get_output_embeddings() and model.config.tie_word_embeddings:
        problem = f"changes {module}, which the base model uses as its embedding too"
        raise UserError("--adapter", None, problem, "use the adapter without merging")
    stored = loaded.get(f"{module}.weight")
    if stored is None or stored.dtype not in MERGEABLE:
        problem = f"changes {module}, whose weight is no tensor of its own in 16 or 32 bits in the base model's files"
        raise UserError("--adapter", None, problem, "use peft's merge_and_unload, or the adapter without merging")
    return stored


def _check_shape(module: str, pair: LoraPair, shape: tuple[int, ...]) -> None:
    if shape != pair.shape:
        theirs, own = (" x ".join(map(str, sizes)) for sizes in (shape, pair.shape))
        problem = f"does not fit the base model: {module} is {theirs} there and {own} in the adapter"
        raise UserError("--adapter", None, problem, "use the base model it was trained on")


def _add_packed(plan: MergePlan, model: PreTrainedModel, loaded: dict[str, StoredTensor]) -> None:
    """Mark the matrices that loading packs, which are more than the adapter's targets."""
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    pack_skeleton(model)
    for module, kind in model.named_modules():
        if isinstance(kind, bitsandbytes.nn.Linear4bit):
            if (stored := loaded.get(f"{module}.weight")) is None:
                problem = f"needs {module}, which is no tensor of its own in the base model's files"
                raise UserError("--base", "dequantized", problem, "use --base original")
            pair = plan.recipes[stored.name].pair if stored.name in plan.recipes else None
            plan.recipes[stored.name] = Recipe(pair, packed=True, transposed=module in transposed)
