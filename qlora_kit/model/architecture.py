"""Is a model built like Llama? From its config.json, without its weights."""

from typing import Any

from qlora_kit.config import Config
from qlora_kit.errors import UserError, unsupported
from qlora_kit.model.hub import read_model_config
from qlora_kit.planning.shape import LLAMA_LIKE, ModelShape, read_shape


def why_not_llama_like(model_config: dict[str, Any], length: int) -> str | None:
    """Return the reason in a config.json why fast/llama_layer.py cannot compute the model on `length` tokens, or None."""
    if model_config.get("model_type") not in LLAMA_LIKE:
        return f"{model_config.get('model_type')} is not built like Llama"
    window = model_config.get("sliding_window") if model_config.get("use_sliding_window", True) else None
    if window and window < length:
        return f"its attention reaches {window} tokens back, less than a block of {length}"
    if model_config.get("hidden_act", "silu") != "silu":
        return f"its activation is {model_config['hidden_act']}"
    return "it uses dropout in the attention" if model_config.get("attention_dropout") else None


def read_fast_shape(config: Config) -> tuple[ModelShape | None, str | None]:
    """Return the model's shape if it is built like Llama, and why a run will not take the fast path, if it will not.

    Raises:
        UserError: the model cannot be sharded as performance.fsdp asks; or as read_model_config.
    """
    model_config = read_model_config(config.model)
    reason = why_not_llama_like(model_config, config.data.max_length)
    if not config.performance.fused_lora:
        reason = "performance.fused_lora is false"
    if config.performance.fsdp and reason:
        raise UserError.of([unsupported("performance.fsdp", reason, "false")])
    return read_shape(model_config), reason
