"""Load a base model in 4 bits, with bitsandbytes' CPU fixes."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.hub import is_local


def build_skeleton(folder: Path, model: ModelSettings) -> PreTrainedModel:
    """The model without weights: its modules by name."""
    name = str(folder) if is_local(model.name) else model.name
    origin = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **origin)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.name: {model.name}: cannot be read ({reason}); name a causal language model") from error


def pack_skeleton(model: PreTrainedModel) -> None:
    """Put a Linear4bit, empty as well, wherever loading would: the library is asked."""
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
