"""A, B and scale of each module, from the adapter's files; anything that is not plain LoRA is refused.

Imports no torch, so that an adapter that cannot be merged is refused at once.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from qlora_kit.adapter.folder import AdapterSource, read_adapter_header
from qlora_kit.adapter.patterns import match_in_time
from qlora_kit.adapter.settings import LoraFile
from qlora_kit.errors import UserError
from qlora_kit.model.weight_files import StoredTensor
from qlora_kit.output.folder import ADAPTER_FILES

if TYPE_CHECKING:
    import torch

# Settings with which the update of a matrix is more, or something else, than scale · B A.
MORE_THAN_LORA = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
LARGEST = 65_504.0  # of float16; numbers of trained matrices are below 1, and their products must not overflow
TOO_LARGE = f"contains NaN or infinity, or numbers beyond {LARGEST:,.0f}"
Value = TypeVar("Value")
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class LoraPair:
    """A (r, in) and B (out, r) of one module: its update is scale · B A."""

    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the update, (out, in)."""
        return self.b.shape[0], self.a.shape[1]

    def read(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Read A (r, in) and B (out, r) in fp32; raises UserError if a number is not finite or too large."""
        a, b = (stored.read().float() for stored in (self.a, self.b))
        for stored, matrix in ((self.a, a), (self.b, b)):
            if not matrix.abs().max() <= LARGEST:  # NaN is neither
                problem = f"{TOO_LARGE}, in {stored.name}"
                raise UserError("--adapter", stored.file.parent, problem, "train again with a lower --learning_rate")
        return a, b


def read_pairs(source: AdapterSource) -> dict[str, LoraPair]:
    """Return the pairs of an adapter by module; reads no matrix.

    Raises:
        UserError: the adapter is damaged, or is not plain LoRA.
    """
    settings = _plain_settings(source)
    matrices = _find_matrices(source)
    modules = dict.fromkeys(module for module, _ in matrices)
    stated = match_in_time(lambda: _ranks_and_alphas(settings, modules), settings, modules, source.folder)
    pairs = {}
    for module, (rank, alpha) in stated.items():
        a, b = matrices.get((module, "A")), matrices.get((module, "B"))
        if not a or not b or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise UserError("--adapter", source.folder, f"has no lora_A and lora_B of one rank for {module}", "copy it again")
        if rank != a.shape[0]:
            problem = f"has matrices of rank {a.shape[0]} for {module}, but rank {rank} in {ADAPTER_FILES[1]}"
            raise UserError("--adapter", source.folder, problem, "copy it again")
        # rsLoRA: arXiv 2312.03732
        pairs[module] = LoraPair(a, b, alpha / (math.sqrt(rank) if settings.use_rslora else rank))
    return pairs


def _plain_settings(source: AdapterSource) -> LoraFile:
    settings = source.settings
    stated = settings.model_dump()
    extra = {name: stated[name] for name in MORE_THAN_LORA if stated.get(name)}
    if not isinstance(settings, LoraFile):
        extra["peft_type"] = settings.peft_type
    else:
        extra |= {"bias": settings.bias} if settings.bias != "none" else {}
        extra |= {"init_lora_weights": settings.changing_start} if settings.changing_start else {}
        if not extra:
            return settings
    listed = ", ".join(f"{name}: {value}" for name, value in extra.items())
    remedy = "use peft's merge_and_unload, or the adapter without merging"
    raise UserError("--adapter", source.folder, f"cannot be merged matrix by matrix ({listed})", remedy)


def _find_matrices(source: AdapterSource) -> dict[tuple[str, str], StoredTensor]:
    """Return the adapter's tensors by module and letter."""
    matrices = {}
    for name, stored in read_adapter_header(source.folder).items():
        match = KEY.fullmatch(name)
        if not match:
            problem = f"holds {name}, which belongs to no LoRA update of a matrix and cannot be merged"
            raise UserError("--adapter", source.folder, problem, "use the adapter without merging")
        matrices[match[1], match[2]] = stored
    return matrices


def _ranks_and_alphas(settings: LoraFile, modules: Collection[str]) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of each module: patterns may set both for some."""
    return {
        module: (
            _matching_value(settings.rank_pattern, module, settings.r),
            _matching_value(settings.alpha_pattern, module, settings.lora_alpha),
        )
        for module in modules
    }


def _matching_value(patterns: dict[str, Value], module: str, default: Value) -> Value:
    """Return the value of the first pattern that matches the end of the module's name, as in peft."""
    found = (value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", module))
    return next(found, default)
