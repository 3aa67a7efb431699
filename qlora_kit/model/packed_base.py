"""A base model whose files are quantized already, from its config.json; imports no torch.

bitsandbytes' 4-bit weights are trained on as they are: their type and their double quantization take the place of the settings.
Weights of any other form are refused.
"""

from typing import Any

from qlora_kit.config import Config, QuantizationSettings
from qlora_kit.errors import Problem, UserError, unsupported
from qlora_kit.model.hub import read_model_config

FORMATS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4", "compressed-tensors": "compressed-tensors"}


def read_packed(model_config: dict[str, Any], name: object) -> dict[str, Any] | None:
    """Return the settings that weights were packed to 4 bits with, under our names; None if they are not quantized.

    Args:
        model_config: the content of config.json.
        name: of the model, for the message.

    Raises:
        UserError: they are quantized otherwise.
    """
    nested = model_config.get("text_config")
    own = model_config.get("quantization_config") or (isinstance(nested, dict) and nested.get("quantization_config"))
    if not own:
        return None
    own = own if isinstance(own, dict) else {}
    if own.get("load_in_4bit") and own.get("quant_method", "bitsandbytes") == "bitsandbytes":
        # What a file leaves out is as bitsandbytes' own defaults have it, which are not ours.
        quant_type, double = own.get("bnb_4bit_quant_type", "fp4"), bool(own.get("bnb_4bit_use_double_quant", False))
        if quant_type in ("nf4", "fp4"):
            computing = str(own.get("bnb_4bit_compute_dtype", "float32"))
            return {"load_in_4bit": True, "quant_type": quant_type, "use_double_quant": double, "compute_dtype": computing}
    method = str(own.get("quant_method", "an unknown method"))
    form = "bitsandbytes' 8 bits" if own.get("load_in_8bit") else FORMATS.get(method, method)
    problem = f"has weights that are quantized already, by {form}, and only bitsandbytes' 4 bits can be used as they are"
    raise UserError("model.name", name, problem, "use the 16-bit model, which is packed to 4 bits here")


def settle_quantization(config: Config) -> tuple[Config, list[str]]:
    """Return the config with the quantization that the base model's files have, and a note for the log; reads config.json.

    Raises:
        UserError: they are quantized in a form that cannot be used, or otherwise than a setting that the user insists on; or as
            hub.read_model_config.
    """
    name, stated = config.model.name, config.quantization
    packed = read_packed(read_model_config(config.model), name)
    if packed is None:
        return config, []
    own, note = adopt(stated, packed, name)
    problem = f"contradicts the files of {name}, which are {describe(own)} already"
    problems = [
        Problem(f"quantization.{key}", stated_value, problem, f"use {str(getattr(own, key)).lower()}, or the 16-bit model")
        for key, stated_value in stated.model_dump(include=stated.model_fields_set).items()
        if stated_value != getattr(own, key)
    ]
    if config.performance.fsdp:
        problems.append(unsupported("performance.fsdp", f"the files of {name} are packed already", "false"))
    if problems:
        raise UserError.of(problems)
    return config.model_copy(update={"quantization": own}), [note]


def adopt(stated: QuantizationSettings, packed: dict[str, Any], name: str) -> tuple[QuantizationSettings, str]:
    """Return the settings with those that packed files have in place of ours, and a note about it.

    Any dtype can compute with packed weights, so the stated one stays.
    """
    own = QuantizationSettings(**stated.model_dump() | packed | {"compute_dtype": stated.compute_dtype})
    return own, f"The files of {name} are {describe(own)} already, made to compute in {packed['compute_dtype']}, and stay so"


def describe(quantization: QuantizationSettings) -> str:
    """Return `4-bit NF4 with double quantization`, or as the case may be."""
    double = "with" if quantization.use_double_quant else "without"
    return f"4-bit {quantization.quant_type.upper()} {double} double quantization"
