"""A base model without its weights: which of its layers are linear, and which of them loading packs to 4 bits.

bitsandbytes packs layers of exactly the class Linear. A class of a model's own that computes the same, such as Falcon's, is
replaced by Linear before anything is loaded. A layer whose weight is read past its own `forward` must stay as it is: packed bytes
are no matrix.
"""

import copy
import functools
import inspect
import os
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Linear
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError

# `self.NAME.weight`, unless only a property of it is asked for, or one slice of it (Bloom's, in a mode that nobody trains in).
READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)\b|\[|, torch\.Tensor\))")


def build_skeleton(model: ModelSettings) -> PreTrainedModel:
    """Return a base model without its weights; raises UserError if it is no causal language model."""
    try:
        config = AutoConfig.from_pretrained(
            os.path.expanduser(model.name), revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
        with torch.device("meta"):
            skeleton = _find_loader(config).from_config(config, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # whatever the library and the model's own code refuse
        raise not_loadable(model.name, error) from error
    if any(is_odd_linear(module) for module in skeleton.modules()):
        skeleton.__class__ = _with_plain_linear(type(skeleton))
        _replace_odd_linear(skeleton)
    return skeleton


def pack_skeleton(model: PreTrainedModel) -> None:
    """Put an empty Linear4bit wherever loading in 4 bits puts one."""
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=modules_to_skip(model))
    AutoHfQuantizer.from_config(settings, pre_quantized=False).preprocess_model(model=model, device_map={"": "cpu"})


def class_to_load(skeleton: PreTrainedModel) -> Any:
    """Return the class whose from_pretrained loads the model with the layers of its skeleton."""
    return type(skeleton) if hasattr(type(skeleton), "odd_linear_replaced") else _find_loader(skeleton.config)


def _find_loader(config: PretrainedConfig) -> Any:
    """Return the class that builds and loads such models; those of Mistral 3 are registered as models of images and text only."""
    by_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if by_images else AutoModelForCausalLM


def modules_to_skip(model: PreTrainedModel) -> list[str] | None:
    """Return the modules that must not be packed; None leaves them to the library, which keeps the output head."""
    read = sorted(linear_layers_read_past_forward(model))
    fp32: Any = model._keep_in_fp32_modules
    return HfQuantizer.get_modules_to_not_convert(model, read, fp32, add_default_skips=True) if read else None


def is_linear(module: torch.nn.Module) -> bool:
    """Return whether a layer computes x Wᵀ + b and nothing else, whatever its class."""
    if isinstance(module, Conv1D):
        return True
    plain = type(module).forward is Linear.forward or _is_bitsandbytes(module)
    return isinstance(module, Linear) and (plain or is_odd_linear(module))


def is_odd_linear(module: torch.nn.Module) -> bool:
    """Return whether a layer of another class computes what Linear computes; routers of experts are subclasses that do not."""
    if not isinstance(module, Linear) or type(module).forward is Linear.forward or _is_bitsandbytes(module):
        return False
    small = copy.copy(module)
    small.in_features, small.out_features = 5, 3
    with torch.device("cpu"):  # the model itself may be built on the meta device
        weight, x = torch.arange(15.0).sin().view(3, 5), torch.arange(10.0).cos().view(1, 2, 5)
        bias = None if module.bias is None else torch.tensor([0.5, -1.0, 2.0])
        small._parameters = {"weight": torch.nn.Parameter(weight), "bias": None if bias is None else torch.nn.Parameter(bias)}
        try:
            y = small(x)
        except Exception:
            return False
    return isinstance(y, torch.Tensor) and y.shape == (1, 2, 3) and torch.allclose(y, F.linear(x, weight, bias), atol=1e-5)


def _is_bitsandbytes(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes")


def _replace_odd_linear(model: PreTrainedModel) -> None:
    for name, module in list(model.named_modules()):
        if is_odd_linear(module):
            sizes, weight = (module.in_features, module.out_features), module.weight
            model.set_submodule(name, Linear(*sizes, module.bias is not None, weight.device, weight.dtype))


def _with_plain_linear(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass of a model's class that is built with Linear where the class has layers of its own."""

    def build(self: Any, config: Any, *args: Any, **named: Any) -> None:
        kind.__init__(self, config, *args, **named)
        _replace_odd_linear(self)

    # The library tells its own models by their module.
    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__, "odd_linear_replaced": True})


def linear_layers_read_past_forward(model: torch.nn.Module) -> set[str]:
    """Return the names of the linear layers whose weight the module around them reads itself, as its source says.

    Mamba multiplies with its dt_proj.weight, and Gemma 3n clamps the weights of its altup in place.
    """
    found, read = set(), {}
    for name, parent in model.named_modules():
        linear = [child for child, module in parent.named_children() if isinstance(module, Linear | Conv1D)]
        if linear and type(parent) not in read:
            read[type(parent)] = _weights_read(type(parent))  # type: ignore[arg-type]  # classes are hashable
        found |= {f"{name}.{child}".removeprefix(".") for child in linear if child in read[type(parent)]}
    return found


@functools.cache
def _weights_read(kind: type) -> set[str]:
    """Return the NAMEs for which a method of a class reads self.NAME.weight."""
    methods = [method for method in vars(kind).values() if inspect.isfunction(method)]
    try:
        return set(READ.findall("".join(map(inspect.getsource, methods))))
    except (OSError, TypeError):  # the source is not there
        return set()


def not_loadable(name: object, error: Exception) -> UserError:
    """Return the error of a model that the library cannot build or load."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ImportError):
        return UserError("model.name", name, f"needs what is not installed here ({reason})", "install it, or use another model")
    remedy = "use a causal language model" if isinstance(error, OSError | ValueError | KeyError) else "use another model"
    return UserError("model.name", name, f"cannot be loaded ({reason})", remedy)
