"""The four functions of QLoRA: load a base model in 4 bits, keep it frozen, and train LoRA matrices next to its projections.

    model, tokenizer = load_model_and_tokenizer("assets/tiny-qwen2", create_bnb_config())
    model = prepare_model_for_training(model, create_lora_config(rank=16, alpha=32.0))

They work with their defaults on a GPU and, with a small model, on a laptop without one.
QLoRA: arXiv 2305.14314. LoRA: arXiv 2106.09685. Data, training and saving are in train_qlora.py.
"""

from typing import Literal, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapter.targets import add_lora
from qlora_kit.config import ModelSettings, QuantizationSettings
from qlora_kit.model.device import choose_device, usable_dtype
from qlora_kit.model.hub import read_model_config
from qlora_kit.model.load import load_base_model, quantization_config, set_padding
from qlora_kit.model.packed_base import read_packed
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.shipped import locate

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def create_bnb_config(
    quant_type: Literal["nf4", "fp4"] = "nf4", compute_dtype: torch.dtype = torch.bfloat16, use_double_quant: bool = True
) -> BitsAndBytesConfig:
    """Return the settings for loading in 4 bits with bitsandbytes.

    Args:
        quant_type: "nf4", whose 16 levels are quantiles of a normal distribution as weights have (QLoRA, section 3), or "fp4".
        compute_dtype: weights are dequantized to it for every product; bfloat16 has fp32's range, float16 needs loss scaling.
        use_double_quant: quantize the absmax values too: 4.127 bits a parameter instead of 4.5 (QLoRA, section 3).

    Raises:
        ValueError: quant_type is neither nf4 nor fp4.
    """
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type {quant_type!r}: should be nf4 or fp4")
    settings = QuantizationSettings(quant_type=quant_type, use_double_quant=use_double_quant)
    return cast(BitsAndBytesConfig, quantization_config(settings, compute_dtype))


def create_lora_config(
    rank: int = 16, alpha: float = 32.0, dropout: float = 0.05, target_modules: list[str] | str = ATTENTION_AND_MLP
) -> LoraConfig:
    """Return the settings of LoRA for a causal language model: y = x Wᵀ + (alpha / rank) · x Aᵀ Bᵀ (LoRA, section 4.1).

    A (rank, in) starts random and B (out, rank) at zero, so that training starts from the base model exactly.

    Args:
        target_modules: names of the projections that get A and B, or "all-linear" for all but the output head.
    """
    number = int(alpha) if float(alpha).is_integer() else alpha  # other tools expect a whole number in adapter_config.json
    return LoraConfig(
        r=rank,
        lora_alpha=number,  # type: ignore[arg-type]  # peft computes with any number
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )


def load_model_and_tokenizer(
    name: str,
    quantization: BitsAndBytesConfig | Literal["nf4"] | None = "nf4",
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer; the projections are packed to 4 bits one by one.

    Args:
        name: a folder or a Hub name.
        quantization: from create_bnb_config; "nf4" is NF4 with double quantization that computes in `dtype`; None packs nothing
            (plain LoRA). A model whose files are in bitsandbytes' 4 bits already stays as it is with the last two.
        device: cuda or cpu; auto takes the GPU if there is one.
        dtype: of everything that is not packed: norms, embeddings, biases. None takes bfloat16 on a GPU that computes in it, else
            float16, and float32 on a CPU.
        tokenizer: the model's own, if it is loaded already.

    Raises:
        UserError: there is no such device, or as load_base_model.
    """
    device = choose_device(device, "device")
    dtype = dtype or usable_dtype("auto", device)[0]
    name = locate(name)
    settings = ModelSettings(name=name, revision=revision, trust_remote_code=trust_remote_code)
    if quantization == "nf4":
        quantization = None if read_packed(read_model_config(settings), name) else create_bnb_config(compute_dtype=dtype)
    if tokenizer is None:
        tokenizer = load_tokenizer(settings)
    model = load_base_model(
        name, quantization, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    set_padding(tokenizer, model)
    return model, tokenizer


def prepare_model_for_training(
    model: PreTrainedModel, lora_config: LoraConfig, use_gradient_checkpointing: bool = True
) -> PeftModel:
    """Freeze the base model, turn on gradient checkpointing, and add LoRA matrices in fp32.

    Layers that text does not train, such as those of an image encoder, get no LoRA matrices.

    peft's own prepare_model_for_kbit_training turns norms and embeddings to fp32. The norms compute in fp32 anyway, and the
    embedding alone would take 0.58 GiB more at Qwen2.5-3B's size, so everything frozen keeps its dtype.

    Raises:
        UserError: a target module is no linear layer of the model, or peft refuses it; the remedy says what would do.
    """
    model.requires_grad_(False)
    model.config.use_cache = False
    if use_gradient_checkpointing:
        # Non-reentrant: gradients reach the adapters although the embedding's output needs none.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return add_lora(model, lora_config)
