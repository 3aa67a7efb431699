"""Put LoRA on the projections of a base model: which it reaches, which it cannot, and what peft refuses.

What peft refuses in a loaded model it refuses in one without weights, so `check_lora` answers before anything is loaded.
"""

import copy
import dataclasses
import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel

from qlora_kit.errors import UserError
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.projections import EXPERTS, find_projections
from qlora_kit.model.skeleton import is_linear, linear_layers_read_past_forward

ALL = "all-linear"


def add_lora(model: PreTrainedModel, lora_config: LoraConfig) -> PeftModel:
    """Return the model with fresh LoRA matrices in fp32 on its targets; layers that text does not train get none.

    Raises:
        UserError: a target names no linear layer of the model, or peft refuses the targets; the remedy names what would do.
    """
    check_names(model, lora_config)
    config = copy.deepcopy(lora_config)  # peft writes into it
    config.exclude_modules = config.exclude_modules or _pattern(untrainable(model), config)
    try:
        return _wrap(model, config)
    except Exception as error:  # ValueError, TypeError, NotImplementedError and more: every architecture has its own
        if is_out_of_memory(error):
            raise
        raise _refusal(model, lora_config, error) from error


def _wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # peft compares the patterns of experts with modules, and their tensors are none; it turns Conv1D's weights by itself.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys|fan_in_fan_out is set to False")
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    assert isinstance(adapted, PeftModel)
    return adapted


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that LoRA can be put on: linear, not the output head, and trained by text."""
    head, without = model.get_output_embeddings(), untrainable(model)
    linear = [name for name, layer in model.named_modules() if layer is not head and is_linear(layer)]
    return [name for name in linear if name not in without]


def untrainable(model: PreTrainedModel) -> set[str]:
    """Return the names of layers that peft takes for linear, and that text would not train.

    They are those of an image or audio encoder, which may wrap them in modules of their names; those whose class computes
    something else, as routers of experts do; and those whose weight the model reads without calling the layer.
    """
    inside = _text_modules(model)
    outside = {name for name, module in model.named_modules() if name and id(module) not in inside}
    own = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and not is_linear(module)}
    return outside | own | linear_layers_read_past_forward(model)


def _text_modules(model: PreTrainedModel) -> set[int]:
    """Return the ids of the modules that text passes through: all but those of encoders of images or sound."""
    if model.config.get_text_config(decoder=True) is model.config:
        return {id(module) for module in model.modules()}
    return {*map(id, model.get_decoder().modules()), id(model.get_output_embeddings())}


def _matches(name: str, targets: Any) -> bool:
    """Return whether peft would match a layer with a list of targets, by its whole name or its end, or with a string."""
    return isinstance(targets, str) or any(f".{name}".endswith(f".{target}") for target in targets or ())


def _pattern(names: set[str], config: LoraConfig) -> str | None:
    """Return a regular expression of those names that the targets would match; None without any."""
    matched = {re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names if _matches(name, config.target_modules)}
    return "|".join(sorted(matched)) or None


def check_names(model: PreTrainedModel, lora_config: LoraConfig) -> None:
    """Check that each target in a list names a linear layer or experts; peft ignores one that matches nothing if another does.

    Raises:
        UserError: one does not; the remedy lists those that would.
    """
    targets, names = lora_config.target_modules, linear_layers(model)
    stated = [] if isinstance(targets, str) else sorted(targets or ())
    missing = [target for target in stated if not any(_matches(name, [target]) for name in names)]
    if missing:
        missing = sorted({*missing} - _names_of_experts(model, lora_config))
    if not missing:
        return
    problem = "names no linear layer of this model" if len(missing) == 1 else "name no linear layers of this model"
    everything = f", or {ALL}" if _accepts(model, lora_config, target_modules=ALL) else ""
    if not everything and _accepts(model, lora_config, target_modules=ALL, lora_dropout=0.0):
        everything = f", or {ALL} with --dropout 0"
    raise UserError("lora.target_modules", ", ".join(missing), problem, f"use {', '.join(_last_parts(names))}{everything}")


def _names_of_experts(model: PreTrainedModel, lora_config: LoraConfig) -> set[str]:
    """Return the targets that peft turns into tensors of experts, which earlier versions of transformers kept as layers."""
    adapted: Any = _try(model, lora_config, lora_dropout=0.0)
    stated: Any = lora_config.target_modules
    return {*stated} - {*adapted.peft_config["default"].target_modules} if adapted else set()


def _last_parts(names: Any) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _refusal(model: PreTrainedModel, lora_config: LoraConfig, error: Exception) -> UserError:
    """Return peft's refusal with the remedy that works, found by trying.

    Args:
        model: as peft left it, in part wrapped.
    """
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    targets: Any = lora_config.target_modules
    stated = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    empty = _without_weights(model)
    names = linear_layers(empty)
    if lora_config.lora_dropout and _accepts(model, lora_config, lora_dropout=0.0):
        experts = sum(projection.weights for projection in find_projections(empty) if projection.kind == EXPERTS)
        stays = f", whose experts of {experts:,} weights stay in 16 bits" if experts else ""
        problem = f"cannot be used with lora.target_modules {stated} on this model{stays} ({reason})"
        attention = _last_parts(name for name in names if "attn" in name or "attention" in name)
        only = f", or the attention alone: --set lora.target_modules=[{','.join(attention)}]" if attention else ""
        return UserError("lora.dropout", lora_config.lora_dropout, problem, f"use --dropout 0{only}")
    accepted = [name for name in _last_parts(names) if _accepts(model, lora_config, target_modules=[name])]
    remedy = f"use {', '.join(accepted)}" if accepted else "use another model"
    return UserError("lora.target_modules", stated, f"cannot be used on this model ({reason})", remedy)


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _accepts(model: PreTrainedModel, lora_config: LoraConfig, **changes: Any) -> bool:
    return _try(model, lora_config, **changes) is not None


def _try(model: PreTrainedModel, lora_config: LoraConfig, **changes: Any) -> PeftModel | None:
    """Return a copy of the model without weights, as peft wraps it; None if it refuses."""
    empty, config = _without_weights(model), dataclasses.replace(copy.deepcopy(lora_config), **changes)
    config.exclude_modules = _pattern(untrainable(empty), config)
    try:
        return _wrap(empty, config)
    except Exception:
        return None


@dataclasses.dataclass(frozen=True)
class Reach:
    """The number of projections that text passes through, how many have LoRA matrices, and the kinds of those that have none.

    Attributes:
        outside: the parts of the model that text does not pass through, such as an encoder of images.
    """

    adapted: int
    projections: int
    without: list[str]
    outside: list[str]

    def as_json(self) -> dict[str, Any]:
        return {"projections": self.projections, "with_lora": self.adapted, "without_lora": self.without}

    def __str__(self) -> str:
        more = f" and {len(self.without) - 8} more kinds" if len(self.without) > 8 else ""
        missing = f"; not on {', '.join(self.without[:8])}{more}" if self.without else ""
        outside = f"; none in {', '.join(self.outside)}, which text does not train" if self.outside else ""
        return f"on {self.adapted} of {self.projections} projections{missing}{outside}"


def measure_reach(adapted: PeftModel) -> Reach:
    """Count the projections that have LoRA matrices; experts that share one tensor count as one."""
    base: Any = adapted.get_base_model()
    inside = _text_modules(base)
    wrapped = {
        f"{_own_name(name)}.{layer.parameter_name}" for name, layer in base.named_modules() if isinstance(layer, ParamWrapper)
    }
    reached: list[bool] = []
    without: dict[str, None] = {}  # sets in order
    outside: dict[str, None] = {}
    for projection in find_projections(base):
        if any(matrix in projection.name for matrix in (".lora_A.", ".lora_B.")):
            continue
        if id(projection.owner) not in inside:
            outside[projection.name.removeprefix("model.").partition(".")[0]] = None
            continue
        reached.append(projection.name.endswith(".base_layer") or _own_name(projection.name) in wrapped)
        if not reached[-1]:
            without[projection.kind] = None
    return Reach(sum(reached), len(reached), list(without), list(outside))


def _own_name(name: str) -> str:
    """Return the name that a module had before peft wrapped it."""
    return name.replace(".base_layer", "")
