"""A, B and scale of each module, from the adapter's files; anything that is not plain LoRA is refused.

Imports no torch, so that an adapter that cannot be merged is refused at once.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter.folder import read_adapter_header
from qlora_kit.errors import UserError
from qlora_kit.model.hub import read_json
from qlora_kit.model.weight_files import StoredTensor
from qlora_kit.output.folder import ADAPTER_FILES

if TYPE_CHECKING:
    import torch

# Keys of adapter_config.json with which the update of a matrix is more, or something else, than scale · B A.
MORE_THAN_LORA = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# Other initializations, such as pissa, change the base model's weights, which the adapter's folder does not contain.
KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
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
        """Read A (r, in) and B (out, r) in fp32."""
        return self.a.read().float(), self.b.read().float()


def read_pairs(folder: Path) -> dict[str, LoraPair]:
    """Return the pairs of an adapter by module; reads no matrix.

    Raises:
        UserError: the adapter is damaged, or is not plain LoRA.
    """
    settings = read_json(folder / ADAPTER_FILES[1], "--adapter")
    _check_settings(settings, folder)
    matrices = _find_matrices(folder)
    pairs = {}
    for module in dict.fromkeys(module for module, _ in matrices):
        a, b = matrices.get((module, "A")), matrices.get((module, "B"))
        if not a or not b or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise UserError("--adapter", folder, f"has no lora_A and lora_B of one rank for {module}", "copy it again")
        pairs[module] = LoraPair(a, b, _scale(settings, module, a.shape[0], folder))
    if not pairs:
        raise UserError("--adapter", folder, "holds no LoRA matrices", "copy it again")
    return pairs


def _check_settings(settings: dict[str, Any], folder: Path) -> None:
    extra = {name: settings[name] for name in MORE_THAN_LORA if settings.get(name)}
    plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": KEEPS_THE_BASE}
    extra |= {name: settings[name] for name, values in plain.items() if settings.get(name, values[0]) not in values}
    if extra:
        listed = ", ".join(f"{name}: {value}" for name, value in extra.items())
        remedy = "use peft's merge_and_unload, or the adapter without merging"
        raise UserError("--adapter", folder, f"cannot be merged matrix by matrix ({listed})", remedy)


def _find_matrices(folder: Path) -> dict[tuple[str, str], StoredTensor]:
    """Return the adapter's tensors by module and letter."""
    matrices = {}
    for name, stored in read_adapter_header(folder).items():
        match = KEY.fullmatch(name)
        if not match:
            problem = f"holds {name}, which belongs to no LoRA update of a matrix and cannot be merged"
            raise UserError("--adapter", folder, problem, "use the adapter without merging")
        matrices[match[1], match[2]] = stored
    return matrices


def _scale(settings: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732); patterns may set both for some modules."""
    stated = _matching_value(settings.get("rank_pattern"), module, settings.get("r"))
    alpha = _matching_value(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
    if stated != rank or not isinstance(alpha, int | float):
        problem = f"has matrices of rank {rank} for {module}, but rank {stated} and alpha {alpha} in {ADAPTER_FILES[1]}"
        raise UserError("--adapter", folder, problem, "copy it again")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _matching_value(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the module's name, as in peft."""
    found = (value for name, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({name})", module))
    return next(found, default)
