"""Turn the checked settings of an adapter into those of peft, which does not see the file itself, and count what it will make."""

import dataclasses
import math
import re
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from qlora_kit.adapter.folder import AdapterSource, read_adapter_header
from qlora_kit.adapter.patterns import match_in_time
from qlora_kit.adapter.settings import IA3File, LoraFile
from qlora_kit.adapter.targets import ALL
from qlora_kit.errors import UserError
from qlora_kit.output.folder import ADAPTER_FILES

FOR_READERS = {"peft_type", "base_model_name_or_path", "revision"}  # not for what peft makes in a model
SLACK = 2**26  # numbers beyond those in the file: 256 MiB in fp32


def make_config(settings: LoraFile | IA3File) -> PeftConfig:
    """Return peft's settings of an adapter to be loaded; raises ValueError or TypeError if peft refuses them."""
    values = settings.model_dump(exclude_defaults=True, exclude=FOR_READERS) | {"inference_mode": True}
    if isinstance(settings, IA3File):
        return IA3Config(**values)
    if not settings.changing_start:
        values.pop("init_lora_weights", None)  # what the matrices begin with is overwritten
    return LoraConfig(**values)


def check_size(model: PreTrainedModel, config: PeftConfig, source: AdapterSource) -> None:
    """Check that peft will make no more numbers in a model than the adapter's file holds, before it takes memory for them.

    Raises:
        UserError: it will, or the adapter's patterns cannot be matched in time.
    """
    names = [*EMBEDDING_LAYER_NAMES, *dict(model.named_modules()), *dict(model.named_parameters())]
    expected = match_in_time(lambda: _count(model, config, names), source.settings, names, source.folder)
    held = sum(math.prod(stored.shape) for stored in read_adapter_header(source.folder).values())
    if expected > held + SLACK:
        problem = f"needs {expected:,} numbers by its {ADAPTER_FILES[1]}, and its {ADAPTER_FILES[0]} holds {held:,}"
        raise UserError("--adapter", source.folder, problem, "copy both files again from one run")


def _count(model: PreTrainedModel, config: Any, names: list[str]) -> int:
    """Return how many numbers peft will make; tries each pattern with the names that peft tries it with."""
    if config.target_modules is None and isinstance(config, LoraConfig):  # then peft has a list for each architecture
        own: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        config = dataclasses.replace(config, target_modules=own)
    stated = config.target_modules
    targets = {name for name in names if stated and (stated == ALL or check_target_module_exists(config, name))}
    if isinstance(feedforward := getattr(config, "feedforward_modules", None), str):
        any(re.fullmatch(feedforward, name) for name in names)
    saved, parameters = (tuple(getattr(config, key, None) or ()) for key in ("modules_to_save", "target_parameters"))
    total = 0
    for name, module in model.named_modules():
        total += _rank(config, name) * _sides(module) if name in targets else 0
        total += sum(parameter.numel() for parameter in module.parameters()) if name.endswith(saved) else 0
    for name, parameter in model.named_parameters():
        if name.endswith(parameters):
            experts = parameter.shape[0] if parameter.dim() == 3 else 1
            total += _rank(config, name) * experts * sum(parameter.shape[-2:])
    tokens = getattr(config, "trainable_token_indices", None) or []
    rows = sum(map(len, tokens.values())) if isinstance(tokens, dict) else len(tokens)
    embedding: Any = model.get_input_embeddings()
    return total + rows * embedding.weight.shape[-1]


def _rank(config: Any, name: str) -> int:
    if isinstance(config, IA3Config):
        return 0
    get_pattern_key(config.alpha_pattern, name)
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)


def _sides(module: Any) -> int:
    """Return the sum of a layer's inputs and outputs."""
    if hasattr(module, "in_features"):  # a packed weight has another shape
        return module.in_features + module.out_features
    return sum(getattr(getattr(module, "weight", None), "shape", ())[:2])
