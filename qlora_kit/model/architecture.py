"""Is a model built like Llama? From its config.json, without its weights."""

from typing import Any

from qlora_kit.config import Config
from qlora_kit.errors import UserError, unsupported
from qlora_kit.model.hub import read_model_config
from qlora_kit.planning.model_config import LLAMA_LIKE, complete_config
from qlora_kit.planning.shape import ModelShape, read_shape


def why_not_llama_like(model_config: dict[str, Any], length: int) -> str | None:
    """Return the reason in a config.json why fast/llama_layer.py cannot compute the model on `length` tokens, or None.

    Raises:
        UserError: as complete_config.
    """
    if model_config.get("model_type") not in LLAMA_LIKE:
        return f"{model_config.get('model_type')} is not built like Llama"
    window = _find_window(model_config)
    if window and window < length:
        return f"its attention reaches {window} tokens back, less than a block of {length}"
    if model_config.get("hidden_act", "silu") != "silu":
        return f"its activation is {model_config['hidden_act']}"
    return "it uses dropout in the attention" if model_config.get("attention_dropout") else None


def _find_window(model_config: dict[str, Any]) -> int | None:
    """Return how many tokens back the attention of some layer reaches; None if every layer sees all tokens before it."""
    values = complete_config(model_config)
    kinds = values.get("layer_types")
    windowed = values.get("use_sliding_window", True)  # which Mistral does not know
    if windowed and kinds is not None:
        windowed = "sliding_attention" in kinds
    elif windowed:
        windowed = values.get("max_window_layers", 0) < values["num_hidden_layers"]
    return values.get("sliding_window") if windowed else None


def read_fast_shape(config: Config) -> tuple[ModelShape | None, str | None]:
    """Return the model's shape if it is built like Llama, and why a run will not take the fast path, if it will not.

    Raises:
        UserError: the model cannot be sharded as performance.fsdp asks; or as read_model_config and read_shape.
    """
    model_config = read_model_config(config.model)
    try:
        shape = read_shape(model_config)
    except UserError as error:
        raise error.under("model.name", config.model.name) from None
    reason = why_not_llama_like(model_config, config.data.max_length)
    if not config.performance.fused_lora:
        reason = "performance.fused_lora is false"
    if config.performance.fsdp and reason:
        raise UserError.of([unsupported("performance.fsdp", reason, "false")])
    return shape, reason
