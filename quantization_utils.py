"""The core of QLoRA: load a base model in 4 bits, keep it frozen, and train small LoRA matrices beside its projections.

    bnb_config = create_bnb_config(quant_type="nf4", compute_dtype=torch.bfloat16)
    model, tokenizer = load_model_and_tokenizer("Qwen/Qwen2.5-3B-Instruct", bnb_config)
    model = prepare_model_for_training(model, create_lora_config(rank=16, alpha=32.0))

QLoRA: arXiv 2305.14314. LoRA: arXiv 2106.09685. Data, training and saving are in train_qlora.py.
"""

import functools
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import UserError
from qlora_kit.fast.sharding import load_sharded

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Tokens that models reserve for padding, in the order in which they are tried.
PADDING_TOKENS = [
    "<|endoftext|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<unk>",
]


def create_bnb_config(
    quant_type: str = "nf4", compute_dtype: torch.dtype = torch.bfloat16, use_double_quant: bool = True
) -> BitsAndBytesConfig:
    """4-bit loading with bitsandbytes.

    Args:
        quant_type: "nf4", whose 16 levels are quantiles of a normal distribution as weights have (QLoRA, section 3), or "fp4".
        compute_dtype: weights are unpacked to it for every product; bfloat16 has fp32's range, float16 needs loss scaling.
        use_double_quant: quantize the absmax values too: 4.127 bits a parameter instead of 4.5 (QLoRA, section 3).

    Raises:
        ValueError: quant_type is neither nf4 nor fp4.
    """
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type {quant_type!r}: should be nf4 or fp4")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=use_double_quant,
    )


def create_lora_config(
    rank: int = 16, alpha: float = 32.0, dropout: float = 0.05, target_modules: list[str] | str = ATTENTION_AND_MLP
) -> LoraConfig:
    """LoRA for a causal language model: y = x Wᵀ + (alpha / rank) · x Aᵀ Bᵀ (LoRA, section 4.1).

    A (rank, in) starts random and B (out, rank) at zero, so that training starts from the base model exactly.

    Args:
        target_modules: names of the projections that get A and B, or "all-linear" for all but the output head.
    """
    whole: Any = int(alpha) if float(alpha).is_integer() else alpha  # other tools expect a whole number in the file
    return LoraConfig(r=rank, lora_alpha=whole, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM")


def load_model_and_tokenizer(
    name: str,
    quantization: BitsAndBytesConfig | None,
    *,
    device: str = "cuda",
    device_map: dict[str, int | str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fsdp: bool | str = False,
    offload_embedding: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, its projections packed to 4 bits on the way, and its tokenizer.

    Args:
        quantization: from create_bnb_config, or None to load in 16 bits (plain LoRA).
        device_map: the device of each module, for a model spread over several; None: all on `device`.
        dtype: of everything that is not packed: norms, embeddings, biases.
        tokenizer: the model's own, where it is loaded already.
        fsdp: divide the weights over the processes (fast/sharding.py), in host memory with "offload"; `name` is then a folder.
        offload_embedding: with fsdp, leave the embedding whole.

    Raises:
        UserError: the tokenizer or the weights cannot be loaded, the model is no causal language model, or its weights would be
            unpacked wrongly here.
    """
    origin = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, **origin)
        if fsdp:
            model = load_sharded(Path(name), quantization, device, dtype, fsdp == "offload", not offload_embedding)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                name,
                quantization_config=quantization,
                dtype=dtype,
                device_map=device_map or {"": 0 if device == "cuda" else device},
                use_safetensors=True,  # and no pickle, where a folder holds both
                **origin,
            )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.name: {name}: cannot be loaded ({reason[:300]}); name a causal language model") from error
    except SafetensorError as error:
        raise UserError(f"model.name: {name}: its weights are damaged ({error}); copy or download them again") from error
    _set_padding(tokenizer, model)
    _keep_differentiable(model)
    _check_unpacking(model, name)
    return model, tokenizer


def prepare_model_for_training(
    model: PreTrainedModel, lora_config: LoraConfig, use_gradient_checkpointing: bool = True
) -> PeftModel:
    """Freeze the base model, recompute activations if asked, and add LoRA matrices in fp32.

    peft's own prepare_model_for_kbit_training turns norms and embeddings to fp32. The norms compute in fp32 anyway, and the
    embedding alone would take 0.58 GiB more at Qwen2.5-3B's size, so everything frozen stays as it was loaded.

    Raises:
        UserError: target_modules match nothing; the message lists what would.
    """
    model.requires_grad_(False)
    model.config.use_cache = False
    if use_gradient_checkpointing:
        # Non-reentrant: gradients reach the adapters although the embedding's output needs none.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _check_targets(model, lora_config.target_modules)
    return get_peft_model(model, lora_config, autocast_adapter_dtype=True)


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights on processors with AVX512-BF16.

    It does so for good at the first evaluation, into a layout whose product has no gradient: training after an evaluation
    would fail, or leave the gradient of the base product out without a word (bitsandbytes 0.50.2, Linear4bit.forward).
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_unpacking(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose weights bitsandbytes would unpack wrongly, and say nothing.

    On processors with AVX-512, version 0.50.2 does so where a row is a multiple of 16 weights long and not of 64.

    Raises:
        UserError: with the length of its rows.
    """
    packed = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for length in {module.in_features for module in packed if module.weight.device.type == "cpu"}:
        if not _unpacks_rightly(length):
            raise UserError(
                f"model.name: {name}: this processor's bitsandbytes unpacks its rows of {length} weights wrongly; use a GPU, or "
                "quantization.load_in_4bit: false"
            )


@functools.cache
def _unpacks_rightly(length: int) -> bool:
    """Rows of so many weights, by the kernel for the CPU and by the definition: a code's level times its block's absmax."""
    values = torch.linspace(-1.0, 1.0, 64 * length).view(64, length)
    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4", blocksize=64)
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: values.numel()].long()
    expected = state.code[codes] * state.absmax.repeat_interleave(64)
    return torch.allclose(bitsandbytes.functional.dequantize_4bit(packed, state), expected.view_as(values), atol=1e-6)


def _set_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Choose a padding token that does not end a turn: where padding is masked by its id, such a model never learns to stop."""
    ending = tokenizer.eos_token
    if tokenizer.pad_token in (None, ending):
        known = tokenizer.get_vocab()
        candidates = [token for token in [*PADDING_TOKENS, *tokenizer.all_special_tokens] if token in known and token != ending]
        # GPT-2 has one special token only, which ends a text and no turn; our masks go by position, so it may pad as well.
        tokenizer.pad_token = candidates[0] if candidates else ending
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _check_targets(model: PreTrainedModel, targets: Any) -> None:
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    # peft takes a target for a whole name or for its end; one that matches nothing beside others it leaves out without a word
    missing = [] if isinstance(targets, str) else sorted(t for t in targets if not any(f".{n}".endswith(f".{t}") for n in linear))
    if missing:
        raise UserError(
            f"lora.target_modules: {', '.join(missing)}: no such linear layer in this model; "
            f"it has {', '.join(sorted({name.rpartition('.')[2] for name in linear}))} (or use all-linear)"
        )
