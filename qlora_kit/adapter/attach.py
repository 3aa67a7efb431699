"""A loaded base model and an adapter's folder -> both as one, checked: every tensor arrives.

peft loads an adapter of which half is missing without a word, and any adapter whose shapes fit.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from safetensors import SafetensorError

from qlora_kit.adapter.folder import AdapterSource
from qlora_kit.errors import UserError
from qlora_kit.model.fingerprint import tensor_shapes
from qlora_kit.output.folder import ADAPTER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_vocabulary(source: AdapterSource, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """
    Raises:
        UserError: the tokenizer has ids for which the base model has no embedding.
    """
    embedding: Any = model.get_input_embeddings()
    rows, tokens = len(embedding.weight), len(tokenizer)  # an embedding may be larger, for speed
    if tokens > rows:
        raise UserError(
            f"--adapter {source.folder}: the tokenizer in {source.tokenizer.name} has {tokens:,} tokens, and "
            f"{source.model.name} embeds {rows:,}; use the base model it was trained on"
        )


def attach_adapter(model: "PreTrainedModel", source: AdapterSource, device: str) -> PeftModel:
    """The base model with the adapter beside its projections.

    Raises:
        UserError: it is of another model, tensors are missing or left over, or its values are no numbers.
    """
    key = f"--adapter {source.folder}"
    try:
        config = PeftConfig.from_pretrained(str(source.folder))
        config.inference_mode = True
        adapted: Any = PeftModelForCausalLM(model, config)  # as PeftModel.from_pretrained, which keeps what load_adapter found
        result = adapted.load_adapter(str(source.folder), "default", torch_device=device)
    except SafetensorError as error:
        raise UserError(f"{key}: {ADAPTER_FILES[0]} is damaged ({error}); copy it again") from error
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: does not fit {source.model.name} ({reason}); use the base model it was trained on") from error
    _check_complete(result.missing_keys, result.unexpected_keys, source)
    if not math.isfinite(_largest([part for A, B, _ in _updates(adapted) for part in (A, B)])):
        raise UserError(f"{key}: holds values that are no numbers; copy it again, or train again with a lower --learning_rate")
    return adapted.eval()


def _check_complete(missing: list[str], unexpected: list[str], source: AdapterSource) -> None:
    for what, names in (("lacks", missing), ("holds, beyond what it says of itself,", unexpected)):
        if names:
            shown = ", ".join(name.removeprefix("base_model.model.").replace(".default", "") for name in names[:2])
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            raise UserError(
                f"--adapter {source.folder}: {ADAPTER_FILES[0]} {what} {len(names)} of the tensors that {source.model.name} "
                f"with its {ADAPTER_FILES[1]} has: {shown}{more}; copy both files again from one run"
            )


def adapter_norm(model: PeftModel) -> tuple[float, int]:
    """Frobenius norm of the whole update, and of how many projections: sqrt(Σ ‖scale · B A‖²), over all of them.

    ‖B A‖² = tr(Aᵀ Bᵀ B A) = Σ (Bᵀ B) ∘ (A Aᵀ): two products of (rank, rank) instead of one as large as the weight.
    """
    squares = [_squared_norm(A, B) * scale**2 for A, B, scale in _updates(model)]
    on_one = [square.to(squares[0].device) for square in squares]  # a model may be spread over several GPUs
    return (torch.stack(on_one).sum().sqrt().item() if squares else 0.0), len(squares)


def _squared_norm(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A (rank, in), B (out, rank) -> ‖B A‖²; rounding may leave it a little below zero."""
    A, B = A.double(), B.double()
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0)


def _updates(model: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            for name in module.active_adapters:
                if name in module.lora_A:
                    yield module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach(), module.scaling[name]


def does_nothing(model: PeftModel, folder: Path) -> bool:
    """Whether every B is zero and the adapter holds nothing but A and B: then its answers are the base model's."""
    names = tensor_shapes(folder / ADAPTER_FILES[0])
    only_pairs = all(".lora_A." in name or ".lora_B." in name for name in names)
    return only_pairs and _largest([B for _, B, _ in _updates(model)]) == 0


def _largest(tensors: list[torch.Tensor]) -> float:
    """The largest absolute value of all: NaN where one is none. Few kernels for hundreds of tensors, and one wait for the GPU."""
    return torch.nn.utils.get_total_norm(tensors, math.inf).item()
