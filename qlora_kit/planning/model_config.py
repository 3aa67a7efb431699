"""What a config.json may state: types, ranges and, for Llama-like models, what it leaves out. Imports no torch.

The keys that decide how long a plan takes, how large a model is built or which numbers come out are checked here, in the file and
in its sub-configs (`text_config` and the like), before anything computes with them. The library checks the rest when it builds
the model.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from qlora_kit.errors import UserError, abbreviate

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
# What transformers takes for a key that a config.json leaves out, by model type; None where the value follows from others.
_LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
_QWEN2 = _LLAMA | {
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"attention_bias": False, "mlp_bias": False},
    "mistral": _LLAMA | {"num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128, "attention_bias": False},
}
MAY_BE_NULL = ("num_key_value_heads", "sliding_window")
MOST_LAYERS, LARGEST, MOST_POSITIONS = 2**9, 2**24, 2**40  # far above any model
DEEPEST = 8  # objects within objects


class Rule(NamedTuple):
    """A rule: what the values of some keys must be, in words for the message; null is left to whoever needs a value."""

    keys: str  # a regular expression of the whole key
    fits: Callable[[Any], bool]
    expected: str


def _whole(keys: str, least: int, most: int) -> Rule:
    """Whole numbers; encoders of images have a list of them, one for each stage."""

    def fits(value: Any) -> bool:
        items = value if isinstance(value, list) and value else [value]
        return all(type(item) is int and least <= item <= most for item in items)  # True is an int, too

    return Rule(keys, fits, f"a whole number from {least} to {most:,}")


def _number(keys: str, least: float, most: float) -> Rule:
    return Rule(keys, lambda value: type(value) in (int, float) and least <= value <= most, f"a number from {least} to {most:g}")


def _kind(keys: str, kind: type, expected: str) -> Rule:
    return Rule(keys, lambda value: isinstance(value, kind), expected)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str | None) for item in value)


def _classes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str | None) or _texts(item) for item in value.values())


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(torch\.)?(b?float\d\w*|half|auto)", value) is not None


RULES = (  # the first whose expression fits a key applies
    _whole("num_hidden_layers", 1, MOST_LAYERS),
    _whole(r"(num|n)_(\w+_)?layers?|max_window_layers|first_k_dense_replace", 0, MOST_LAYERS),
    _whole(r"(num|n)_(\w+_)?experts", 0, 2**16),
    _whole("hidden_size|intermediate_size|vocab_size|num_attention_heads|num_key_value_heads|n_embd|n_head|d_model", 1, LARGEST),
    _whole("head_dim", 0, LARGEST),  # GLM's sparse layers have 0
    _number("max_position_embeddings|n_positions|original_max_position_embeddings", 1, MOST_POSITIONS),
    _whole("sliding_window", 0, MOST_POSITIONS),
    _number("rms_norm_eps|layer_norm_eps(ilon)?|norm_eps(ilon)?", 0, 1),
    _number("attention_dropout|hidden_dropout(_prob)?|attention_probs_dropout_prob|(attn|resid|embd)_pdrop", 0, 1),
    _number("rope_theta", 1, 1e15),
    _number("model_max_length", 1, math.inf),  # of a tokenizer: 1e30 where it knows no end
    _number("factor", 1e-3, 1e6),  # of a rotary embedding's scaling
    _whole("(bos|eos|pad)_token_id", -1, LARGEST),  # the first Llama has -1 for a token that it lacks
    _kind("tie_word_embeddings|use_cache|use_sliding_window|attention_bias|mlp_bias|load_in_[48]bit", bool, "true or false"),
    _kind(r"rope_scaling|rope_parameters|(text|vision|audio|quantization)_config", dict, "an object"),
    _kind("model_type|hidden_act|hidden_activation|activation_function|rope_type", str, "a text"),
    Rule("architectures|layer_types", _texts, "a list of texts"),
    Rule("auto_map", _classes, "an object of class names"),
    Rule("(torch_)?dtype", _is_dtype, "a dtype such as bfloat16"),
)


def check_model_config(model_config: dict[str, Any], file: str = "config.json") -> None:
    """Check the keys of RULES in a config.json, at any depth, and that no number is NaN.

    Args:
        file: its name, for the message; generation_config.json and tokenizer_config.json have some of the keys, too.

    Raises:
        UserError: a value is of another type, or out of range.
    """
    for key, value, depth in _walk(model_config, 0):
        rule = next((rule for rule in RULES if re.fullmatch(rule.keys, key)), None)
        if value is not None and rule and not rule.fits(value):
            raise refuse(key, value, rule.expected, file)
        if isinstance(value, float) and math.isnan(value):
            raise refuse(key, value, "a number", file)
        if depth > DEEPEST:
            raise refuse(key, value, f"no more than {DEEPEST} objects within each other", file)


def _walk(settings: dict[str, Any], depth: int) -> Iterator[tuple[str, Any, int]]:
    for key, value in settings.items():
        yield str(key), value, depth  # labels of a PretrainedConfig have numbers for keys
        if isinstance(value, dict):
            yield from _walk(value, depth + 1)


def refuse(key: str, value: object, expected: str, file: str = "config.json") -> UserError:
    """Return the error of a value that a config.json states; hub.read_model_config adds the model's name."""
    problem = f"states {key}: {abbreviate(json.dumps(value))} in its {file}, expected {expected}"
    return UserError("model.name", None, problem, "correct it, or copy the file again from its source")


def complete_config(model_config: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the shape of a Llama-like model: the values of its config.json, else transformers' defaults.

    Raises:
        UserError: as check_model_config, or a value is null that must not be.
    """
    check_model_config(model_config)
    defaults = DEFAULTS[model_config["model_type"]]
    values = {key: model_config.get(key, default) for key, default in defaults.items()}
    for key, value in values.items():
        if value is None and (defaults[key] is None or key in MAY_BE_NULL):
            continue
        if value is None or (isinstance(value, list) and key != "layer_types") or (key == "head_dim" and value < 1):
            raise refuse(
                key, value, "true or false" if isinstance(defaults[key], bool) else f"a whole number from 1 to {LARGEST:,}"
            )
    return values
