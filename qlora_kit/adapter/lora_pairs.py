"""An adapter's files -> the pair of matrices of each module, with its scale; what is no plain LoRA is refused.

Imports no torch: what cannot be merged is said at once.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import UserError
from qlora_kit.model.hub import read_json
from qlora_kit.output.folder import ADAPTER_FILES

if TYPE_CHECKING:
    import torch

# Keys of adapter_config.json with which the update of a matrix is more, or something else, than scale · B A.
MORE_THAN_LORA = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# Other ways to begin, such as pissa, change the base model's weights, which a folder with the adapter alone does not hold.
KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class LoraPair:
    """A and B of one module: its update is scale · B A."""

    file: Path
    module: str
    shape: tuple[int, int]  # (out, in)
    scale: float

    def read(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """A (r, in) and B (out, r) in fp32."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as tensors:
            a, b = (tensors.get_tensor(f"base_model.model.{self.module}.lora_{letter}.weight").float() for letter in "AB")
        return a, b


def read_pairs(folder: Path, key: str) -> dict[str, LoraPair]:
    """The pairs of an adapter, by module.

    Args:
        key: the flag and the folder, as messages name them.

    Raises:
        UserError: the adapter is damaged, or holds what cannot be merged.
    """
    settings = read_json(folder / ADAPTER_FILES[1], key)
    _check_settings(settings, key)
    shapes = _read_shapes(folder / ADAPTER_FILES[0], key)
    pairs = {}
    for module in dict.fromkeys(module for module, _ in shapes):
        a, b = shapes.get((module, "A")), shapes.get((module, "B"))
        if not a or not b or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(f"{key}: {module}: its lora_A and lora_B do not belong together; copy the adapter again")
        scale = _scale(settings, module, a[0], key)
        pairs[module] = LoraPair(folder / ADAPTER_FILES[0], module, (b[0], a[1]), scale)
    if not pairs:
        raise UserError(f"{key}: adapter_model.safetensors holds no LoRA matrices; copy the adapter again")
    return pairs


def _check_settings(settings: dict[str, Any], key: str) -> None:
    kind, start = settings.get("peft_type", "LORA"), settings.get("init_lora_weights")
    extra = {name: settings[name] for name in MORE_THAN_LORA if settings.get(name)}
    if kind != "LORA":
        extra["peft_type"] = kind
    if settings.get("bias", "none") != "none":
        extra["bias"] = settings["bias"]
    if start not in KEEPS_THE_BASE:
        extra["init_lora_weights"] = start
    if extra:
        said = ", ".join(f"{name}: {value}" for name, value in extra.items())
        raise UserError(
            f"{key}: cannot be merged matrix by matrix ({said}); use peft's merge_and_unload, or the adapter as it is"
        )


def _read_shapes(path: Path, key: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shapes by module and letter."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {path.name} is damaged ({error}); copy it again") from None
    shapes = {}
    for name, shape in found.items():
        match = KEY.fullmatch(name)
        if not match:
            raise UserError(
                f"{key}: holds {name}, which is no part of a matrix's LoRA update and cannot be merged; use the adapter as it is"
            )
        shapes[match[1], match[2]] = shape
    return shapes


def _scale(settings: dict[str, Any], module: str, rank: int, key: str) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732); patterns of names may set both for some modules."""
    stated = _of_module(settings.get("rank_pattern"), module, settings.get("r"))
    alpha = _of_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
    if stated != rank or not isinstance(alpha, int | float):
        raise UserError(
            f"{key}: {module}: its matrices have rank {rank}, adapter_config.json says rank {stated}, alpha {alpha}; "
            "copy the adapter again"
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_module(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as peft matches it."""
    found = (value for name, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({name})", module))
    return next(found, default)
