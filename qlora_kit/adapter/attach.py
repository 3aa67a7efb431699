"""Load the base model of an adapter, attach the adapter, and check that every tensor arrives.

peft silently loads an adapter with half of its tensors missing, and any adapter whose shapes fit.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapter.folder import AdapterSource, read_adapter_header
from qlora_kit.adapter.lora_pairs import LARGEST, TOO_LARGE
from qlora_kit.adapter.peft_settings import check_size, make_config
from qlora_kit.adapter.switchable import SwitchableAdapter
from qlora_kit.errors import UserError
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.load import DeviceMap, load_base_model, quantization_config
from qlora_kit.model.vocabulary import RESIZE, describe_beyond, tokens_beyond
from qlora_kit.output.folder import ADAPTER_FILES


def check_vocabulary(source: AdapterSource, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Check that the base model has an embedding for each of the tokenizer's tokens; raises UserError if not."""
    beyond, rows = tokens_beyond(tokenizer, model)
    if beyond:
        problem = f"has {describe_beyond(beyond, rows)} of {source.model.name} (tokenizer in {source.tokenizer.name})"
        remedy = f"{RESIZE} restore the tokenizer's files, of the model and in the adapter's folder"
        raise UserError("--adapter", source.folder, problem, remedy)


def load_base(source: AdapterSource, dtype: torch.dtype, device_map: DeviceMap) -> PreTrainedModel:
    """Load an adapter's base model as its training loaded it; raises UserError as load_base_model.

    Args:
        dtype: of everything that is not packed, and of the products.
    """
    return load_base_model(
        source.model.name,
        quantization_config(source.quantization, dtype),
        device=device_map,
        dtype=dtype,
        revision=source.model.revision,
        trust_remote_code=source.model.trust_remote_code,
    )


def attach_adapter(model: PreTrainedModel, source: AdapterSource, device: str) -> SwitchableAdapter:
    """Return the base model with the adapter; peft gets its checked settings, and reads nothing but its weights.

    Raises:
        UserError: the adapter was trained on another model, has too few or too many tensors, or contains NaN or infinity.
    """
    folder = str(source.folder)
    try:
        config = make_config(source.settings)
        check_size(model, config, source)
        # PeftModel.from_pretrained does the same, but reads the settings, and drops the lists of missing and unexpected keys.
        adapted = SwitchableAdapter(model, config, source)
        result = adapted.load_adapter(folder, "default", torch_device=device)
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError("--adapter", folder, f"has a damaged {ADAPTER_FILES[0]} ({error})", "copy it again") from error
    except Exception as error:  # every kind of adapter has its own
        if is_out_of_memory(error):
            raise
        read_adapter_header(source.folder)  # says so, if another process has removed the file since it was read
        problem = f"does not fit {source.model.name} ({' '.join(str(error).split())[:200] or type(error).__name__})"
        raise UserError("--adapter", folder, problem, "use the base model it was trained on") from error
    _check_complete(result.missing_keys, result.unexpected_keys, source)
    if not _largest([matrix for A, B, _ in _updates(adapted) for matrix in (A, B)]) <= LARGEST:  # NaN is neither
        raise UserError("--adapter", folder, TOO_LARGE, "copy it again, or train again with a lower --learning_rate")
    return adapted.eval()


def _check_complete(missing: list[str], unexpected: list[str], source: AdapterSource) -> None:
    for verb, relation, names in (("lacks", "of", missing), ("has", "unknown to", unexpected)):
        if names:
            count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
            listed = ", ".join(name.removeprefix("base_model.model.").replace(".default", "") for name in names[:2])
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            problem = f"{verb} {count} {relation} {source.model.name} with this {ADAPTER_FILES[1]}: {listed}{more}"
            raise UserError("--adapter", source.folder, problem, f"copy it and {ADAPTER_FILES[0]} again from one run")


def adapter_norm(model: PeftModel) -> tuple[float, int]:
    """Return the Frobenius norm of the whole update, sqrt(Σ ‖scale · B A‖²), and the number of projections.

    ‖B A‖² = tr(Aᵀ Bᵀ B A) = Σ (Bᵀ B) ∘ (A Aᵀ): two products of (rank, rank) instead of one as large as the weight.
    """
    squares = [_squared_norm(A, B) * scale**2 for A, B, scale in _updates(model)]
    on_one = [square.to(squares[0].device) for square in squares]  # a model may be spread over several GPUs
    return (torch.stack(on_one).sum().sqrt().item() if squares else 0.0), len(squares)


def _squared_norm(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return ‖B A‖² for A (rank, in) and B (out, rank)."""
    A, B = A.double(), B.double()
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0)  # rounding may leave it a little below zero


def _updates(model: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yield A (rank, in), B (out, rank) and the scale of each projection."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            for name in module.active_adapters:
                if name in module.lora_A:
                    yield module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach(), module.scaling[name]


def is_identity(model: PeftModel, source: AdapterSource) -> bool:
    """Return whether the adapter changes nothing: every B is zero, and it holds nothing but A and B."""
    only_pairs = all(".lora_A." in name or ".lora_B." in name for name in read_adapter_header(source.folder))
    return only_pairs and _largest([B for _, B, _ in _updates(model)]) == 0


def _largest(tensors: list[torch.Tensor]) -> float:
    """Return the largest absolute value, NaN if one is NaN: few kernels for hundreds of tensors, and one wait for the GPU."""
    return torch.nn.utils.get_total_norm(tensors, math.inf).item()
