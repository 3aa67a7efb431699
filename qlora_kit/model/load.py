"""Load a base model in 4 bits, with bitsandbytes' CPU fixes."""

import functools
import os
from pathlib import Path

import bitsandbytes
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import AutoHfQuantizer

from qlora_kit.config import ModelSettings, QuantizationSettings
from qlora_kit.errors import UserError

DeviceMap = dict[str, int | str]  # module -> number of its GPU, or cpu; the module "" is the whole model
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


def quantization_config(settings: QuantizationSettings, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the settings as bitsandbytes takes them; None if they keep the weights in 16 bits.

    Args:
        dtype: weights are dequantized to it for every product.
    """
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=settings.use_double_quant,
    )


def load_base_model(
    name: str | Path,
    quantization: BitsAndBytesConfig | None,
    *,
    device: str | DeviceMap,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, its projections packed to 4 bits one by one.

    Args:
        name: a folder or a Hub name.
        quantization: None loads the weights as they are.
        device: cuda, cpu, or the device of each module.
        dtype: of everything that is not packed: norms, embeddings, biases.

    Raises:
        UserError: the weights cannot be loaded, the model is no causal language model, or bitsandbytes would dequantize its
            weights wrongly on this processor.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            os.path.expanduser(name),
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": 0 if device == "cuda" else device} if isinstance(device, str) else device,
            use_safetensors=True,  # no pickle, even in a folder that holds both
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(name, error) from error
    except SafetensorError as error:
        raise UserError("model.name", name, f"has damaged weights ({error})", "copy or download them again") from error
    guard_cpu_kernels(model, name)
    return model


def build_skeleton(model: ModelSettings) -> PreTrainedModel:
    """Return a base model without its weights; raises UserError if it is no causal language model."""
    name = os.path.expanduser(model.name)
    try:
        config = AutoConfig.from_pretrained(name, revision=model.revision or "main", trust_remote_code=model.trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(model.name, error) from error


def pack_skeleton(model: PreTrainedModel) -> None:
    """Put an empty Linear4bit wherever loading in 4 bits puts one."""
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})


def set_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Choose a padding token that ends no turn: if labels are masked by its id, a model never learns to stop."""
    end = tokenizer.eos_token
    if tokenizer.pad_token in (None, end):
        known = tokenizer.get_vocab()
        candidates = [token for token in [*PADDING_TOKENS, *tokenizer.all_special_tokens] if token in known and token != end]
        # GPT-2 has one special token only, which ends a text and no turn; our masks go by position, so it may pad as well.
        tokenizer.pad_token = candidates[0] if candidates else end
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def check_context(model: PreTrainedModel, length: int) -> None:
    """Check that the model has a position for each token of a block; a longer block gives nonsense, not an error.

    Args:
        length: tokens of a block.

    Raises:
        UserError: it has not.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and length > positions:
        raise UserError(
            "data.max_length", length, f"is more than the base model's {positions} positions", f"use {positions} or less"
        )


def guard_cpu_kernels(model: PreTrainedModel, name: str | Path) -> None:
    """Keep the packed layers of a loaded model from two faults of bitsandbytes 0.50.2 on a CPU.

    On processors with AVX512-BF16 it repacks weights for good at the first evaluation, into a layout whose product is in bfloat16
    and has no gradient: training after an evaluation fails, or silently leaves out the gradient of the base product
    (Linear4bit.forward). On processors with AVX-512 it dequantizes rows wrongly whose length is a multiple of 16 and not of 64.

    Raises:
        UserError: it dequantizes rows of this model wrongly on this processor.
    """
    packed = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for module in packed:
        module.support_avx512bf16_for_cpu = False
    for length in {module.in_features for module in packed if module.weight.device.type == "cpu"}:
        if not dequantizes_correctly(length):
            problem = f"has rows of {length} weights, which bitsandbytes dequantizes wrongly on this processor"
            raise UserError("model.name", name, problem, "use a GPU, or quantization.load_in_4bit: false")


@functools.cache
def dequantizes_correctly(length: int) -> bool:
    """Return whether the CPU kernel gives, for rows of `length` weights, each code's level times its block's absmax."""
    values = torch.linspace(-1.0, 1.0, 64 * length).view(64, length)
    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4", blocksize=64)
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: values.numel()].long()
    expected = state.code[codes] * state.absmax.repeat_interleave(64)
    return torch.allclose(bitsandbytes.functional.dequantize_4bit(packed, state), expected.view_as(values), atol=1e-6)


def _not_loadable(name: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError("model.name", name, f"cannot be loaded ({reason})", "use a causal language model")
